"""``trace-offline evaluation-set``: build the fixed texts every checkpoint is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Build and inspect evaluation sets.", no_args_is_help=True)


@app.command()
def build(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    from_: Annotated[
        list[Path],
        typer.Option(
            "--from", metavar="FILE", help="Plain text, CoNLL-U, JSONL, ABSynth JSON or minimal pairs; repeat."
        ),
    ],
    tokenizer: Annotated[
        str, typer.Option(metavar="CHECKPOINT", help="A checkpoint or folder with the tokenizer, or hf://org/name.")
    ],
    task: Annotated[
        list[str] | None, typer.Option(help="An annotation to keep: upos, deprel, a feature, role, …; repeat.")
    ] = None,
    test: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Probes are fitted on --from and scored on this.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="text, conllu, jsonl, absynth or pairs. Default: by the file.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name stored with every number. Default: the folder's name.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sequence in tokens.", min=2)] = None,
    max_examples: Annotated[
        int | None,
        typer.Option(
            help="Only the first so many texts of each side. Ordered corpora then show one genre only.", min=1
        ),
    ] = None,
    text_unit: Annotated[
        str, typer.Option(help="What one plain text is: auto, mark (<|endoftext|>), paragraph, line or file.")
    ] = "auto",
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="Begin each text with the BOS token. Default: if there is one."),
    ] = None,
    align: Annotated[str, typer.Option(help="Which sub-word carries a word's label: last, first or mean.")] = "last",
    objective: Annotated[str, typer.Option(help="causal_lm or masked_lm.")] = "causal_lm",
    licence: Annotated[str, typer.Option(help="Licence of the text, stored with the set.")] = "",
    mask_probability: Annotated[float, typer.Option(help="Share of tokens to guess (masked_lm).")] = 0.15,
    seed: Annotated[int, typer.Option(help="Seed of the masking (masked_lm).")] = 0,
    training_text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="What the model was trained on, for n-gram baselines and memorisation; repeat."
        ),
    ] = None,
) -> None:
    """Build an evaluation set from annotated or plain text."""
    from trace_offline.evaluation.build import build_evaluation_set

    if tokenizer.startswith("hf://"):
        from trace_offline.checkpoints.hub_tokenizer import fetch_tokenizer

        tokenizer = str(fetch_tokenizer(tokenizer))
    made = build_evaluation_set(
        out,
        from_,
        tokenizer=tokenizer,
        tasks=task,
        test_sources=test or (),
        kind=kind,
        max_length=max_length,
        alignment=align,
        max_examples=max_examples,
        name=name,
        licence=licence,
        objective=objective,
        text_unit=text_unit,
        add_bos=bos,
        mask_probability=mask_probability,
        seed=seed,
        training_text=training_text or (),
    )
    for warning in made.summary.get("warnings", []):
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{out}: {made.n_examples} sequences, {made.n_tokens} tokens, hash {made.hash}")
    for task, counts in made.summary.get("tasks", {}).items():
        lost = {name: count for name, count in counts.items() if isinstance(count, int) and count}
        shown = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in lost.items())
        typer.echo(f"  {task}: {shown}; {len(counts.get('classes', ()))} classes")
    if found := made.summary.get("pairs"):
        kinds = ", ".join(f"{count} {kind}" for kind, count in found["kinds"].items())
        typer.echo(f"  minimal pairs: {found['pairs']} ({kinds}); {sum(found['dropped'].values())} left out")
    if others := made.summary.get("alternatives"):
        typer.echo(
            "  alternatives: " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in others.items())
        )
    if training := made.summary.get("training_text"):
        typer.echo(
            f"  training text: {training['texts']} texts, {training['tokens']} tokens; {training['rows_seen']} of "
            f"{made.n_examples} sequences are among them"
        )


@app.command()
def show(folder: Annotated[Path, typer.Argument(help="The evaluation set.")]) -> None:
    """Print what an evaluation set holds."""
    from trace_offline.evaluation.evaluation_set import EvaluationSet

    loaded = EvaluationSet.load(folder)
    typer.echo(f"{loaded.name} ({loaded.objective}), hash {loaded.hash}")
    typer.echo(f"{loaded.n_examples} sequences of at most {loaded.max_length} tokens, {loaded.n_tokens} in all")
    for task in loaded.tasks:
        spans = loaded.spans(task)
        typer.echo(f"  {task}: {len(spans)} words, {len(spans.classes)} classes: {', '.join(spans.classes)}")
    if loaded.alternatives is not None:
        typer.echo(f"{len(loaded.alternatives)} words have another form to compare them with")
    if loaded.has_training_text:
        training = loaded.training_text()
        typer.echo(
            f"compared with a training text of {training.n_texts} texts, {training.n_tokens} tokens; "
            f"{int(training.seen.sum())} sequences are among them"
        )

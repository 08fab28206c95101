"""``trace-offline corpus``: the annotated synthetic corpus."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trace_offline.corpus.params import CorpusParams

app = typer.Typer(help="Generate, inspect and change annotated synthetic sentences.", no_args_is_help=True)


@app.command()
def generate(
    output: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; FILE.params.json goes beside it.")],
    sentences: Annotated[int, typer.Option(help="How many sentences.", min=1)] = 25_000,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    format_: Annotated[
        str, typer.Option("--format", help="jsonl, absynth, semantic_annotations, sentences_only or v1.")
    ] = "jsonl",
    vocabulary: Annotated[
        int | None, typer.Option(help="How many distinct word forms the grammar can use. Default: 468.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Zipf exponent of every list of lemmas. Default: 1.")] = None,
    entropy: Annotated[
        float | None, typer.Option(help="Bits per content word given its list, instead of --alpha.")
    ] = None,
    complexity: Annotated[
        str | None, typer.Option(metavar="S,M,C", help="Shares of simple, medium and complex, e.g. 0.35,0.4,0.25.")
    ] = None,
    frame: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SHARE", help="Draw from these frames only; repeat for several.")
    ] = None,
    collocation: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=STRENGTH", help="noun_adjective, verb_noun or verb_adverb = 0 to 1; repeatable."),
    ] = None,
    attractors: Annotated[
        float | None, typer.Option(help="Share of subjects followed by a phrase with another noun. Default: 0.25.")
    ] = None,
    agreement: Annotated[
        bool, typer.Option("--agreement/--no-agreement", help="Whether words show their number.")
    ] = True,
    params: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="All parameters, as written beside a corpus.")
    ] = None,
) -> None:
    """Write sentences with gold part of speech and semantic role for every word."""
    from trace_offline.core.errors import UsageError
    from trace_offline.corpus import generate_to_file
    from trace_offline.corpus.lexicon import LexiconParams

    given: dict[str, Any] = {"alpha": alpha, "entropy": entropy, "attractors": attractors}
    if vocabulary is not None:
        given["lexicon"] = LexiconParams.for_vocabulary(vocabulary)
    if complexity is not None:
        given["complexity"] = tuple(_number(part, "--complexity") for part in complexity.split(","))
    if frame:
        given["frames"] = tuple(_assignment(each, "--frame") for each in frame)
    if not agreement:
        given["agreement"] = False
    for each in collocation or ():
        kind, strength = _assignment(each, "--collocation")
        if kind not in ("noun_adjective", "verb_noun", "verb_adverb"):
            raise UsageError(
                f'--collocation: expected noun_adjective, verb_noun or verb_adverb = strength; found "{each}".'
            )
        given[kind] = strength
    chosen = _params(params, {name: value for name, value in given.items() if value is not None})
    try:
        count = generate_to_file(output, sentences, seed, chosen, form=format_)
    except OSError as error:
        raise UsageError(f"Cannot write {output}: {error.strerror or error}.") from error
    typer.echo(f"{count} sentences written to {output}", err=True)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A corpus in any of the five formats.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure a corpus: counts, shares, Zipf exponents, entropies, collocations, lengths, repeated sentences."""
    import json

    from trace_offline.cli.corpus_table import lines
    from trace_offline.corpus.inspection import inspect_corpus

    found = inspect_corpus(file)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for line in lines(found):
        typer.echo(line)


@app.command()
def intervene(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="A corpus made by generate.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The file to write, one minimal pair a line.")],
    kind: Annotated[
        list[str],
        typer.Option(help="synonym, role_violation, elimination or agreement_violation; repeat for several."),
    ],
    seed: Annotated[int, typer.Option(help="Same seed, same pairs.", min=0)] = 0,
    sentences: Annotated[int | None, typer.Option(help="Only the first so many sentences.", min=1)] = None,
) -> None:
    """Write minimal pairs: each sentence, and the same with one word replaced or removed."""
    from trace_offline.core.errors import UsageError
    from trace_offline.corpus.interventions import intervene_file

    try:
        written, without = intervene_file(file, out, kind, seed, limit=sentences)
    except OSError as error:
        raise UsageError(f"Cannot write {out}: {error.strerror or error}.") from error
    for each in kind:
        skipped = f"; {without[each]} sentences do not admit it" if without[each] else ""
        typer.echo(f"{each}: {written[each]} pairs written to {out}{skipped}", err=True)


def _params(path: Path | None, given: dict[str, Any]) -> CorpusParams:
    """Parameters from a file, with the options given put over them."""
    import json
    from dataclasses import replace

    from trace_offline.core.errors import UsageError
    from trace_offline.corpus.params import CorpusParams

    base = CorpusParams()
    if path is not None:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot read the parameters: {error}.") from None
        base = CorpusParams.from_record(record.get("params", record) if isinstance(record, dict) else record)
    return replace(base, **given)


def _assignment(text: str, option: str) -> tuple[str, float]:
    from trace_offline.core.errors import UsageError

    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f'{option}: expected NAME=NUMBER, found "{text}".')
    return name.strip(), _number(value, option)


def _number(text: str, option: str) -> float:
    from trace_offline.core.errors import UsageError

    try:
        return float(text)
    except ValueError:
        raise UsageError(f'{option}: expected a number, found "{text}".') from None

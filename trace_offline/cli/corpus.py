"""``trace-offline corpus``: the annotated synthetic corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Generate, inspect and change annotated synthetic sentences.", no_args_is_help=True)


@app.command()
def generate(
    output: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="The file to write, one sentence a line.")],
    sentences: Annotated[int, typer.Option(help="How many sentences.", min=1)] = 25_000,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
) -> None:
    """Write sentences with gold part of speech and semantic role for every word."""
    from trace_offline.core.errors import UsageError
    from trace_offline.corpus import generate_to_file

    try:
        count = generate_to_file(output, sentences, seed)
    except OSError as error:
        raise UsageError(f"Cannot write {output}: {error.strerror or error}.") from error
    typer.echo(f"{count} sentences written to {output}", err=True)


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

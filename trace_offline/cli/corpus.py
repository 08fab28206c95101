"""``trace-offline corpus``: the annotated synthetic corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Generate annotated synthetic sentences.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``generate`` a sub-command while it is the only one."""


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

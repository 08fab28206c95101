"""``trace-offline merge`` and ``compact``: whole stores."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(merge)
    app.command()(compact)


def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="A.duckdb B.duckdb …", help="The stores to join.")],
    store: Annotated[Path, typer.Option(metavar="FILE.duckdb", help="Where all goes; made when it is not there.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Join stores into one: shards of one run, or runs measured apart. Doing it twice is a no-op."""
    from trace_offline.store.merge import merge as join

    done = join(sources, store)
    if as_json:
        typer.echo(json.dumps({**asdict(done), "store": str(done.store)}, indent=1))
    typer.echo(
        f"{done.sources} stores merged into {store}: {done.analyses} analyses added, {done.kept} already there; "
        f"{done.runs} new runs, {done.checkpoints} new checkpoints",
        err=True,
    )


def compact(
    store: Annotated[Path, typer.Argument(metavar="FILE.duckdb", help="The store.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Sort a store for fast queries and shrink it; needs room for a second copy."""
    from trace_offline.store.compact import compact as rewrite

    done = rewrite(store)
    if as_json:
        typer.echo(json.dumps({**asdict(done), "store": str(done.store)}, indent=1))
    typer.echo(f"{store}: {done.measurements} numbers, {done.before:,} → {done.after:,} bytes", err=True)

"""``trace-offline import``: numbers that other programs measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

_app = typer.Typer(help="Bring numbers of other programs into a store.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group ``import`` to the command line."""
    app.add_typer(_app, name="import")


@_app.callback()
def _group() -> None:
    """Bring numbers of other programs into a store."""


@_app.command("lm-eval")
def lm_eval(
    files: Annotated[list[Path], typer.Argument(metavar="FILES…", help="Result files (.json), or folders of them.")],
    store: Annotated[Path, typer.Option(metavar="FILE.duckdb", help="Where the history goes.")],
    run: Annotated[str | None, typer.Option(help="Name of the run. Default: the model's name in the file.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Training step, for one file that does not say.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Read results of lm-evaluation-harness into the history; the same file twice is a no-op."""
    from trace_offline.importers.writing import import_lm_eval

    done = import_lm_eval(files, store, run=run, step=step)
    for name, steps in done.steps.items():
        span = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
        print(f"{name}: {span}", file=sys.stderr)
    print(
        f"{done.files} files: {done.new} task results new ({done.numbers} numbers), {done.unchanged} already there "
        f"→ {done.store}",
        file=sys.stderr,
    )
    if as_json:
        shown = {
            "store": str(done.store), "files": done.files, "new": done.new, "unchanged": done.unchanged,
            "numbers": done.numbers, "steps": done.steps,
        }  # fmt: skip
        print(json.dumps(shown, indent=1))

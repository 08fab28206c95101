"""``trace-offline discover``."""

from __future__ import annotations

import dataclasses
import json
import sys

from trace_offline.core.types import Checkpoint


def show(source: str, revisions: str | None, *, as_json: bool) -> int:
    """Print what was found; exit code 0."""
    from trace_offline.checkpoints.discover import discover

    found = discover(source, revisions=revisions)
    if as_json:
        print(json.dumps([dataclasses.asdict(item) for item in found], indent=1, default=str))
        return 0
    _table(found)
    usable = sum(item.state.analyzable for item in found)
    print(f"{usable} of {len(found)} can be analyzed.", file=sys.stderr)
    return 0


def _table(found: list[Checkpoint]) -> None:
    from rich.console import Console
    from rich.table import Table

    # Off a terminal nothing may be cut to 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=400)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, justify in (("step", "right"), ("tokens", "right"), ("layout", "left"), ("state", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("size", justify="right")
    table.add_column("location", overflow="fold")
    table.add_column("why", overflow="fold")
    for item in found:
        table.add_row(
            "" if item.step is None else str(item.step),
            "" if item.tokens_seen is None else f"{item.tokens_seen:,}",
            item.layout,
            item.state.value.replace("_", " "),
            f"{item.size_bytes / 1e6:.1f} MB" if item.size_bytes else "",
            item.location,
            item.reason or "",
        )
    console.print(table)

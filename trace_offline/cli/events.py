"""``trace-offline events``: emergence, convergence, peaks, regress and change points of a history."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from trace_offline.events.find import FoundEvents, Settings
    from trace_offline.events.ordering import MetricOrder
    from trace_offline.events.selection import Selection
    from trace_offline.events.stopping import RunStop

_SHOWN = 12


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(events)


def events(
    store: Annotated[Path, typer.Argument(metavar="FILE.duckdb", help="The store.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="metric, analyzer.metric or analyzer.metric[task=pos,layer=2]; repeat for several."),
    ] = None,
    analyzer: Annotated[list[str] | None, typer.Option(help="Only this analyzer; repeatable.")] = None,
    run: Annotated[list[str] | None, typer.Option(help="Only this run; repeatable.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; repeatable.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="This class too; '*' for all. Default: totals only.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; repeatable.")] = None,
    evaluation_set: Annotated[list[str] | None, typer.Option(help="Only this evaluation set; repeatable.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="emergence, convergence, peak, regress, change_point; repeatable.")
    ] = None,
    share: Annotated[float, typer.Option(help="Share of the rise (or fall) that must be crossed.")] = 0.25,
    tolerance: Annotated[float, typer.Option(help="Of the range, for convergence.")] = 0.05,
    confidence: Annotated[float, typer.Option(help="Of intervals; 1 - the rate of events in pure noise.")] = 0.95,
    direction: Annotated[str, typer.Option(help="How the metric improves: auto, rises or falls.")] = "auto",
    model: Annotated[str, typer.Option(help="Change points of slope or mean.")] = "slope",
    order: Annotated[
        tuple[str, str] | None, typer.Option(metavar="METRIC_A METRIC_B", help="Which emerges first? Stores nothing.")
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="From when on did nothing improve? Stores nothing.")] = False,
    stop_tolerance: Annotated[float, typer.Option(help="In standard errors of a difference, for --stop.")] = 2.0,
    stop_amount: Annotated[float | None, typer.Option(help="In the metric's unit instead, for --stop.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find what happened when, store it in the table events, and print it; or ask for an order, or when to stop."""
    from trace_offline.core.errors import UsageError
    from trace_offline.events.find import KINDS, Settings
    from trace_offline.events.selection import Selection

    if order and stop:
        raise UsageError("--order and --stop are two questions; ask one at a time.")
    if order and metric:
        raise UsageError("--order names both metrics itself; leave --metric out.")
    selection = Selection(
        metrics=metric or (), analyzers=analyzer or (), runs=run or (), tasks=task or (), labels=label or (),
        layers=layer or (), evaluation_sets=evaluation_set or (),
    )  # fmt: skip
    settings = Settings(
        share=share, tolerance=tolerance, confidence=confidence, direction=direction, model=model,
        kinds=tuple(kind or KINDS),
    )  # fmt: skip
    if order:
        from trace_offline.events.ordering import order_metrics

        _show_order(order_metrics(store, *order, selection, settings), as_json=as_json)
    elif stop:
        from trace_offline.events.stopping import find_stop

        found = find_stop(store, selection, settings, stderrs=stop_tolerance, absolute=stop_amount)
        _show_stop(found, as_json=as_json)
    else:
        _show_events(store, selection, settings, as_json=as_json)


def _show_events(store: Path, selection: Selection, settings: Settings, *, as_json: bool) -> None:
    from trace_offline.events.find import find_events

    found = find_events(store, selection, settings)
    if as_json:
        rows = [{**event.row(), "detail": event.detail} for event in found.events]
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        _print_table(found)
    for key, reason in [(key, reason) for key, kind, reason in found.without if kind is None][:_SHOWN]:
        print(f"{key.run}: {key}: {reason}", file=sys.stderr)
    kinds = Counter(event.kind for event in found.events)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    print(f"{len(found.events)} events in {found.series} series ({counts}) → {store}", file=sys.stderr)
    if found.series > 1:
        chance = found.series * (1 - settings.confidence)
        print(
            f"Up to {chance:.1f} of {found.series} series of pure noise would show an event by chance.", file=sys.stderr
        )


def _print_table(found: FoundEvents) -> None:
    import pyarrow as pa

    from trace_offline.query.formats import render

    names = (
        "run",
        "analyzer",
        "task",
        "label",
        "layer",
        "component",
        "metric",
        "kind",
        "step",
        "step_low",
        "step_high",
    )
    table = found.to_arrow()
    texts = pa.array([event.detail["text"] for event in found.events], pa.string())
    shown = [name for name in names if table.num_rows == 0 or table[name].null_count < table.num_rows]
    sys.stdout.write(render(table.select(shown).append_column("what", texts), "table").decode())


def _show_order(found: MetricOrder, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.plain(), indent=1))
        return
    for one in found.runs:
        parts = [
            f"{name} at {where[0]} ({where[1]} to {where[2]})"
            for name, where in ((found.first, one.first), (found.second, one.second))
            if where
        ]
        print(f"{one.run}: {'; '.join([*parts, one.verdict])}")
    over = found.over_runs
    if over is None:
        print("No run has both emergences.")
        return
    interval = "" if over.ratio_low is None else f" ({over.ratio_low:.3g} to {over.ratio_high:.3g})"
    tests = (
        "" if over.p_sign is None else f"; sign test p = {over.p_sign:.3g}, permutation p = {over.p_permutation:.3g}"
    )
    print(
        f"{found.first} first in {over.first} of {over.n} runs, {found.second} in {over.second}, {over.ties} ties; "
        f"ratio of steps {over.ratio:.3g}{interval}{tests}"
    )


def _show_stop(found: list[RunStop], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return
    for one in found:
        last = ", ".join(str(key) for key in one.last[:_SHOWN]) or "nothing improved at all"
        print(f"{one.run}: nothing improved after step {one.step} of {one.final_step}; last to improve: {last}")
        for stop in one.series[:_SHOWN]:
            print(f"  {stop.key}: {stop.step} ({stop.direction}; best {stop.best:.4g}, later by {stop.missed:+.3g})")
        if len(one.series) > _SHOWN:
            print(f"  … and {len(one.series) - _SHOWN} more; see --json")
        for key, reason in one.left_out[:_SHOWN]:
            print(f"{one.run}: {key} left out: {reason}", file=sys.stderr)

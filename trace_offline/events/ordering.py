"""Which of two metrics emerges first: within each run by disjoint intervals, over runs by paired differences."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trace_offline.core.errors import UsageError
from trace_offline.estimators.emergence import NoEvent, enough_points
from trace_offline.estimators.event_order import Order, order_of_events
from trace_offline.estimators.history_noise import NoiseUnknown
from trace_offline.events.find import Settings, emergence_of
from trace_offline.events.orientation import orient
from trace_offline.events.selection import Selection, Series, read_series


@dataclass(frozen=True)
class RunOrder:
    """Both emergences in one run, (step, low, high) or the reason there is none; ``verdict`` in words."""

    run: str
    first: tuple[int, int, int] | None
    second: tuple[int, int, int] | None
    verdict: str


@dataclass(frozen=True)
class MetricOrder:
    """``runs``: one entry each; ``over_runs``: None when no run has both emergences."""

    first: str
    second: str
    runs: tuple[RunOrder, ...]
    over_runs: Order | None

    def plain(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def order_metrics(store: Path | str, first: str, second: str, selection: Selection, settings: Settings) -> MetricOrder:
    """Compare the emergence of two metrics, given as ``metric``, ``analyzer.metric`` or with ``[task=…,layer=…]``.

    Within a run the intervals are widened so that both hold together with the confidence asked for; disjoint intervals
    (they may touch at a checkpoint) tell the order. Raises UsageError when a metric means several series in a run.
    """
    joint = replace(settings, confidence=1 - (1 - settings.confidence) / 2)
    one, two = (_by_run(store, text, selection) for text in (first, second))
    shared = [run for run in one if run in two]
    if not shared:
        raise UsageError(f"--order: no run of {store} has both {first} and {second}.")
    runs, pairs = [], []
    for run in shared:
        found = [_emergence(series[run], joint) for series in (one, two)]
        if isinstance(found[0], tuple) and isinstance(found[1], tuple):
            pairs.append((found[0][0], found[1][0]))
        runs.append(
            RunOrder(
                run=run,
                first=found[0] if isinstance(found[0], tuple) else None,
                second=found[1] if isinstance(found[1], tuple) else None,
                verdict=_verdict(first, second, found[0], found[1]),
            )
        )
    over = None
    if pairs:
        steps = np.array(pairs, float)
        over = order_of_events(steps[:, 0], steps[:, 1], confidence=settings.confidence)
    return MetricOrder(first, second, tuple(runs), over)


def _by_run(store: Path | str, metric: str, selection: Selection) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for series in read_series(store, replace(selection, metrics=(metric,))):
        if series.key.run in found:
            raise UsageError(
                f"--order: {metric} means several series of run {series.key.run}, among them "
                f"{found[series.key.run].key} and {series.key} on {series.key.evaluation_set}. Choose one, as in "
                f"'{metric.split('[')[0]}[task=…,layer=…]', or --evaluation-set."
            )
        found[series.key.run] = series
    return found


def _emergence(series: Series, settings: Settings) -> tuple[int, int, int] | str:
    try:
        enough_points(series.values)
        step, low, high, _ = next(iter(emergence_of(series, orient(series, settings.direction), settings)))
    except (NoEvent, NoiseUnknown) as reason:
        return str(reason)
    return step, low, high


def _verdict(first: str, second: str, one: tuple[int, int, int] | str, two: tuple[int, int, int] | str) -> str:
    for name, found in ((first, one), (second, two)):
        if isinstance(found, str):
            return f"{name} does not emerge: {found}"
    assert isinstance(one, tuple)
    assert isinstance(two, tuple)
    if one[2] <= two[1]:
        return f"{first} first"
    if two[2] <= one[1]:
        return f"{second} first"
    return "not told apart: the intervals overlap"

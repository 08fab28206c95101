"""From which checkpoint on did nothing that is asked for improve, and what was the last to do so?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trace_offline.core.errors import UsageError
from trace_offline.estimators.history_noise import NoiseUnknown
from trace_offline.estimators.last_improvement import last_improvement
from trace_offline.events.find import Settings
from trace_offline.events.orientation import known_direction, orient
from trace_offline.events.selection import Key, Selection, Series, read_series


@dataclass(frozen=True)
class Stop:
    """The answer for one series: ``step`` is enough; ``best`` up to it; ``missed``: what later checkpoints are better
    by at most (negative: nothing is), in the metric's unit or, on a log scale, as a logarithm.
    """

    key: Key
    step: int
    best: float
    missed: float
    improved: bool
    direction: str


@dataclass(frozen=True)
class RunStop:
    """The answer for one run: nothing of ``series`` improved after ``step``; ``last`` improved last."""

    run: str
    step: int
    final_step: int
    last: tuple[Key, ...]
    series: tuple[Stop, ...]
    left_out: tuple[tuple[Key, str], ...]


def find_stop(
    store: Path | str,
    selection: Selection,
    settings: Settings,
    *,
    stderrs: float = 2.0,
    absolute: float | None = None,
) -> list[RunStop]:
    """One answer for each run; ``stderrs``, ``absolute``: tolerance, see ``estimators.last_improvement``.

    Raises UsageError when nothing matches, or no series of any run can be judged.
    """
    if stderrs < 0 or (absolute is not None and absolute < 0):
        raise UsageError("--stop-tolerance: expected a number of at least 0.")
    by_run: dict[str, list[Series]] = {}
    for series in read_series(store, selection):
        by_run.setdefault(series.key.run, []).append(series)
    found = []
    reasons: list[str] = []
    for run, chosen in by_run.items():
        stops, left_out = [], []
        for series in chosen:
            try:
                stops.append(_stop(series, settings, stderrs, absolute))
            except NoiseUnknown as reason:
                left_out.append((series.key, str(reason)))
        reasons += [f"{key}: {reason}" for key, reason in left_out]
        if not stops:
            continue
        step = max(stop.step for stop in stops)
        found.append(
            RunStop(
                run=run,
                step=step,
                final_step=int(max(series.steps[-1] for series in chosen if len(series.steps))),
                last=tuple(stop.key for stop in stops if stop.step == step and stop.improved),
                series=tuple(sorted(stops, key=lambda stop: -stop.step)),
                left_out=tuple(left_out),
            )
        )
    if not found:
        raise UsageError(f"--stop: no series can be judged: {'; '.join(reasons[:3])}. Give --stop-amount.")
    return found


def _stop(series: Series, settings: Settings, stderrs: float, absolute: float | None) -> Stop:
    if len(series.values) < 2:
        raise NoiseUnknown(f"{len(series.values)} checkpoints with a number: at least 2 are needed")
    if absolute is not None:
        # An amount needs no noise, which few checkpoints cannot tell.
        net = 1.0 if series.values[-1] >= series.values[0] else -1.0
        sign, _ = known_direction(series.key.metric, settings.direction) or (net, "net change")
        logarithmic = False
        one = last_improvement(sign * series.values, None, absolute=absolute)
    else:
        oriented = orient(series, settings.direction)
        sign, logarithmic = oriented.sign, oriented.logarithmic
        one = last_improvement(oriented.values, oriented.noise, stderrs=stderrs)
    best = sign * one.best
    return Stop(
        key=series.key,
        step=int(series.steps[one.k]),
        best=float(np.exp(best)) if logarithmic else best,
        missed=one.missed,
        improved=one.improved,
        direction="rises" if sign > 0 else "falls",
    )

"""Emergence: the first lasting crossing of a stated share of a metric's rise.

``threshold = start + share (best - start)``: start is the mean of the first checkpoints that do not differ from each
other, best the mean of the checkpoints within noise of the largest value. The crossing is lasting when the metric
does not fall below the threshold again before its best; what happens after is a regress. A dip before the rise moves
neither start nor threshold, so a return from it is no emergence. There is an event only when the rise is more than
noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_offline.estimators.history_levels import (
    best_run,
    exceeds,
    largest_rise,
    leading_run,
    mean_weights,
    shortfall,
)
from trace_offline.estimators.history_noise import Noise
from trace_offline.estimators.krylov import Floats
from trace_offline.estimators.lasting_crossing import between, lasting_crossing


class NoEvent(ValueError):
    """There is no event of the kind asked for; the message says why."""


LEAST_POINTS = 4
"""Fewest checkpoints of which anything can be said."""


@dataclass(frozen=True)
class Emergence:
    """``step`` between the checkpoints ``low`` and ``high``; levels and threshold in the unit of the values."""

    step: int
    low: int
    high: int
    start: float
    best: float
    threshold: float
    ratio: float


def find_emergence(
    steps: Floats, values: Floats, noise: Noise, *, share: float, level: float, tails: int = 1, confidence: float = 0.95
) -> Emergence:
    """The emergence of a metric that rises when it improves.

    ``level``: probability to report one in pure noise; ``tails``: 2 when the direction was chosen from the values;
    ``confidence`` of ``low … high``. Raises NoEvent when there is none.
    """
    enough_points(values)
    ratio, tests = largest_rise(values, noise)
    limit = noise.limit(level, tails * tests)
    start, best = leading_run(values, noise), best_run(values, noise)
    if ratio <= limit:
        raise NoEvent(f"no rise beyond noise: the largest is {shortfall(ratio, limit)}")
    above, needed = exceeds(values, noise, best, start, level)
    if above <= needed:
        raise NoEvent(f"no rise beyond noise: from the first level to the best one it is {shortfall(above, needed)}")
    threshold = (1 - share) * mean_weights(start) + share * mean_weights(best)
    crossing = lasting_crossing(values, noise, threshold, first=0, last=int(np.argmax(values)), level=1 - confidence)
    if len(values) - crossing.k < 3:
        raise NoEvent("the metric rises at the last checkpoint only, so whether it lasts is unknown")
    return Emergence(
        step=between(steps, crossing.k, crossing.fraction),
        low=int(steps[crossing.low]),
        high=int(steps[crossing.high]),
        start=float(mean_weights(start) @ values),
        best=float(mean_weights(best) @ values),
        threshold=float(threshold @ values),
        ratio=ratio,
    )


def enough_points(values: Floats) -> None:
    """Raise NoEvent for fewer than ``LEAST_POINTS`` values."""
    if len(values) < LEAST_POINTS:
        raise NoEvent(f"{len(values)} checkpoints with a number: at least {LEAST_POINTS} are needed")

"""Regress: a later, lasting fall from the best by more than noise.

The fall is lasting when the mean of all checkpoints from some point to the end (two at least) lies below an earlier
mean by more than noise. Its step is where the metric crosses ``best - share (best - end)`` downwards for good.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_offline.estimators.emergence import NoEvent, enough_points
from trace_offline.estimators.history_levels import (
    best_run,
    exceeds,
    largest_fall,
    mean_weights,
    shortfall,
    trailing_run,
)
from trace_offline.estimators.history_noise import Noise
from trace_offline.estimators.krylov import Floats
from trace_offline.estimators.lasting_crossing import between, lasting_crossing


@dataclass(frozen=True)
class Regress:
    """``step`` between the checkpoints ``low`` and ``high``; ``best`` was reached at ``best_step``; ``end`` is the last
    level; ``fall_stderr``: stderr of their difference.
    """

    step: int
    low: int
    high: int
    best: float
    best_step: int
    end: float
    fall_stderr: float
    ratio: float


def find_regress(
    steps: Floats, values: Floats, noise: Noise, *, share: float, level: float, tails: int = 1, confidence: float = 0.95
) -> Regress:
    """The regress of a metric that rises when it improves; parameters as for ``find_emergence``.

    Raises NoEvent when there is none.
    """
    enough_points(values)
    ratio, tests = largest_fall(values, noise)
    limit = noise.limit(level, tails * tests)
    best, end = best_run(values, noise), trailing_run(values, noise)
    peak, last = int(np.argmax(values)), len(values) - 1
    if ratio <= limit:
        raise NoEvent(f"no lasting fall beyond noise: the largest is {shortfall(ratio, limit)}")
    below, needed = exceeds(values, noise, best, end, level)
    if below <= needed:
        raise NoEvent(
            f"no lasting fall beyond noise: from the best level to the last one it is {shortfall(below, needed)}"
        )
    threshold = (1 - share) * mean_weights(best) + share * mean_weights(end)
    crossing = lasting_crossing(-values, noise, threshold, first=peak, last=last, level=1 - confidence)
    fall = mean_weights(best) - mean_weights(end)
    return Regress(
        step=between(steps, crossing.k, crossing.fraction),
        low=int(steps[crossing.low]),
        high=int(steps[crossing.high]),
        best=float(mean_weights(best) @ values),
        best_step=int(steps[peak]),
        end=float(mean_weights(end) @ values),
        fall_stderr=float(noise.contrast(fall)[0]),
        ratio=ratio,
    )

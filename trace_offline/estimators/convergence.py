"""Convergence: from when on a metric stays within a tolerance of its final level.

The final level is the mean of the last checkpoints that do not differ from each other. The tolerance is a share of the
distance between smallest and largest value, and never less than what the noise lets one see at one checkpoint; then the
event says that noise limits it. Only a history that changed at all can converge, and at least three checkpoints must
lie within the tolerance at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_offline.estimators.emergence import NoEvent, enough_points
from trace_offline.estimators.history_levels import largest_rise, mean_weights, trailing_run
from trace_offline.estimators.history_noise import Noise
from trace_offline.estimators.krylov import Floats


@dataclass(frozen=True)
class Convergence:
    """``step``: first checkpoint from which on all lie within ``tolerance`` of ``final``; with confidence the metric
    came within it for good between ``low`` and ``high``.
    """

    step: int
    low: int
    high: int
    final: float
    tolerance: float
    noise_limited: bool


def find_convergence(
    steps: Floats,
    values: Floats,
    noise: Noise,
    *,
    level: float,
    share: float | None = 0.05,
    absolute: float | None = None,
    tails: int = 1,
    confidence: float = 0.95,
) -> Convergence:
    """The convergence of a metric in either direction.

    ``share``: tolerance as a share of the range; ``absolute``: in the unit of the values, wins over ``share``.
    ``low``: last checkpoint surely outside; ``high``: the first up to which some stretch before lies surely inside (for
    a metric that comes closer steadily), or the last checkpoint. Raises NoEvent.
    """
    enough_points(values)
    n = len(values)
    ratio, tests = max(largest_rise(values, noise), largest_rise(-values, noise))
    limit = noise.limit(level, 2 * tails * tests)
    if ratio <= limit:
        raise NoEvent(f"no change beyond noise: the largest is {ratio:.1f} standard errors, {limit:.1f} are needed")
    weights = mean_weights(trailing_run(values, noise))
    asked = absolute if absolute is not None else (share or 0.0) * float(np.ptp(values))
    apart = values - float(weights @ values)
    errors = noise.contrast(np.eye(n) - weights)
    seen = noise.limit(1 - confidence, n)
    outside = np.flatnonzero(np.abs(apart) > np.maximum(asked, seen * errors))
    last = int(outside[-1]) if len(outside) else -1
    if n - 1 - last < 3:
        raise NoEvent("the metric is still changing at the last checkpoints")
    if last < 0:
        raise NoEvent("every checkpoint lies within the tolerance of the final level")
    surely = np.flatnonzero(np.abs(apart) > asked + seen * errors)
    high = _surely_inside(apart, noise, weights, asked, last, seen)
    return Convergence(
        step=int(steps[last + 1]),
        low=int(steps[surely[-1]]) if len(surely) else int(steps[0]),
        high=int(steps[high]),
        final=float(weights @ values),
        tolerance=asked,
        noise_limited=bool((seen * errors[last:] > asked).any()),
    )


def _surely_inside(apart: Floats, noise: Noise, weights: Floats, tolerance: float, last: int, limit: float) -> int:
    n = len(apart)
    for end in range(last + 1, n):
        rows = np.zeros((end - last, n))
        for row, begin in zip(rows, range(last + 1, end + 1), strict=True):
            row[begin : end + 1] = 1 / (end + 1 - begin)
        means = np.abs(rows @ apart)
        if (means + limit * noise.contrast(rows - weights) < tolerance).any():
            return end
    return n - 1

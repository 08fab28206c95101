"""Where a noisy history crosses a level for good, as a point and as a set of intervals between checkpoints.

The history is known at checkpoints only, so a crossing is a bracket: it lies between checkpoint k and k + 1. Inverting
a test gives the set of brackets that the noise leaves possible. Bracket k is refused when a later point, or the mean of
the points right after it, lies surely below the level, or when the mean of the points right before it lies surely above
(points since the last one that is surely below). The level itself may be a mean of points (``threshold`` weights), so
that its own noise, and what it shares with the points, is allowed for exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_offline.estimators.history_noise import Noise
from trace_offline.estimators.krylov import Floats


@dataclass(frozen=True)
class Crossing:
    """The crossing lies between points ``k`` and ``k + 1``, with confidence between ``low`` and ``high`` (points).

    ``fraction``: place between the two points by linear interpolation of the values, 0 to 1.
    """

    k: int
    low: int
    high: int
    fraction: float


def lasting_crossing(
    values: Floats, noise: Noise, threshold: Floats, *, first: int, last: int, level: float
) -> Crossing:
    """The last upward crossing of ``threshold [n] @ values`` between the points ``first`` and ``last`` (inclusive).

    ``level``: probability that ``low … high`` misses it (1 - confidence). The point minimises the squared violation of
    "below before, above after"; ``fraction`` interpolates linearly. Raises ValueError when ``first >= last``.
    """
    if first >= last:
        raise ValueError(f"a crossing needs two points, got first={first}, last={last}")
    n = len(values)
    limit = noise.limit(level, 2 * (last - first + 1))
    height = values - float(threshold @ values)
    single = height / noise.contrast(np.eye(n) - threshold)
    surely_below = [i for i in range(first, last) if single[i] < -limit]
    start = surely_below[-1] if surely_below else first
    possible = [k for k in range(start, last) if _possible(values, noise, threshold, start, k, last, limit)]
    cost = {k: _cost(single, start, k, last) for k in range(start, last)}
    k = min(possible or cost, key=lambda place: (cost[place], place))
    below, above = height[k], height[k + 1]
    fraction = float(np.clip(-below / (above - below), 0.0, 1.0)) if above > below else 0.5
    return Crossing(k, min(possible, default=k), max(possible, default=k) + 1, fraction)


def _possible(values: Floats, noise: Noise, threshold: Floats, start: int, k: int, last: int, limit: float) -> bool:
    n = len(values)
    after = [(k + 1, end) for end in range(k + 2, last + 2)]
    before = [(begin, k + 1) for begin in range(start + 1, k + 1)]
    later = [(i, i + 1) for i in range(k + 2, last + 1)]
    rows = np.zeros((len(after) + len(before) + len(later), n))
    for row, (begin, end) in zip(rows, [*after, *before, *later], strict=True):
        row[begin:end] = 1 / (end - begin)
    rows -= threshold
    ratio = rows @ values / noise.contrast(rows)
    ratio[len(after) : len(after) + len(before)] *= -1
    return bool((ratio >= -limit).all())


def _cost(single: Floats, start: int, k: int, last: int) -> float:
    above_before = np.maximum(single[start : k + 1], 0)
    below_after = np.maximum(-single[k + 1 : last + 1], 0)
    return float((above_before**2).sum() + (below_after**2).sum())


def between(steps: Floats, k: int, fraction: float) -> int:
    """Step at ``fraction`` of the way from point k to k + 1 in ``log(step + 1)``, rounded."""
    low, high = np.log1p(float(steps[k])), np.log1p(float(steps[k + 1]))
    return round(float(np.expm1(low + fraction * (high - low))))

"""Levels of a history: where it starts, where it ends, its best, and whether one lies above another by more than noise.

Every comparison is one between means of neighbouring checkpoints, so that many noisy checkpoints together show what
none shows alone; the limits count all comparisons made.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trace_offline.estimators.history_noise import Noise, Places
from trace_offline.estimators.krylov import Floats

Bools = NDArray[np.bool_]


def leading_run(values: Floats, noise: Noise) -> Bools:
    """``[n]``: the first points up to the first that differs from the mean of those before it by two stderr."""
    inside = np.zeros(len(values), bool)
    inside[0] = True
    for i in range(1, len(values)):
        weights = np.zeros(len(values))
        weights[:i], weights[i] = -1 / i, 1.0
        if abs(float(weights @ values)) > 2 * float(noise.contrast(weights)[0]):
            break
        inside[i] = True
    return inside


def trailing_run(values: Floats, noise: Noise) -> Bools:
    """``[n]``: the last points back to the first that differs from the mean of those after it by two stderr."""
    back = Noise(noise.sigma[::-1], noise.source, noise.places, noise.correlation)
    return leading_run(values[::-1], back)[::-1]


def best_run(values: Floats, noise: Noise) -> Bools:
    """``[n]``: the points that are within two stderr of a difference of the largest value."""
    best = int(np.argmax(values))
    return values[best] - values <= 2 * np.sqrt(noise.sigma**2 + noise.sigma[best] ** 2)


def mean_weights(inside: Bools) -> Floats:
    """``[n]``: weights of the plain mean of the points inside."""
    return inside / inside.sum()


def windows(n: int, first: int, after: int) -> tuple[Places, Places]:
    """Starts and ends (exclusive) of all windows of 1, 2, 4, 8 … points within ``first … after - 1``."""
    starts, ends = [], []
    length = 1
    while length <= after - first:
        begin = np.arange(first, after - length + 1)
        starts.append(begin)
        ends.append(begin + length)
        length *= 2
    empty = np.zeros(0, np.intp)
    return (np.concatenate(starts), np.concatenate(ends)) if starts else (empty, empty)


def window_means(values: Floats, starts: Places, ends: Places) -> Floats:
    """Means of the points ``start … end - 1``."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[ends] - total[starts]) / (ends - starts)


def largest_rise(values: Floats, noise: Noise) -> tuple[float, int]:
    """Largest contrast (window mean - mean of the first k points before it) / stderr, and the number of contrasts."""
    n = len(values)
    starts, ends = windows(n, 1, n)
    if not len(starts):
        return 0.0, 0
    means, errors = window_means(values, starts, ends), noise.means(starts, ends)
    largest, tests = -np.inf, 0
    for k in sorted({1, 2, 4, 8, 16, 32, n // 2} & set(range(1, n))):
        later = starts >= k
        if not later.any():
            continue
        first, after = np.array([0]), np.array([k])
        before, error = window_means(values, first, after)[0], noise.means(first, after)[0]
        ratio = (means[later] - before) / np.hypot(errors[later], error)
        largest, tests = max(largest, float(ratio.max())), tests + int(later.sum())
    return largest, tests


def largest_fall(values: Floats, noise: Noise) -> tuple[float, int]:
    """Largest contrast (window mean - mean of all points from k on, two at least) / stderr, and their number."""
    n = len(values)
    starts, ends = windows(n, 0, n - 2)
    if not len(starts):
        return 0.0, 0
    means, errors = window_means(values, starts, ends), noise.means(starts, ends)
    k = np.arange(1, n - 1)
    after, error = window_means(values, k, np.full(len(k), n)), noise.means(k, np.full(len(k), n))
    ratio = (means[:, None] - after) / np.hypot(errors[:, None], error)
    allowed = ends[:, None] <= k
    return float(ratio[allowed].max()), int(allowed.sum())


def exceeds(values: Floats, noise: Noise, upper: Bools, lower: Bools, level: float) -> tuple[float, float]:
    """(by how many standard errors the mean over ``upper`` lies above that over ``lower``, how many noise may make).

    Both sets were chosen by looking at the values, so the limit is that of all pairs of points.
    """
    limit = noise.limit(level, len(values) * (len(values) - 1))
    weights = mean_weights(upper) - mean_weights(lower)
    if not weights.any():
        return 0.0, limit
    return float(weights @ values) / float(noise.contrast(weights)[0]), limit


def shortfall(ratio: float, limit: float) -> str:
    """``3.1 standard errors, 3.3 are needed``, with as many digits as tell the two apart."""
    digits = next((n for n in range(1, 6) if f"{ratio:.{n}f}" != f"{limit:.{n}f}"), 6)
    return f"{ratio:.{digits}f} standard errors, {limit:.{digits}f} are needed"

"""Peak: an interior maximum that lies above both ends of a history by more than noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_offline.estimators.emergence import NoEvent, enough_points
from trace_offline.estimators.history_levels import (
    best_run,
    exceeds,
    leading_run,
    mean_weights,
    shortfall,
    trailing_run,
    window_means,
    windows,
)
from trace_offline.estimators.history_noise import Noise
from trace_offline.estimators.krylov import Floats

_ENDS = (1, 2, 4)


@dataclass(frozen=True)
class Peak:
    """The largest value is at checkpoint ``step``, the true maximum with confidence between ``low`` and ``high``."""

    step: int
    low: int
    high: int
    value: float
    start: float
    end: float
    ratio: float


def find_peak(
    steps: Floats, values: Floats, noise: Noise, *, level: float, tails: int = 1, confidence: float = 0.95
) -> Peak:
    """The interior maximum, when it lies above start and end; for a minimum give the negative values.

    ``level``: probability to report one where there is none (noise, or a monotone history). The interval reaches from
    the checkpoint before the first to the one after the last that could be the largest. Raises NoEvent.
    """
    enough_points(values)
    n, place = len(values), int(np.argmax(values))
    if place in (0, n - 1):
        raise NoEvent("the largest value is at an end of the history")
    starts, ends = windows(n, 1, n - 1)
    means, errors = window_means(values, starts, ends), noise.means(starts, ends)
    before, after = np.full(len(starts), -np.inf), np.full(len(starts), -np.inf)
    for length in (one for one in _ENDS if one < n - 1):
        for first, last, side, apart in (
            (0, length, before, starts >= length),
            (n - length, n, after, ends <= n - length),
        ):
            place_first, place_last = np.array([first]), np.array([last])
            edge, error = window_means(values, place_first, place_last), noise.means(place_first, place_last)
            beyond = (means - edge) / np.hypot(errors, error)
            np.maximum(side, np.where(apart, beyond, -np.inf), out=side)
    ratio = float(np.minimum(before, after).max())
    limit = noise.limit(level, tails * len(starts) * len(_ENDS))
    top, head, tail = best_run(values, noise), leading_run(values, noise), trailing_run(values, noise)
    for what, found, needed in (
        ("beyond the nearer end", ratio, limit),
        ("of the levels beyond the first one", *exceeds(values, noise, top, head, level)),
        ("of the levels beyond the last one", *exceeds(values, noise, top, tail, level)),
    ):
        if found <= needed:
            raise NoEvent(f"no interior extremum beyond noise: distance {what} is {shortfall(found, needed)}")
    likely = noise.limit(1 - confidence, len(starts))
    difference = np.hypot(errors[:, None], noise.sigma)
    possible = np.flatnonzero(((means[:, None] - values) / difference <= likely).all(0))
    low, high = min(int(possible[0]), place) - 1, max(int(possible[-1]), place) + 1
    return Peak(
        step=int(steps[place]),
        low=int(steps[max(low, 0)]),
        high=int(steps[min(high, n - 1)]),
        value=float(values[place]),
        start=float(mean_weights(head) @ values),
        end=float(mean_weights(tail) @ values),
        ratio=ratio,
    )

"""Change points of a history: exact segmentation into straight pieces (or levels) by dynamic programming.

Cost of a segmentation: weighted residual sum of squares around a line in ``log(step + 1)`` (or a mean) per segment;
for each number of changes the best segmentation is found exactly (Auger and Lawrence 1989, Bull. Math. Biol. 51:39).
The number of changes minimises cost + penalty × changes. The penalty is calibrated: it is the one below which pure
noise, correlated or not, of as many points would give a change with probability ``level``, found by simulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from trace_offline.estimators.emergence import NoEvent
from trace_offline.estimators.history_noise import Noise, correlated_noise, scatter_scale
from trace_offline.estimators.krylov import Floats

_SIMULATIONS = 1000
_SEED = 19890511
MOST_POINTS = 200
"""Above this many checkpoints the penalty of this many is used, plus what a union bound adds."""


@dataclass(frozen=True)
class ChangePoint:
    """``step``: first checkpoint of the new segment; the change lies between the checkpoints ``low`` and ``high``.

    ``before`` and ``after``: slope per unit of ``log(step + 1)`` (or level, for ``model="mean"``) of the two segments;
    ``gain``: fall of the cost, in units of the noise variance, that this change brings.
    """

    step: int
    low: int
    high: int
    before: float
    after: float
    gain: float


def find_change_points(
    steps: Floats, values: Floats, noise: Noise, *, level: float, model: str = "slope", most: int = 4
) -> list[ChangePoint]:
    """The change points, in order; empty when there are none. ``model``: ``slope`` or ``mean``; ``most`` at most.

    Intervals hold the places whose cost is within 7.35 noise variances of the best (95 %, Hansen 2000, Econometrica
    68:575), scaled for correlated noise, and reach to the checkpoint before the first of them. Raises NoEvent when
    there are too few points for two segments.
    """
    least = 3 if model == "slope" else 2
    n = len(values)
    if n < 2 * least:
        raise NoEvent(f"{n} checkpoints with a number: at least {2 * least} are needed for a change of {model}")
    most = min(most, n // least - 1)
    places = np.log1p(np.asarray(steps, float))
    cost = _segment_costs(places, values[None], 1 / noise.sigma**2, least, model)
    totals, parents = _segmentations(cost, most)
    penalty = _penalty(tuple(np.round(places, 6).tolist()), noise.places is not None, noise.correlation, level, model)
    changes = int(np.argmin(totals[0] + penalty * np.arange(most + 1)))
    if changes == 0:
        return []
    bounds = _bounds(parents[0], changes, n)
    reach = 7.35 * (1 + noise.correlation) / (1 - noise.correlation)
    found = []
    for left, middle, right in zip(bounds, bounds[1:], bounds[2:], strict=False):
        here = np.arange(left + least, right - least + 1)
        profile = cost[0, left, here] + cost[0, here, right]
        possible = here[profile <= profile.min() + reach]
        parts = (slice(left, middle), slice(middle, right))
        sides = [_describe(places[part], values[part], noise.sigma[part], model) for part in parts]
        found.append(
            ChangePoint(
                step=int(steps[middle]),
                low=int(steps[possible[0] - 1]),
                high=int(steps[possible[-1]]),
                before=sides[0],
                after=sides[1],
                gain=float(cost[0, left, right] - profile.min()),
            )
        )
    return found


def _describe(places: Floats, values: Floats, sigma: Floats, model: str) -> float:
    if model == "mean":
        return float(np.average(values, weights=1 / sigma**2))
    return float(np.polyfit(places, values, 1, w=1 / sigma)[0])


def _segment_costs(places: Floats, values: Floats, weights: Floats, least: int, model: str) -> Floats:
    """``[m, n + 1, n + 1]``: cost of the segment ``a … b - 1`` of each row; infinite when shorter than ``least``."""
    n = values.shape[1]
    x = places - places.mean()
    y = values - values.mean(1, keepdims=True)
    w = weights / weights.mean()

    def sums(terms: Floats) -> Floats:
        total = np.concatenate([np.zeros((*terms.shape[:-1], 1)), np.cumsum(terms, -1)], -1)
        return total[..., None, :] - total[..., :, None]

    with np.errstate(divide="ignore", invalid="ignore"):
        s, sy, syy = sums(w), sums(w * y), sums(w * y**2)
        cost = syy - sy**2 / s
        if model == "slope":
            sx, sxx, sxy = sums(w * x), sums(w * x**2), sums(w * x * y)
            cost = cost - (sxy - sx * sy / s) ** 2 / (sxx - sx**2 / s)
    length = np.subtract.outer(np.arange(n + 1), np.arange(n + 1)).T
    return np.where(length >= least, np.maximum(cost, 0.0) * weights.mean(), np.inf)


def _segmentations(cost: Floats, most: int) -> tuple[Floats, Floats]:
    """Best cost with 0 … ``most`` changes ``[m, most + 1]``, and where the last segment begins ``[m, most, n + 1]``."""
    best = cost[:, 0, :]
    totals, parents = [best[:, -1]], []
    for _ in range(most):
        candidates = best[:, :, None] + cost
        parents.append(candidates.argmin(1))
        best = candidates.min(1)
        totals.append(best[:, -1])
    return np.stack(totals, 1), np.stack(parents, 1) if parents else np.zeros((len(cost), 0, 0))


def _bounds(parents: Floats, changes: int, n: int) -> list[int]:
    bounds = [n]
    for number in range(changes, 0, -1):
        bounds.append(int(parents[number - 1, bounds[-1]]))
    return [0, *bounds[:0:-1], n]


@lru_cache(maxsize=256)
def _penalty(places: tuple[float, ...], estimated: bool, correlation: float, level: float, model: str) -> float:
    """The penalty with which a share ``level`` of pure noise gives a change, independent or correlated (the larger)."""
    n = min(len(places), MOST_POINTS)
    grid = np.array(places[:n])
    least = 3 if model == "slope" else 2
    needed = []
    for phi in {0.0, correlation}:
        generator = np.random.default_rng(_SEED)
        smallest = []
        chunk = max(1, int(4e6) // (n + 1) ** 2)
        for begin in range(0, _SIMULATIONS, chunk):
            noise = correlated_noise(min(chunk, _SIMULATIONS - begin), n, phi, generator)
            if estimated:
                noise = noise / scatter_scale(grid, noise, np.ones(n))[:, None]
            cost = _segment_costs(grid, noise, np.ones(n), least, model)
            totals, _ = _segmentations(cost, min(3, n // least - 1))
            gain = (totals[:, :1] - totals[:, 1:]) / np.arange(1, totals.shape[1])
            smallest.append(gain.max(1))
        needed.append(float(np.quantile(np.concatenate(smallest), 1 - level)))
    return max(needed) + 2 * float(np.log(len(places) / n))

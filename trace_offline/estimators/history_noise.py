"""Noise of a history (one metric over checkpoints) and the limits beyond which a change is more than noise.

Assumption, stated wherever the limits are used: what the checkpoints add to a smooth curve is Gaussian, and correlated
between neighbours by at most ``CORRELATION`` (autoregressive, first order). Stronger correlation needs a larger value.

Scatter without stderr: each point minus the interpolation of its two neighbours in ``log(step + 1)`` (Gasser, Sroka and
Jennen-Steinmetz 1986, Biometrika 73:625), from nine points on also minus the cubic through four neighbours, which bends
with the curve; the smaller of the two robust scales (median absolute residual / 0.6745).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import signal, stats

from trace_offline.estimators.krylov import Floats

Places = NDArray[np.intp]

CORRELATION = 0.3
"""Largest correlation between the noise of neighbouring checkpoints that the limits allow for."""
LEAST_FOR_SCATTER = 6
"""Fewest points from which the noise can be told from the points themselves."""

_DRAWS = 1000
_SEED = 20250704


class NoiseUnknown(ValueError):
    """The noise cannot be judged: too few points without standard errors."""


@dataclass(frozen=True)
class Noise:
    """``sigma [n]``: standard deviation of each point. ``source``: ``stderr``, ``scatter`` or ``stderr and scatter``.

    ``places`` is None when the standard errors are taken as known; otherwise the places on the axis whose scatter
    gave the scale, so that limits allow for the scale's own uncertainty.
    """

    sigma: Floats
    source: str
    places: tuple[float, ...] | None = None
    correlation: float = CORRELATION

    def limit(self, level: float, tests: int) -> float:
        """Standard errors that the largest of ``tests`` contrasts of pure noise exceeds with probability ≤ ``level``.

        Bonferroni's bound: with a known sigma ``Φ⁻¹(1 - level / tests)``; with an estimated one the ``c`` that solves
        ``E min(1, tests Φ(-c σ̂/σ)) = level``, the expectation over simulated ``σ̂/σ`` at the same places.
        """
        if self.places is None:
            return float(stats.norm.isf(level / max(tests, 1)))
        return _limit(self.places, self.correlation, level, max(tests, 1))

    def swell(self, length: Places) -> Floats:
        """Factor on the stderr of a mean of ``length`` neighbours that their correlation adds; 1 for one point."""
        most = int(np.max(length, initial=1))
        lags = np.arange(most)
        powers = self.correlation**lags
        cumulated, weighted = np.cumsum(powers), np.cumsum(lags * powers)
        table = 1 + 2 * (cumulated - 1 - weighted / np.arange(1, most + 1))
        return np.sqrt(table)[np.asarray(length, int) - 1]

    def contrast(self, weights: Floats) -> Floats:
        """Standard errors of ``weights [m, n] @ values``: the larger of correlated and independent noise."""
        scaled = np.atleast_2d(weights) * self.sigma
        lag = np.abs(np.subtract.outer(np.arange(len(self.sigma)), np.arange(len(self.sigma))))
        correlated = np.einsum("mi,ij,mj->m", scaled, self.correlation**lag, scaled, optimize=True)
        return np.sqrt(np.maximum(correlated, (scaled**2).sum(1)))

    def means(self, first: Places, after: Places) -> Floats:
        """Standard errors of the means of the points ``first … after - 1``."""
        total = np.concatenate([[0.0], np.cumsum(self.sigma**2)])
        length = after - first
        return np.sqrt(np.maximum(total[after] - total[first], 0)) / length * self.swell(length)


def estimate_noise(steps: Floats, values: Floats, stderr: Floats | None, *, correlation: float = CORRELATION) -> Noise:
    """The noise of ``values [n]`` at ``steps [n]`` (increasing) from ``stderr [n]`` (NaN where there is none).

    Standard errors are used as they are unless the scatter between neighbours is larger than they can explain (beyond
    the 99.9 % quantile of what independent noise gives), which happens when training itself jitters: then they are
    scaled up to the scatter. A stderr of zero (an accuracy of exactly 0 or 1 has one) or a missing one is replaced by
    the smallest positive one. Raises NoiseUnknown without any stderr and with fewer than ``LEAST_FOR_SCATTER`` points.
    """
    places, values = np.log1p(np.asarray(steps, float)), np.asarray(values, float)
    floor = 1e-9 * max(float(np.ptp(values)), float(np.abs(values).max()) * 1e-3, 1e-300)
    given = np.full(len(values), np.nan) if stderr is None else np.asarray(stderr, float)
    positive = given[given > 0]
    enough = len(values) >= LEAST_FOR_SCATTER
    key = tuple(np.round(places, 6).tolist())
    if not len(positive):
        if not enough:
            raise NoiseUnknown(
                f"{len(values)} checkpoints without standard errors: at least {LEAST_FOR_SCATTER} are needed to tell "
                "noise from change"
            )
        scale = float(scatter_scale(places, values[None], np.ones(len(values)))[0])
        return Noise(np.full(len(values), max(scale, floor)), "scatter", key, correlation)
    sigma = np.maximum(np.where(given > 0, given, positive.min()), floor)
    if enough:
        ratio = float(scatter_scale(places, values[None], sigma)[0])
        if ratio > max(1.0, float(np.quantile(_ratios(key, 0.0), 0.999))):
            return Noise(sigma * ratio, "stderr and scatter", key, correlation)
    return Noise(sigma, "stderr", None, correlation)


def scatter_scale(places: Floats, values: Floats, sigma: Floats) -> Floats:
    """Robust scale of the residuals from neighbours, of each row of ``values [m, n]``, in units of ``sigma [n]``."""
    scale = _robust(_residuals(places, values, sigma, (-1, 1)))
    if values.shape[1] < 9:
        return scale
    return np.minimum(scale, _robust(_residuals(places, values, sigma, (-2, -1, 1, 2))))


def _residuals(places: Floats, values: Floats, sigma: Floats, around: tuple[int, ...]) -> Floats:
    """Each point minus the polynomial through its neighbours (Lagrange), over the stderr of that difference."""
    reach = max(around)
    middle = np.arange(reach, len(places) - reach)
    residual, variance = values[:, middle].copy(), sigma[middle] ** 2
    for one in around:
        weight = np.ones(len(middle))
        for other in around:
            if other != one:
                gap = places[middle + one] - places[middle + other]
                weight = weight * (places[middle] - places[middle + other]) / gap
        residual -= weight * values[:, middle + one]
        variance = variance + weight**2 * sigma[middle + one] ** 2
    return residual / np.sqrt(variance)


def _robust(residuals: Floats) -> Floats:
    """Median absolute residual / 0.6745; the root mean square where more than half of them are exactly zero."""
    median = np.median(np.abs(residuals), axis=1) / stats.norm.ppf(0.75)
    return np.where(median > 0, median, np.sqrt((residuals**2).mean(1)))


def correlated_noise(rows: int, n: int, correlation: float, generator: np.random.Generator) -> Floats:
    """``[rows, n]``: stationary first-order autoregressive Gaussian noise of unit variance."""
    white = generator.standard_normal((rows, n))
    white[:, 1:] *= np.sqrt(1 - correlation**2)
    return np.asarray(signal.lfilter([1.0], [1.0, -correlation], white, axis=1))


@lru_cache(maxsize=256)
def _ratios(places: tuple[float, ...], correlation: float) -> Floats:
    noise = correlated_noise(_DRAWS, len(places), correlation, np.random.default_rng(_SEED))
    return scatter_scale(np.array(places), noise, np.ones(len(places)))


@lru_cache(maxsize=4096)
def _limit(places: tuple[float, ...], correlation: float, level: float, tests: int) -> float:
    ratios = _ratios(places, correlation)
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        if np.minimum(1.0, tests * stats.norm.sf(middle * ratios)).mean() > level:
            low = middle
        else:
            high = middle
    return high

"""TwoNN: the dimension in which second neighbours are as far as they are, relative to first ones.

E. Facco, M. d'Errico, A. Rodriguez, A. Laio, "Estimating the intrinsic dimension of datasets by a minimal
neighborhood information", Scientific Reports 7, 12140 (2017). If the density is constant on the scale of the second
neighbour, the ratio μ = r₂/r₁ of the distances to the second and the first neighbour has the distribution function
``F(μ) = 1 − μ^(−d)``, that is, ``ln μ`` is exponential with rate d.

Two estimators of d from the same ratios are in use. The *fit* is the published one and the default of DADApy's and
scikit-dimension's TwoNN: a line through the origin of ``−ln(1 − F)`` against ``ln μ`` without the largest tenth of the
ratios, which are the ones that noise and varying density reach. *Maximum likelihood* uses all ratios and has the
smallest variance if the model holds, but one wild ratio moves it more. If the ratios were independent that variance
would be d²/n; neighbouring points share neighbours, and the true standard deviation is 10 to 30 % larger.
"""

from __future__ import annotations

import math

import numpy as np


def neighbor_log_ratios(squared_distances: np.ndarray) -> np.ndarray:
    """``ln μ = ½ ln(r₂²/r₁²)`` of every point, ``[n]``, from squared distances ``[n, ≥2]``, nearest first.

    Raises ValueError when a point has a neighbour at distance 0: the ratio is then meaningless, and dropping such
    points would bias the rest. Remove duplicates first (``distinct_rows``).
    """
    if squared_distances.ndim != 2 or squared_distances.shape[1] < 2:
        raise ValueError(f"expected squared distances [points, at least 2], found {squared_distances.shape}")
    first, second = squared_distances[:, 0], squared_distances[:, 1]
    if not np.all(first > 0):
        raise ValueError(f"{int(np.sum(~(first > 0)))} points coincide with another point; pass distinct points only")
    return 0.5 * np.log(second / first)


def twonn_fit(log_ratios: np.ndarray, *, discard_fraction: float = 0.1) -> float:
    """Slope of ``−ln(1 − i/n)`` on ``ln μ_(i)`` through the origin, i = 1…⌊n(1 − discard)⌋ in ascending order.

    ``log_ratios [n]`` ≥ 0 → dimension (no unit). ``discard_fraction`` in (0, 1): the share of the largest ratios that
    is left out; at least the largest one always is, because there ``1 − F = 0``.

    Raises ValueError for fewer than 3 points, a fraction out of range, or ratios that are all 1.
    """
    _check(log_ratios, at_least=3)
    if not 0 < discard_fraction < 1:
        raise ValueError(f"expected a discarded fraction between 0 and 1, found {discard_fraction}")
    n = len(log_ratios)
    kept = min(int(n * (1 - discard_fraction)), n - 1)
    if kept < 2:
        raise ValueError(f"only {kept} of {n} ratios are left for the fit; at least 2 are needed")
    x = np.sort(log_ratios)[:kept]
    y = -np.log1p(-np.arange(1, kept + 1) / n)
    denominator = float(x @ x)
    if denominator == 0:
        raise ValueError("all first and second neighbours are equally far: the ratios do not determine a dimension")
    return float(x @ y) / denominator


def twonn_maximum_likelihood(log_ratios: np.ndarray) -> float:
    """``(n − 1) / Σ ln μ``: maximum likelihood with the factor that makes it unbiased (n / Σ ln μ is too large).

    ``log_ratios [n]`` ≥ 0 → dimension (no unit). Its standard deviation is d/√(n − 2) for independent ratios.
    See also F. Denti et al., Scientific Reports 12, 20005 (2022). Raises ValueError for fewer than 3 points or when
    all ratios are 1.
    """
    _check(log_ratios, at_least=3)
    total = math.fsum(log_ratios.tolist())
    if total == 0:
        raise ValueError("all first and second neighbours are equally far: the ratios do not determine a dimension")
    return (len(log_ratios) - 1) / total


def _check(log_ratios: np.ndarray, at_least: int) -> None:
    if log_ratios.ndim != 1 or len(log_ratios) < at_least:
        raise ValueError(f"expected the ratios of at least {at_least} points, found shape {log_ratios.shape}")
    if not np.all(np.isfinite(log_ratios)) or np.any(log_ratios < 0):
        raise ValueError("expected finite, non-negative logarithms of r₂/r₁")

"""Standard errors when observations come in clusters (the words of one sentence, the sentences of one document).

Tokens of one sequence are not independent, so a mean over tokens must not claim √n precision. Only sums per cluster
are kept, and clusters beyond a fixed number are merged at random (the random-groups estimator), so memory does not
grow with the data and the order of arrival does not matter.

References: W. G. Cochran (1977), Sampling Techniques, 3rd ed., 6.3 (ratio estimator) and 9A.5 (cluster sampling);
K. M. Wolter (2007), Introduction to Variance Estimation, 2nd ed., chapters 2 (random groups) and 4 (jackknife).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

MAX_CLUSTERS = 1024
"""Clusters kept apart for ratios: the relative error of a standard error from G clusters is about 1/√(2G)."""

JACKKNIFE_GROUPS = 50
"""Groups left out one at a time for statistics that are no ratio (F1, calibration error)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its standard error; each None when it is undefined (no observation; fewer than two clusters)."""

    value: float | None
    stderr: float | None


def cluster_codes(groups: NDArray[np.integer], limit: int = MAX_CLUSTERS) -> Codes:
    """Group of every row → code in 0…min(groups, limit)−1; rows of one group share a code, codes are even in size."""
    _, ranks = np.unique(np.asarray(groups), return_inverse=True)
    return ranks.reshape(-1).astype(np.int64) % limit


def cluster_sums(values: NDArray[np.floating], codes: Codes, n_clusters: int) -> Floats:
    """``values [n]`` or ``[n, F]`` summed within each cluster: ``[G]`` or ``[G, F]``, in float64."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 1:
        return np.bincount(codes, weights=values, minlength=n_clusters).astype(np.float64)
    columns = [np.bincount(codes, weights=column, minlength=n_clusters) for column in values.T]
    return np.stack(columns, axis=1) if columns else np.zeros((n_clusters, 0))


def ratio(numerators: Floats, denominators: Floats) -> Estimate:
    """R = Σ a / Σ b over clusters, with the linearised standard error of a ratio.

    ``numerators [G]``, ``denominators [G]``: sums per cluster (of a token-wise quantity, and of the tokens).
    stderr² = G/(G−1) · Σ (a_g − R b_g)² / (Σ b)², over the G clusters with b_g ≠ 0.
    """
    used = denominators != 0
    clusters, total = int(used.sum()), float(denominators.sum())
    if clusters == 0 or total == 0:
        return Estimate(None, None)
    value = float(numerators.sum()) / total
    if clusters < 2:
        return Estimate(value, None)
    residual = numerators[used] - value * denominators[used]
    return Estimate(value, math.sqrt(clusters / (clusters - 1) * float(residual @ residual)) / abs(total))


def combined_ratios(numerators: Floats, denominators: Floats, weights: Floats) -> Estimate:
    """Σ_k w_k R_k with R_k = Σ_g a_gk / Σ_g b_gk: a difference of two means (w = 1, −1), an average of class means.

    ``numerators [G, K]``, ``denominators [G, K]``: sums per cluster; ``weights [K]``. A cluster may count for several
    means, whose dependence is then taken into account: stderr² = G/(G−1) · Σ_g (Σ_k w_k (a_gk − R_k b_gk) / Σ b_k)².
    No value when one of the means has no observation.
    """
    totals = denominators.sum(0)
    if not len(denominators) or (totals == 0).any():
        return Estimate(None, None)
    means = numerators.sum(0) / totals
    value = float(weights @ means)
    used = (denominators != 0).any(1)
    clusters = int(used.sum())
    # a mean of a single cluster has no known spread, however many clusters the others have
    if clusters < 2 or ((denominators != 0).sum(0) < 2).any():
        return Estimate(value, None)
    influence = ((numerators[used] - means * denominators[used]) / totals) @ weights
    return Estimate(value, math.sqrt(clusters / (clusters - 1) * float(influence @ influence)))


def sum_of_squared_shares(counts: Floats) -> Estimate:
    """Σ_c s_c² with s_c the share of class c; ``counts [G, K]`` per cluster. Standard error by linearisation.

    It is what a guess drawn from the class shares gets right on average.
    """
    per_cluster = counts.sum(1)
    total = float(per_cluster.sum())
    if total == 0:
        return Estimate(None, None)
    shares = counts.sum(0) / total
    value = float(shares @ shares)
    return Estimate(value, ratio(2.0 * (counts @ shares), per_cluster).stderr)


def jackknife(sums: Floats, statistic: Callable[[Floats], Floats]) -> Estimate:
    """A smooth function of sums, with its standard error by leaving out one group at a time.

    ``sums [G, …]`` per group; ``statistic`` maps ``[…]`` to a number and ``[G, …]`` to ``[G]``, NaN where undefined.
    stderr² = (G−1)/G · Σ (θ_(−g) − mean θ_(−g))². Groups without observations are left aside.
    """
    if not len(sums):
        return Estimate(None, None)
    used = sums.reshape(len(sums), -1).any(axis=1)
    sums = sums[used]
    total = sums.sum(axis=0)
    value = float(statistic(total)) if len(sums) else math.nan
    if not math.isfinite(value):
        return Estimate(None, None)
    groups = len(sums)
    if groups < 2:
        return Estimate(value, None)
    replicates = np.asarray(statistic(total[None] - sums), dtype=np.float64)
    if not np.isfinite(replicates).all():
        return Estimate(value, None)
    spread = replicates - replicates.mean()
    return Estimate(value, math.sqrt((groups - 1) / groups * float(spread @ spread)))

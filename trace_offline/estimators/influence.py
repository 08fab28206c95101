"""Standard errors of smooth functions of sums, from the influence of every observation.

The infinitesimal jackknife (L. Jaeckel, 1972; B. Efron, "The Jackknife, the Bootstrap and Other Resampling Plans",
1982, chapter 6): if ψ_i is the derivative of a statistic by the weight of observation i (all weights 1), leaving out a
cluster g changes it by about −Σ_{i∈g} ψ_i, and ``stderr² = G/(G−1) Σ_g (Σ_{i∈g} ψ_i)²``. To first order the same as
leaving out every cluster, at the price of one evaluation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def influence_stderr(influence: Tensor, clusters: NDArray[np.integer] | None = None) -> float | None:
    """Standard error from ``influence [n]``; None for fewer than two independent clusters.

    ``clusters [n]``: observations with equal numbers depend on each other; None: none do.
    """
    values = influence.detach().double().cpu().numpy()
    if clusters is not None:
        codes = np.unique(clusters, return_inverse=True)[1].reshape(-1)
        values = np.bincount(codes, weights=values)
    count = len(values)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * float(values @ values))

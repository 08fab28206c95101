"""Orthogonal Procrustes distance of two representations of the same points.

Both are centred and scaled to Frobenius norm 1; the distance is what is left after the best rotation (or reflection):
``d = min_Q ‖A Q − B‖ = √(2 − 2 ‖AᵀB‖_*)`` with the nuclear norm, between 0 and √2. A metric. P. Schönemann, "A
generalized solution of the orthogonal Procrustes problem", Psychometrika 31, 1966; F. Ding, J.-S. Denain,
J. Steinhardt, "Grounding Representation Similarity with Statistical Testing", NeurIPS 2021, arXiv:2108.01661.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trace_offline.estimators.clustered import Estimate
from trace_offline.estimators.influence import influence_stderr

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


def procrustes_distance(first: Tensor, second: Tensor, clusters: NDArray[np.integer] | None = None) -> Estimate:
    """Distance of two tables ``[n, D₁]``, ``[n, D₂]`` from ``cka.unit_points``; the narrower is padded with zeros.

    Standard error: infinitesimal jackknife of ``ρ = Σ_i aᵢᵀQ bᵢ / √(Σ|aᵢ|² Σ|bᵢ|²)``, in which to first order Q does
    not move (it is where ρ is largest), divided by d. ``clusters [n]``: points that are not independent.

    Equal tables are at distance exactly 0. Raises ValueError when the numbers of points differ.
    """
    if len(first) != len(second):
        raise ValueError(f"expected two tables of the same points, found {len(first)} and {len(second)}")
    if torch.equal(first, second):
        return Estimate(0.0, 0.0)
    first, second = _narrow(first), _narrow(second)
    width = max(first.shape[1], second.shape[1])
    first, second = (torch.nn.functional.pad(table, (0, width - table.shape[1])) for table in (first, second))
    left, _, right = torch.linalg.svd(first.T @ second)
    rotated = first @ (left @ right)
    # The residual itself, not 2 − 2ρ: near 0 the difference would lose half of the digits.
    distance = float(torch.linalg.vector_norm(rotated - second))
    if distance == 0:
        return Estimate(0.0, 0.0)
    products = (rotated * second).sum(1)
    influence = products - 0.5 * products.sum() * (first.square().sum(1) + second.square().sum(1))
    return Estimate(min(distance, 2.0**0.5), influence_stderr(-influence / distance, clusters))


def _narrow(table: Tensor) -> Tensor:
    """At most n columns: more than that are rotated into n, which changes no distance and no inner product."""
    if table.shape[1] <= table.shape[0]:
        return table
    return torch.linalg.qr(table.T).R.T

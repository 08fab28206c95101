"""Projection-weighted canonical correlation (PWCCA) of two representations of the same points.

The mean of the canonical correlations ρ, each weighted by how much of the *first* representation it accounts for:
``Σ α_i ρ_i / Σ α_i`` with ``α_i = Σ_j |⟨h_i, x_j⟩|`` over the features x_j, h_i the canonical variates of the first.
Not symmetric. 1 when the two agree up to an invertible linear map. A. Morcos, M. Raghu, S. Bengio, "Insights on
representational similarity in neural networks with canonical correlation", NeurIPS 2018, arXiv:1806.05759.

Directions that hold less than ``RANK_TOLERANCE`` of the largest singular value are rounding and are left out: canonical
correlations do not see scale, so that rounding would count as much as signal. With few points for the width the value
is high by chance (exactly 1 when there are fewer points than dimensions), hence the bound on n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from trace_offline.estimators.clustered import Estimate
from trace_offline.estimators.subsampling import jackknife_stderr

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]

RANK_TOLERANCE = 1e-5


def pwcca(first: Tensor, second: Tensor, parts: Sequence[np.ndarray] = ()) -> Estimate:
    """PWCCA of tables ``[n, D₁]``, ``[n, D₂]`` (any shift and scale; weights from the first), between 0 and 1.

    ``parts``: a division of the rows (``subsampling.partition``) for the delete-group jackknife; none: no standard
    error. Equal tables give exactly 1: all canonical correlations are 1.

    Raises ValueError unless there are more points than dimensions in both together (by rank, plus one for the mean).
    """
    if len(first) != len(second):
        raise ValueError(f"expected two tables of the same points, found {len(first)} and {len(second)}")
    value = _pwcca(first, second)
    if torch.equal(first, second):
        return Estimate(1.0, 0.0)
    if len(parts) < 2:
        return Estimate(value, None)
    rest = torch.ones(len(first), dtype=torch.bool)
    left_out = []
    for part in parts:
        rest.fill_(True)
        rest[torch.from_numpy(part)] = False
        try:
            left_out.append(_pwcca(first[rest], second[rest]))
        except ValueError:
            return Estimate(value, None)
    return Estimate(value, float(jackknife_stderr(np.array(left_out))))


def _pwcca(first: Tensor, second: Tensor) -> float:
    # numpy rather than torch: these matrices are small and many, and waking threads for each costs more than the work
    x, y = (table.double().cpu().numpy() for table in (first, second))
    x, y = x - x.mean(0), y - y.mean(0)
    (roots, axes), (roots_y, axes_y) = _principal(x), _principal(y)
    ranks, n = (len(roots), len(roots_y)), len(x)
    if not all(ranks):
        raise ValueError("all points coincide: there is nothing to compare")
    if n - 1 <= sum(ranks):
        raise ValueError(
            f"{n} points fill {ranks[0]} and {ranks[1]} dimensions: with no more points than dimensions canonical "
            "correlations are high whatever the data"
        )
    cross = (axes / roots).T @ (x.T @ y) @ (axes_y / roots_y)
    rotation, correlations, _ = np.linalg.svd(cross, full_matrices=False)
    # h = X E λ^(−1/2) p, so that ⟨h, x_j⟩ is row j of E λ^(1/2) p
    weights = np.abs((axes * roots) @ rotation).sum(0)
    # correlations cannot exceed 1; only rounding can
    return float((weights * correlations.clip(0, 1)).sum() / weights.sum())


def _principal(centred: Floats) -> tuple[Floats, Floats]:
    """Singular values ``[r]`` and right singular vectors ``[D, r]`` of the directions that are not rounding."""
    if not np.isfinite(centred).all():
        raise ValueError("expected finite points, found NaN or infinity")
    if centred.shape[1] >= len(centred):
        raise ValueError(
            f"{len(centred)} points of {centred.shape[1]} features: with no more points than dimensions canonical "
            "correlations are high whatever the data"
        )
    values, vectors = np.linalg.eigh(centred.T @ centred)
    keep = values > RANK_TOLERANCE**2 * max(values[-1], 0.0)
    return np.sqrt(values[keep]), vectors[:, keep]

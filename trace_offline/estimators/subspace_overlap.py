"""How much two subspaces have in common: overlap and principal angles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trace_offline.estimators.krylov import Floats

_ORTHONORMAL = 1e-3


@dataclass(frozen=True)
class SubspaceOverlap:
    """``value = (1/k) Σ cos² θ_i``; ``angles [k]``: principal angles θ, radians, ascending; ``chance``: k/n."""

    value: float
    angles: Floats
    chance: float


def subspace_overlap(first: Tensor, second: Tensor) -> SubspaceOverlap:
    """``(1/k) ‖V₁ᵀV₂‖_F²``: 1 for one subspace, 0 for orthogonal ones, k/n on average for random ones.

    The measure of Gur-Ari, Roberts & Dyer 2018 (arXiv 1812.04754). Small angles come from sines, since a cosine near
    1 has lost their digits (Björck & Golub, Math. Comp. 27, 1973). Equal arrays give exactly 1 and angles of exactly 0.

    Args:
        first: ``[k, n]``, orthonormal rows.
        second: ``[k, n]``, orthonormal rows.

    Raises:
        ValueError: shapes that differ, no vector, rows that are not orthonormal or not finite.

    """
    if first.ndim != 2 or first.shape != second.shape or not 1 <= first.shape[0] <= first.shape[1]:
        raise ValueError(
            f"expected two bases of one shape [k, n], 1 <= k <= n, found {tuple(first.shape)} and {tuple(second.shape)}"
        )
    count, size = first.shape
    unit = torch.eye(count, dtype=torch.float64)
    for rows in (first, second):
        gram = _inner(rows, rows)
        if not bool(torch.isfinite(gram).all()) or float((gram - unit).abs().max()) > _ORTHONORMAL:
            raise ValueError("expected orthonormal rows: their products differ from the identity by more than 0.001")
    if torch.equal(first, second):
        return SubspaceOverlap(1.0, np.zeros(count), count / size)
    mixed = _inner(first, second)
    cosines = torch.linalg.svdvals(mixed).clamp(max=1.0).numpy()
    # what of the second lies outside the first has the sines as its singular values
    sines = torch.linalg.svdvals(second.double() - mixed.T @ first.double()).clamp(max=1.0).numpy()
    return SubspaceOverlap(float((cosines**2).mean()), np.arctan2(np.sort(sines), cosines), count / size)


def _inner(first: Tensor, second: Tensor) -> Tensor:
    return first.double() @ second.double().T

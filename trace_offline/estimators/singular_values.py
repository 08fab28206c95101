"""Singular values of a matrix and what they say: spectral norm, stable rank, effective rank, condition number.

Singular values come from the eigenvalues of the smaller Gram matrix in float64. Squaring costs half of the digits, so
values below about 1e-7 of the largest are rounding; entries given in float32 (or less) are themselves no better than
that, and the Gram matrix is several times cheaper than a decomposition. Matrices given in float64 are decomposed.

M. Rudelson, R. Vershynin, "Sampling from large matrices", J. ACM 54, 2007 (stable rank); O. Roy, M. Vetterli, "The
effective rank: a measure of effective dimensionality", EUSIPCO 2007; R. Diehl Martinez et al., "Tending Towards
Stability", arXiv:2410.11451, 2024 (proportional effective rank).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 22


def singular_values(matrix: Tensor) -> Tensor:
    """All ``min(a, b)`` singular values of ``matrix [a, b]`` (any floating dtype), descending, float64, same device.

    Raises ValueError for anything but a finite matrix with at least one entry.
    """
    if matrix.ndim != 2 or not matrix.numel() or not matrix.is_floating_point():
        raise ValueError(f"expected a floating-point matrix, found shape {tuple(matrix.shape)} {matrix.dtype}")
    matrix = matrix.detach()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("expected finite entries, found NaN or infinity")
    if matrix.dtype == torch.float64:
        return torch.linalg.svdvals(matrix)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    width = tall.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=matrix.device)
    for part in tall.split(max(1, _CHUNK // width)):
        wide = part.double()
        gram.addmm_(wide.T, wide)
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min_(0.0).sqrt_()


def numerical_rank(values: Tensor, shape: tuple[int, int], precision: float = torch.finfo(torch.float32).eps) -> int:
    """How many singular values exceed ``max(shape) · precision · largest`` (the usual rule; 0 for a zero matrix).

    ``precision``: the rounding of the entries the singular values come from.
    """
    largest = float(values.max())
    return int((values > max(shape) * precision * largest).sum())


def stable_rank(values: Tensor) -> float:
    """``Σ σ² / σ_max²``: between 1 and the number of singular values. Raises ValueError when all are 0."""
    scaled = _scaled(values)
    return float(scaled.square().sum())


def effective_rank(values: Tensor) -> float:
    """``exp(−Σ p ln p)`` with ``p = σ / Σ σ``: k equal values and zeros give k. Raises ValueError when all are 0."""
    scaled = _scaled(values)
    share = scaled / scaled.sum()
    # exp of an entropy cannot exceed the number of values, nor fall below 1; only rounding can
    return min(max(math.exp(float(torch.special.entr(share).sum())), 1.0), float(len(values)))


def _scaled(values: Tensor) -> Tensor:
    if values.ndim != 1 or not len(values) or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError("expected finite singular values of at least 0")
    largest = values.max()
    if float(largest) == 0:
        raise ValueError("all singular values are 0")
    return values.double() / largest

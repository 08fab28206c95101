"""Linear centred kernel alignment (CKA) of two representations of the same points.

With K, L the centred Gram matrices of the two: ``CKA = ⟨K, L⟩ / (‖K‖ ‖L‖)`` (Frobenius), 1 when they agree up to
rotation, reflection, shift and one scale. S. Kornblith, M. Norouzi, H. Lee, G. Hinton, "Similarity of Neural Network
Representations Revisited", ICML 2019, arXiv:1905.00414.

Centring by the sample mean makes CKA large by chance when there are few points for the width. The debiased variant
centres so that ⟨K, L⟩ is an unbiased estimate of the population's HSIC (U-centring: off the diagonal, every row sums to
0): L. Song et al., "Feature Selection via Dependence Maximization", JMLR 13, 2012; G. Székely, M. Rizzo, Annals of
Statistics 42, 2014. It is about 0, and may be negative, for unrelated representations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trace_offline.estimators.clustered import Estimate
from trace_offline.estimators.influence import influence_stderr

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class Kernel:
    """``matrix [n, n]``: a centred Gram matrix; ``rows [n]``: sums of squares of its rows. float64."""

    matrix: Tensor
    rows: Tensor


def centred_kernel(points: Tensor) -> Kernel:
    """Gram matrix of ``points [n, D]`` around their mean, scaled to unit trace.

    Raises ValueError for fewer than 2 points, points that are not finite, and points that all coincide.
    """
    centred = unit_points(points)
    matrix = centred @ centred.T
    return Kernel(matrix, matrix.square().sum(1))


def u_centred_kernel(points: Tensor) -> Kernel:
    """The same with U-centring: diagonal 0, every row sums to 0. Raises ValueError for fewer than 4 points, too."""
    n = len(points)
    if n < 4:
        raise ValueError(f"debiased CKA needs at least 4 points, found {n}")
    centred = unit_points(points)
    matrix = centred @ centred.T
    # The mean was removed, so that without its diagonal k a row sums to −k_i and everything to −Σk.
    diagonal = matrix.diagonal().clone()
    matrix += (diagonal[:, None] + diagonal[None, :]) / (n - 2) - diagonal.sum() / ((n - 1) * (n - 2))
    matrix.fill_diagonal_(0.0)
    # Rows that are shifts of each other only: nothing is left but rounding.
    if float(matrix.abs().max()) <= 1e-14:
        raise ValueError("the points have no off-diagonal structure: debiased CKA is not defined")
    return Kernel(matrix, matrix.square().sum(1))


def cka(first: Kernel, second: Kernel, clusters: NDArray[np.integer] | None = None) -> Estimate:
    """CKA of two kernels of the same n points, between −1 and 1 (0 and 1 unless U-centred), with standard error.

    ``clusters [n]``: points that are not independent (tokens of one text). The standard error is the infinitesimal
    jackknife, ``ψ_i = 2 ⟨K_i, L_i⟩/(‖K‖‖L‖) − CKA (‖K_i‖²/‖K‖² + ‖L_i‖²/‖L‖²)`` with row i of each.

    A kernel with itself is exactly 1: ⟨K, K⟩ = ‖K‖². Raises ValueError when the kernels differ in size.
    """
    if first.matrix.shape != second.matrix.shape:
        raise ValueError(f"expected kernels of the same points, found {len(first.matrix)} and {len(second.matrix)}")
    if first is second or torch.equal(first.matrix, second.matrix):
        return Estimate(1.0, 0.0)
    rows = (first.matrix * second.matrix).sum(1)
    squares = float(first.rows.sum()), float(second.rows.sum())
    scale = math.sqrt(squares[0]) * math.sqrt(squares[1])
    # Cauchy-Schwarz: only rounding can leave [−1, 1]
    value = min(1.0, max(-1.0, float(rows.sum()) / scale))
    influence = 2 * rows / scale - value * (first.rows / squares[0] + second.rows / squares[1])
    return Estimate(value, influence_stderr(influence, clusters))


def unit_points(points: Tensor) -> Tensor:
    """``points [n, D]`` minus their mean, divided by their Frobenius norm; float64.

    Raises ValueError for anything but a finite matrix of at least 2 points that do not all coincide.
    """
    if points.ndim != 2 or not points.is_floating_point() or len(points) < 2 or not points.shape[1]:
        raise ValueError(f"expected at least 2 points [points, features], found {tuple(points.shape)} {points.dtype}")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("expected finite points, found NaN or infinity")
    if bool((points == points[0]).all()):
        raise ValueError("all points coincide: there is nothing to compare")
    centred = points.double() - points.double().mean(0)
    return centred / torch.linalg.vector_norm(centred)

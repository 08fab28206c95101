"""Linear CKA of two tables with many rows: the same numbers as ``cka``, without the Gram matrix of the rows.

``⟨K, L⟩ = ‖XᵀY‖²`` (Frobenius) for centred tables X, Y: time n·D₁·D₂ and memory D₁·D₂ instead of n² (S. Kornblith et
al., ICML 2019, arXiv:1905.00414, equation 5). U-centring (``cka.u_centred_kernel``) only needs the squared lengths
k, l of the rows besides:

``⟨K, L⟩_U = ‖XᵀY‖² − n/(n−2) Σ k_i l_i + Σk Σl / ((n−1)(n−2))``,

n(n−3) times the unbiased HSIC of L. Song et al., JMLR 13, 2012, equation 5, for tables that were centred before.
There is no standard error: this is for tables whose rows are all there are, such as the units of a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trace_offline.estimators.cka import unit_points

if TYPE_CHECKING:
    from torch import Tensor

# ⟨K, K⟩_U is a difference of numbers of the size of ⟨K, K⟩ in float64: below this share of it, it is rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class CentredTable:
    """``points [n, D]``: centred, Frobenius norm 1; ``lengths [n]``: squared lengths of its rows; float64.

    ``square``: ⟨K, K⟩; ``square_debiased``: ⟨K, K⟩_U, None for fewer than 4 rows.
    """

    points: Tensor
    lengths: Tensor
    square: float
    square_debiased: float | None


def centred_table(points: Tensor) -> CentredTable:
    """What CKA needs of ``points [n, D]``. Raises ValueError as ``cka.unit_points``."""
    centred = unit_points(points)
    lengths = centred.square().sum(1)
    square = _square(centred, centred)
    debiased = None if len(centred) < 4 else _debiased(square, lengths, lengths)
    return CentredTable(centred, lengths, square, debiased)


def table_cka(first: CentredTable, second: CentredTable) -> float:
    """CKA between 0 and 1; equal tables give exactly 1. Raises ValueError when the numbers of rows differ."""
    if _same(first, second):
        return 1.0
    value = _square(first.points, second.points) / (math.sqrt(first.square) * math.sqrt(second.square))
    # Cauchy-Schwarz: only rounding can leave [0, 1]
    return min(1.0, max(0.0, value))


def table_cka_debiased(first: CentredTable, second: CentredTable) -> float:
    """Debiased CKA between −1 and 1, about 0 for unrelated tables; equal tables give exactly 1.

    Raises ValueError for fewer than 4 rows, when the numbers of rows differ, and for a table without structure off the
    diagonal of its Gram matrix.
    """
    same = _same(first, second)
    for table in (first, second):
        if table.square_debiased is None:
            raise ValueError(f"debiased CKA needs at least 4 points, found {len(table.points)}")
        if table.square_debiased <= _ROUNDING * table.square:
            raise ValueError("the points have no off-diagonal structure: debiased CKA is not defined")
    if same:
        return 1.0
    assert first.square_debiased is not None
    assert second.square_debiased is not None
    product = _debiased(_square(first.points, second.points), first.lengths, second.lengths)
    return min(1.0, max(-1.0, product / (math.sqrt(first.square_debiased) * math.sqrt(second.square_debiased))))


def _square(first: Tensor, second: Tensor) -> float:
    return float((first.T @ second).square().sum())


def _debiased(product: float, first: Tensor, second: Tensor) -> float:
    n = len(first)
    return product - n / (n - 2) * float(first @ second) + float(first.sum() * second.sum()) / ((n - 1) * (n - 2))


def _same(first: CentredTable, second: CentredTable) -> bool:
    if len(first.points) != len(second.points):
        raise ValueError(f"expected tables of the same points, found {len(first.points)} and {len(second.points)}")
    return first is second or torch.equal(first.points, second.points)

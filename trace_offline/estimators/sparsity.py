"""How unevenly the magnitudes of some numbers are spread: Gini index and Hoyer's measure.

Both are 0 when all magnitudes are equal and grow towards 1 as few numbers carry all; both do not change when all
numbers are multiplied by a constant. N. Hurley, S. Rickard, "Comparing Measures of Sparsity", IEEE Transactions on
Information Theory 55, 2009, arXiv:0811.4706; P. Hoyer, "Non-negative Matrix Factorization with Sparseness
Constraints", JMLR 5, 2004.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def gini(values: Tensor) -> Tensor:
    """Gini index of ``|values|`` along the last dimension: ``[…, n] → […]`` float64, between 0 and 1 − 1/n.

    ``Σ_i (2i − n − 1) |v|_(i) / (n Σ |v|)`` with magnitudes in ascending order. Raises ValueError for values that are
    not finite, for no values, and where all are 0.
    """
    magnitudes = _magnitudes(values).sort(-1).values
    n = magnitudes.shape[-1]
    # weights are summed in place: the magnitudes of a large layer are held once, not three times
    total = magnitudes.sum(-1)
    weights = torch.arange(1 - n, n, 2, dtype=torch.float64, device=values.device)
    return ((magnitudes * weights).sum(-1) / (n * total)).clamp_(0.0, 1.0)


def hoyer(values: Tensor) -> Tensor:
    """Hoyer's sparsity along the last dimension: ``(√n − ‖v‖₁/‖v‖₂) / (√n − 1)``, ``[…, n] → […]`` float64 in [0, 1].

    1 when one number alone is not 0. Raises ValueError as ``gini``, and for fewer than 2 values.
    """
    magnitudes = _magnitudes(values)
    if magnitudes.shape[-1] < 2:
        raise ValueError("Hoyer's sparsity needs at least 2 numbers, found 1")
    # divided by the largest first: squares of very small or large numbers would leave the range of floats
    scaled = magnitudes / magnitudes.amax(-1, keepdim=True)
    root = math.sqrt(magnitudes.shape[-1])
    # |v|₁ ≤ √n |v|₂ (Cauchy-Schwarz) and |v|₂ ≤ |v|₁, so that only rounding can leave [0, 1]
    return ((root - scaled.sum(-1) / scaled.square().sum(-1).sqrt()) / (root - 1)).clamp_(0.0, 1.0)


def _magnitudes(values: Tensor) -> Tensor:
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"expected at least one number, found shape {tuple(values.shape)}")
    magnitudes = values.detach().double().abs()
    if not bool(torch.isfinite(magnitudes).all()):
        raise ValueError("expected finite numbers, found NaN or infinity")
    if bool((magnitudes.amax(-1) == 0).any()):
        raise ValueError("all numbers are 0: there is nothing to divide among them")
    return magnitudes

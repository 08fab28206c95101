"""Trace of a symmetric operator: a subspace exactly, the rest by random vectors (Hutch++ and its relatives).

For any orthonormal ``Q [d, n]`` with projector ``P = I − QᵀQ``,

    ``Tr A = Tr(Q A Qᵀ) + Tr(P A P)``,

and ``(n − d) vᵀAv`` with v uniform on the unit sphere of the complement is an unbiased estimate of the second term, of
variance ``≈ 2‖PAP‖_F²``. Hutch++ (Meyer, Musco, Musco & Woodruff, SOSA 2021, arXiv 2010.09649) takes for Q the range of
a random sketch; who has eigenvectors from Lanczos anyway takes those: no subspace of that size leaves a smaller
``‖PAP‖_F`` than the eigenvectors of the largest |λ|. Q must not come from the same random vectors as the probes; then
the sum is unbiased whatever its quality.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trace_offline.estimators.hvp import NonFiniteError
from trace_offline.estimators.krylov import Floats
from trace_offline.estimators.operators import SymmetricOperator, orthogonalize, standard_normal
from trace_offline.estimators.slq import Estimate


@dataclass(frozen=True)
class Moments:
    """Per probe an unbiased sample of ``Tr(PAP)`` (``first [p]``) and of ``Tr((PAP)²)`` (``second [p]``)."""

    first: Floats
    second: Floats


def sphere_probe(operator: SymmetricOperator, generator: torch.Generator, basis: Tensor | None = None) -> Tensor:
    """``[n]``, uniform on the unit sphere of the complement of the orthonormal rows of ``basis``."""
    vector = orthogonalize(standard_normal(operator, generator), basis)
    vector = orthogonalize(vector / torch.linalg.vector_norm(vector), basis)
    return vector / torch.linalg.vector_norm(vector)


def complement_moments(
    operator: SymmetricOperator, probes: int, generator: torch.Generator, basis: Tensor | None = None
) -> Moments:
    """``(n − d) vᵀAv`` and ``(n − d) ‖PAv‖²`` for ``probes`` vectors v of the complement: one product each.

    Empty when the basis spans the whole space. Raises NonFiniteError when a product is NaN or infinite.
    """
    rest = operator.n - (0 if basis is None else len(basis))
    first, second = [], []
    for _ in range(probes if rest else 0):
        vector = sphere_probe(operator, generator, basis)
        image = orthogonalize(operator.product(vector), basis)
        first.append(rest * float(torch.dot(vector, image)))
        second.append(rest * float(torch.dot(image, image)))
    moments = Moments(np.array(first), np.array(second))
    if not (np.isfinite(moments.first).all() and np.isfinite(moments.second).all()):
        raise NonFiniteError("the product with a random vector is not finite")
    return moments


def mean_of(samples: Floats, known: float = 0.0) -> Estimate:
    """``known`` plus the mean of independent samples, with its standard error; exact when there are none."""
    if not len(samples):
        return Estimate(known, 0.0, 0)
    error = float(samples.std(ddof=1) / np.sqrt(len(samples))) if len(samples) > 1 else None
    return Estimate(known + float(samples.mean()), error, len(samples))


def hutchpp(operator: SymmetricOperator, *, products: int, generator: torch.Generator) -> Estimate:
    """``Tr A`` by Hutch++: a third of the products sketches the range, a third measures it, a third the complement.

    Error ``O(‖A‖_* / products)`` for positive semidefinite A, where Hutchinson's is ``O(‖A‖_F / √products)``.

    Args:
        operator: n, dtype, device, product.
        products: at least 6; what ``products // 3`` leaves over is not used. From ``3 n`` on the trace is exact.
        generator: source of the random vectors.

    Returns:
        An Estimate; its standard error is that of the random part (0 when nothing was random).

    Raises:
        ValueError: fewer than 6 products.

    """
    if products < 6:
        raise ValueError(f"expected at least 6 products (two vectors for each third), found {products}")
    third = min(products // 3, operator.n)
    basis = torch.eye(operator.n, dtype=operator.dtype, device=operator.device)
    if third < operator.n:
        sketch = torch.stack([operator.product(standard_normal(operator, generator)) for _ in range(third)])
        basis = range_of(sketch)
    known = sum(float(torch.dot(row, operator.product(row))) for row in basis)
    return mean_of(complement_moments(operator, products // 3, generator, basis).first, known)


def range_of(rows: Tensor) -> Tensor:
    """Orthonormal rows ``[r, n]`` that span the rows of ``[m, n]``; directions below rounding are left out."""
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    limit = torch.finfo(rows.dtype).eps * max(rows.shape) * values.max()
    return basis[values > limit]


def participation_ratio(first: Floats, second: Floats) -> Estimate:
    """``(Tr A)² / Tr(A²)`` from per-probe samples of both, with its jackknife standard error over probes.

    For a definite matrix between 1 (rank one) and n (multiple of the identity), and at most the effective rank; with
    eigenvalues of both signs the trace cancels, and the ratio goes to 0 however many directions are curved.

    Raises:
        ZeroDivisionError: the operator is zero.

    """
    if not second.any():
        raise ZeroDivisionError("the operator is zero: there is no curvature to share out")
    return ratio_of(first, second, power=2)


def ratio_of(above: Floats, below: Floats, *, power: int = 1) -> Estimate:
    """``mean(above)^power / mean(below)`` of paired samples, with its jackknife standard error (None for one pair)."""
    value = float(above.mean() ** power / below.mean())
    count = len(above)
    if count == 1:
        return Estimate(value, None, 1)
    rest = (below.sum() - below) / (count - 1)
    ratio = ((above.sum() - above) / (count - 1)) ** power / np.where(rest == 0, 1.0, rest)
    left_out = np.where(rest == 0, value, ratio)
    return Estimate(value, float(np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())), count)

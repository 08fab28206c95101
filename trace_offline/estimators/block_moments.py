"""Trace and Frobenius norm of all diagonal blocks of a symmetric operator from one set of products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trace_offline.estimators.hutchpp import mean_of
from trace_offline.estimators.hvp import NonFiniteError
from trace_offline.estimators.krylov import Floats
from trace_offline.estimators.operators import SymmetricOperator, orthogonalize
from trace_offline.estimators.slq import Estimate

Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class BlockMoments:
    """Of ``P_b H_bb P_b`` for each block b: ``forms[b] [p, p]`` with entries ``v_iᵀ (H v_j)`` over the block's part.

    Between probes that were not held together the entries are NaN.
    """

    forms: tuple[Floats, ...]

    def traces(self, block: int) -> Floats:
        """``[p]`` unbiased samples of the block's trace: the diagonal."""
        return np.diagonal(self.forms[block]).copy()

    def square(self, block: int) -> Estimate:
        """``‖P_b H_bb P_b‖_F²``, unbiased: the mean of ``M_ij M_ji`` over pairs of probes, with its jackknife error.

        ``(v_i)_bᵀ(H v_j)_b`` and ``(v_j)_bᵀ(H v_i)_b`` agree in what comes from the block itself; what comes from the
        other blocks is made of different vectors in the two, and vanishes on average from their product.
        """
        form = self.forms[block]
        count = len(form)
        if not count:
            return Estimate(0.0, 0.0, 0)
        products = form * form.T
        np.fill_diagonal(products, np.nan)
        pairs = np.isfinite(products)
        filled = np.where(pairs, products, 0.0)
        total, number = filled.sum(), pairs.sum()
        left_number = number - 2 * pairs.sum(1)
        value = float(total / number)
        if not (left_number > 0).all():
            return Estimate(value, None, count)
        left_out = (total - 2 * filled.sum(1)) / left_number
        variance = (count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum())
        return Estimate(value, float(np.sqrt(variance)), count)

    def trace(self, block: int, known: float = 0.0) -> Estimate:
        """The trace of a block: ``known`` (its deflated eigenvalues) plus the mean of the samples."""
        return mean_of(self.traces(block), known)


def block_moments(
    operator: SymmetricOperator,
    blocks: Sequence[Ranges],
    *,
    probes: int,
    generator: torch.Generator,
    bases: Sequence[Tensor | None] | None = None,
    together: int | None = None,
) -> BlockMoments:
    """One product per probe gives every block: ``E[v_bᵀ (Hv)_b] = Tr H_bb`` when the parts v_b are independent.

    Each v_b is uniform on the sphere of squared radius ``n_b − d_b`` in the complement of the block's basis. Beside
    Hutchinson's variance ``2‖H_bb‖_F²`` a sample has that of the blocks beside it, ``Σ_{c≠b} ‖H_bc‖_F²``; both are in
    the scatter that the standard errors are taken from.

    Args:
        operator: n, dtype, device, product.
        blocks: for each block the disjoint ranges ``(start, stop)`` of its coordinates.
        probes: random vectors, at least 2: one product each.
        generator: source of the probes.
        bases: for each block ``[d_b, n_b]`` orthonormal rows that are known exactly, or None.
        together: probes and images held at once, ``2 · together`` vectors; None: all. At least 2.

    Raises:
        ValueError: fewer than 2 probes, or held together.
        NonFiniteError: a product is NaN or infinite.

    """
    together = probes if together is None else min(together, probes)
    if probes < 2 or together < 2:
        raise ValueError(f"expected at least 2 probes, held together, found {probes} and {together}")
    known = [None] * len(blocks) if bases is None else list(bases)
    sizes = [sum(stop - start for start, stop in ranges) for ranges in blocks]
    rest = [size - (0 if basis is None else len(basis)) for size, basis in zip(sizes, known, strict=True)]
    forms = [np.full((probes if left else 0,) * 2, np.nan) for left in rest]
    edges = list(range(0, probes, together))
    if probes - edges[-1] < 2:
        edges[-1] -= 1  # no probe may stand alone
    for first, last in zip(edges, [*edges[1:], probes], strict=True):
        vectors = torch.zeros(last - first, operator.n, dtype=operator.dtype, device=operator.device)
        for row in vectors:
            for ranges, basis, left in zip(blocks, known, rest, strict=True):
                if left:
                    _place(row, ranges, _sphere(operator, ranges, basis, left, generator))
        images = torch.stack([operator.product(row) for row in vectors])
        if not bool(torch.isfinite(images).all()):
            raise NonFiniteError("the product with a random vector is not finite")
        for ranges, form in zip(blocks, forms, strict=True):
            if len(form):
                parts = sum((vectors[:, start:stop] @ images[:, start:stop].T).double().cpu() for start, stop in ranges)
                form[first:last, first:last] = np.asarray(parts)
    return BlockMoments(tuple(forms))


def _sphere(
    operator: SymmetricOperator, ranges: Ranges, basis: Tensor | None, left: int, generator: torch.Generator
) -> Tensor:
    size = sum(stop - start for start, stop in ranges)
    drawn = torch.randn(size, generator=generator, device=generator.device, dtype=torch.float32)
    vector = orthogonalize(drawn.to(device=operator.device, dtype=operator.dtype), basis)
    vector = orthogonalize(vector / torch.linalg.vector_norm(vector), basis)
    return vector * (left**0.5 / torch.linalg.vector_norm(vector))


def _place(row: Tensor, ranges: Ranges, part: Tensor) -> None:
    offset = 0
    for start, stop in ranges:
        row[start:stop] = part[offset : offset + stop - start]
        offset += stop - start

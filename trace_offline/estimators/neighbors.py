"""Exact nearest neighbours of every point of a cloud: the one search all dimension estimators share.

Squared distances from a matrix product, ``|a|² + |b|² − 2a·b``, are fast but wrong where it matters: neighbours that
are much closer to each other than to the centre of the cloud lose all their digits, and the result may be negative.
So the product only *proposes* candidates, the candidates' distances are recomputed from differences in float64, and
a rounding-error bound decides for every point whether the proposal certainly contains its nearest neighbours. Points
that cannot be certified are searched again with a float64 product, and at last by differences to every other point.
The answer is therefore that of a brute-force search in float64, at the price of one float32 product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_SPARE = 8
_UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@dataclass(frozen=True, slots=True)
class Neighbors:
    """The k nearest other points of each of n points, nearest first; ties in the order of the index.

    ``squared_distances [n, k]`` float64, in squared units of the input, never negative. ``indices [n, k]`` int64.
    """

    squared_distances: Tensor
    indices: Tensor

    @property
    def log_distances(self) -> Tensor:
        """``ln r`` of every neighbour, ``[n, k]`` float64; −inf where two points coincide."""
        return 0.5 * self.squared_distances.log()


def nearest_neighbors(points: Tensor, k: int, *, block_bytes: int = 64 << 20) -> Neighbors:
    """The k nearest other points of each row, exactly (Euclidean distance; the row itself is left out by index).

    ``points [n, D]`` floating point, finite → ``Neighbors`` of shape ``[n, k]`` on the same device. Rows that
    coincide with another row have a neighbour at distance exactly 0. ``block_bytes`` bounds the temporary memory.
    The result does not depend on ``block_bytes``.

    Raises ValueError for anything but a finite matrix with more than k rows, or k < 1.
    """
    _check(points, k)
    points = points if points.dtype in (torch.float32, torch.float64) else points.float()
    centred = points.double()
    centred = centred - centred.mean(0)
    n = len(points)
    squared = torch.empty(n, k, dtype=torch.float64, device=points.device)
    indices = torch.empty(n, k, dtype=torch.int64, device=points.device)
    pending = torch.arange(n, device=points.device)
    # "highest" is the only setting under which a float32 product is computed in float32 (not TF32 or bfloat16).
    exact_products = torch.get_float32_matmul_precision() == "highest"
    for dtype in (torch.float32, torch.float64) if exact_products else (torch.float64,):
        pending = _search_by_product(points, centred.to(dtype), pending, k, block_bytes, squared, indices)
        if not len(pending):
            return Neighbors(squared, indices)
    _search_by_differences(points, pending, k, block_bytes, squared, indices)
    return Neighbors(squared, indices)


def _check(points: Tensor, k: int) -> None:
    if points.ndim != 2 or not points.is_floating_point():
        raise ValueError(
            f"expected a floating-point matrix [points, features], found {tuple(points.shape)} {points.dtype}"
        )
    if k < 1:
        raise ValueError(f"expected at least 1 neighbour, found k = {k}")
    if len(points) <= k:
        raise ValueError(f"{k} neighbours need at least {k + 1} points, found {len(points)}")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("expected finite points, found NaN or infinity")


def _search_by_product(
    points: Tensor,
    centred: Tensor,
    rows: Tensor,
    k: int,
    block_bytes: int,
    squared: Tensor,
    indices: Tensor,
) -> Tensor:
    """Fill the answers of ``rows`` that a product in the precision of ``centred`` certifies; return the others."""
    n, width = centred.shape
    n_candidates = min(n - 1, k + _SPARE)
    norms = centred.square().sum(1)
    # |fl(|a|²+|b|²−2a·b) − |a−b|²| ≤ γ(|a|+|b|)², γ = (D+4)u, plus the rounding of the centred coordinates (2u each).
    gamma = (width + 8) * _UNIT_ROUNDOFF[centred.dtype]
    longest = float(norms.max().sqrt()) if n else 0.0
    per_row = 2 * n * centred.element_size() + 3 * 8 * n_candidates * width
    left = []
    for block in rows.split(max(1, block_bytes // max(1, per_row))):
        approximate = torch.addmm(norms[None, :], centred[block], centred.T, alpha=-2).add_(norms[block, None])
        approximate[torch.arange(len(block), device=block.device), block] = torch.inf
        proposed, candidates = approximate.topk(n_candidates, largest=False)
        exact, order = _refine(points, block, candidates, k)
        if n_candidates < n - 1:
            slack = gamma * (norms[block].double().sqrt() + longest).square()
            certain = exact[:, -1] < proposed.double().amax(1) - slack
        else:
            certain = torch.ones(len(block), dtype=torch.bool, device=block.device)
        squared[block[certain]] = exact[certain]
        indices[block[certain]] = order[certain]
        left.append(block[~certain])
    return torch.cat(left) if left else rows


def _search_by_differences(
    points: Tensor, rows: Tensor, k: int, block_bytes: int, squared: Tensor, indices: Tensor
) -> None:
    """Fill the answers of ``rows`` by differences to every other point, in float64."""
    n, width = points.shape
    everyone = torch.arange(n, device=points.device)
    for block in rows.split(max(1, block_bytes // (3 * 8 * n * width + 1))):
        others = everyone.expand(len(block), n)
        others = others[others != block[:, None]].view(len(block), n - 1)
        squared[block], indices[block] = _refine(points, block, others, k)


def _refine(points: Tensor, rows: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of each row's candidates ``[rows, c]`` by float64 differences, ties by index."""
    candidates = candidates.sort(1).values
    differences = points[candidates].double().sub_(points[rows, None].double())
    exact = differences.square_().sum(2)
    exact, order = exact.sort(dim=1, stable=True)
    return exact[:, :k], candidates.gather(1, order[:, :k])

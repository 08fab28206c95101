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
# Candidates beyond the k-th whose distances are recomputed at first; the others only where they could come closer.
_LOOK = 1
_GROUP = 32
_CACHE_BYTES = 1 << 20
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
    points = points.detach()
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
    # A product of few rows is slow, so what is beside the table must be small: on a CPU the differences are.
    per_row = 2 * n * centred.element_size() + 3 * 8 * n_candidates * _GROUP
    if points.device.type != "cpu":
        per_row += 3 * 8 * n_candidates * width
    step = max(1, block_bytes // max(1, per_row))
    # One table for all blocks: fresh memory of this size costs more than the arithmetic on it.
    table = centred.new_empty(min(step, len(rows)), n)
    left = []
    for block in rows.split(step):
        # |a|² is the same along a row: it is added to the few numbers that are looked at.
        approximate = torch.addmm(norms[None, :], centred[block], centred.T, alpha=-2, out=table[: len(block)])
        approximate[torch.arange(len(block), device=block.device), block] = torch.inf
        proposed, candidates = _smallest(approximate, n_candidates)
        proposed = (proposed + norms[block, None]).double()
        slack = gamma * (norms[block].double().sqrt() + longest).square()
        exact, order = _certain_order(points, block, candidates, proposed - slack[:, None], k)
        certain = torch.ones(len(block), dtype=torch.bool, device=block.device)
        if n_candidates < n - 1:
            certain = exact[:, -1] < proposed[:, -1] - slack
        squared[block[certain]] = exact[certain]
        indices[block[certain]] = order[certain]
        left.append(block[~certain])
    return torch.cat(left) if left else rows


def _smallest(table: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` smallest of each row of ``[rows, n]``, ascending, and where they are.

    They lie in the ``count`` groups of columns with the smallest minima, and minima of groups are found faster than
    ranks: only those groups are ranked.
    """
    n = table.shape[1]
    groups = n // _GROUP
    if groups < 4 * count:
        values, places = table.topk(count, largest=False)
        return values, places
    # Group g holds the columns g, g + groups, g + 2 groups, …: minima then run along the memory.
    whole = table[:, : groups * _GROUP].unflatten(1, (_GROUP, groups))
    chosen = whole.amin(1).topk(count, largest=False, sorted=False).indices
    offsets = torch.arange(_GROUP, device=table.device) * groups
    columns = (chosen[:, :, None] + offsets).flatten(1)
    rest = torch.arange(groups * _GROUP, n, device=table.device).expand(len(table), -1)
    columns = torch.cat([columns, rest], 1)
    values, places = table.gather(1, columns).topk(count, largest=False)
    return values, columns.gather(1, places)


def _certain_order(points: Tensor, rows: Tensor, candidates: Tensor, least: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of each row's candidates ``[rows, c]``, which come in the order proposed.

    ``least [rows, c]``: what the squared distance of each candidate is at least. Where that of the later ones exceeds
    the k-th found among the first, they need not be looked at.
    """
    first = k + _LOOK
    if first >= candidates.shape[1]:
        return _refine(points, rows, candidates, k)
    exact, order = _refine(points, rows, candidates[:, :first], k)
    again = exact[:, -1] >= least[:, first]
    if bool(again.any()):
        exact[again], order[again] = _refine(points, rows[again], candidates[again], k)
    return exact, order


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
    exact = torch.empty(candidates.shape, dtype=torch.float64, device=points.device)
    width = points.shape[1]
    # A few rows at a time on a CPU: their differences then stay in its cache.
    step = len(rows)
    if points.device.type == "cpu":
        step = max(1, _CACHE_BYTES // max(1, 8 * candidates.shape[1] * width))
    for start in range(0, len(rows), max(step, 1)):
        part = candidates[start : start + step]
        others = points.index_select(0, part.flatten()).double().view(*part.shape, width)
        others -= points[rows[start : start + step], None].double()
        torch.sum(others.square_(), 2, out=exact[start : start + step])
    exact, order = exact.sort(dim=1, stable=True)
    return exact[:, :k], candidates.gather(1, order[:, :k])

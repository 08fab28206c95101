"""How narrow the cone of representations is, and how much of them a few dimensions or vectors carry.

Anisotropy is the mean cosine of two random vectors: 0 when directions are uniform, near 1 when all point the same way.
K. Ethayarajh, "How Contextual are Contextualized Word Representations?", EMNLP 2019, arXiv:1909.00512. Outlier
dimensions: O. Kovaleva et al., "BERT Busters", 2021, arXiv:2105.06990; W. Timkey, M. van Schijndel, "All Bark and No
Bite: Rogue Dimensions", EMNLP 2021, arXiv:2109.04404.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from trace_offline.estimators.clustered import Estimate, cluster_sums, ratio
from trace_offline.estimators.subsampling import jackknife_stderr

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def mean_cosine(points: Tensor, clusters: NDArray[np.integer] | None = None) -> Estimate:
    """Mean cosine over all pairs of ``points [n, D]`` from different clusters, with the delete-one-cluster jackknife.

    ``clusters [n]``: points with equal numbers depend on each other (tokens of one text), so their pairs say nothing
    about two random texts; None: all pairs of different points. All pairs are counted, by
    ``(|Σ u|² − Σ_g |Σ_{i∈g} u_i|²) / (n² − Σ_g n_g²)`` with unit vectors u; nothing is sampled. The standard error is
    None for fewer than 3 clusters.

    Raises ValueError for points that are not finite or are 0, and for fewer than 2 clusters.
    """
    _check(points)
    wide = points.double()
    # The largest entry first: squares of very small numbers would vanish.
    wide = wide / wide.abs().amax(1, keepdim=True)
    unit = wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    codes = _codes(clusters, len(points))
    count = int(codes.max()) + 1
    if count < 2:
        raise ValueError("all points belong to one text: there is no pair of independent ones")
    where = torch.from_numpy(codes).to(points.device)
    sums = torch.zeros(count, points.shape[1], dtype=torch.float64, device=points.device).index_add_(0, where, unit)
    sizes = np.bincount(codes, minlength=count).astype(np.float64)
    inner = sums.square().sum(1).cpu().numpy()
    total = sums.sum(0)
    square = float(total @ total)
    # A mean of cosines cannot leave [−1, 1]; only rounding can.
    value = _clip((square - inner.sum()) / (sizes.sum() ** 2 - (sizes**2).sum()))
    if count < 3:
        return Estimate(float(value), None)
    # Without cluster g: |S − S_g|² = |S|² − 2 S·S_g + |S_g|², and its own pairs are gone from both sums.
    numerators = square - 2 * (sums @ total).cpu().numpy() + 2 * inner - inner.sum()
    denominators = (sizes.sum() - sizes) ** 2 - (sizes**2).sum() + sizes**2
    return Estimate(float(value), float(jackknife_stderr(_clip(numerators / denominators))))


def top_dimension_share(points: Tensor, dimensions: int, clusters: NDArray[np.integer] | None = None) -> Estimate:
    """Share of ``Σ x²`` that the ``dimensions`` largest coordinates (by their sum of squares) hold; 0 to 1.

    ``points [n, D]``. D equal coordinates give ``dimensions / D``. Standard error of a ratio over clusters, with the
    coordinates taken as given (their choice makes the share slightly too large when coordinates are nearly equal).
    Raises ValueError for points that are not finite or all 0, and unless 1 ≤ dimensions ≤ D.
    """
    if not 1 <= dimensions <= points.shape[1]:
        raise ValueError(f"expected between 1 and {points.shape[1]} dimensions, found {dimensions}")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("expected finite points, found NaN or infinity")
    squares = points.double().square()
    top = squares.sum(0).topk(dimensions).indices
    codes = _codes(clusters, len(points))
    count = int(codes.max()) + 1
    within = cluster_sums(squares[:, top].sum(1).cpu().numpy(), codes, count)
    found = ratio(within, cluster_sums(squares.sum(1).cpu().numpy(), codes, count))
    if found.value is None:
        raise ValueError("all points are 0")
    return Estimate(min(found.value, 1.0), found.stderr)


def max_to_median_norm(points: Tensor) -> float:
    """Largest over median Euclidean norm of ``points [n, D]``; at least 1. Raises ValueError when the median is 0."""
    if not bool(torch.isfinite(points).all()):
        raise ValueError("expected finite points, found NaN or infinity")
    norms = np.linalg.norm(points.double().cpu().numpy(), axis=1)
    median = float(np.median(norms))
    if median == 0:
        raise ValueError("at least half of the points are 0")
    return float(norms.max()) / median


def _clip(values: np.ndarray | float) -> np.ndarray:
    return np.clip(values, -1.0, 1.0)


def _codes(clusters: NDArray[np.integer] | None, n: int) -> NDArray[np.int64]:
    if clusters is None:
        return np.arange(n, dtype=np.int64)
    return np.unique(clusters, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _check(points: Tensor) -> None:
    if points.ndim != 2 or not points.numel() or not points.is_floating_point():
        raise ValueError(f"expected points [points, features], found {tuple(points.shape)} {points.dtype}")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("expected finite points, found NaN or infinity")
    if bool((points == 0).all(1).any()):
        raise ValueError("some points are 0: they have no direction")

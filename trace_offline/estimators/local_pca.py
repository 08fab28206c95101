"""Local PCA: how many directions the neighbourhood of a point spreads into.

K. Fukunaga, D. Olsen, "An algorithm for finding intrinsic dimensionality of data", IEEE Trans. Computers C-20,
176 (1971): in the neighbourhood of a point the manifold is nearly flat, and the eigenvalues of the covariance that
exceed a fixed share of the largest one count its directions. Here a neighbourhood is the k nearest other points (the
point itself is left out, as in scikit-dimension), the share is 5 %, and the counts are averaged over the points.

The answer cannot exceed k − 1, and grows with k on curved clouds: say k with every number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SHARE = 0.05


def local_pca_dimensions(
    points: Tensor, neighbors: Tensor, *, share: float = SHARE, block_bytes: int = 64 << 20
) -> np.ndarray:
    """Eigenvalues above ``share`` × the largest of the covariance of each neighbourhood, int64 ``[c]``.

    ``points [n, D]`` floating point; ``neighbors [c, k]`` int64: rows of ``points`` that make up each neighbourhood
    (``nearest_neighbors(…).indices`` at the points looked at). k ≥ 2. From the Gram or the covariance matrix, whichever
    is smaller, in float64.

    Raises ValueError for k < 2, a share outside (0, 1), or a neighbourhood whose points all coincide.
    """
    import torch

    if neighbors.ndim != 2 or neighbors.shape[1] < 2:
        raise ValueError(f"expected neighbourhoods [points, at least 2], found {tuple(neighbors.shape)}")
    if not 0 < share < 1:
        raise ValueError(f"expected a share of the largest eigenvalue between 0 and 1, found {share}")
    k, width = neighbors.shape[1], points.shape[1]
    counts = [np.zeros(0, np.int64)]
    for block in neighbors.split(max(1, block_bytes // (8 * (2 * k * width + min(k, width) ** 2)))):
        cloud = points[block].double()
        cloud = cloud - cloud.mean(1, keepdim=True)
        small = cloud @ cloud.mT if k <= width else cloud.mT @ cloud
        values = torch.linalg.eigvalsh(small)
        largest = values[:, -1:]
        if not bool((largest > 0).all()):
            raise ValueError(f"{int((~(largest > 0)).sum())} neighbourhoods consist of one point; pass distinct points")
        counts.append((values > share * largest).sum(1).cpu().numpy())
    return np.concatenate(counts)


def local_pca_dimension(points: Tensor, neighbors: Tensor, *, share: float = SHARE) -> float:
    """The mean of ``local_pca_dimensions`` (no unit). Raises ValueError also for no neighbourhoods at all."""
    counts = local_pca_dimensions(points, neighbors, share=share)
    if not len(counts):
        raise ValueError("expected at least one neighbourhood, found none")
    return float(counts.mean())

"""How many nearest neighbours of every point are the same in two representations of the same points.

For each point the Jaccard index of its two sets of k neighbours, ``|A ∩ B| / |A ∪ B|``: 1 when the sets agree, near 0
when they are unrelated. It looks at small scales only, where CKA is ruled by the largest directions. D. Doimo,
A. Glielmo, A. Ansuini, A. Laio, "Hierarchical nucleation in deep neural networks", NeurIPS 2020, arXiv:2007.03506;
M. Huh, B. Cheung, T. Wang, P. Isola, "The Platonic Representation Hypothesis", ICML 2024, arXiv:2405.07987.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def neighbourhood_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Jaccard index of two sets of neighbours for every point: ``int64 [n, k]`` twice → ``float64 [n]``.

    Each row holds k different indices. Raises ValueError when the shapes differ or k is 0.
    """
    if first.shape != second.shape or first.ndim != 2 or not first.shape[1]:
        raise ValueError(f"expected two tables [points, neighbours], found {tuple(first.shape)}, {tuple(second.shape)}")
    shared = (first[:, :, None] == second[:, None, :]).any(2).sum(1).double()
    return shared / (2 * first.shape[1] - shared)


def overlap_by_chance(n: int, k: int) -> float:
    """Expected Jaccard index of two independent random sets of k among the n − 1 other points.

    The intersection h is hypergeometric: ``Σ_h P(h) h / (2k − h)``. Raises ValueError unless 1 ≤ k ≤ n − 1.
    """
    from scipy.stats import hypergeom

    if not 1 <= k <= n - 1:
        raise ValueError(f"expected between 1 and {n - 1} neighbours of {n} points, found {k}")
    shared = np.arange(k + 1)
    return float((hypergeom.pmf(shared, n - 1, k, k) * shared / (2 * k - shared)).sum())

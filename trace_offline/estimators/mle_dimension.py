"""Maximum-likelihood dimension from the k nearest neighbours of every point.

E. Levina, P. Bickel, "Maximum likelihood estimation of intrinsic dimension", NIPS 17 (2004): around point i,
``1/d_i = 1/(k−1) Σ_{j<k} ln(r_k/r_j)``. The points are combined as D. MacKay and Z. Ghahramani proposed ("Comments on
'Maximum likelihood estimation of intrinsic dimension'", 2005): the *inverses* are averaged, which is the maximum
likelihood of one common d, whereas the average of the d_i is biased upwards by (k−1)/(k−2) and by its heavy tail.
"""

from __future__ import annotations

import numpy as np


def inverse_local_dimensions(squared_distances: np.ndarray) -> np.ndarray:
    """``1/d_i = 1/(k−1) Σ_{j<k} ln(r_k/r_j)`` of every point, ``[n]``, from squared distances ``[n, k]``.

    k ≥ 2 is the number of columns, nearest first. Raises ValueError when a point has a neighbour at distance 0
    (remove duplicates first, ``distinct_rows``).
    """
    if squared_distances.ndim != 2 or squared_distances.shape[1] < 2:
        raise ValueError(f"expected squared distances [points, at least 2], found {squared_distances.shape}")
    if not np.all(squared_distances[:, 0] > 0):
        coinciding = int(np.sum(~(squared_distances[:, 0] > 0)))
        raise ValueError(f"{coinciding} points coincide with another point; pass distinct points only")
    logs = 0.5 * np.log(squared_distances)
    return (logs[:, -1:] - logs[:, :-1]).mean(1)


def mle_dimension(squared_distances: np.ndarray) -> float:
    """``1 / mean_i(1/d_i)`` over all points: squared distances ``[n, k]``, nearest first → dimension (no unit).

    Raises ValueError for no points, k < 2, coinciding points, or when all k neighbours are equally far everywhere.
    """
    inverses = inverse_local_dimensions(squared_distances)
    if not len(inverses):
        raise ValueError("expected at least one point, found none")
    mean = float(inverses.mean())
    if mean == 0:
        raise ValueError("all neighbours are equally far: the distances do not determine a dimension")
    return 1 / mean

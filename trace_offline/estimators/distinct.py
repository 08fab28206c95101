"""Which rows of a table are different points.

Nearest-neighbour estimators assume that no two points coincide. Representations do coincide: all tokens of one type
at the embedding output, all positions with the same left context in a causal model. The latter agree only up to
rounding (the same sum is evaluated in another order when a batch has another shape), so that a test for equality
alone would leave pairs at distances of pure rounding noise, each of which ruins a ratio of distances.
"""

from __future__ import annotations

import numpy as np


def distinct_rows(points: np.ndarray, *, tolerance: float = 0.0) -> np.ndarray:
    """Indices of rows that are different points, ascending: of rows that coincide the first one stays.

    ``points [n, D]`` → ``int64 [m]``, m ≤ n. With ``tolerance`` 0 rows coincide when they are equal as float numbers
    (0.0 equals −0.0). With ``tolerance`` t > 0 also rows x, y with ``|x − y| ≤ t · max(|x|, |y|)`` (norms of the rows
    as given, not centred, because rounding is relative to them): going down the table, a row is dropped when it
    coincides with a row kept before. The kept rows are pairwise farther apart than the tolerance.

    Raises ValueError for anything but a finite floating-point matrix, or a negative tolerance.
    """
    if points.ndim != 2 or not np.issubdtype(points.dtype, np.floating):
        raise ValueError(f"expected a floating-point matrix [points, features], found {points.shape} {points.dtype}")
    if not np.isfinite(points).all():
        raise ValueError("expected finite points, found NaN or infinity")
    if tolerance < 0:
        raise ValueError(f"expected a tolerance of at least 0, found {tolerance}")
    first = _first_of_equal(points)
    if tolerance > 0 and len(first) > 1:
        first = first[_farther_than(points[first].astype(np.float64), tolerance)]
    return first


def _first_of_equal(points: np.ndarray) -> np.ndarray:
    """Indices of the first row of every set of equal rows, ascending."""
    n, width = points.shape
    if n == 0 or width == 0:
        return np.arange(min(n, 1), dtype=np.int64)
    # Adding 0.0 turns −0.0 into 0.0; finite floats are then equal exactly when their bytes are.
    rows = np.ascontiguousarray(points + points.dtype.type(0))
    seen: dict[bytes, int] = {}
    for index, row in enumerate(rows):
        seen.setdefault(row.tobytes(), index)
    return np.fromiter(seen.values(), dtype=np.int64, count=len(seen))


def _farther_than(points: np.ndarray, tolerance: float) -> np.ndarray:
    """Mask of the rows that stay when each row near an earlier kept row is dropped (float64 ``[n, D]``).

    Distances along one direction never exceed distances in space, so only rows whose projections are close have to be
    compared; for points in general position those are few.
    """
    n, width = points.shape
    norms = np.linalg.norm(points, axis=1)
    # A fixed direction: the outcome must not depend on it, only the running time does.
    direction = np.random.default_rng(0).standard_normal(width)
    projection = points @ (direction / np.linalg.norm(direction))
    order = np.argsort(projection, kind="stable")
    ordered = projection[order]
    # Whatever y is compared, |x − y| ≤ t·max(|x|, |y|) implies |x − y| ≤ reach(x) when t < 1; the last term is for
    # the rounding of the projection itself.
    scale = tolerance / (1 - tolerance) if tolerance < 1 else np.inf
    reach = np.minimum(scale * norms, tolerance * norms.max()) + 1e-13 * norms.max()
    low = np.searchsorted(ordered, ordered - reach[order], side="left")
    high = np.searchsorted(ordered, ordered + reach[order], side="right")
    kept_by_position = high - low == 1
    position = np.empty(n, dtype=np.int64)
    position[order] = np.arange(n)
    for index in np.flatnonzero(~kept_by_position[position]):
        place = position[index]
        window = np.arange(low[place], high[place])
        earlier = order[window[kept_by_position[window]]]
        earlier = earlier[earlier < index]
        distance = np.linalg.norm(points[earlier] - points[index], axis=1)
        kept_by_position[place] = not np.any(distance <= tolerance * np.maximum(norms[earlier], norms[index]))
    return kept_by_position[position]

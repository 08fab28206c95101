"""GRIDE: TwoNN for neighbours farther away, so that the dimension can be read at several scales.

F. Denti, D. Doimo, A. Laio, A. Mira, "The generalized ratios intrinsic dimension estimator", Scientific Reports 12,
20005 (2022). If the density is constant on the scale of the n₂-th neighbour, the ratio μ = r_{n₂}/r_{n₁} has the
density ``d (μ^d − 1)^(n₂−n₁−1) / (μ^((n₂−1)d+1) B(n₂−n₁, n₁))`` for μ > 1; n₁ = 1, n₂ = 2 is TwoNN. Small scales see
noise, large ones curvature and edges; a plateau between them is the dimension one can speak of.
"""

from __future__ import annotations

import numpy as np


def gride_scales(most: int) -> tuple[tuple[int, int], ...]:
    """The pairs (n₁, n₂) = (1, 2), (2, 4), (4, 8), … with n₂ ≤ ``most``; none for ``most`` < 2."""
    scales = []
    first = 1
    while 2 * first <= most:
        scales.append((first, 2 * first))
        first *= 2
    return tuple(scales)


def gride(squared_distances: np.ndarray, first: int, second: int) -> float:
    """Maximum likelihood of d from the ratios of the ``second`` (n₂) to the ``first`` (n₁) neighbour of every point.

    Squared distances ``[n, ≥ n₂]``, nearest first → dimension (no unit). With v = ln μ it is the root of
    ``n/d + (n₂−n₁−1) Σ v/(1−e^{−dv}) − (n₂−1) Σ v``, which falls from +∞ to ``−n₁ Σ v``: there is exactly one.

    Raises ValueError for n₁ < 1, n₂ ≤ n₁, too few neighbours, coinciding points, no points, or ratios that are all 1.
    """
    if not 1 <= first < second:
        raise ValueError(f"expected neighbours 1 ≤ n₁ < n₂, found {first} and {second}")
    if squared_distances.ndim != 2 or squared_distances.shape[1] < second or not len(squared_distances):
        raise ValueError(f"expected squared distances [points, at least {second}], found {squared_distances.shape}")
    near = squared_distances[:, first - 1]
    if not np.all(squared_distances[:, 0] > 0):
        coinciding = int(np.sum(~(squared_distances[:, 0] > 0)))
        raise ValueError(f"{coinciding} points coincide with another point; pass distinct points only")
    return _root(0.5 * np.log(squared_distances[:, second - 1] / near), first, second)


def _root(v: np.ndarray, first: int, second: int) -> float:
    total = float(v.sum())
    if total == 0:
        raise ValueError("all neighbours are equally far: the ratios do not determine a dimension")
    n, between = len(v), second - first - 1
    # n/d ≤ Σ v/(1−e^{−dv}) ≤ n/d + Σ v encloses the root. The mean of v is (ψ(n₂) − ψ(n₁))/d, the sum of 1/(d·i) over
    # n₁ ≤ i < n₂, which gives a start close by; the function is convex and falls, so that Newton stays left of the
    # root from the first one on. Bisection is the net under rounding.
    low = n * (1 + between) / ((second - 1) * total)
    high = n * (1 + between) / (first * total)
    d = min(max(n * sum(1 / i for i in range(first, second)) / total, low), high)
    for _ in range(200):
        gap = -np.expm1(-d * v)
        with np.errstate(invalid="ignore", divide="ignore"):
            pull = v / gap
            bend = pull * pull * (1 - gap)
        tied = gap == 0
        if tied.any():
            pull[tied], bend[tied] = 1 / d, 1 / d**2
        value = n / d + between * float(pull.sum()) - (second - 1) * total
        low, high = (d, high) if value > 0 else (low, d)
        step = d + value / (n / d**2 + between * float(bend.sum()))
        previous, d = d, step if low <= step <= high else 0.5 * (low + high)
        # The error after a step is about the square of its relative length.
        if abs(d - previous) <= 1e-7 * d:
            break
    return d

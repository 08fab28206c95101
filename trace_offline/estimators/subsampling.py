"""Standard errors from subsamples: disjoint parts for nearest-neighbour statistics, left-out parts for smooth ones.

The ordinary bootstrap is not an option: a resample repeats points, repeated points are neighbours at distance zero, and
the ratios of distances lose their meaning. The jackknife over single points is known to be inconsistent for such
statistics. What does hold is the definition itself: a random part of the points that has m of them *is* a sample of
size m, and disjoint parts are independent, so the spread of the statistic over the parts of a partition is an unbiased
estimate of its variance at size m (D. Politis, J. Romano, M. Wolf, "Subsampling", 1999). Averages over points of
functions of their nearest neighbours obey a central limit theorem at rate √n (M. Penrose, J. Yukich, Annals of Applied
Probability 11, 2001), so that variance is carried over to n by m/n. Neighbours are searched anew within every part:
those found among all points belong to another sample size.

Two refinements. Estimates of a dimension depend on the sample size through their bias, and their standard deviation is
proportional to the dimension (exactly so for exponential log-ratios), so it is the *relative* spread that is carried
over. And the partition is repeated, because one of G parts leaves only G − 1 degrees of freedom.

Functions of moments (spectra of covariances) are smooth and for them the delete-group jackknife holds; it keeps the
sample size nearly at n, which matters because the small eigenvalues of a covariance depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def partition(
    n: int, parts: int, generator: np.random.Generator, clusters: np.ndarray | None = None
) -> list[np.ndarray]:
    """A random division of ``range(n)`` into ``parts`` sets of nearly equal size; ascending indices, int64.

    ``clusters [n]``: points with equal numbers stay together (tokens of one text are not independent); parts then
    differ in size by at most about one cluster. Raises ValueError when there are fewer clusters (or points) than parts.
    """
    codes = np.arange(n) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sizes = np.bincount(codes, minlength=0) if n else np.zeros(0, np.int64)
    if parts < 1 or len(sizes) < parts:
        raise ValueError(f"cannot divide {len(sizes)} independent groups of points into {parts} parts")
    owner = np.empty(len(sizes), np.int64)
    shuffled = generator.permutation(len(sizes))
    if clusters is None:
        owner[shuffled] = np.arange(len(sizes)) % parts
    else:
        # Largest cluster first, each to the smallest part: random among equals thanks to the shuffle.
        filled = np.zeros(parts, np.int64)
        for cluster in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
            part = int(filled.argmin())
            owner[cluster] = part
            filled[part] += sizes[cluster]
    return [np.flatnonzero(owner[codes] == part) for part in range(parts)]


def subsample_covariance(
    statistics: Callable[[np.ndarray], Sequence[float]],
    n: int,
    *,
    subsamples: int = 20,
    smallest: int = 50,
    seed: int = 0,
    clusters: np.ndarray | None = None,
) -> np.ndarray | None:
    """Covariance ``[S, S]`` of the *relative* errors of S positive √n-consistent statistics of n points.

    ``statistics(indices)`` computes the values on a part of the points; ``subsamples`` parts are looked at in all. With
    parts of m_g points and values θ_g the entry of two statistics is the average over partitions of
    ``Σ_g m_g (θ_g/θ̄ − 1)(θ'_g/θ̄' − 1) / (G − 1) / n``. Parts are a fifth of the points, or larger where a fifth would
    be fewer than ``smallest``.

    Returns None where two parts of ``smallest`` points cannot be had. ``clusters`` as in ``partition``.
    """
    independent = n if clusters is None else len(np.unique(clusters))
    parts = min(5, n // smallest, independent // 2)
    if parts < 2:
        return None
    generator = np.random.default_rng(seed)
    covariances = []
    for _ in range(-(-subsamples // parts)):
        chosen = partition(n, parts, generator, clusters)
        if min(len(part) for part in chosen) < smallest // 2:
            return None
        sizes = np.array([len(part) for part in chosen], np.float64)[:, None]
        found = np.array([statistics(part) for part in chosen], np.float64)
        relative = found / ((sizes * found).sum(0) / n) - 1
        covariances.append((sizes * relative).T @ relative / (parts - 1) / n)
    return np.asarray(np.mean(covariances, axis=0))


def subsample_stderr(
    statistics: Callable[[np.ndarray], Sequence[float]],
    full: Sequence[float],
    n: int,
    *,
    subsamples: int = 20,
    smallest: int = 50,
    seed: int = 0,
    clusters: np.ndarray | None = None,
) -> list[float] | None:
    """Standard errors of the values ``full`` of all points: the diagonal of ``subsample_covariance`` (see there).

    ``stderr² = θ² · average over partitions of Σ_g m_g (θ_g/θ̄ − 1)² / (G − 1) / n``; its relative error is about
    ``1/√(2 · subsamples · (G − 1)/G)``. Returns None where two parts of ``smallest`` points cannot be had.
    """
    covariance = subsample_covariance(
        statistics, n, subsamples=subsamples, smallest=smallest, seed=seed, clusters=clusters
    )
    if covariance is None:
        return None
    return [float(value) for value in np.asarray(full, np.float64) * np.sqrt(np.diag(covariance))]


def jackknife_stderr(left_out: np.ndarray) -> np.ndarray:
    """Delete-group jackknife: ``sqrt((G−1)/G Σ_g (θ_(g) − mean)²)`` from values with each of G parts left out.

    ``left_out [G, …]`` → ``[…]``. The parts must divide all points and be of about equal size (``partition``).
    Raises ValueError for fewer than 2 parts.
    """
    parts = len(left_out)
    if parts < 2:
        raise ValueError(f"expected values for at least 2 left-out parts, found {parts}")
    spread = np.square(left_out - left_out.mean(0)).sum(0)
    return np.asarray(np.sqrt((parts - 1) / parts * spread))

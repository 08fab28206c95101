"""What TwoNN would find with more and more points: the sample-size curve, and its continuation to neighbours at 0.

Nearest-neighbour estimators assume a constant density up to the neighbours they use. In many dimensions those are far
away whatever the sample (in dimension 40 the second of 10,000 neighbours of a Gaussian is at half the typical distance
of two points), and the estimate falls short, the more the fewer the points. With n points of a cloud the second
neighbour has the mean squared distance ρ(n); ρ falls like n^(−2/d), and where ρ → 0 the assumption holds.

How the estimate depends on ρ is known for the case that all clouds in many dimensions resemble, a sphere of dimension
D: within an angle θ of a point lie points in number ∝ sin^D θ, the chord is r = 2 sin(θ/2), and the local slope of
ln (number) against ln r is ``d = D (1 − ρ)/(1 − ρ/2)`` with ρ in units of the mean squared distance of two points. The
power that is linear in ρ to second order is the third: ``d³ = D³ (1 − 3ρ/2 + O(ρ³))``. Hence

    ``d(n)³ = d∞³ − b ρ(n)``,

fitted by least squares through the sizes n, n/2, n/4, … of nested random subsamples; the unit of ρ does not matter.
Simulation agreed (Gaussians, cubes, spheres and a curved embedding of dimension 20 and 40, 10,000 points): of the
powers 1 to 4 and the law itself with a free unit, the third had the smallest mean error, just before the second,
which scatters more; powers n^(−α) of the sample size, also with the exponents 1/d and 2/d that theory gives for edges
and for curvature, diverged at dimension 40.

It is an extrapolation: a cloud that folds back on itself at the distance of its neighbours, or whose dimension differs
between scales (noise!), does not follow the law, and the result is then farther off than the estimate it started from.

E. Facco et al., Scientific Reports 7, 12140 (2017) and F. Denti et al., Scientific Reports 12, 20005 (2022) read the
dimension against the sample size by decimation, without continuing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trace_offline.estimators.mle_dimension import inverse_local_dimensions
from trace_offline.estimators.neighbors import nearest_neighbors
from trace_offline.estimators.twonn import neighbor_log_ratios, twonn_fit

if TYPE_CHECKING:
    from torch import Tensor

POWER = 3
FEWEST_LEVELS = 3
MOST_LEVELS = 8


@dataclass(frozen=True, slots=True)
class SampleSizeCurve:
    """Estimates at falling sample sizes, each over all disjoint nested subsamples of that size.

    ``n [J]`` points of one subsample; ``twonn [J]`` mean of the published fits; ``twonn_sd [J − 1]`` standard deviation
    between single subsamples, from the second size on; ``twonn_ml [J]`` ``(N−1)/Σ ln μ`` over the points of all
    subsamples; ``mle [≤ J]`` inverses averaged over all points, for the sizes that exceed k; ``squared_distance [J]``
    mean squared distance to the second neighbour, in squared units of the points.
    """

    n: np.ndarray
    twonn: np.ndarray
    twonn_sd: np.ndarray
    twonn_ml: np.ndarray
    mle: np.ndarray
    squared_distance: np.ndarray


def curve_levels(n: int, *, smallest: int = 100, most: int = MOST_LEVELS) -> int:
    """How many sizes n, n/2, n/4, … are at least ``smallest``: between 0 and ``most``."""
    levels = 0
    while levels < most and n >> levels >= smallest:
        levels += 1
    return levels


def nested_subsamples(n: int, levels: int, generator: np.random.Generator) -> list[list[np.ndarray]]:
    """Level j: 2^j disjoint subsets of ``range(n)``, each of ⌊n/2^j⌋ points and inside one of level j − 1; int64.

    At most 2^j − 1 points are left out at level j. Raises ValueError when the last level would be empty.
    """
    if levels < 1 or n >> (levels - 1) < 1:
        raise ValueError(f"cannot halve {n} points {levels - 1} times")
    found = [[generator.permutation(n)]]
    for level in range(1, levels):
        size = n >> level
        found.append([half for parent in found[-1] for half in (parent[:size], parent[size : 2 * size])])
    return [[np.sort(part) for part in level] for level in found]


def sample_size_curve(
    points: Tensor, levels: int, *, k: int = 20, generator: np.random.Generator, full: np.ndarray | None = None
) -> SampleSizeCurve:
    """TwoNN (fit and maximum likelihood) and MLE over ``k`` neighbours at n, n/2, … (``levels`` sizes).

    ``points [n, D]`` distinct, floating point; neighbours are searched anew in every subsample. ``full``: squared
    distances ``[n, ≥ max(2, k)]`` among all points, when they are known already. Cost: about twice that of one search.

    Raises ValueError when a subsample is too small (4 points) or its ratios do not determine a dimension.
    """
    import torch

    n = len(points)
    rows: dict[str, list[float]] = {"n": [], "twonn": [], "sd": [], "ml": [], "mle": [], "rho": []}
    for level, parts in enumerate(nested_subsamples(n, levels, generator)):
        size = len(parts[0])
        if size < 4:
            raise ValueError(f"halving {n} points {level} times leaves {size}; at least 4 are needed")
        wanted = max(2, k if size > k else 2)
        if level == 0 and full is not None:
            tables = [full[:, :wanted]]
        else:
            tables = [
                nearest_neighbors(points[torch.from_numpy(part).to(points.device)], wanted)
                .squared_distances.cpu()
                .numpy()
                for part in parts
            ]
        ratios = [neighbor_log_ratios(table) for table in tables]
        fits = [twonn_fit(ratio) for ratio in ratios]
        total = float(sum(ratio.sum() for ratio in ratios))
        rows["n"].append(size)
        rows["twonn"].append(float(np.mean(fits)))
        if level:
            rows["sd"].append(float(np.std(fits, ddof=1)))
        rows["ml"].append((sum(len(ratio) for ratio in ratios) - 1) / total)
        rows["rho"].append(float(np.mean([table[:, 1].mean() for table in tables])))
        if size > k:
            rows["mle"].append(1 / float(np.mean([inverse_local_dimensions(table[:, :k]).mean() for table in tables])))
    return SampleSizeCurve(*(np.array(rows[name]) for name in ("n", "twonn", "sd", "ml", "mle", "rho")))


def extrapolated_dimension(dimensions: np.ndarray, squared_distance: np.ndarray, *, power: int = POWER) -> float:
    """``d∞`` of ``d³ = d∞³ − b ρ`` by least squares; ``dimensions [J]`` and ρ ``[J]`` at J ≥ 3 sizes (no unit).

    Raises ValueError for fewer than 3 sizes, values that are not positive and finite, distances that do not differ, or
    when the continuation to ρ = 0 is not positive (the estimate falls with the sample size so fast that it has no limit
    under this law: different dimensions at different scales).
    """
    scale, terms = _terms(dimensions, squared_distance, power)
    return scale * float(terms.sum()) ** (1 / power)


def extrapolation_weights(dimensions: np.ndarray, squared_distance: np.ndarray, *, power: int = POWER) -> np.ndarray:
    """``∂ ln d∞ / ∂ ln d_j``, ``[J]``, which sum to 1: how relative errors of the curve pass to the continuation.

    ``stderr² = d∞² wᵀ C w`` with C the covariance of the relative errors of the curve (``subsample_covariance``).
    Linear on purpose: a fifth of the points, extrapolated by itself, is far from linear. Raises as
    ``extrapolated_dimension`` does.
    """
    terms = _terms(dimensions, squared_distance, power)[1]
    return np.asarray(terms / terms.sum())


def _terms(dimensions: np.ndarray, squared_distance: np.ndarray, power: int) -> tuple[float, np.ndarray]:
    """Scale s and terms t with ``(d∞/s)³ = Σ t``: each size's part of the intercept of the fitted line."""
    if dimensions.ndim != 1 or dimensions.shape != squared_distance.shape or len(dimensions) < FEWEST_LEVELS:
        raise ValueError(
            f"expected dimensions and distances at {FEWEST_LEVELS} or more sizes, found {dimensions.shape} and "
            f"{squared_distance.shape}"
        )
    both = np.stack([dimensions, squared_distance])
    if not np.isfinite(both).all() or both.min() <= 0:
        raise ValueError("expected positive, finite dimensions and squared distances")
    y, x = (dimensions / dimensions[0]) ** power, squared_distance / squared_distance[0]
    spread = x - x.mean()
    if not float(spread @ spread) > 1e-12:
        raise ValueError("the neighbours are equally far at all sample sizes: there is nothing to extrapolate")
    terms = (1 / len(x) - x.mean() * spread / (spread @ spread)) * y
    if terms.sum() <= 0:
        raise ValueError(
            "the estimate falls so fast with the sample size that its continuation to neighbours at distance 0 is not "
            "positive: there are different dimensions at different scales"
        )
    return float(dimensions[0]), terms

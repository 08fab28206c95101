"""The estimates of dimension of one cloud of distinct points, with their standard errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trace_offline.analyzers._dimension_points import SMALLEST

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.analyzers.base import Context
    from trace_offline.estimators.extrapolation import SampleSizeCurve

NEIGHBOR_METRICS = ("twonn", "twonn_ml", "mle")
SPECTRAL_METRICS = ("pca_participation_ratio", "pca_90", "pca_99")
SMALLEST_CURVE = 100
"""Fewest points of the smallest subsample of the sample-size curve."""

_JACKKNIFE_PARTS = 20
Arrays = dict[str, tuple[float, ...]]


class Estimate(NamedTuple):
    """A number or the reason why there is none."""

    value: float | None
    stderr: float | None
    reason: str | None


@dataclass(frozen=True)
class _Searched:
    """A cloud, or a part of it, after its one neighbour search: what every estimator reads."""

    points: Tensor
    squared: np.ndarray
    indices: Tensor
    centers: np.ndarray


@dataclass(frozen=True)
class _Estimator:
    needs: int
    call: Callable[[_Searched], float]


def metrics_of(params: Any) -> tuple[str, ...]:
    """The metrics that every cloud of distinct points has under these parameters, in the order they are yielded."""
    return (
        *NEIGHBOR_METRICS,
        *(("gride",) if params.gride_to >= 2 else ()),
        *(("local_pca",) if params.local_pca_k else ()),
        *(("twonn_extrapolated",) if params.curve else ()),
        *SPECTRAL_METRICS,
    )


def estimates(points: np.ndarray, clusters: np.ndarray | None, context: Context) -> tuple[dict[str, Estimate], Arrays]:
    """Every metric of ``metrics_of`` and every array, from ``points [n, D]``, distinct and at least ``SMALLEST``."""
    import torch

    table = torch.from_numpy(points).to(context.model.device)
    found, arrays, squared = _by_neighbors(table, clusters, context)
    if context.params.curve:
        found["twonn_extrapolated"], curve = _by_sample_size(table, squared, clusters, context)
        arrays |= curve
    found |= _by_spectrum(points, clusters, context.seed)
    return {metric: found[metric] for metric in metrics_of(context.params)}, arrays


def _estimators(params: Any) -> dict[str, _Estimator]:
    from trace_offline.estimators.gride import gride_scales
    from trace_offline.estimators.local_pca import local_pca_dimension
    from trace_offline.estimators.mle_dimension import mle_dimension
    from trace_offline.estimators.twonn import neighbor_log_ratios, twonn_fit, twonn_maximum_likelihood

    k, around = params.k, params.local_pca_k
    chosen = {
        "twonn": _Estimator(2, lambda at: twonn_fit(neighbor_log_ratios(at.squared))),
        "twonn_ml": _Estimator(2, lambda at: twonn_maximum_likelihood(neighbor_log_ratios(at.squared))),
        "mle": _Estimator(k, lambda at: mle_dimension(at.squared[:, :k])),
    }
    for first, second in gride_scales(params.gride_to):
        chosen[f"gride {second}"] = _Estimator(second, partial(_gride_at, first=first, second=second))
    if around:
        chosen["local_pca"] = _Estimator(
            around, lambda at: local_pca_dimension(at.points, at.indices[at.centers, :around])
        )
    return chosen


def _gride_at(at: _Searched, *, first: int, second: int) -> float:
    from trace_offline.estimators.gride import gride

    return gride(at.squared, first, second)


def _by_neighbors(
    points: Tensor, clusters: np.ndarray | None, context: Context
) -> tuple[dict[str, Estimate], Arrays, np.ndarray]:
    """All that reads the distances and indices of one neighbour search, and the squared distances themselves."""
    import torch

    from trace_offline.estimators.neighbors import nearest_neighbors
    from trace_offline.estimators.subsampling import subsample_stderr

    params, n = context.params, len(points)
    wanted = _estimators(params)
    found: dict[str, Estimate] = {}
    for name, estimator in list(wanted.items()):
        if n <= estimator.needs:
            reason = f"{n} distinct points have fewer than k = {estimator.needs} neighbours each"
            found[name] = Estimate(None, None, reason)
            del wanted[name]
    is_center = np.zeros(n, dtype=bool)
    is_center[np.random.default_rng(context.seed).permutation(n)[: params.local_pca_points]] = True

    def search(part: Tensor, center: np.ndarray) -> _Searched:
        neighbors = nearest_neighbors(part, max(estimator.needs for estimator in wanted.values()))
        squared = neighbors.squared_distances.cpu().numpy()
        return _Searched(part, squared, neighbors.indices, np.flatnonzero(center))

    whole = search(points, is_center)
    for name, estimator in list(wanted.items()):
        try:
            found[name] = Estimate(estimator.call(whole), None, None)
        except ValueError as error:
            found[name] = Estimate(None, None, str(error))
            del wanted[name]
    if wanted:

        def statistics(part: np.ndarray) -> Sequence[float]:
            at = search(points[torch.from_numpy(part).to(points.device)], is_center[part])
            return [estimator.call(at) for estimator in wanted.values()]

        try:
            errors = subsample_stderr(
                statistics,
                [float(found[name].value or 0) for name in wanted],
                n,
                subsamples=params.subsamples,
                smallest=max(SMALLEST, 2 * (max(estimator.needs for estimator in wanted.values()) + 1)),
                seed=context.seed,
                clusters=clusters,
            )
        except ValueError:
            # A part of the points can be degenerate where all of them are not; there is then no standard error.
            errors = None
        if errors is not None:
            for name, stderr in zip(wanted, errors, strict=True):
                found[name] = Estimate(found[name].value, stderr, None)
    return _with_gride(found), _gride_arrays(found, whole.squared), whole.squared


def _with_gride(found: dict[str, Estimate]) -> dict[str, Estimate]:
    """The scales of GRIDE become one metric, the largest scale that has a value; else the reason of the first."""
    scales = [name for name in found if name.startswith("gride ")]
    kept = {name: estimate for name, estimate in found.items() if name not in scales}
    if scales:
        measured = [name for name in scales if found[name].value is not None]
        kept["gride"] = found[max(measured, key=_second) if measured else min(scales, key=_second)]
    return kept


def _gride_arrays(found: dict[str, Estimate], squared: np.ndarray) -> Arrays:
    measured = sorted(
        (name for name in found if name.startswith("gride ") and found[name].value is not None), key=_second
    )
    if not measured:
        return {}
    seconds = [_second(name) for name in measured]
    distance = np.sqrt(squared)
    arrays: Arrays = {
        "gride": tuple(float(found[name].value or 0) for name in measured),
        "gride_scales": tuple(float(second) for second in seconds),
        "gride_distances": tuple(float(distance[:, [second // 2 - 1, second - 1]].mean()) for second in seconds),
    }
    errors = [found[name].stderr for name in measured]
    if all(stderr is not None for stderr in errors):
        arrays["gride_stderr"] = tuple(float(stderr or 0) for stderr in errors)
    return arrays


def _second(name: str) -> int:
    return int(name.removeprefix("gride "))


def _by_sample_size(
    points: Tensor, squared: np.ndarray, clusters: np.ndarray | None, context: Context
) -> tuple[Estimate, Arrays]:
    """The sample-size curve and what it continues to."""
    import torch

    from trace_offline.estimators.extrapolation import (
        FEWEST_LEVELS,
        curve_levels,
        extrapolated_dimension,
        extrapolation_weights,
        sample_size_curve,
    )
    from trace_offline.estimators.subsampling import subsample_covariance

    n, k, seed = len(points), context.params.k, context.seed
    levels = curve_levels(n, smallest=SMALLEST_CURVE)
    if levels < FEWEST_LEVELS:
        least = SMALLEST_CURVE << (FEWEST_LEVELS - 1)
        return Estimate(None, None, f"{n} distinct points are too few to halve twice; at least {least} are needed"), {}
    known = squared if squared.shape[1] >= max(2, k) else None

    def curve_of(part: Tensor, full: np.ndarray | None = None) -> SampleSizeCurve:
        return sample_size_curve(part, levels, k=k, generator=np.random.default_rng(seed), full=full)

    def statistics(part: np.ndarray) -> Sequence[float]:
        at = curve_of(points[torch.from_numpy(part).to(points.device)])
        return [*at.twonn, *at.twonn_ml]

    try:
        curve = curve_of(points, known)
    except ValueError as error:
        return Estimate(None, None, str(error)), {}
    arrays: Arrays = {
        "curve_n": tuple(map(float, curve.n)),
        "curve_twonn": tuple(map(float, curve.twonn)),
        "curve_twonn_sd": tuple(map(float, curve.twonn_sd)),
        "curve_twonn_ml": tuple(map(float, curve.twonn_ml)),
        "curve_squared_distance": tuple(map(float, curve.squared_distance)),
    }
    if len(curve.mle):
        arrays["curve_mle"] = tuple(map(float, curve.mle))
    limit, weights, reason = None, None, None
    try:
        limit = extrapolated_dimension(curve.twonn_ml, curve.squared_distance)
        weights = extrapolation_weights(curve.twonn_ml, curve.squared_distance)
    except ValueError as error:
        reason = str(error)
    try:
        covariance = subsample_covariance(
            statistics, n, subsamples=context.params.subsamples, smallest=SMALLEST, seed=seed, clusters=clusters
        )
    except ValueError:
        # As above: a degenerate part leaves the curve without standard errors.
        covariance = None
    if covariance is None:
        return Estimate(limit, None, reason), arrays
    relative = np.sqrt(np.diag(covariance))
    arrays["curve_twonn_stderr"] = tuple(map(float, curve.twonn * relative[:levels]))
    arrays["curve_twonn_ml_stderr"] = tuple(map(float, curve.twonn_ml * relative[levels:]))
    if limit is None or weights is None:
        return Estimate(None, None, reason), arrays
    return Estimate(limit, limit * float(np.sqrt(weights @ covariance[levels:, levels:] @ weights)), None), arrays


def _by_spectrum(points: np.ndarray, clusters: np.ndarray | None, seed: int) -> dict[str, Estimate]:
    """The linear dimensions: value and jackknife standard error."""
    from trace_offline.estimators import pca_dimension as pca
    from trace_offline.estimators.subsampling import jackknife_stderr, partition

    spectrum = pca.covariance_spectrum(points)
    parts = partition(len(points), _JACKKNIFE_PARTS, np.random.default_rng(seed), clusters)
    left_out = [
        (
            pca.participation_ratio(rest),
            pca.fractional_components_for_variance(rest, 0.9),
            pca.fractional_components_for_variance(rest, 0.99),
        )
        for rest in pca.leave_out_spectra(points, parts)
    ]
    errors = jackknife_stderr(np.array(left_out))
    values = (
        pca.participation_ratio(spectrum),
        float(pca.components_for_variance(spectrum, 0.9)),
        float(pca.components_for_variance(spectrum, 0.99)),
    )
    return {
        metric: Estimate(value, float(stderr), None)
        for metric, value, stderr in zip(SPECTRAL_METRICS, values, errors, strict=True)
    }

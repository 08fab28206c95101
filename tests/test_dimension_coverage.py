"""Nominal 95 % intervals against 200 simulated repetitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trace_offline.estimators.extrapolation import (
    SampleSizeCurve,
    curve_levels,
    extrapolated_dimension,
    extrapolation_weights,
    sample_size_curve,
)
from trace_offline.estimators.gride import gride
from trace_offline.estimators.local_pca import local_pca_dimension
from trace_offline.estimators.mle_dimension import mle_dimension
from trace_offline.estimators.neighbors import nearest_neighbors
from trace_offline.estimators.pca_dimension import covariance_spectrum, leave_out_spectra, participation_ratio
from trace_offline.estimators.subsampling import jackknife_stderr, partition, subsample_covariance
from trace_offline.estimators.twonn import neighbor_log_ratios, twonn_fit

Floats = NDArray[np.float64]
NAMES = ("twonn", "mle", "gride", "local_pca", "twonn_ml", "twonn_extrapolated", "participation_ratio")
# Student's t with the 16 degrees of freedom that 20 subsamples in four partitions of five leave.
QUANTILE = 2.12


def interval(points: Floats, seed: int) -> tuple[Floats, Floats]:
    """Values and standard errors in the order of ``NAMES``, as the analyzer takes them."""
    n = len(points)
    table = torch.from_numpy(points)
    levels = curve_levels(n)
    center = np.random.default_rng(seed).permutation(n) < n // 4

    def statistics(part: NDArray[np.int64]) -> tuple[list[float], SampleSizeCurve]:
        mine = table[torch.from_numpy(part)]
        found = nearest_neighbors(mine, 30)
        squared = found.squared_distances.numpy()
        curve = sample_size_curve(mine, levels, generator=np.random.default_rng(seed), full=squared)
        around = found.indices[torch.from_numpy(np.flatnonzero(center[part]))]
        single = [
            twonn_fit(neighbor_log_ratios(squared)),
            mle_dimension(squared[:, :20]),
            gride(squared, 8, 16),
            local_pca_dimension(mine, around),
        ]
        return [*single, *curve.twonn_ml], curve

    full, curve = statistics(np.arange(n))
    covariance = subsample_covariance(lambda part: statistics(part)[0], n, smallest=62, seed=seed)
    assert covariance is not None
    stderr = np.array(full) * np.sqrt(np.diag(covariance))
    weights = extrapolation_weights(curve.twonn_ml, curve.squared_distance)
    limit = extrapolated_dimension(curve.twonn_ml, curve.squared_distance)
    limit_stderr = limit * np.sqrt(weights @ covariance[4:, 4:] @ weights)
    parts = partition(n, 20, np.random.default_rng(seed))
    left_out = [[participation_ratio(rest)] for rest in leave_out_spectra(points, parts)]
    ratio, ratio_stderr = participation_ratio(covariance_spectrum(points)), jackknife_stderr(np.array(left_out))[0]
    return np.array([*full[:5], limit, ratio]), np.array([*stderr[:5], limit_stderr, ratio_stderr])


def curved(n: int, seed: int) -> Floats:
    """Five dimensions, bent; the directions differ in length, so that counts of eigenvalues vary."""
    weights = np.random.default_rng(99).standard_normal((5, 24)) * np.geomspace(1, 0.3, 5)[:, None]
    return np.asarray(np.sin(np.random.default_rng(seed).standard_normal((n, 5)) @ weights / 2))


def torus(n: int, seed: int) -> Floats:
    """Flat, without edges, uniform: dimension 2 exactly, with next to no bias."""
    angle = np.random.default_rng(seed).random((n, 2)) * 2 * np.pi
    return np.concatenate([np.cos(angle), np.sin(angle)], 1)


@pytest.mark.slow
def test_intervals_cover_what_the_estimators_find_at_this_sample_size() -> None:
    found = [interval(curved(800, seed), seed) for seed in range(200)]
    values, stderr = np.array([item[0] for item in found]), np.array([item[1] for item in found])
    covered = (np.abs(values - values.mean(0)) < QUANTILE * stderr).mean(0)
    for name, share in zip(NAMES, covered, strict=True):
        assert 0.90 <= share <= 0.98, (name, dict(zip(NAMES, covered, strict=True)))


@pytest.mark.slow
def test_intervals_of_twonn_cover_the_true_dimension_where_it_has_no_bias() -> None:
    found = [interval(torus(800, seed), seed) for seed in range(200)]
    values, stderr = np.array([item[0] for item in found]), np.array([item[1] for item in found])
    covered = dict(zip(NAMES, (np.abs(values - 2) < QUANTILE * stderr).mean(0), strict=True))
    for name in ("twonn", "twonn_ml", "twonn_extrapolated"):
        assert 0.90 <= covered[name] <= 0.98, covered


def test_intervals_have_the_width_of_the_scatter() -> None:
    """The same, quick: root mean square of the standard errors against the spread over 30 clouds (known to 13 %)."""
    found = [interval(curved(400, seed), seed) for seed in range(30)]
    values, stderr = np.array([item[0] for item in found]), np.array([item[1] for item in found])
    ratio = np.sqrt((stderr**2).mean(0)) / values.std(0, ddof=1)
    assert (ratio > 0.6).all(), dict(zip(NAMES, ratio, strict=True))
    assert (ratio < 1.7).all(), dict(zip(NAMES, ratio, strict=True))

"""Standard errors from subsamples against the spread over simulated repetitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from trace_offline.estimators.mle_dimension import mle_dimension
from trace_offline.estimators.neighbors import nearest_neighbors
from trace_offline.estimators.pca_dimension import (
    covariance_spectrum,
    fractional_components_for_variance,
    leave_out_spectra,
    participation_ratio,
)
from trace_offline.estimators.subsampling import jackknife_stderr, partition, subsample_stderr
from trace_offline.estimators.twonn import neighbor_log_ratios, twonn_fit, twonn_maximum_likelihood

Floats = NDArray[np.float64]


def neighbor_statistics(points: Floats, part: NDArray[np.int64]) -> tuple[float, float, float]:
    squared = nearest_neighbors(torch.from_numpy(points[part]), 20).squared_distances.numpy()
    ratios = neighbor_log_ratios(squared)
    return twonn_fit(ratios), twonn_maximum_likelihood(ratios), mle_dimension(squared)


def simulate(n: int, repeats: int, clustered: bool = False) -> tuple[Floats, Floats]:
    """Values and standard errors ``[repeats, 3]`` of TwoNN (both) and MLE on a curved cloud of dimension 5."""
    values, errors = [], []
    weights = np.random.default_rng(99).standard_normal((5, 32))
    for seed in range(repeats):
        generator = np.random.default_rng(seed)
        inner = generator.standard_normal((n, 5))
        clusters = None
        if clustered:  # ten points share a text, and their places depend on it
            clusters = np.repeat(np.arange(n // 10), 10)
            inner = 0.8 * generator.standard_normal((n // 10, 5))[clusters] + 0.6 * inner
            # texts differ in how spread out their tokens are, so that neighbours tell about the text
            inner = inner * np.exp(0.7 * generator.standard_normal(n // 10))[clusters][:, None]
        points = np.sin(inner @ weights / 3) if not clustered else inner @ weights
        full = neighbor_statistics(points, np.arange(n))
        found = subsample_stderr(
            lambda part, points=points: neighbor_statistics(points, part), full, n, seed=seed, clusters=clusters
        )
        assert found is not None
        values.append(full)
        errors.append(found)
    return np.array(values), np.array(errors)


@pytest.mark.parametrize(
    ("n", "repeats"),
    [(150, 60), pytest.param(100, 300, marks=pytest.mark.slow), pytest.param(600, 200, marks=pytest.mark.slow)],
)
def test_subsamples_find_the_spread_of_nearest_neighbour_estimates(n: int, repeats: int) -> None:
    values, errors = simulate(n, repeats)
    spread = values.std(0, ddof=1)
    # The spread itself is known to 1/√(2 · repeats): 9 % for 60 repetitions.
    np.testing.assert_allclose(np.sqrt((errors**2).mean(0)) / spread, 1, atol=0.25)
    # Neighbouring points share neighbours: d/√n, which takes the ratios for independent, is too small.
    analytic = values[:, 1].mean() / math.sqrt(n)
    assert analytic < spread[1] < 1.6 * analytic
    # Nominal 95 % intervals (t with about 16 degrees of freedom) cover the mean of the estimates.
    covered = np.abs(values - values.mean(0)) < 2.12 * errors
    assert (covered.mean(0) > (0.8 if repeats < 200 else 0.88)).all()


@pytest.mark.slow
def test_subsamples_keep_dependent_points_together() -> None:
    values, errors = simulate(400, repeats=200, clustered=True)
    ratio = np.sqrt((errors**2).mean(0)) / values.std(0, ddof=1)
    assert (ratio > 0.75).all()
    assert (ratio < 1.4).all()


@pytest.mark.parametrize(("n", "width"), [(100, 10), (400, 40)])
def test_jackknife_finds_the_spread_of_spectral_dimensions(n: int, width: int) -> None:
    scales = np.geomspace(1, 0.1, width)
    values, errors = [], []

    def statistics(spectrum: Floats) -> list[float]:
        return [participation_ratio(spectrum), fractional_components_for_variance(spectrum, 0.9)]

    for seed in range(150):
        generator = np.random.default_rng(seed)
        points = generator.standard_normal((n, width)) * scales
        parts = partition(n, 20, generator)
        values.append(statistics(covariance_spectrum(points)))
        errors.append(jackknife_stderr(np.array([statistics(s) for s in leave_out_spectra(points, parts)])))
    ratio = np.sqrt((np.array(errors) ** 2).mean(0)) / np.std(values, axis=0, ddof=1)
    np.testing.assert_allclose(ratio, 1, atol=0.25)


def test_jackknife_of_a_mean_is_the_textbook_standard_error() -> None:
    x = np.random.default_rng(0).standard_normal(50)
    left_out = (x.sum() - x) / 49
    assert jackknife_stderr(left_out) == pytest.approx(x.std(ddof=1) / math.sqrt(50))
    with pytest.raises(ValueError, match="at least 2 left-out parts, found 1"):
        jackknife_stderr(np.ones(1))


def test_subsamples_of_a_mean_are_the_textbook_standard_error() -> None:
    x = 10 + np.random.default_rng(0).standard_normal(5000)
    found = subsample_stderr(lambda part: [x[part].mean()], [x.mean()], 5000, subsamples=2000)
    assert found is not None
    assert found[0] == pytest.approx(x.std() / math.sqrt(5000), rel=0.1)


def test_subsamples_count_dependent_points_once() -> None:
    texts = 10 + np.random.default_rng(0).standard_normal(500)
    clusters = np.repeat(np.arange(500), 10)
    x = texts[clusters]
    found = subsample_stderr(lambda part: [x[part].mean()], [x.mean()], 5000, subsamples=500, clusters=clusters)
    assert found is not None
    assert found[0] == pytest.approx(texts.std() / math.sqrt(500), rel=0.1)


def test_too_few_points_have_no_standard_error() -> None:
    assert subsample_stderr(lambda part: [1.0], [1.0], 99) is None
    assert subsample_stderr(lambda part: [1.0], [1.0], 100) == [0.0]
    assert subsample_stderr(lambda part: [1.0], [1.0], 500, clusters=np.zeros(500, int)) is None
    # One text with almost all points: the other part would be too small to mean anything.
    lopsided = np.r_[np.zeros(490, int), np.arange(1, 11)]
    assert subsample_stderr(lambda part: [1.0], [1.0], 500, clusters=lopsided) is None


def test_subsamples_are_the_same_every_time() -> None:
    x = np.random.default_rng(0).random(500)
    first, second, other = (
        subsample_stderr(lambda part: [x[part].mean()], [x.mean()], 500, seed=seed) for seed in (3, 3, 4)
    )
    assert first == second
    assert first != other


@given(
    n=st.integers(1, 80), parts=st.integers(1, 6), seed=st.integers(0, 1000), texts=st.integers(0, 30), data=st.data()
)
def test_partition_divides_everything_once(n: int, parts: int, seed: int, texts: int, data: st.DataObject) -> None:
    clusters = None
    if texts:
        clusters = np.array(data.draw(st.lists(st.integers(0, texts - 1), min_size=n, max_size=n)))
    generator = np.random.default_rng(seed)
    if (n if clusters is None else len(np.unique(clusters))) < parts:
        with pytest.raises(ValueError, match="cannot divide"):
            partition(n, parts, generator, clusters)
        return
    found = partition(n, parts, generator, clusters)
    assert len(found) == parts
    assert sorted(np.concatenate(found).tolist()) == list(range(n))
    if clusters is None:
        assert max(map(len, found)) - min(map(len, found)) <= 1
    else:
        for text in np.unique(clusters):
            assert sum(bool((clusters[part] == text).any()) for part in found) == 1

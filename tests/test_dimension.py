"""Estimators of dimension against closed forms, known manifolds and scikit-dimension."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trace_offline.estimators.mle_dimension import inverse_local_dimensions, mle_dimension
from trace_offline.estimators.neighbors import nearest_neighbors
from trace_offline.estimators.pca_dimension import (
    components_for_variance,
    covariance_spectrum,
    fractional_components_for_variance,
    leave_out_spectra,
    participation_ratio,
)
from trace_offline.estimators.twonn import neighbor_log_ratios, twonn_fit, twonn_maximum_likelihood

Points = NDArray[np.float32]


def manifold(kind: str, n: int, dimension: int, width: int, seed: int) -> Points:
    """A cloud of known intrinsic dimension, rotated into ``width`` dimensions, float32."""
    generator = np.random.default_rng(seed)
    if kind == "gauss":
        inner = generator.standard_normal((n, dimension))
    elif kind == "cube":
        inner = generator.random((n, dimension))
    else:  # products of circles of growing radius and lines: curved like a Swiss roll, flat inside
        angle = generator.random((n, dimension)) * 1.5 * np.pi
        inner = np.concatenate([angle * np.cos(angle), angle * np.sin(angle)], 1)
    axes = np.linalg.qr(np.random.default_rng(1000 + seed).standard_normal((width, inner.shape[1])))[0]
    return (inner @ axes.T + 5).astype(np.float32)


def distances(points: Points, k: int = 20) -> NDArray[np.float64]:
    return nearest_neighbors(torch.from_numpy(points), k).squared_distances.numpy()


def estimates(points: Points) -> dict[str, float]:
    squared = distances(points)
    ratios = neighbor_log_ratios(squared)
    return {
        "fit": twonn_fit(ratios),
        "ml": twonn_maximum_likelihood(ratios),
        "mle": mle_dimension(squared),
        "pr": participation_ratio(covariance_spectrum(points)),
    }


# --- manifolds of known dimension


@pytest.mark.parametrize(("dimension", "width"), [(5, 64), (10, 256)])
@pytest.mark.parametrize("kind", ["gauss", "cube", "curved"])
def test_manifolds_of_known_dimension(kind: str, dimension: int, width: int) -> None:
    """Within the known bias at n = 2,000, which grows with the dimension, with edges (cube) and with k = 20."""
    found = estimates(manifold(kind, 2000, dimension, width, seed=1))
    tolerance = {"gauss": 0.1, "cube": 0.2, "curved": 0.15}[kind]
    assert found["fit"] == pytest.approx(dimension, rel=tolerance)
    assert found["ml"] == pytest.approx(dimension, rel=tolerance)
    assert found["mle"] == pytest.approx(dimension, rel=tolerance + 0.07)
    assert found["mle"] < found["ml"] + dimension / 10
    assert abs(found["fit"] - found["ml"]) < 4 * dimension / math.sqrt(2000)
    if kind != "curved":
        assert found["pr"] == pytest.approx(dimension, rel=0.02)
    else:
        assert found["pr"] > 1.3 * dimension  # linear dimensions see the curvature


def test_a_curve_and_a_surface() -> None:
    """Where neighbours are close the estimators are right to a few standard errors."""
    t = np.random.default_rng(0).random((2000, 2))
    curve = np.stack([np.cos(9 * t[:, 0]), np.sin(9 * t[:, 0]), t[:, 0]], 1).astype(np.float32)
    roll = np.stack([t[:, 0] * np.cos(9 * t[:, 0]), t[:, 0] * np.sin(9 * t[:, 0]), t[:, 1]], 1).astype(np.float32)
    for points, dimension in ((curve, 1), (roll, 2)):
        found = estimates(points)
        assert found["ml"] == pytest.approx(dimension, abs=4 * dimension / math.sqrt(2000))
        assert found["mle"] == pytest.approx(dimension, rel=0.06)


# --- closed forms


def test_twonn_of_exact_pareto_ratios() -> None:
    """If ln μ is exponential with rate d, maximum likelihood is unbiased with standard deviation d/√(n−2)."""
    generator = np.random.default_rng(0)
    d, n, repeats = 7.0, 100, 4000
    ratios = generator.exponential(1 / d, (repeats, n))
    ml = np.array([twonn_maximum_likelihood(row) for row in ratios])
    error = ml.std(ddof=1) / math.sqrt(repeats)
    assert abs(ml.mean() - d) < 4 * error
    assert ml.std(ddof=1) == pytest.approx(d / math.sqrt(n - 2), rel=0.05)
    fit = np.array([twonn_fit(row) for row in ratios])
    assert fit.mean() == pytest.approx(d, rel=0.03)
    assert fit.std(ddof=1) > ml.std(ddof=1)


def test_twonn_fit_of_exact_quantiles_is_exact() -> None:
    n, d = 50, 3.0
    quantiles = -np.log1p(-np.arange(1, n) / n) / d
    assert twonn_fit(np.append(quantiles, 1e6)) == pytest.approx(d, rel=1e-12)
    assert twonn_fit(np.append(quantiles, 1e6)[::-1], discard_fraction=1e-9) == pytest.approx(d, rel=1e-12)


def test_maximum_likelihood_by_hand() -> None:
    squared = np.array([[1.0, 4.0, 16.0], [1.0, 1.0, 4.0]])
    np.testing.assert_allclose(neighbor_log_ratios(squared), [math.log(2), 0])
    np.testing.assert_allclose(inverse_local_dimensions(squared), [1.5 * math.log(2), math.log(2)])
    assert mle_dimension(squared) == pytest.approx(1 / (1.25 * math.log(2)))
    assert twonn_maximum_likelihood(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 6)


def test_collinear_points_have_dimension_one() -> None:
    line = np.random.default_rng(0).random((1000, 1)) * np.random.default_rng(1).standard_normal((1, 64))
    found = estimates(line.astype(np.float32))
    assert found["pr"] == pytest.approx(1, abs=1e-6)
    assert found["mle"] == pytest.approx(1, rel=0.05)
    assert found["ml"] == pytest.approx(1, rel=0.1)
    spectrum = covariance_spectrum(line)
    assert components_for_variance(spectrum, 0.99) == 1


@pytest.mark.parametrize("shape", [(500, 12), (30, 80)])
def test_spectrum_equals_singular_values(shape: tuple[int, int]) -> None:
    points = np.random.default_rng(0).standard_normal(shape) * np.geomspace(1, 100, shape[1]) + 1e4
    expected = np.linalg.svd(points - points.mean(0), compute_uv=False) ** 2 / shape[0]
    found = covariance_spectrum(points)
    assert found.shape == (min(shape),)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11 * expected[0])


@pytest.mark.parametrize("shape", [(200, 12), (40, 80)])
def test_leave_out_spectra_equal_those_of_the_rest(shape: tuple[int, int]) -> None:
    points = np.random.default_rng(0).standard_normal(shape) + 3
    parts = np.array_split(np.random.default_rng(1).permutation(shape[0]), 7)
    for part, found in zip(parts, leave_out_spectra(points, parts), strict=True):
        expected = covariance_spectrum(np.delete(points, part, 0))
        np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-9)
        np.testing.assert_allclose(found[len(expected) :], 0, atol=1e-9)


def test_participation_ratio_and_counts_by_hand() -> None:
    assert participation_ratio(np.full(9, 1e-200)) == pytest.approx(9)
    assert participation_ratio(np.array([5.0, 0, 0])) == 1
    assert participation_ratio(np.array([3.0, 1.0])) == pytest.approx(16 / 10)
    spectrum = np.array([6.0, 2.0, 1.0, 1.0])
    assert [components_for_variance(spectrum, share) for share in (0.5, 0.6, 0.61, 0.8, 0.9, 0.99)] == [
        1,
        1,
        2,
        2,
        3,
        4,
    ]
    fractional = [fractional_components_for_variance(spectrum, share) for share in (0.3, 0.6, 0.7, 0.8, 0.95)]
    np.testing.assert_allclose(fractional, [0.5, 1, 1.5, 2, 3.5])
    tenth = np.ones(10)
    assert components_for_variance(tenth, 0.9) == 9
    assert components_for_variance(tenth, 0.99) == 10


# --- scikit-dimension


@pytest.mark.parametrize("kind", ["gauss", "curved"])
@pytest.mark.parametrize(("dimension", "width"), [(3, 20), (10, 64)])
def test_agrees_with_scikit_dimension(kind: str, dimension: int, width: int) -> None:
    points = manifold(kind, 700, dimension, width, seed=2).astype(np.float64)
    squared = nearest_neighbors(torch.from_numpy(points), 20).squared_distances.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skdim = pytest.importorskip("skdim")
        fit = skdim.id.TwoNN(discard_fraction=0.1).fit(points).dimension_
        mle = skdim.id.MLE().fit(points, n_neighbors=20, comb="mle").dimension_
    assert twonn_fit(neighbor_log_ratios(squared)) == pytest.approx(fit, rel=1e-9)
    assert mle_dimension(squared) == pytest.approx(mle, rel=1e-9)


def test_gaussian_of_dimension_5_agrees_with_other_implementations() -> None:
    """DADApy and scikit-dimension at n = 2,000 in 256 dimensions, five seeds: TwoNN 5.15 (sd 0.18), MLE 4.76."""
    found = [estimates(manifold("gauss", 2000, 5, 256, seed)) for seed in range(4)]
    assert np.mean([row["fit"] for row in found]) == pytest.approx(5.05, abs=0.3)
    assert np.mean([row["mle"] for row in found]) == pytest.approx(4.85, abs=0.2)


# --- what is refused


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: neighbor_log_ratios(np.ones((5, 1))), r"at least 2\], found \(5, 1\)"),
        (lambda: neighbor_log_ratios(np.array([[0.0, 1.0], [1.0, 2.0]])), "1 points coincide with another point"),
        (lambda: neighbor_log_ratios(np.array([[np.nan, 1.0]])), "coincide"),
        (lambda: inverse_local_dimensions(np.array([[0.0, 1.0]])), "1 points coincide"),
        (lambda: inverse_local_dimensions(np.ones((5, 1))), "at least 2"),
        (lambda: mle_dimension(np.ones((0, 5))), "at least one point"),
        (lambda: mle_dimension(np.ones((4, 5))), "equally far"),
        (lambda: twonn_fit(np.ones(2)), "at least 3 points"),
        (lambda: twonn_fit(np.zeros(9)), "equally far"),
        (lambda: twonn_fit(np.ones(9), discard_fraction=0.0), "between 0 and 1"),
        (lambda: twonn_fit(np.ones(9), discard_fraction=0.9), "only 0 of 9 ratios"),
        (lambda: twonn_maximum_likelihood(np.zeros(9)), "equally far"),
        (lambda: twonn_maximum_likelihood(np.array([1.0, np.inf, 1.0])), "finite"),
        (lambda: covariance_spectrum(np.ones((1, 3))), r"at least 2 points"),
        (lambda: covariance_spectrum(np.ones((9, 3))), "all points coincide"),
        (lambda: covariance_spectrum(np.full((9, 3), np.nan)), "finite"),
        (lambda: participation_ratio(np.zeros(3)), "all eigenvalues are 0"),
        (lambda: participation_ratio(np.array([1.0, -1.0])), "non-negative"),
        (lambda: components_for_variance(np.ones(3), 1.0), "between 0 and 1, found 1.0"),
        (lambda: leave_out_spectra(np.eye(3), [np.array([0, 1])]), "leaving 2 of 3"),
    ],
)
def test_refuses(call, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=text):
        call()

"""GRIDE and local PCA against closed forms, brute force, and the estimators they generalise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq

from trace_offline.estimators.gride import gride, gride_scales
from trace_offline.estimators.local_pca import local_pca_dimension, local_pca_dimensions
from trace_offline.estimators.neighbors import nearest_neighbors

Floats = NDArray[np.float64]


def pareto_table(n: int, d: float, k: int, seed: int) -> Floats:
    """Squared distances of ``k`` neighbours in a homogeneous Poisson process of dimension d: volumes are Gamma sums."""
    volumes = np.random.default_rng(seed).exponential(size=(n, k)).cumsum(1)
    return np.asarray(volumes ** (2 / d))


def score(d: float, v: Floats, first: int, second: int) -> float:
    """Derivative of the log-likelihood of Denti et al. 2022, formula (5), written out."""
    grown = np.exp(d * v)
    return float(len(v) / d + (second - first - 1) * (v * grown / (grown - 1)).sum() - (second - 1) * v.sum())


# --- GRIDE


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 4), (8, 16), (3, 5), (1, 7)])
@pytest.mark.parametrize("d", [0.5, 6.0, 80.0])
def test_gride_is_the_root_of_the_likelihood_s_derivative(first: int, second: int, d: float) -> None:
    table = pareto_table(400, d, 16, seed=first)
    v = 0.5 * np.log(table[:, second - 1] / table[:, first - 1])
    expected = brentq(score, d / 10, d * 10, args=(v, first, second), xtol=1e-13 * d)
    assert gride(table, first, second) == pytest.approx(expected, rel=1e-9)


def test_gride_finds_the_dimension_of_a_poisson_process_at_every_scale() -> None:
    """The law of the ratios is exact there; the standard deviation is that of the Fisher information."""
    d, n, repeats = 7.0, 150, 300
    for first, second in gride_scales(16):
        found = np.array([gride(pareto_table(n, d, 16, seed), first, second) for seed in range(repeats)])
        assert abs(found.mean() - d) < 4 * found.std() / math.sqrt(repeats) + 1.5 * d / n
        assert found.std() < 1.2 * d / math.sqrt(n)
    # Larger scales average over more neighbours.
    assert found.std() < 0.6 * d / math.sqrt(n)


def test_gride_of_the_first_two_neighbours_is_twonn_by_hand() -> None:
    table = np.array([[1.0, math.e**2], [1.0, math.e**4], [1.0, math.e**6]])
    assert gride(table, 1, 2) == pytest.approx(3 / 6, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 300), st.floats(1e-6, 1e6))
def test_gride_does_not_depend_on_the_unit_and_scales_with_the_exponent(seed: int, d: float, unit: float) -> None:
    table = pareto_table(60, 3.0, 8, seed)
    value = gride(table, 2, 4)
    assert gride(table * unit, 2, 4) == pytest.approx(value, rel=1e-9)
    assert gride(table ** (1 / d), 2, 4) == pytest.approx(value * d, rel=1e-9)


def test_ties_do_not_break_gride() -> None:
    table = pareto_table(50, 3.0, 4, seed=0)
    table[:10, 3] = table[:10, 1]
    value = gride(table, 2, 4)
    v = 0.5 * np.log(table[:, 3] / table[:, 1])
    limit = v + 1e-9  # the derivative has a limit where v → 0
    assert value == pytest.approx(brentq(score, 0.1, 100, args=(limit, 2, 4)), rel=1e-5)


def test_scales_double() -> None:
    assert gride_scales(16) == ((1, 2), (2, 4), (4, 8), (8, 16))
    assert gride_scales(31) == gride_scales(16)
    assert gride_scales(1) == gride_scales(0) == ()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: gride(np.ones((5, 4)), 2, 2), "1 ≤ n₁ < n₂, found 2 and 2"),
        (lambda: gride(np.ones((5, 4)), 0, 2), "found 0 and 2"),
        (lambda: gride(np.ones((5, 3)), 2, 4), r"at least 4\], found \(5, 3\)"),
        (lambda: gride(np.ones((0, 4)), 2, 4), r"found \(0, 4\)"),
        (lambda: gride(np.ones((5, 4)), 2, 4), "equally far"),
        (lambda: gride(np.array([[0.0, 1, 2, 3]]), 2, 4), "1 points coincide with another point"),
        (lambda: gride(np.array([[np.nan, 1, 2, 3]]), 2, 4), "coincide"),
        (lambda: local_pca_dimensions(torch.rand(5, 3), torch.zeros(5, 1).long()), r"at least 2\], found \(5, 1\)"),
        (lambda: local_pca_dimensions(torch.ones(5, 3), torch.zeros(2, 4).long()), "2 neighbourhoods consist of one"),
        (lambda: local_pca_dimensions(torch.rand(5, 3), torch.zeros(2, 4).long(), share=1.0), "between 0 and 1"),
        (lambda: local_pca_dimension(torch.rand(5, 3), torch.zeros(0, 4).long()), "found none"),
    ],
)
def test_refuses(call, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=text):
        call()


# --- local PCA


@pytest.mark.parametrize("width", [6, 60])
def test_local_pca_counts_eigenvalues_of_every_neighbourhood(width: int) -> None:
    """One neighbourhood at a time by singular values, on both sides of k = D."""
    points = np.random.default_rng(0).standard_normal((300, width)) * np.geomspace(1, 0.05, width) + 100
    table = torch.from_numpy(points)
    around = nearest_neighbors(table, 25).indices
    expected = []
    for row in around.numpy():
        cloud = points[row] - points[row].mean(0)
        values = np.linalg.svd(cloud, compute_uv=False) ** 2
        expected.append(int((values > 0.05 * values[0]).sum()))
    found = local_pca_dimensions(table, around)
    np.testing.assert_array_equal(found, expected)
    assert len(set(expected)) > 1
    np.testing.assert_array_equal(local_pca_dimensions(table, around, block_bytes=1), expected)
    assert local_pca_dimension(table, around) == pytest.approx(np.mean(expected))


def test_local_pca_sees_a_surface_where_global_pca_sees_the_space() -> None:
    angle = np.random.default_rng(1).random((3000, 2)) * 2 * np.pi
    torus = np.stack([np.cos(angle[:, 0]), np.sin(angle[:, 0]), np.cos(angle[:, 1]), np.sin(angle[:, 1])], 1)
    table = torch.from_numpy(torus)
    assert local_pca_dimension(table, nearest_neighbors(table, 30).indices) == pytest.approx(2, abs=0.02)
    # In float32 as well, and whatever the offset does to its last digits.
    single = (table + 10).float()
    assert local_pca_dimension(single, nearest_neighbors(single, 30).indices) == pytest.approx(2, abs=0.02)


def test_local_pca_by_hand() -> None:
    points = torch.tensor([[0.0, 0], [2, 0], [4, 0], [0, 1], [2, 1], [4, 1]], dtype=torch.float64)
    everyone = torch.arange(6)[None]
    # variances 8/3 and 1/4: the second is 9.4 % of the first
    assert local_pca_dimensions(points, everyone).tolist() == [2]
    assert local_pca_dimensions(points, everyone, share=0.1).tolist() == [1]

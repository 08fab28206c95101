"""Standard errors over clusters: closed forms, and whether 95 % intervals cover 95 %."""

from __future__ import annotations

import numpy as np
import pytest

from trace_offline.estimators.classification import f1_counts, macro_f1
from trace_offline.estimators.clustered import (
    Estimate,
    cluster_codes,
    cluster_sums,
    combined_ratios,
    jackknife,
    ratio,
    sum_of_squared_shares,
)


def clustered_values(rng: np.random.Generator, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Values with a shared effect in each cluster (intra-class correlation ½) and clusters of 1 to 12 values."""
    sizes = rng.integers(1, 13, clusters)
    code = np.repeat(np.arange(clusters), sizes)
    return 3.0 + rng.normal(size=clusters)[code] + rng.normal(size=len(code)), code


def test_clusters_of_one_give_the_textbook_formula() -> None:
    x = np.random.default_rng(0).normal(size=50)
    found = ratio(x, np.ones(50))
    assert found.value == pytest.approx(x.mean())
    assert found.stderr == pytest.approx(x.std(ddof=1) / np.sqrt(50))
    left_out = jackknife(np.stack([x, np.ones(50)], 1), lambda s: s[..., 0] / s[..., 1])
    assert left_out.value == pytest.approx(x.mean())
    assert left_out.stderr == pytest.approx(found.stderr)


def test_intervals_cover_and_the_naive_ones_do_not() -> None:
    rng = np.random.default_rng(1)
    covered, naive = 0, 0
    for _ in range(1000):
        values, code = clustered_values(rng, 60)
        found = ratio(cluster_sums(values, code, 60), cluster_sums(np.ones(len(code)), code, 60))
        assert found.value == pytest.approx(values.mean())
        covered += abs(found.value - 3.0) < 1.96 * found.stderr
        naive += abs(found.value - 3.0) < 1.96 * values.std() / np.sqrt(len(values))
    assert 0.92 < covered / 1000 < 0.97
    assert naive / 1000 < 0.8


def test_merged_clusters_give_the_same_standard_error_on_average() -> None:
    rng = np.random.default_rng(2)
    errors: dict[int, list[float]] = {400: [], 50: []}
    means = []
    for _ in range(300):
        values, code = clustered_values(rng, 400)
        for limit, found in errors.items():
            merged = cluster_codes(code, limit)
            clusters = int(merged.max()) + 1
            sums, counts = cluster_sums(values, merged, clusters), cluster_sums(np.ones(len(code)), merged, clusters)
            found.append(ratio(sums, counts).stderr)
        means.append(values.mean())
    assert np.mean(errors[400]) == pytest.approx(np.std(means), rel=0.1)
    assert np.mean(errors[50]) == pytest.approx(np.mean(errors[400]), rel=0.03)


def test_macro_f1_intervals_cover() -> None:
    rng = np.random.default_rng(3)

    def sample(clusters: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        code = np.repeat(np.arange(clusters), 8)
        truth = rng.choice(3, size=len(code), p=[0.6, 0.3, 0.1])
        shaky = (rng.random(clusters) < 0.5)[code]
        wrong = rng.random(len(code)) < np.where(shaky, 0.5, 0.1)
        return np.where(wrong, rng.integers(0, 3, len(code)), truth), truth, code

    predicted, truth, code = sample(50_000)
    true_value = float(macro_f1(f1_counts(predicted, truth, 3, code, 50_000).sum(0)))
    covered = 0
    for _ in range(400):
        predicted, truth, code = sample(100)
        groups = cluster_codes(code, 50)
        found = jackknife(f1_counts(predicted, truth, 3, groups, 50), macro_f1)
        covered += abs(found.value - true_value) < 1.96 * found.stderr
    assert 0.91 < covered / 400 < 0.98


def test_squared_shares() -> None:
    rng = np.random.default_rng(4)
    p = np.array([0.5, 0.3, 0.2])
    found = [sum_of_squared_shares(rng.multinomial(9, p, size=80).astype(float)) for _ in range(500)]
    values = [item.value for item in found]
    assert np.mean(values) == pytest.approx(p @ p, rel=0.01)
    assert np.mean([item.stderr for item in found]) == pytest.approx(np.std(values), rel=0.1)
    assert sum_of_squared_shares(np.zeros((3, 2))) == Estimate(None, None)


def test_what_cannot_be_estimated_is_none() -> None:
    assert ratio(np.zeros(3), np.zeros(3)) == Estimate(None, None)
    assert ratio(np.array([2.0]), np.array([4.0])) == Estimate(0.5, None)
    assert ratio(np.array([2.0, 0.0]), np.array([4.0, 0.0])) == Estimate(0.5, None)  # the second holds nothing
    assert jackknife(np.zeros((4, 2)), lambda s: s[..., 0]) == Estimate(None, None)
    assert jackknife(np.array([[1.0, 2.0]]), lambda s: s[..., 0] / s[..., 1]) == Estimate(0.5, None)
    assert ratio(np.full(5, 2.0), np.full(5, 2.0)) == Estimate(1.0, 0.0)


def test_cluster_codes_keep_groups_whole_and_even() -> None:
    groups = np.array([7, 7, 100, 3, 3, 3, 50])
    codes = cluster_codes(groups)
    assert codes.tolist() == [1, 1, 3, 0, 0, 0, 2]
    merged = cluster_codes(np.arange(1000), 64)
    assert set(np.bincount(merged)) == {15, 16}
    np.testing.assert_array_equal(cluster_sums(np.arange(7.0), codes, 4), [12.0, 1.0, 6.0, 2.0])
    np.testing.assert_array_equal(cluster_sums(np.ones((7, 2)), codes, 4), [[3, 3], [2, 2], [1, 1], [1, 1]])


def test_combined_ratios_by_a_jackknife_and_by_independence() -> None:
    rng = np.random.default_rng(0)
    b = rng.integers(0, 5, (400, 3)).astype(float)
    a = b * rng.normal([1.0, 2.0, 3.0], 0.3, (400, 3))
    weights = np.array([1.0, -0.5, -0.5])
    found = combined_ratios(a, b, weights)
    assert found.value == pytest.approx(float(weights @ (a.sum(0) / b.sum(0))))
    left_out = [float(weights @ ((a.sum(0) - a[g]) / (b.sum(0) - b[g]))) for g in range(400)]
    assert found.stderr == pytest.approx(np.sqrt(399 / 400 * ((left_out - np.mean(left_out)) ** 2).sum()), rel=0.02)
    # clusters that count for one mean only: the two are independent, and their variances add
    a[:200, 1], b[:200, 1], a[200:, 0], b[200:, 0] = 0, 0, 0, 0
    one, other = ratio(a[:200, 0], b[:200, 0]), ratio(a[200:, 1], b[200:, 1])
    apart = combined_ratios(a[:, :2], b[:, :2], np.array([1.0, -1.0]))
    assert one.stderr is not None
    assert other.stderr is not None
    assert apart.stderr == pytest.approx(np.hypot(one.stderr, other.stderr), rel=0.01)


def test_combined_ratios_of_one_mean_are_the_ratio() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=30), rng.integers(1, 4, 30).astype(float)
    found, expected = combined_ratios(a[:, None], b[:, None], np.ones(1)), ratio(a, b)
    assert (found.value, found.stderr) == (pytest.approx(expected.value), pytest.approx(expected.stderr))
    empty = combined_ratios(np.zeros((3, 2)), np.array([[1.0, 0], [1, 0], [1, 0]]), np.ones(2))
    assert empty.value is None
    few = combined_ratios(np.ones((3, 2)), np.array([[1.0, 0], [1, 1], [1, 0]]), np.ones(2))
    assert few.value is not None
    assert few.stderr is None

"""Paired differences and proportions, against closed forms, scipy and simulations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from trace_offline.estimators.paired import mean_within_clusters, paired_test, share_positive
from trace_offline.estimators.proportion import proportion


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [2, 7, 40])
def test_mean_of_independent_pairs_is_the_textbook_one(seed: int, n: int) -> None:
    values = np.random.default_rng(seed).normal(1.0, 2.0, n)
    found = mean_within_clusters(values, np.arange(n))
    assert found.value == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(n))


def test_copies_of_one_observation_do_not_make_it_more_certain() -> None:
    values = np.random.default_rng(0).normal(size=30)
    once = mean_within_clusters(values, np.arange(30))
    thrice = mean_within_clusters(np.repeat(values, 3), np.repeat(np.arange(30), 3))
    assert (thrice.value, thrice.stderr) == pytest.approx((once.value, once.stderr))


def test_one_pair_and_none() -> None:
    assert mean_within_clusters(np.array([3.0]), np.array([0])).value == 3.0
    assert mean_within_clusters(np.array([3.0]), np.array([0])).stderr is None
    assert mean_within_clusters(np.zeros(0), np.zeros(0, np.int64)).value is None
    assert paired_test(np.zeros(0)) == paired_test(np.zeros(4))
    assert paired_test(np.zeros(4)).sign is None
    assert paired_test(np.array([2.0])).sign == paired_test(np.array([2.0])).wilcoxon == 1.0


def test_ties_count_half() -> None:
    found = share_positive(np.array([1.0, 2.0, -1.0, 0.0]), np.arange(4))
    assert found.value == 2.5 / 4
    assert share_positive(np.zeros(9), np.arange(9)).value == 0.5


def all_signs(differences: np.ndarray) -> float:
    """Exact two-sided p of the signed-rank sum by going through all 2^n signs."""
    ranks = stats.rankdata(np.abs(differences))
    sums = np.array([ranks[np.array(signs)].sum() for signs in itertools.product((False, True), repeat=len(ranks))])
    observed, middle = ranks[differences > 0].sum(), ranks.sum() / 2
    return float((np.abs(sums - middle) >= abs(observed - middle) - 1e-9).mean())


@pytest.mark.parametrize("seed", range(6))
def test_wilcoxon_is_exact_for_few_pairs(seed: int) -> None:
    differences = np.random.default_rng(seed).normal(0.5, 1.0, 9)
    found = paired_test(np.append(differences, 0.0))
    assert found.wilcoxon == pytest.approx(all_signs(differences))
    k = int((differences > 0).sum())
    tail = sum(math.comb(9, i) for i in range(10) if math.comb(9, i) <= math.comb(9, k)) / 2**9
    assert found.sign == pytest.approx(tail)


def test_many_pairs_and_ties_use_the_normal_approximation() -> None:
    rng = np.random.default_rng(1)
    for differences in (rng.normal(0.1, 1, 400), rng.integers(-3, 5, 60).astype(float)):
        moved = differences[differences != 0]
        ranks = stats.rankdata(np.abs(moved))
        w, n = ranks[moved > 0].sum(), len(moved)
        _, counts = np.unique(np.abs(moved), return_counts=True)
        variance = n * (n + 1) * (2 * n + 1) / 24 - (counts**3 - counts).sum() / 48
        z = (w - n * (n + 1) / 4) / math.sqrt(variance)
        assert paired_test(differences).wilcoxon == pytest.approx(2 * stats.norm.sf(abs(z)))


def test_both_tests_hold_their_level_where_nothing_differs() -> None:
    rng = np.random.default_rng(2)
    found = [paired_test(rng.standard_t(3, 30)) for _ in range(1_000)]
    # 1000 trials at 5 %: three standard errors are 2.1 %; the sign test of 30 pairs attains 4.3 % at most
    assert 0.029 < np.mean([item.wilcoxon < 0.05 for item in found if item.wilcoxon is not None]) < 0.071
    assert 0.02 < np.mean([item.sign < 0.05 for item in found if item.sign is not None]) < 0.064


@pytest.mark.parametrize("n", [1, 2, 17, 1000])
def test_wilson_interval_is_that_of_scipy(n: int) -> None:
    for k in sorted({0, 1, n // 3, n - 1, n}):
        found = proportion(k, n)
        expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert found.value == k / n
        assert found.stderr == pytest.approx(math.sqrt(k / n * (1 - k / n) / n))
        assert 0.0 <= found.low <= found.value <= found.high <= 1.0
        narrow = proportion(k, n, level=0.5)
        assert narrow.high - narrow.low < found.high - found.low


def test_wilson_interval_covers_at_the_nominal_rate_near_zero() -> None:
    n, p = 200, 0.01
    weights = stats.binom.pmf(np.arange(n + 1), n, p)
    covered = [proportion(k, n).low <= p <= proportion(k, n).high for k in range(n + 1)]
    assert 0.93 < float(weights @ np.array(covered)) < 0.99


@pytest.mark.parametrize(("k", "n", "level"), [(1, 0, 0.95), (-1, 3, 0.95), (4, 3, 0.95), (1, 3, 1.0)])
def test_impossible_counts(k: int, n: int, level: float) -> None:
    with pytest.raises(ValueError, match="successes ≤ n"):
        proportion(k, n, level)

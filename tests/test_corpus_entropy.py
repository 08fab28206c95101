"""Entropy, mutual information and mixture shares: closed forms, planted truths, coverage, edge cases."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import digamma

from trace_offline.core.errors import UsageError
from trace_offline.corpus.entropy import _unseen_rest, entropy, mean_entropy, mixture_share, mutual_information
from trace_offline.corpus.sampling import zipf_probabilities


@pytest.mark.parametrize("n", [50, 500, 20_000])
def test_entropy_is_unbiased_where_the_plug_in_is_not(n: int) -> None:
    rng = np.random.default_rng(n)
    p = zipf_probabilities(60, 1.0)
    truth = float(-(p @ np.log2(p)))
    samples = rng.multinomial(n, p, size=400)
    fits = [entropy(sample) for sample in samples]
    values = np.array([fit.value for fit in fits])
    mean_error = values.std(ddof=1) / 20
    assert abs(values.mean() - truth) < 0.02 + 3 * mean_error
    plug_in = [-sum(x / n * math.log2(x / n) for x in sample if x) for sample in samples.tolist()]
    if n < 1000:
        assert abs(values.mean() - truth) < 0.3 * abs(np.mean(plug_in) - truth)
    if n >= 500:
        z = np.array([(fit.value - truth) / fit.stderr for fit in fits])
        assert z.std() == pytest.approx(1.0, abs=0.25)


def test_entropy_against_the_estimator_written_out() -> None:
    counts = [7, 4, 2, 2, 1, 1, 1]
    n, ones, twos = 18, 3, 2
    first = sum(x / n * (digamma(n) - digamma(x)) for x in counts)
    a = 2 * twos / ((n - 1) * ones + 2 * twos)
    rest = ones / n * (1 - a) ** (1 - n) * (-math.log(a) - sum((1 - a) ** r / r for r in range(1, n)))
    assert entropy(counts).value == pytest.approx((first + rest) / math.log(2), rel=1e-12)
    # Without words seen once nothing is missing.
    assert entropy([5, 5]).value == pytest.approx((digamma(10) - digamma(5)) / math.log(2))


@pytest.mark.parametrize(("a", "n"), [(0.5, 60), (0.2, 120), (0.05, 500), (0.9, 30)])
def test_both_ways_to_the_unseen_part_agree(a: float, n: int) -> None:
    series = sum((1 - a) ** j / (n + j - 1) for j in range(1, 4000))
    assert _unseen_rest(a, n) == pytest.approx(series, rel=1e-6)


def test_entropy_at_the_edges() -> None:
    assert entropy([9]).value == pytest.approx(0.0, abs=1e-12)
    assert entropy([9, 0, 0]).stderr == 0.0
    assert entropy([1]).value == 0.0
    assert math.isfinite(entropy([1] * 50).value)
    assert entropy([1] * 50).value > math.log2(50)  # all different: there must be many more
    assert entropy([1, 1]).n == 2
    assert entropy([3, 1]).value == entropy([1, 0, 3]).value
    for empty in ([], [0, 0]):
        with pytest.raises(UsageError, match="at least one observation"):
            entropy(empty)


def test_mean_entropy_covers_at_the_nominal_rate() -> None:
    rng = np.random.default_rng(3)
    lists = {"a": zipf_probabilities(40, 1.0), "b": zipf_probabilities(10, 0.5), "c": np.ones(1)}
    shares = np.array([0.5, 0.3, 0.2])
    truth = sum(w * float(-(p @ np.log2(p))) for w, p in zip(shares, lists.values(), strict=True))
    z = []
    for _ in range(300):
        sizes = rng.multinomial(3000, shares)
        drawn = {
            name: Counter(dict(enumerate(rng.multinomial(m, p).tolist())))
            for m, (name, p) in zip(sizes, lists.items(), strict=True)
        }
        fit = mean_entropy(drawn)  # type: ignore[arg-type]
        assert fit.n == 3000
        z.append((fit.value - truth) / fit.stderr)
    assert abs(np.mean(z)) < 0.2
    assert np.std(z) == pytest.approx(1.0, abs=0.15)
    with pytest.raises(UsageError):
        mean_entropy({"a": Counter()})


def joint(strength: float) -> np.ndarray:
    p, q = zipf_probabilities(20, 1.0), zipf_probabilities(15, 0.7)
    together = np.zeros((20, 15))
    np.add.at(together, (np.arange(60) % 20, np.arange(60) % 15), 1 / 60)
    return (1 - strength) * np.outer(p, q) + strength * together


def pairs_of(table: np.ndarray) -> Counter[tuple[str, str]]:
    return Counter({(f"a{i}", f"b{j}"): int(table[i, j]) for i, j in zip(*np.nonzero(table), strict=True)})


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.9])
def test_mutual_information_is_that_of_the_joint_distribution(strength: float) -> None:
    p = joint(strength)
    independent = np.outer(p.sum(1), p.sum(0))
    truth = float(np.sum(p[p > 0] * np.log2(p[p > 0] / independent[p > 0])))
    rng = np.random.default_rng(1)
    fits = [mutual_information(pairs_of(rng.multinomial(4000, p.ravel()).reshape(p.shape)), seed=i) for i in range(40)]
    values = np.array([fit.value for fit in fits])
    assert abs(values.mean() - truth) < 0.01 + 0.01 * truth + 3 * values.std() / math.sqrt(40)
    assert np.mean([fit.stderr for fit in fits]) == pytest.approx(values.std(ddof=1), rel=0.5)


def test_mutual_information_of_what_is_the_same_and_of_nothing() -> None:
    same = mutual_information(Counter({("x", "u"): 500, ("y", "v"): 500}))
    assert same.value == pytest.approx(1.0, abs=0.01)
    assert mutual_information(Counter({("x", "u"): 50})).value == pytest.approx(0.0, abs=1e-9)
    swapped = mutual_information(Counter({("u", "x"): 500, ("v", "y"): 500}))
    assert swapped.value == pytest.approx(same.value, abs=0.01)
    with pytest.raises(UsageError, match="at least two pairs"):
        mutual_information(Counter({("x", "u"): 1}))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_mixture_shares_cover_at_the_nominal_rate(share: float) -> None:
    rng = np.random.default_rng(2)
    p = zipf_probabilities(30, 1.0)
    q = rng.permutation(p)
    z = []
    for _ in range(300):
        counts = rng.multinomial(2000, (1 - share) * p + share * q)
        fit = mixture_share(q / p, counts)
        z.append((fit.value - share) / fit.stderr)
    assert abs(np.mean(z)) < 0.2
    assert np.std(z) == pytest.approx(1.0, abs=0.15)


def test_mixture_share_maximises_the_likelihood() -> None:
    rng = np.random.default_rng(4)
    p, q = zipf_probabilities(12, 1.0), zipf_probabilities(12, 0.2)
    counts = rng.multinomial(300, 0.5 * p + 0.5 * q)

    def negative(s: float) -> float:
        return -float(counts @ np.log((1 - s) * p + s * q))

    best = minimize_scalar(negative, bounds=(0, 1), method="bounded", options={"xatol": 1e-10})
    fit = mixture_share(q / p, counts)
    assert fit.value == pytest.approx(best.x, abs=1e-5)
    h = 1e-3
    curvature = (negative(fit.value + h) - 2 * negative(fit.value) + negative(fit.value - h)) / h**2
    assert fit.stderr == pytest.approx(curvature**-0.5, rel=1e-4)


def test_mixture_share_stays_where_every_outcome_is_possible() -> None:
    # Outcome 0 cannot come from the second distribution: a share of 1 is the most.
    assert mixture_share(np.array([0.0, 2.0]), np.array([0, 50])).value == 1.0
    assert mixture_share(np.array([0.5, 2.0]), np.array([50, 0])).value == -1.0
    with pytest.raises(UsageError, match="not equally probable"):
        mixture_share(np.array([1.0, 1.0]), np.array([3, 4]))
    with pytest.raises(UsageError):
        mixture_share(np.array([0.5, 2.0]), np.array([0, 0]))

"""Entropy and mutual information of counted words, in bits, with their small-sample bias removed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trace_offline.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its standard error and the number of observations it rests on."""

    value: float
    stderr: float
    n: int


def entropy(counts: Sequence[int] | np.ndarray) -> Estimate:
    """Entropy in bits of the distribution behind ``counts`` (int [class]), unseen classes included.

    The estimator of Chao, Wang & Jost (2013, doi:10.1111/2041-210X.12108): the unbiased part
    ``sum_i x_i/n (psi(n) - psi(x_i))`` and, from the classes seen once and twice, an estimate of the rest. The
    standard error is the plug-in one, sqrt(Var[-log2 p] / n). Raises UsageError without observations.
    """
    from scipy.special import digamma

    x = np.asarray(counts, dtype=np.float64)
    x = x[x > 0]
    n = int(x.sum())
    if n == 0:
        raise UsageError("an entropy needs at least one observation.")
    nats = float(np.sum(x / n * (digamma(n) - digamma(x))))
    ones, twos = int((x == 1).sum()), int((x == 2).sum())
    if ones and n > 1:
        # 1 - A estimates the share of the distribution that was not seen, once the ones are allowed for.
        a = 2 * twos / ((n - 1) * ones + 2 * twos) if twos else 2 / ((n - 1) * (ones - 1) + 2)
        if a < 1:
            nats += ones / n * _unseen_rest(a, n)
    surprise = -np.log2(x / n)
    mean = float(x @ surprise) / n
    variance = float(x @ (surprise - mean) ** 2) / n
    return Estimate(nats / float(np.log(2)), float(np.sqrt(variance / n)), n)


def _unseen_rest(a: float, n: int) -> float:
    """``(1 - a)^(1 - n) (-log a - sum_{r=1}^{n-1} (1 - a)^r / r)`` = ``sum_{j>=1} (1 - a)^j / (n + j - 1)``."""
    decay = -float(np.log1p(-a))
    if (n - 1) * decay < 20:  # few digits are lost in the difference, and the series would be long
        r = np.arange(1, n)
        return (-float(np.log(a)) - float(np.sum(np.exp(-decay * r) / r))) * float(np.exp((n - 1) * decay))
    j = np.arange(1, int(40 / decay) + 2)
    return float(np.sum(np.exp(-decay * j) / (n + j - 1)))


def mean_entropy(lists: Mapping[str, Counter[str]]) -> Estimate:
    """Bits per word given its list: ``sum_l n_l H_l / n``, each H_l as in :func:`entropy`.

    The standard error adds those of the lists and that of the lists' shares, all draws being independent.
    """
    estimates = [entropy(list(counts.values())) for counts in lists.values() if counts.total()]
    n = sum(each.n for each in estimates)
    if not n:
        raise UsageError("an entropy needs at least one observation.")
    value = sum(each.n * each.value for each in estimates) / n
    inner = sum((each.n * each.stderr) ** 2 for each in estimates) / n**2
    shares = sum(each.n * (each.value - value) ** 2 for each in estimates) / n**2
    return Estimate(value, float(np.sqrt(inner + shares)), n)


def mutual_information(pairs: Counter[tuple[str, str]], *, seed: int = 0, shuffles: int = 10) -> Estimate:
    """Bits that one word of a pair tells about the other: H(a) + H(b) - H(a, b), each as in :func:`entropy`.

    The mean over ``shuffles`` random pairings of the same words, which is what the estimator makes of no relation at
    all, is subtracted; the standard error is the plug-in one, sqrt(Var[log2 P(a, b) / (P(a) P(b))] / n), or the
    standard deviation over the random pairings where that is larger. Raises UsageError for fewer than two pairs.
    """
    n = pairs.total()
    if n < 2:
        raise UsageError("mutual information needs at least two pairs.")
    first = {word: i for i, word in enumerate(dict.fromkeys(a for a, _ in pairs))}
    second = {word: i for i, word in enumerate(dict.fromkeys(b for _, b in pairs))}
    times = np.array(list(pairs.values()))
    one, two = (np.array([index[pair[side]] for pair in pairs]) for side, index in ((0, first), (1, second)))
    a, b = np.repeat(one, times), np.repeat(two, times)
    apart = _entropy_of(a) + _entropy_of(b)
    rng = np.random.default_rng(seed)
    chance = [apart - _entropy_of(a * len(second) + rng.permutation(b)) for _ in range(shuffles)]
    value = apart - _entropy_of(a * len(second) + b) - float(np.mean(chance))
    local = np.log2(times * n / (np.bincount(a)[one] * np.bincount(b)[two]))
    mean = float(times @ local) / n
    spread = float(np.sqrt(float(times @ (local - mean) ** 2) / n / n))
    return Estimate(value, max(spread, float(np.std(chance, ddof=1))), n)


def _entropy_of(codes: np.ndarray) -> float:
    return entropy(np.unique(codes, return_counts=True)[1]).value


def mixture_share(ratios: np.ndarray, counts: np.ndarray) -> Estimate:
    """Maximum-likelihood share s of the second of two known distributions in their mixture.

    ``ratios``: float [outcome], q_i / p_i of outcomes drawn from ``(1 - s) p + s q``; ``counts``: how often each was,
    0 for outcomes that are possible but were not drawn. Maximises ``sum_i c_i log(1 + s (r_i - 1))``, which is
    concave; the standard error is 1 / sqrt(observed information). s may come out below 0, so that it is unbiased
    there, as long as every outcome keeps a probability. Raises UsageError when all ratios are 1 (any share fits).
    """
    from scipy.optimize import brentq

    gain = np.asarray(ratios, dtype=np.float64) - 1.0
    counts = np.asarray(counts, dtype=np.float64)
    if not counts.sum() or not np.any(gain[counts > 0]):
        raise UsageError("a share needs outcomes that are not equally probable under both distributions.")
    seen, weights = gain[counts > 0], counts[counts > 0]
    # 1 + s (r - 1) >= 0 for every outcome.
    low = -1.0 / gain.max() if gain.max() > 0 else 0.0
    high = -1.0 / gain.min() if gain.min() < 0 else 1.0
    margin = 1e-9 * (high - low)

    def slope(s: float) -> float:
        return float(weights @ (seen / (1 + s * seen)))

    ends = low + margin, high - margin
    if slope(ends[0]) <= 0 or slope(ends[1]) >= 0:
        s = low if slope(ends[0]) <= 0 else high
    else:
        s = float(brentq(slope, *ends, xtol=1e-12))
    at = min(max(s, ends[0]), ends[1])
    information = float(weights @ (seen / (1 + at * seen)) ** 2)
    return Estimate(float(s), information**-0.5, int(weights.sum()))

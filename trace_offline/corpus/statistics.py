"""Measures of a corpus: the Zipf exponent of a list of counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trace_offline.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class ZipfFit:
    """Exponent with its standard error and the number of draws it rests on."""

    alpha: float
    stderr: float
    n: int


def fit_zipf(counts: Sequence[int] | np.ndarray) -> ZipfFit:
    """Maximum-likelihood exponent of P(r) = r^-a / sum_k k^-a over r = 1…R, from ``counts[r - 1]`` (int [R]).

    The likelihood equation is E_a[log r] = mean observed log r; its standard error is 1 / sqrt(n Var_a[log r]).
    Ranks are those of the list, not sorted by count, so rare words cause no bias (Clauset, Shalizi & Newman 2009).

    Raises UsageError when fewer than two ranks or no draws are given, or when all draws fall on one end of the list.
    """
    from scipy.optimize import brentq

    observed = np.asarray(counts, dtype=np.float64)
    n = int(observed.sum())
    if observed.ndim != 1 or len(observed) < 2 or n == 0 or observed.min() < 0:
        raise UsageError("a Zipf exponent needs the counts of at least two ranks and at least one draw.")
    log_rank = np.log(np.arange(1, len(observed) + 1, dtype=np.float64))
    mean = float(observed @ log_rank) / n

    def moments(alpha: float) -> tuple[float, float]:
        logits = -alpha * log_rank
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        first = float(weights @ log_rank)
        return first, float(weights @ (log_rank - first) ** 2)

    low, high = -50.0, 50.0
    if not moments(high)[0] < mean < moments(low)[0]:
        raise UsageError("no Zipf exponent fits: all draws fall on the first or all on the last rank.")
    alpha = float(brentq(lambda a: moments(a)[0] - mean, low, high, xtol=1e-10))
    return ZipfFit(alpha, float(1.0 / np.sqrt(n * moments(alpha)[1])), n)


def fit_zipf_by_count(counts: Sequence[int] | np.ndarray, *, seed: int = 0, draws: int = 20) -> ZipfFit:
    """Exponent when the order of the words is unknown, from counts in any order (int [word]); unseen words are 0.

    Ranking words by their own counts makes every distribution look steeper than it is: of two equal words the luckier
    one comes first. This bias is removed by simulation: the exponent is sought for which samples of the same size,
    ranked by count in the same way, give on average the observed maximum-likelihood fit (indirect inference,
    Gouriéroux, Monfort & Renault 1993). The number of words is that of the observed ones and, by Chao's (1984) lower
    bound f1^2 / 2 f2 from the words seen once and twice, of those unseen. The standard error is that of the simulated
    fits. Raises UsageError as :func:`fit_zipf` does.
    """
    observed = np.sort(np.asarray(counts, dtype=np.int64))[::-1]
    observed = observed[observed > 0]
    raw = fit_zipf(observed)
    once, twice = int((observed == 1).sum()), int((observed == 2).sum())
    words = len(observed) + round(once**2 / (2 * twice) if twice else once * (once - 1) / 2)
    ranks = np.arange(1, words + 1, dtype=np.float64)
    alpha, fits = raw.alpha, np.zeros(draws)
    for _ in range(4):
        weights = ranks**-alpha
        rng = np.random.default_rng(seed)  # the same draws in every round, so that the search settles
        for i in range(draws):
            sample = np.sort(rng.multinomial(raw.n, weights / weights.sum()))[::-1]
            fits[i] = fit_zipf(sample[sample > 0]).alpha
        alpha -= float(fits.mean()) - raw.alpha
    return ZipfFit(alpha, float(fits.std(ddof=1)), raw.n)


def log_log_slope(counts: Sequence[int] | np.ndarray) -> float:
    """Least-squares slope of log count against log rank over the ranks that occur; about -alpha for large counts.

    Raises UsageError when fewer than two ranks occur.
    """
    observed = np.asarray(counts, dtype=np.float64)
    seen = observed > 0
    if seen.sum() < 2:
        raise UsageError("a slope needs at least two ranks that occur.")
    log_rank = np.log(np.arange(1, len(observed) + 1, dtype=np.float64))
    return float(np.polyfit(log_rank[seen], np.log(observed[seen]), 1)[0])

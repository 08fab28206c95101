"""Measures of a corpus: the Zipf exponent of a list of counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

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

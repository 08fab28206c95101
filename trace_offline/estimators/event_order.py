"""Which of two events comes first, over several runs: paired differences of ``log(step + 1)``.

Sign test (exact binomial, ties left out), sign-flip permutation test of the mean (exact up to 2^16 sign patterns, else
100,000 drawn with a fixed seed), and Student's interval for the mean, which assumes nearly Gaussian differences. With n
runs no two-sided p value is below ``2^(1 - n)``: three seeds cannot give p < 0.25.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import stats

from trace_offline.estimators.krylov import Floats

_EXACT = 16
_DRAWS = 100_000
_SEED = 1


@dataclass(frozen=True)
class Order:
    """``first``: runs in which the first event came first, ``second``, ``ties``. ``ratio``: geometric mean of
    ``(step_1 + 1) / (step_2 + 1)``, with its interval (None for a single run); p values two-sided (None without runs
    that differ).
    """

    n: int
    first: int
    second: int
    ties: int
    ratio: float
    ratio_low: float | None
    ratio_high: float | None
    p_sign: float | None
    p_permutation: float | None


def order_of_events(first: Floats, second: Floats, *, confidence: float = 0.95) -> Order:
    """Compare the steps ``first [n]`` and ``second [n]`` of two events in the same n runs.

    Raises ValueError for no runs or unequal lengths.
    """
    one, two = np.asarray(first, float), np.asarray(second, float)
    if len(one) == 0 or len(one) != len(two):
        raise ValueError(f"expected the steps of both events in the same runs, got {len(one)} and {len(two)}")
    apart = np.log1p(one) - np.log1p(two)
    n = len(apart)
    earlier, later = int((apart < 0).sum()), int((apart > 0).sum())
    low = high = None
    if n > 1:
        reach = float(stats.t.isf((1 - confidence) / 2, n - 1) * apart.std(ddof=1) / np.sqrt(n))
        low, high = float(np.exp(apart.mean() - reach)), float(np.exp(apart.mean() + reach))
    told = earlier + later
    return Order(
        n=n,
        first=earlier,
        second=later,
        ties=n - told,
        ratio=float(np.exp(apart.mean())),
        ratio_low=low,
        ratio_high=high,
        p_sign=float(stats.binomtest(earlier, told).pvalue) if told else None,
        p_permutation=_sign_flips(apart) if told else None,
    )


def _sign_flips(apart: Floats) -> float:
    n = len(apart)
    seen = abs(float(apart.sum())) * (1 - 1e-12)
    if n <= _EXACT:
        signs = np.array(list(product((-1.0, 1.0), repeat=n)))
        return float((np.abs(signs @ apart) >= seen).mean())
    signs = np.random.default_rng(_SEED).choice((-1.0, 1.0), size=(_DRAWS, n))
    return float((1 + (np.abs(signs @ apart) >= seen).sum()) / (_DRAWS + 1))

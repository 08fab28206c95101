"""A share of independent yes/no observations, with its standard error and an interval that holds near 0 and 1 as well.

E. B. Wilson (1927), Probable inference, the law of succession, and statistical inference, JASA 22; L. D. Brown, T. T.
Cai and A. DasGupta (2001), Interval Estimation for a Binomial Proportion, Statistical Science 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95
"""Nominal coverage of the interval."""


@dataclass(frozen=True, slots=True)
class Proportion:
    """``value`` = successes / n; ``stderr`` = √(p(1−p)/n), 0 at both ends; ``low`` and ``high``: Wilson interval."""

    value: float
    stderr: float
    low: float
    high: float


def proportion(successes: int, n: int, level: float = LEVEL) -> Proportion:
    """Share of ``successes`` among ``n`` independent trials.

    With z the normal quantile of (1 + level)/2: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n). Raises ValueError
    unless 0 ≤ successes ≤ n, n ≥ 1 and 0 < level < 1.
    """
    if n < 1 or not 0 <= successes <= n or not 0.0 < level < 1.0:
        raise ValueError(f"0 ≤ successes ≤ n, n ≥ 1 and 0 < level < 1 expected, found {successes}, {n} and {level}")
    p = successes / n
    z = NormalDist().inv_cdf((1.0 + level) / 2.0)
    scale = 1.0 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # rounding must not push an end past the observed 0 or 1
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Proportion(p, math.sqrt(p * (1 - p) / n), low, high)

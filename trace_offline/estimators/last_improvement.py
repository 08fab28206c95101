"""The early-stopping question asked offline: from which checkpoint on did nothing improve?

Checkpoint k is enough when no later value exceeds the best up to k by more than the tolerance: a number of standard
errors of their difference, or an amount in the unit of the values. The answer is the first such k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_offline.estimators.history_noise import Noise
from trace_offline.estimators.krylov import Floats


@dataclass(frozen=True)
class LastImprovement:
    """``k``: the point that is enough. ``missed``: largest later value minus the best up to k (negative: none is
    better); ``improved``: whether there was any improvement at all since the first point.
    """

    k: int
    best: float
    missed: float
    improved: bool


def last_improvement(
    values: Floats, noise: Noise | None, *, stderrs: float = 2.0, absolute: float | None = None
) -> LastImprovement:
    """The last improvement of a metric that rises when it improves; ``absolute`` wins over ``stderrs``.

    Raises ValueError when there are no values, or neither noise nor an absolute tolerance.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values")
    if noise is None and absolute is None:
        raise ValueError("a tolerance in standard errors needs to know them; give an absolute one")
    best = np.maximum.accumulate(values)
    if absolute is not None or noise is None:
        allowed = np.full((n, n), float(absolute or 0.0))
    else:
        where = np.array([int(np.argmax(values[: k + 1])) for k in range(n)])
        allowed = stderrs * np.hypot(noise.sigma[where][:, None], noise.sigma)
    better = np.triu(values - best[:, None] > allowed, 1)
    k = int(np.flatnonzero(~better.any(1))[0])
    missed = float(values[k + 1 :].max() - best[k]) if k < n - 1 else 0.0
    return LastImprovement(k=k, best=float(best[k]), missed=missed, improved=k > 0)

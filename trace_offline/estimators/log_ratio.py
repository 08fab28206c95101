"""Ratio of two weighted means of clustered observations, with an interval: the delta method on its logarithm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from trace_offline.estimators.krylov import Floats


@dataclass(frozen=True)
class Contributions:
    """What each observation adds to a weighted mean: ``Σ_s added_s`` with ``added_s = weight_s x_s / Σ weight``.

    ``added [S]``, or ``[P, S]`` with one row for each random vector, whose mean is meant; ``weights [S]``, positive;
    ``groups [S]``: observations of one group may depend on each other.
    """

    added: Floats
    weights: Floats
    groups: ArrayLike

    @property
    def value(self) -> float:
        """The mean."""
        return float(np.atleast_2d(self.added).sum(1).mean())

    def without_group(self) -> Floats:
        """``[G]``: the mean without each group in turn."""
        added = np.atleast_2d(self.added).mean(0)
        _, code = np.unique(np.asarray(self.groups), return_inverse=True)
        part, weight = np.bincount(code, weights=added), np.bincount(code, weights=self.weights)
        left = weight.sum() - weight
        if len(part) < 2:
            return np.zeros(0)
        return (part.sum() - part) * weight.sum() / left

    def without_row(self) -> Floats:
        """``[P]``: the mean without each random vector in turn; empty when there is one only."""
        rows = np.atleast_2d(self.added).sum(1)
        return (rows.sum() - rows) / (len(rows) - 1) if len(rows) > 1 else np.zeros(0)

    @property
    def stderr(self) -> float | None:
        """Jackknife error over groups and over random vectors, in quadrature; None from a single group."""
        groups = self.without_group()
        if not len(groups):
            return None
        return float(np.sqrt(jackknife_variance(groups) + jackknife_variance(self.without_row())))


@dataclass(frozen=True)
class Ratio:
    """``value``, its standard error ``value · stderr(log)``, the 95 % interval, and independent groups behind it."""

    value: float
    stderr: float
    lower: float
    upper: float
    groups: int


def jackknife_variance(left_out: Floats) -> float:
    """``(m − 1)/m Σ (x_(i) − mean)²`` of the m delete-one values; 0 when there are none."""
    count = len(left_out)
    return float((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum()) if count else 0.0


def log_ratio(above: Contributions, below: Contributions, *, level: float = 0.95) -> Ratio:
    """``above / below``: two independent samples measured with the same random vectors (paired rows).

    The variance of the logarithm is the sum of three jackknife variances: over the groups of either sample, and over
    the random vectors of both together. The interval is ``exp(log ratio ± t s)`` with Student's t at the degrees of
    freedom of Welch and Satterthwaite (Satterthwaite, Biometrics Bull. 2, 1946).

    Raises:
        ValueError: fewer than two groups on either side, different numbers of rows.
        ZeroDivisionError: a mean, or a mean without one group or vector, is not positive: there is no logarithm.

    """
    parts = [above.without_group(), below.without_group()]
    if min(len(part) for part in parts) < 2:
        raise ValueError("expected at least two groups of observations on either side, to see how they vary")
    rows = [above.without_row(), below.without_row()]
    if len(rows[0]) != len(rows[1]):
        raise ValueError(f"expected as many random vectors on either side, found {len(rows[0])} and {len(rows[1])}")
    if min(above.value, below.value, *(float(part.min()) for part in (*parts, *rows) if len(part))) <= 0:
        raise ZeroDivisionError("not positive beyond its error: a ratio has no meaning")
    terms = [(jackknife_variance(np.log(part)), len(part) - 1) for part in parts]
    if len(rows[0]):
        terms.append((jackknife_variance(np.log(rows[0]) - np.log(rows[1])), len(rows[0]) - 1))
    variance = sum(term for term, _ in terms)
    value, count = above.value / below.value, min(len(part) for part in parts)
    if variance == 0:
        return Ratio(value, 0.0, value, value, count)
    freedom = variance**2 / sum(term**2 / free for term, free in terms)
    half = float(stats.t.ppf(0.5 + level / 2, freedom) * np.sqrt(variance))
    return Ratio(value, value * float(np.sqrt(variance)), value * np.exp(-half), value * np.exp(half), count)

"""How much a text repeats itself, and how far the n-grams of two collections of texts differ.

rep-n of one text is the share of its n-grams that it has had before: 1 − |different n-grams| / |n-grams|.

The divergence of two collections compares the chances that two n-grams drawn from two different texts are equal: from
both collections s_pq = Σ_v p_v q_v, within each s_pp and s_qq,

    divergence = 1 − 2 s_pq / (s_pp + s_qq).

0 for collections of one law, 1 when they share no n-gram. s_pp is estimated from pairs of *different* texts only,

    s_pp = (‖Σ_i c_i‖² − Σ_i ‖c_i‖²) / (N² − Σ_i N_i²),      c_i the n-gram counts of text i, N_i their number,

so that few texts do not look more alike to themselves than to others: a plain divergence between counts
(Jensen–Shannon, Kullback–Leibler) is positive for two samples of one law, and the more so the fewer they are. One minus
this number is Morisita's index of overlap with texts instead of single draws as the independent units.

References: S. Welleck et al. (2020), Neural Text Generation with Unlikelihood Training, ICLR, arXiv:1908.04319 (rep-n);
M. Morisita (1959), Measuring of interspecific association and similarity between communities, Memoirs of the Faculty
of Science, Kyushu University, Series E 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trace_offline.estimators.clustered import Codes, Estimate, Floats

Texts = Sequence[NDArray[np.integer] | Sequence[int]]


def repeated_share(text: NDArray[np.integer] | Sequence[int], n: int) -> float | None:
    """rep-n of one text: the share of its n-grams that occurred before in it; None when it has no n-gram."""
    found = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    return 1.0 - len(set(found)) / len(found) if found else None


def ngram_divergence(
    first: Texts,
    second: Texts,
    n: int,
    first_groups: Sequence[int] | None = None,
    second_groups: Sequence[int] | None = None,
) -> Estimate:
    """Divergence of the n-grams of two collections, with its standard error by leaving out one text at a time.

    ``first_groups``, ``second_groups``: texts with one number belong together and are one text with gaps. stderr² is
    the sum of both jackknife variances, (m − 1)/m · Σ (θ_(−i) − mean)². No value when fewer than two texts of a
    collection have an n-gram, or no n-gram occurs in two texts.
    """
    one = _Collection(first, n, range(len(first)) if first_groups is None else first_groups)
    other = _Collection(second, n, range(len(second)) if second_groups is None else second_groups)
    if len(one.size) < 2 or len(other.size) < 2:
        return Estimate(None, None)
    codes = _numbered(np.concatenate([one.grams, other.grams]))
    one.code(codes[: len(one.grams)], int(codes.max()) + 1)
    other.code(codes[len(one.grams) :], int(codes.max()) + 1)
    cross = float(one.total @ other.total)
    # what leaving out each text changes: dot products of its counts with the totals, its own squared counts
    value = float(_divergence(one.within(), other.within(), cross / (one.n * other.n)))
    variance = 0.0
    for mine, theirs in ((one, other), (other, one)):
        left = (cross - mine.dot(theirs.total)) / ((mine.n - mine.size) * theirs.n)
        replicates = _divergence(mine.within_without(), theirs.within(), left)
        if not np.isfinite(replicates).all():
            return Estimate(value, None) if math.isfinite(value) else Estimate(None, None)
        m = len(mine.size)
        variance += (m - 1) / m * float(((replicates - replicates.mean()) ** 2).sum())
    if not math.isfinite(value):
        return Estimate(None, None)
    return Estimate(value, math.sqrt(variance))


def _divergence(within: Floats | float, other: Floats | float, cross: Floats | float) -> Floats:
    total = np.asarray(within, dtype=np.float64) + other
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, 1.0 - 2.0 * np.asarray(cross) / total, np.nan)


def _numbered(grams: Codes) -> Codes:
    """A number from 0 for every different row of ``[F, n]``."""
    codes = np.zeros(len(grams), dtype=np.int64)
    for column in grams.T:
        tokens = np.unique(column, return_inverse=True)[1].reshape(-1)
        codes = np.unique(codes * (int(tokens.max()) + 1) + tokens, return_inverse=True)[1].reshape(-1)
    return codes


class _Collection:
    """The n-grams of all texts: ``grams [F, n]``, the text of each ``owner [F]``, n-grams of each text ``size [m]``."""

    def __init__(self, texts: Texts, n: int, groups: Sequence[int]) -> None:
        grams, owners = [np.zeros((0, n), np.int64)], [np.zeros(0, np.int64)]
        for text, group in zip(texts, groups, strict=True):
            tokens = np.asarray(text, dtype=np.int64)
            if len(tokens) >= n:
                grams.append(np.lib.stride_tricks.sliding_window_view(tokens, n))
                owners.append(np.full(len(tokens) - n + 1, group, dtype=np.int64))
        self.grams = np.concatenate(grams)
        _, owner, size = np.unique(np.concatenate(owners), return_inverse=True, return_counts=True)
        self.owner: Codes = owner.reshape(-1)
        self.size: Floats = size.astype(np.float64)
        self.n = float(self.size.sum())

    def code(self, codes: Codes, distinct: int) -> None:
        """``codes [F]``: number of each n-gram."""
        self._codes = codes
        self.total: Floats = np.bincount(codes, minlength=distinct).astype(np.float64)
        pairs, counts = np.unique(self.owner * distinct + codes, return_counts=True)
        self._own: Floats = np.bincount(pairs // distinct, weights=counts.astype(np.float64) ** 2).astype(np.float64)

    def dot(self, table: Floats) -> Floats:
        """Σ_v c_iv · table_v for every text i."""
        return np.bincount(self.owner, weights=table[self._codes], minlength=len(self.size)).astype(np.float64)

    def within(self) -> float:
        """Chance that n-grams of two different texts are equal."""
        return float((self.total @ self.total - self._own.sum()) / (self.n**2 - (self.size**2).sum()))

    def within_without(self) -> Floats:
        """The same without each text in turn; NaN when a single text is left."""
        equal = (self.total @ self.total - self._own.sum()) - 2.0 * (self.dot(self.total) - self._own)
        rest = self.n - self.size
        pairs = rest**2 - ((self.size**2).sum() - self.size**2)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(pairs > 0, equal / pairs, np.nan)

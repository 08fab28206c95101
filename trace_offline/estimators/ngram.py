"""n-gram language models by Witten–Bell interpolation: exact distributions over the whole vocabulary, kept sparse.

With c(h w) the count of token w after context h, c(h) = Σ_w c(h w), T(h) the number of different tokens seen after h,
h' the context without its first token and V the size of the vocabulary,

    p(w | h) = (c(h w) + T(h) · p(w | h')) / (c(h) + T(h)),      p(w | no context) mixes with 1/V in the same way,

and p(w | h) = p(w | h') where h never occurs. The weight of the lower order, γ(h) = T(h) / (c(h) + T(h)), is the chance
of meeting something new after h, estimated by how often that happened. Every token has a positive probability, and no
discount has to be estimated from counts of counts, which small and synthetic vocabularies may not have.

A dense table is never built: with γ known, entropies, expectations and most likely tokens of p(· | h) follow from those
of p(· | h') and the tokens seen after h alone.

References: I. H. Witten and T. C. Bell (1991), The Zero-Frequency Problem, IEEE Transactions on Information Theory
37(4); S. F. Chen and J. Goodman (1999), An Empirical Study of Smoothing Techniques for Language Modeling, Computer
Speech & Language 13(4), section 2.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trace_offline.estimators.ngram_counts import Integers, Level

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]


class WittenBell:
    """Models of order 1 … len(levels), where ``levels[k]`` holds the contexts of k tokens.

    ``vocabulary``: V, at least the largest token counted + 1. Contexts are indices into their level; −1 stands for a
    context that is not there, whose distribution is that of the level below. Raises ValueError for a V too small.
    """

    def __init__(self, levels: Sequence[Level], vocabulary: int) -> None:
        largest = max((int(level.token.max()) for level in levels if len(level.token)), default=-1)
        if largest >= vocabulary:
            raise ValueError(f"the counts hold token {largest}, beyond a vocabulary of {vocabulary}")
        self.vocabulary = vocabulary
        self.levels = tuple(levels)
        self.gamma: list[Floats] = []
        self.weight: list[Floats] = []
        self._keys: list[Integers] = []
        self._owner: list[Integers] = []
        for level in self.levels:
            followers = np.diff(level.start)
            owner = np.repeat(np.arange(len(level)), followers)
            total = np.bincount(owner, weights=level.count, minlength=len(level))
            mixed = total + followers
            self.gamma.append(np.where(mixed > 0, followers / np.maximum(mixed, 1), 1.0))
            self.weight.append(level.count / mixed[owner])
            self._owner.append(owner)
            self._keys.append(owner * vocabulary + level.token)
        self._entropy: list[Floats] = []
        self._best: list[tuple[Integers, Floats]] = []
        for k in range(len(self.levels)):
            self._summarize(k)

    def probability(self, contexts: Integers, tokens: Integers) -> Floats:
        """p(token | context) of every order: ``contexts [orders, M]``, ``tokens [M] → [orders, M]``."""
        found = np.empty((len(self.levels), len(tokens)))
        lower = np.full(len(tokens), 1.0 / self.vocabulary)
        for k in range(len(self.levels)):
            lower = found[k] = self._step(k, contexts[k], tokens, lower)
        return found

    def entropy(self, contexts: Integers) -> Floats:
        """−Σ_w p(w | h) log p(w | h) in nats of every order, ``[order, M]``."""
        return self._by_context(contexts, self._entropy, np.log(self.vocabulary))

    def most_likely(self, contexts: Integers) -> Integers:
        """The most likely token of every order, the smallest of equal ones: ``[order, M]``."""
        best = [token.astype(np.float64) for token, _ in self._best]
        return self._by_context(contexts, best, 0.0).astype(np.int64)

    def expectation(self, contexts: Integers, values: Tensor) -> Tensor:
        """Σ_w p(w | h) · values[m, w] of every order: ``contexts [order, M]``, ``values [M, V] → float64 [order, M]``.

        With values = log q this is minus the cross-entropy of p with q. Values of −∞ give −∞.
        """
        import torch

        def tensor(array: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(values.device)

        wide = values.double()
        lower = wide.mean(-1)
        found = []
        for k, level in enumerate(self.levels):
            if k == 0 and len(level):
                # one context for all: one product with its dense distribution
                dense = np.zeros(self.vocabulary)
                dense[level.token] = self.weight[0]
                dense += self.gamma[0][0] / self.vocabulary
                lower = wide @ tensor(dense)
            else:
                known = np.flatnonzero(contexts[k] >= 0)
                context = contexts[k][known]
                length = np.diff(level.start)[context]
                owner = np.repeat(np.arange(len(known)), length)
                offset = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
                at = np.repeat(level.start[context], length) + offset
                terms = wide[tensor(known[owner]), tensor(level.token[at])] * tensor(self.weight[k][at])
                seen = torch.zeros(len(known), dtype=torch.float64, device=values.device)
                seen.index_add_(0, tensor(owner), terms)
                lower = lower.clone()
                places = tensor(known)
                lower[places] = tensor(self.gamma[k][context]) * lower[places] + seen
            found.append(lower)
        return torch.stack(found)

    def distribution(self, contexts: Integers) -> Floats:
        """p(· | h) of the highest order as a dense table ``[M, V]``; for small vocabularies."""
        tokens = np.tile(np.arange(self.vocabulary), contexts.shape[1])
        repeated = np.repeat(contexts, self.vocabulary, axis=1)
        return self.probability(repeated, tokens)[-1].reshape(contexts.shape[1], self.vocabulary)

    def _step(self, k: int, context: Integers, tokens: Integers, lower: Floats) -> Floats:
        """Probability under order k + 1 of these tokens, from that under order k."""
        known = context >= 0
        if not known.any():
            return lower.copy()
        keys, weights = self._keys[k], self.weight[k]
        seen = np.zeros(len(tokens))
        if len(keys):
            wanted = context * self.vocabulary + tokens
            place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            seen = np.where(keys[place] == wanted, weights[place], 0.0)
        gamma = np.where(known, self.gamma[k][np.maximum(context, 0)], 1.0)
        return np.where(known, seen, 0.0) + gamma * lower

    def _summarize(self, k: int) -> None:
        """Entropy and most likely token of every context of level k."""
        level, gamma, owner = self.levels[k], self.gamma[k], self._owner[k]
        n = len(level)
        below: Floats = np.full(n, np.log(self.vocabulary))
        best: Integers = np.zeros(n, dtype=np.int64)
        best_p: Floats = np.full(n, 1.0 / self.vocabulary)
        if k:
            below = self._entropy[k - 1][level.parent]
            tokens, probabilities = self._best[k - 1]
            best, best_p = tokens[level.parent], probabilities[level.parent]
        ancestors = self._ancestors(k)[:, owner]
        lower_p: Floats = np.full(len(level.token), 1.0 / self.vocabulary)
        for j in range(k):
            lower_p = self._step(j, ancestors[j], level.token, lower_p)
        backed = gamma[owner] * lower_p
        p = backed + self.weight[k]
        # Σ γq log γq over the whole vocabulary, corrected at the tokens that were seen; γ and q are never 0
        change = np.bincount(owner, weights=p * np.log(p) - backed * np.log(backed), minlength=n)
        self._entropy.append(gamma * (below - np.log(gamma)) - change)
        self._best.append(self._argmax(owner, level.token, p, best, gamma * best_p, n))

    @staticmethod
    def _argmax(
        owner: Integers, token: Integers, p: Floats, other: Integers, other_p: Floats, n: int
    ) -> tuple[Integers, Floats]:
        """The best of the tokens seen and the best of the level below (whose p is larger still when it was seen)."""
        owner = np.concatenate([owner, np.arange(n)])
        token, p = np.concatenate([token, other]), np.concatenate([p, other_p])
        order = np.lexsort((token, -p, owner))
        first = np.searchsorted(owner[order], np.arange(n))
        return token[order][first], p[order][first]

    def _ancestors(self, k: int) -> Integers:
        """For every context of level k all that it mixes with: ``[k + 1, C]``, from the empty context to itself."""
        rows = [np.arange(len(self.levels[k]))]
        for level in reversed(self.levels[1 : k + 1]):
            rows.append(level.parent[rows[-1]])
        return np.stack(rows[::-1])

    def _by_context(self, contexts: Integers, tables: list[Floats], start: float) -> Floats:
        """Table values of each order; where a context is not there, those of the order below."""
        lower = np.full(contexts.shape[1], start)
        found = np.empty((len(self.levels), contexts.shape[1]))
        for k, table in enumerate(tables):
            if len(table):
                lower = np.where(contexts[k] >= 0, table[np.maximum(contexts[k], 0)], lower)
            found[k] = lower
        return found

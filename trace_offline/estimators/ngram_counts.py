"""What a training text says about the n-grams of an evaluation text: counts of continuations, and longest matches.

Only contexts that occur in the evaluation text are counted, so what is kept grows with the evaluation text and the
variety of its continuations, not with the training text. Everything is exact: n-grams are named by number, one length
after the other (the name of an n-gram is that of its first n − 1 tokens and its last token), and nothing is hashed.

Shape letters: E tokens of the evaluation rows one after the other, M tokens of the training texts, C contexts,
F continuations of all contexts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Level:
    """Contexts of one length and what follows them in the training text.

    ``parent [C]``: the context without its first token, as an index into the level below (0 for the single empty
    context). Context c is followed by ``token[start[c]:start[c + 1]]`` (ascending), ``count`` times each.
    """

    parent: Integers
    start: Integers
    token: Integers
    count: Integers

    def __len__(self) -> int:
        return len(self.parent)


@dataclass(frozen=True)
class TrainingMatches:
    """``levels[k]``: contexts of k tokens, k = 0 … order − 1. ``context [order, E]``: the context of k tokens before
    each token of the evaluation text as an index into ``levels[k]``, −1 where there are fewer tokens before it in its
    row or the training text does not have it. ``matched [E]``: length of the longest n-gram that ends with the token,
    lies in its row and occurs within one training text; 0 for a token that never occurs.
    """

    levels: tuple[Level, ...]
    context: Integers
    matched: Integers


def match_training_text(rows: Sequence[Integers], texts: Sequence[Integers], order: int = 3) -> TrainingMatches:
    """Compare evaluation rows with training texts; n-grams never cross the end of a row or text.

    ``order``: n of the longest n-gram counted (contexts of n − 1 tokens). The first token of a training text is a
    context but no continuation: a causal model never predicts it. Raises ValueError without rows or texts.
    """
    if not len(rows) or not len(texts):
        raise ValueError("expected at least one evaluation row and one training text")
    x, place = _joined(rows)
    y, depth = _joined(texts)
    vocabulary = int(max(x.max(initial=0), y.max(initial=0))) + 1
    matched = np.zeros(len(x), dtype=np.int64)
    context = np.full((order, len(x)), -1, dtype=np.int64)
    context[0] = 0
    following = np.flatnonzero(depth > 0)
    levels = [_level(np.zeros(1, np.int64), np.zeros(len(following), np.int64), y[following], vocabulary)]
    # names of the n-grams that end at these tokens; only those both texts have are named
    ends, names = np.arange(len(x)), np.zeros(len(x), dtype=np.int64)
    others, other_names = np.arange(len(y)), np.zeros(len(y), dtype=np.int64)
    # name of the n-gram one token shorter that ends at each token: the empty one for n = 1
    shorter = np.zeros(len(x), dtype=np.int64)
    n = 0
    while len(ends):
        n += 1
        if n > 1:
            ends, names = _next(ends, names, place, n)
            others, other_names = _next(others, other_names, depth, n)
        keys, other_keys = names * vocabulary + x[ends], other_names * vocabulary + y[others]
        distinct = np.intersect1d(keys, other_keys)
        ends, names = _named(ends, keys, distinct)
        others, other_names = _named(others, other_keys, distinct)
        matched[ends] = n
        if n < order:
            parent = np.zeros(len(distinct), dtype=np.int64)
            parent[names] = shorter[ends]
            shorter[ends] = names
            inside = others + 1 < len(y)
            inside[inside] = depth[others[inside] + 1] > 0
            after = others[inside] + 1
            levels.append(_level(parent, other_names[inside], y[after], vocabulary))
            before = ends + 1 < len(x)
            before[before] = place[ends[before] + 1] > 0
            context[n, ends[before] + 1] = names[before]
    while len(levels) < order:
        levels.append(_level(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), vocabulary))
    return TrainingMatches(tuple(levels), context, matched)


def _joined(parts: Sequence[Integers]) -> tuple[Integers, Integers]:
    """All tokens one after the other, and the place of each in its own part."""
    lengths = np.asarray([len(part) for part in parts], dtype=np.int64)
    tokens = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    return tokens, np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _next(ends: Integers, names: Integers, place: Integers, n: int) -> tuple[Integers, Integers]:
    """Tokens right after a named n-gram of length n − 1 within the same text, and the name before them."""
    after = ends + 1
    inside = after < len(place)
    inside[inside] = place[after[inside]] >= n - 1
    return after[inside], names[inside]


def _named(ends: Integers, keys: Integers, distinct: Integers) -> tuple[Integers, Integers]:
    """Those whose key is among ``distinct`` (sorted), with its index there as the new name."""
    if not len(distinct):
        return ends[:0], keys[:0]
    name = np.minimum(np.searchsorted(distinct, keys), len(distinct) - 1)
    known = distinct[name] == keys
    return ends[known], name[known]


def _level(parent: Integers, contexts: Integers, tokens: Integers, vocabulary: int) -> Level:
    pairs, count = np.unique(contexts * vocabulary + tokens, return_counts=True)
    start = np.searchsorted(pairs // vocabulary, np.arange(len(parent) + 1))
    return Level(parent, start.astype(np.int64), pairs % vocabulary, count.astype(np.int64))

"""Where lemmas come from: each list by its Zipf distribution, with or without collocations.

Collocations rest on fields of meaning. The lemmas of a list are laid in a random order on the interval from 0 to 1,
each as long as it is probable, and field k of K is the stretch from k/K to (k+1)/K; a lemma that lies across a border,
as frequent ones do, belongs to several fields. A free draw is a uniform point of the interval. A draw near field k is a
uniform point of that stretch. With collocation strength s the second word of a pair is drawn near the field of the
first with probability s and freely otherwise, so

    P(a, b) = (1 - s) p_a p_b + s K sum_k o_ak o_bk,      o_ak = length of a's interval in field k,

in which both words keep their own distribution whatever s is: collocations change neither exponent nor entropy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from trace_offline.corpus.expectation import exponent
from trace_offline.corpus.lexicon import Lexicon
from trace_offline.corpus.params import CorpusParams
from trace_offline.corpus.sampling import drawer, permutation, uniform_stream, zipf_probabilities


class Lexis(Protocol):
    """Draws lemmas by list (``noun``, ``adjective``, ``adverb``, ``verb FRAME``)."""

    def draw(self, name: str, near: int | None = None) -> tuple[str, int]:
        """A lemma and its field; ``near`` is the field of the word that it may collocate with."""


def lexis(lexicon: Lexicon, params: CorpusParams, seed: int) -> Lexis:
    """The draws that the parameters ask for."""
    return Collocated(lexicon, params, seed) if params.collocated else Independent(lexicon, params, seed)


def lemma_lists(lexicon: Lexicon) -> dict[str, tuple[str, ...]]:
    """All lists by name, most frequent lemma first: ``noun``, ``adjective``, ``adverb`` and ``verb FRAME``."""
    lists = {"noun": lexicon.nouns, "adjective": lexicon.adjectives, "adverb": lexicon.adverbs}
    return lists | {f"verb {name}": stems for name, stems in lexicon.verbs.items()}


class Independent:
    """Every lemma by itself, each list from its own stream."""

    def __init__(self, lexicon: Lexicon, params: CorpusParams, seed: int) -> None:
        alpha = exponent(params)
        self._next = {
            name: drawer(seed, name, zipf_probabilities(len(stems), alpha), stems).__next__
            for name, stems in lemma_lists(lexicon).items()
        }

    def draw(self, name: str, near: int | None = None) -> tuple[str, int]:
        """A lemma; there are no fields, so its field is 0."""
        return self._next[name](), 0


class FieldList:
    """One list of lemmas laid out in fields of meaning; ``name`` and ``seed`` fix the layout, not the draws."""

    def __init__(self, name: str, stems: Sequence[str], alpha: float, fields: int, seed: int) -> None:
        order = permutation(seed, f"fields {name}", len(stems))
        ends = np.cumsum(zipf_probabilities(len(stems), alpha)[order])
        ends[-1] = 1.0
        self.fields = fields
        self.stems = tuple(stems[i] for i in order)
        self.starts = np.concatenate([[0.0], ends[:-1]])
        self.ends = ends
        self._edges: list[float] = ends[:-1].tolist()

    def at(self, point: float) -> str:
        """The lemma at a point of the interval."""
        return self.stems[bisect_right(self._edges, point)]

    def overlap(self) -> np.ndarray:
        """o_ak, the length of lemma a's interval in field k; float64 [lemma, field] in the order of ``stems``."""
        borders = np.arange(self.fields + 1) / self.fields
        inside = np.minimum(self.ends[:, None], borders[1:]) - np.maximum(self.starts[:, None], borders[:-1])
        return np.maximum(inside, 0.0)


def field_lists(lexicon: Lexicon, params: CorpusParams) -> dict[str, FieldList]:
    """The layout of every list of :func:`lemma_lists`."""
    alpha = exponent(params)
    return {
        name: FieldList(name, stems, alpha, params.fields, params.lexicon_seed)
        for name, stems in lemma_lists(lexicon).items()
    }


class Collocated:
    """Second words near the field of the first, as often as the collocation strengths say."""

    def __init__(self, lexicon: Lexicon, params: CorpusParams, seed: int) -> None:
        self._lists = field_lists(lexicon, params)
        self._points = {name: uniform_stream(seed, f"collocated {name}").__next__ for name in self._lists}
        self._fields = params.fields
        self._strengths = {"noun": params.verb_noun, "adjective": params.noun_adjective, "adverb": params.verb_adverb}
        self._verbs = params.verb_noun

    def draw(self, name: str, near: int | None = None) -> tuple[str, int]:
        """A lemma and its field."""
        point, strength = self._points[name], self._strengths.get(name, self._verbs)
        if near is not None and strength > 0 and point() < strength:
            return self._lists[name].at((near + point()) / self._fields), near
        place = point()
        return self._lists[name].at(place), int(place * self._fields)

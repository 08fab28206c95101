"""Collocations: the pairs of a text, the strength that made them, and what the generator's own distribution says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from trace_offline.core.errors import UsageError
from trace_offline.corpus.entropy import Estimate, mixture_share
from trace_offline.corpus.expectation import words_per_sentence
from trace_offline.corpus.grammar import FRAMES
from trace_offline.corpus.lexicon import build_lexicon
from trace_offline.corpus.lexis import FieldList, field_lists
from trace_offline.corpus.params import COLLOCATIONS, CorpusParams
from trace_offline.corpus.sentence import AnnotatedSentence

Pairs = dict[str, Counter[tuple[str, str, str]]]
"""By kind of collocation: how often (list of the verb or "", first lemma, second lemma) occurs."""


def collocation_pairs(sentences: Iterable[AnnotatedSentence]) -> Pairs:
    """Count the pairs of ``noun_adjective``, ``verb_noun`` and ``verb_adverb``.

    A verb's noun is its object, which in a passive is the subject.
    """
    found: Pairs = {name: Counter() for name in COLLOCATIONS}
    for sentence in sentences:
        count_pairs(sentence, found)
    return found


def count_pairs(sentence: AnnotatedSentence, found: Pairs) -> None:
    """Add the pairs of one sentence to ``found``."""
    pos, lemmas = sentence.pos, sentence.lemmas
    for i, tag in enumerate(pos):
        if tag == "ADJ" and i + 1 < len(pos) and pos[i + 1] == "NOUN":
            found["noun_adjective"]["", lemmas[i + 1], lemmas[i]] += 1
    for clause in sentence.clauses:
        verb = lemmas[clause.verb + clause.passive]
        if clause.verb and pos[clause.verb - 1] == "ADV":
            found["verb_adverb"][clause.frame, verb, lemmas[clause.verb - 1]] += 1
        if clause.passive:
            found["verb_noun"][clause.frame, verb, lemmas[clause.subject]] += 1
        elif clause.verb + 1 < len(pos) and pos[clause.verb + 1] == "DET":
            head = next((i for i in range(clause.verb + 1, len(pos)) if pos[i] == "NOUN"), None)
            if head is not None:
                found["verb_noun"][clause.frame, verb, lemmas[head]] += 1


def pointwise(pairs: Counter[tuple[str, str, str]]) -> dict[tuple[str, str, str], float]:
    """Pointwise mutual information of each pair in bits, for verbs given the frame: log2 n_ab n / (n_a n_b)."""
    totals: Counter[str] = Counter()
    first: Counter[tuple[str, str]] = Counter()
    second: Counter[tuple[str, str]] = Counter()
    for (frame, one, two), count in pairs.items():
        totals[frame] += count
        first[frame, one] += count
        second[frame, two] += count
    return {
        (frame, one, two): float(np.log2(count * totals[frame] / (first[frame, one] * second[frame, two])))
        for (frame, one, two), count in pairs.items()
    }


def expected_pointwise(kind: str, params: CorpusParams) -> dict[tuple[str, str, str], float]:
    """The same from the generator's own distribution, log2 P(a, b) / (p_a p_b), of every pair that can occur."""
    layout = field_lists(build_lexicon(params.lexicon, seed=params.lexicon_seed), params)
    s = getattr(params, kind)
    found = {}
    for frame, _ in _frames(kind, params):
        first, second = (layout[name] for name in _lists(kind, frame))
        ratio = 1 - s + s * _ratio(first, second)
        for i, j in zip(*np.nonzero(ratio), strict=True):
            found[frame, first.stems[i], second.stems[j]] = float(np.log2(ratio[i, j]))
    return found


def strength(kind: str, pairs: Counter[tuple[str, str, str]], params: CorpusParams) -> Estimate:
    """Collocation strength in the text, by maximum likelihood under the generator's own lists.

    P(b | a) = (1 - s) p_b + s q(b | a); only s is unknown. Raises UsageError for lemmas that the lexicon of
    ``params`` does not have, and without pairs.
    """
    if not pairs:
        raise UsageError(f"{kind}: a collocation strength needs at least one pair.")
    layout = field_lists(build_lexicon(params.lexicon, seed=params.lexicon_seed), params)
    places = {name: {stem: i for i, stem in enumerate(each.stems)} for name, each in layout.items()}
    joints: dict[str, np.ndarray] = {}
    ratios: list[float] = []
    counts: list[int] = []
    for (frame, one, two), count in pairs.items():
        first, second = _lists(kind, frame)
        if frame not in joints:
            joints[frame] = _ratio(layout[first], layout[second])
            ratios += [joints[frame].min(), joints[frame].max()]  # possible, and bounds for s, even if never drawn
            counts += [0, 0]
        try:
            ratios.append(joints[frame][places[first][one], places[second][two]])
        except KeyError as error:
            raise UsageError(
                f"{kind}: {error} is not a lemma of this lexicon: the corpus was made with other parameters."
            ) from None
        counts.append(count)
    return mixture_share(np.array(ratios), np.array(counts))


def expected_information(kind: str, params: CorpusParams) -> float:
    """Exact mutual information of the pairs in bits, from the generator's distribution; for verbs given the frame.

    ``sum_ab P(a, b) log2 P(a, b) / (p_a p_b)``, averaged over frames by their share of the clauses (for ``verb_noun``
    of those with an object).
    """
    layout = field_lists(build_lexicon(params.lexicon, seed=params.lexicon_seed), params)
    s = getattr(params, kind)
    total = mass = 0.0
    for frame, share in _frames(kind, params):
        first, second = (layout[name] for name in _lists(kind, frame))
        ratio = 1 - s + s * _ratio(first, second)
        joint = ratio * np.outer(first.ends - first.starts, second.ends - second.starts)
        bits = float(np.sum(joint[joint > 0] * np.log2(ratio[joint > 0])))
        total, mass = total + share * bits, mass + share
    return total / mass if mass else 0.0


def _frames(kind: str, params: CorpusParams) -> Iterator[tuple[str, float]]:
    if kind == "noun_adjective":
        yield "", 1.0
        return
    words = words_per_sentence(params)
    for name, frame in FRAMES.items():
        if kind == "verb_adverb" or frame.object is not None:
            yield name, words[f"verb {name}"]


def _lists(kind: str, frame: str) -> tuple[str, str]:
    return {
        "noun_adjective": ("noun", "adjective"),
        "verb_noun": (f"verb {frame}", "noun"),
        "verb_adverb": (f"verb {frame}", "adverb"),
    }[kind]


def _ratio(first: FieldList, second: FieldList) -> np.ndarray:
    """``q(b | a) / p_b`` where b is drawn near the field of a: ``K sum_k o_ak o_bk / (p_a p_b)``; float64 [a, b]."""
    one, two = first.overlap(), second.overlap()
    return first.fields * (one / one.sum(1, keepdims=True)) @ (two / two.sum(1, keepdims=True)).T

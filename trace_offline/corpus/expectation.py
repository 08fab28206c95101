"""What a corpus has on average, computed exactly from its parameters: numbers of words, entropy, mutual information."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

import numpy as np

from trace_offline.core.errors import UsageError
from trace_offline.corpus.grammar import AGENT_PHRASE, FRAMES, OBLIQUE, Frame
from trace_offline.corpus.params import MAX_ALPHA, CorpusParams
from trace_offline.corpus.sampling import zipf_probabilities


def list_sizes(params: CorpusParams) -> dict[str, int]:
    """Lemmas of each list: ``noun``, ``adjective``, ``adverb`` and ``verb FRAME``."""
    lexicon = params.lexicon
    sizes = {"noun": lexicon.nouns, "adjective": lexicon.adjectives, "adverb": lexicon.adverbs}
    return sizes | {f"verb {name}": lexicon.verbs_per_frame for name in FRAMES}


@lru_cache(maxsize=64)
def words_per_sentence(params: CorpusParams) -> dict[str, float]:
    """Expected number of words of each list in one sentence (keys as in :func:`list_sizes`)."""
    simple, medium, complex_ = params.complexity
    total: defaultdict[str, float] = defaultdict(float)
    for share, (counts, _) in (
        (simple, _clause(params, False, 0.0)),
        (medium, _clause(params, True, OBLIQUE["medium"])),
    ):
        _add(total, counts, share)
    joined, _ = _clause(params, True, OBLIQUE["coordinated"])
    active = _predicate(params, True, OBLIQUE["coordinated"], passive=False)[0]
    inner = _predicate(params, False, 0.0, passive=False)[0]
    bare, _ = _clause(params, False, 0.0)
    # Coordinated verbs, coordinated clauses, relative clause on the subject, relative clause on the last noun.
    quarter = complex_ / 4
    _add(total, joined, quarter)
    _add(total, active, quarter)
    _add(total, joined, 2 * quarter)
    _add(total, _phrase(params, True), quarter)
    _add(total, inner, quarter)
    _add(total, _predicate(params, True, OBLIQUE["relative"], passive=True)[0], quarter)
    _, no_noun = _clause(params, True, OBLIQUE["coordinated"])
    _add(total, joined, quarter)
    _add(total, inner, quarter * (1 - no_noun))
    _add(total, bare, quarter * no_noun)
    return dict(total)


@lru_cache(maxsize=64)
def preposition_use(params: CorpusParams) -> dict[str, float]:
    """Expected number of each preposition that marks a role in one sentence; 0 for those that never occur."""
    simple, medium, complex_ = params.complexity
    quarter = complex_ / 4
    # (how many predicates of a sentence are of a kind, rich, probability of an oblique, whether it may be passive)
    kinds = (
        (simple + 2 * quarter, False, 0.0, False),  # both relative clauses, or the clause that replaces one
        (medium, True, OBLIQUE["medium"], True),
        (4 * quarter, True, OBLIQUE["coordinated"], True),
        (quarter, True, OBLIQUE["coordinated"], False),
        (quarter, True, OBLIQUE["relative"], True),
    )
    total: defaultdict[str, float] = defaultdict(float)
    for name, share in params.frame_shares.items():
        frame = FRAMES[name]
        for count, rich, oblique, passive in kinds:
            chance = oblique if rich else 0.0
            none = (1 - chance) ** len(frame.obliques)
            for place, (preposition, _) in enumerate(frame.obliques):
                forced = none / 2 if frame.required and place < 2 else 0.0  # one of the two that are the frame's own
                total[preposition] += count * share * (chance + forced)
            if rich and passive and frame.passive:
                total["by"] += count * share * params.passive * AGENT_PHRASE
    return dict(total)


def entropy_per_word(params: CorpusParams, alpha: float) -> float:
    """Bits per content word given its list, ``sum_l m_l H_l / sum_l m_l``, for the exponent ``alpha``.

    m_l = expected words of list l in a sentence, H_l = -sum_r p_r log2 p_r with p_r = r^-alpha / sum_k k^-alpha.
    """
    sizes = list_sizes(params)
    weights = words_per_sentence(params)
    by_size = {n: _zipf_entropy(n, alpha) for n in set(sizes.values())}
    return sum(weights[name] * by_size[n] for name, n in sizes.items()) / sum(weights.values())


@lru_cache(maxsize=64)
def exponent(params: CorpusParams) -> float:
    """The Zipf exponent of the corpus: ``alpha``, or the one that gives the asked ``entropy``.

    Raises UsageError for an entropy that no exponent from 0 on gives.
    """
    if params.entropy is None:
        return params.alpha
    from scipy.optimize import brentq

    low, high = entropy_per_word(params, MAX_ALPHA), entropy_per_word(params, 0.0)
    if not low < params.entropy <= high:
        raise UsageError(
            f"corpus: this lexicon can give at most {high:.3f} bits per content word (all words of a list equally "
            f"frequent), found entropy {params.entropy}. Ask for less, or for a larger vocabulary."
        )
    wanted = params.entropy
    return float(brentq(lambda alpha: entropy_per_word(params, alpha) - wanted, 0.0, MAX_ALPHA, xtol=1e-12))


def _zipf_entropy(n: int, alpha: float) -> float:
    p = zipf_probabilities(n, alpha)
    p = p[p > 0]
    return float(-(p @ np.log2(p)))


def _add(total: defaultdict[str, float], counts: dict[str, float], factor: float) -> None:
    for name, count in counts.items():
        total[name] += count * factor


def _phrase(params: CorpusParams, rich: bool) -> dict[str, float]:
    return {"noun": 1.0, "adjective": params.adjectives if rich else 0.0}


def _clause(params: CorpusParams, rich: bool, oblique: float) -> tuple[dict[str, float], float]:
    """Words of a clause, and the probability that no noun follows its verb."""
    total: defaultdict[str, float] = defaultdict(float)
    _add(total, _phrase(params, rich), 1.0)
    total["noun"] += params.attractors if rich else 0
    predicate, no_noun = _predicate(params, rich, oblique, passive=True)
    _add(total, predicate, 1.0)
    return dict(total), no_noun


def _predicate(params: CorpusParams, rich: bool, oblique: float, *, passive: bool) -> tuple[dict[str, float], float]:
    """Words of a predicate whose frame may be passive, and the probability that no noun follows the verb."""
    total: defaultdict[str, float] = defaultdict(float)
    total["adverb"] += params.adverbs if rich else 0
    none = 0.0
    for name, share in params.frame_shares.items():
        frame = FRAMES[name]
        passives = params.passive if passive and rich and frame.passive else 0.0
        core = (1 - passives) * (frame.object is not None) + passives * AGENT_PHRASE
        phrases, no_oblique = _obliques(frame, rich, oblique)
        total[f"verb {name}"] += share
        _add(total, _phrase(params, rich), share * (core + phrases))
        none += share * (1 - core) * no_oblique
    return dict(total), none


def _obliques(frame: Frame, rich: bool, oblique: float) -> tuple[float, float]:
    """Expected number of oblique phrases, and the probability of none."""
    if not rich:
        return float(frame.required), float(frame.required == 0)
    empty = (1 - oblique) ** len(frame.obliques)
    if frame.required:
        return oblique * len(frame.obliques) + empty, 0.0
    return oblique * len(frame.obliques), empty

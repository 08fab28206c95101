"""Minimal pairs: one word of a sentence replaced or removed, with annotations that stay aligned with the words.

``synonym``: a noun, verb, adjective or adverb gives way to another lemma of its list in the same form (for verbs: of
the same frame), in a corpus with collocations one of the same field of meaning. The result is as grammatical as the
original: the control for the other three.

``role_violation``: an argument that its clause's frame cannot license. Either the preposition of an oblique argument is
replaced by one that marks no role in this frame and voice, or the verb of an active clause with an object is replaced
by a verb of a frame that takes no object and gives the subject the same role, in the same number. Words are compared at
the preposition, or at the first word of the object, which is the same word on both sides.

``elimination``: an obligatory word is removed (the determiner or head of a noun phrase, a finite verb, a participle, a
preposition, a conjunction), only where the word after the gap cannot stand there. That word is compared.

``agreement_violation``: a finite verb in the number that its subject does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trace_offline.core.errors import UsageError, nearest
from trace_offline.corpus.expectation import exponent, preposition_use
from trace_offline.corpus.grammar import FRAMES, MODIFIER_PREPOSITIONS
from trace_offline.corpus.lexicon import build_lexicon, inflect
from trace_offline.corpus.lexis import field_lists, lemma_lists
from trace_offline.corpus.pairs import Pair, write_pairs
from trace_offline.corpus.params import CorpusParams, read_origin
from trace_offline.corpus.sampling import zipf_probabilities
from trace_offline.corpus.sentence import AnnotatedSentence, Clause, read_jsonl

KINDS: tuple[str, ...] = ("synonym", "role_violation", "elimination", "agreement_violation")
_LISTS = {"NOUN": "noun", "ADJ": "adjective", "ADV": "adverb"}


class _Words:
    """What the interventions ask the lexicon."""

    def __init__(self, params: CorpusParams) -> None:
        lexicon = build_lexicon(params.lexicon, seed=params.lexicon_seed)
        self.lists = lemma_lists(lexicon)
        self.nouns = frozenset(lexicon.nouns)
        self.verbs = frozenset(stem for stems in lexicon.verbs.values() for stem in stems)
        alpha = exponent(params)
        self.probabilities = {name: zipf_probabilities(len(stems), alpha) for name, stems in self.lists.items()}
        self.places = {name: {stem: i for i, stem in enumerate(stems)} for name, stems in self.lists.items()}
        self.prepositions = preposition_use(params)
        self.frame_shares = params.frame_shares
        self.fields: dict[str, np.ndarray] = {}
        if params.collocated:
            for name, layout in field_lists(lexicon, params).items():
                order = [self.places[name][stem] for stem in layout.stems]
                self.fields[name] = np.empty_like(layout.overlap())
                self.fields[name][order] = layout.overlap()

    def objectless(self, frame: str) -> dict[str, float]:
        """Shares of the frames without an object that give their subject the role that it has in ``frame``."""
        subject = FRAMES[frame].subject
        return {
            name: share
            for name, share in self.frame_shares.items()
            if share > 0 and FRAMES[name].object is None and FRAMES[name].subject == subject
        }

    def wrong_prepositions(self, clause: Clause) -> dict[str, float]:
        """Use of the prepositions that mark no role in this clause; those that never occur are none."""
        known = {"by"} if clause.passive else set()
        known |= {preposition for preposition, _ in FRAMES[clause.frame].obliques}
        return {name: use for name, use in self.prepositions.items() if use > 0 and name not in known}

    def draw(self, name: str, rng: np.random.Generator) -> str:
        """A lemma of a list with its probability in the corpus."""
        return self.lists[name][int(rng.choice(len(self.lists[name]), p=self.probabilities[name]))]

    def another(self, name: str, lemma: str, rng: np.random.Generator) -> str | None:
        """Another lemma of the list, in a corpus with collocations one of the same field; None when there is none."""
        place = self.places[name].get(lemma)
        if place is None:
            raise UsageError(
                f'"{lemma}" is not a lemma of this lexicon: the corpus was made with other parameters. Give those '
                "it was made with (they are written beside a generated file, as FILE.params.json)."
            )
        fields = self.fields.get(name)
        weights = self.probabilities[name].copy() if fields is None else fields @ fields[place]
        weights[place] = 0.0
        total = weights.sum()
        return self.lists[name][int(rng.choice(len(weights), p=weights / total))] if total > 0 else None


_words = lru_cache(maxsize=8)(_Words)


def intervene(
    sentence: AnnotatedSentence, kind: str, rng: int | np.random.Generator, params: CorpusParams | None = None
) -> Pair | None:
    """The sentence with one word changed as ``kind`` says; None when it has no word that admits it.

    ``rng``: a seed or a generator; the same seed gives the same pair. ``params``: those of the corpus. Raises
    UsageError for an unknown kind and for lemmas that the lexicon of ``params`` does not have.
    """
    _check_kind(kind)
    return _MAKERS[kind](sentence, np.random.default_rng(rng), _words(params or CorpusParams()))


def intervene_all(
    sentences: Iterable[AnnotatedSentence], kind: str, seed: int, params: CorpusParams | None = None
) -> Iterator[Pair | None]:
    """One pair (or None) for each sentence; each has its own seed, so none depends on the sentences before it."""
    _check_kind(kind)
    for index, sentence in enumerate(sentences):
        yield intervene(sentence, kind, np.random.default_rng([seed, KINDS.index(kind), index]), params)


def intervene_file(
    corpus: Path | str, out: Path | str, kinds: Sequence[str], seed: int, *, limit: int | None = None
) -> tuple[Counter[str], Counter[str]]:
    """Pairs of every kind from a corpus file, kind after kind, into a file of pairs.

    The corpus's own parameters are used where they are written beside it (``read_origin``), else the default ones.
    Returns, by kind, how many pairs were written and how many sentences do not admit one. Raises UsageError for
    unusable input and when nothing could be written.
    """
    if not kinds or len(set(kinds)) != len(kinds):
        raise UsageError(f"intervene: name at least one kind of {', '.join(KINDS)}, each once.")
    origin = read_origin(corpus)
    params = origin.params if origin else CorpusParams()
    written: Counter[str] = Counter()
    without: Counter[str] = Counter()

    def pairs() -> Iterator[Pair]:
        for kind in kinds:
            for pair in intervene_all(islice(read_jsonl(corpus), limit), kind, seed, params):
                (without if pair is None else written)[kind] += 1
                if pair is not None:
                    yield pair
        if not written:
            raise UsageError(
                f"{corpus}: no sentence admits {' or '.join(kinds)}"
                + (" (its words have no number)." if "agreement_violation" in kinds else ".")
            )

    write_pairs(out, pairs())
    return written, without


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UsageError(f'intervene: expected a kind of {", ".join(KINDS)}; found "{kind}".{nearest(kind, KINDS)}')


def _synonym(sentence: AnnotatedSentence, rng: np.random.Generator, words: _Words) -> Pair | None:
    verbs = {clause.verb + clause.passive: clause.frame for clause in sentence.clauses}
    places = [i for i, tag in enumerate(sentence.pos) if tag in _LISTS or i in verbs]
    for place in rng.permutation(places).tolist():
        tag, lemma, form = sentence.pos[place], sentence.lemmas[place], sentence.words[place]
        other = words.another(f"verb {verbs[place]}" if place in verbs else _LISTS[tag], lemma, rng)
        if other is not None:
            changed = _replaced(sentence, place, word=other + form[len(lemma) :], lemma=other)
            return Pair("synonym", sentence, changed, (place,), (place,), tag)
    return None


def _role_violation(sentence: AnnotatedSentence, rng: np.random.Generator, words: _Words) -> Pair | None:
    places: list[tuple[str, int, int]] = []
    for number, clause in enumerate(sentence.clauses):
        if not clause.passive and FRAMES[clause.frame].object and words.objectless(clause.frame):
            places.append(("object", number, clause.verb + 1))
    for i, tag in enumerate(sentence.pos):
        if tag == "ADP" and sentence.words[i] not in MODIFIER_PREPOSITIONS:
            # An oblique belongs to the last verb before it.
            number = max(
                (n for n, c in enumerate(sentence.clauses) if c.verb < i), key=lambda n: sentence.clauses[n].verb
            )
            if words.wrong_prepositions(sentence.clauses[number]):
                places.append(("preposition", number, i))
    if not places:
        return None
    detail, number, place = places[int(rng.integers(len(places)))]
    clause = sentence.clauses[number]
    if detail == "preposition":
        other = _weighted(words.wrong_prepositions(clause), rng)
        changed = _replaced(sentence, place, word=other, lemma=other)
        head = next(i for i in range(place, len(sentence.words)) if sentence.pos[i] == "NOUN")
        roles = tuple(None if i == head else role for i, role in enumerate(sentence.roles))
        return Pair("role_violation", sentence, replace(changed, roles=roles), (place,), (place,), detail)
    frame = _weighted(words.objectless(clause.frame), rng)
    stem = words.draw(f"verb {frame}", rng)
    ending = sentence.words[clause.verb][len(sentence.lemmas[clause.verb]) :]
    changed = _replaced(sentence, clause.verb, word=stem + ending, lemma=stem)
    clauses = tuple(replace(c, frame=frame) if n == number else c for n, c in enumerate(sentence.clauses))
    changed = replace(
        changed,
        clauses=clauses,
        frame=clauses[0].frame,
        roles=_roles_of_complements(sentence, clause, frame),
    )
    return Pair("role_violation", sentence, changed, (place,), (place,), detail)


def _roles_of_complements(sentence: AnnotatedSentence, clause: Clause, frame: str) -> tuple[str | None, ...]:
    """Roles when the verb of an active clause gets another frame: its object has none, obliques what the frame says."""
    roles = list(sentence.roles)
    preposition: str | None = None
    for i in range(clause.verb + 1, len(sentence.words)):
        tag = sentence.pos[i]
        if tag in ("PRON", "CCONJ", "SCONJ", "VERB", "AUX"):
            break
        if tag == "ADP":
            preposition = sentence.words[i]
        elif tag == "NOUN":
            roles[i] = dict(FRAMES[frame].obliques).get(preposition) if preposition else None
    return tuple(roles)


def _elimination(sentence: AnnotatedSentence, rng: np.random.Generator, words: _Words) -> Pair | None:
    places: dict[str, list[int]] = {}
    for i, tag in enumerate(sentence.pos[:-1]):
        if _obligatory(sentence, i, words):
            places.setdefault(tag, []).append(i)
    if not places:
        return None
    tag = sorted(places)[int(rng.integers(len(places)))]
    place = places[tag][int(rng.integers(len(places[tag])))]
    return Pair("elimination", sentence, _removed(sentence, place), (place + 1,), (place,), tag)


def _obligatory(sentence: AnnotatedSentence, place: int, words: _Words) -> bool:
    """Whether without this word the next one cannot stand where it then stands, whatever follows."""
    pos, lemmas = sentence.pos, sentence.lemmas
    tag, after = pos[place], pos[place + 1]
    before = pos[place - 1] if place else None
    if tag == "DET":
        # After "and", a noun without a determiner may be read as a second verb if there is such a verb.
        return not (after == "NOUN" and lemmas[place + 1] in words.verbs)
    if tag == "NOUN":
        return not (after == "VERB" and lemmas[place + 1] in words.nouns)
    if tag == "AUX":
        return after == "VERB"
    if tag == "VERB":
        if before == "AUX":
            return True
        # "A near the B [strikes] the C": what follows could not follow the noun. Not after "and", where a clause may
        # begin, and not after a relative clause, whose verb might take what follows.
        clause = next(c for c in sentence.clauses if c.verb == place)
        relative = "PRON" in pos[clause.subject : place - 1]
        return after in ("DET", "ADP") and before != "CCONJ" and not relative
    if tag == "ADP":
        return True
    return tag in ("CCONJ", "SCONJ")


def _agreement_violation(sentence: AnnotatedSentence, rng: np.random.Generator, words: _Words) -> Pair | None:
    clauses = [clause for clause in sentence.clauses if clause.plural is not None]
    if not clauses:
        return None
    clause = clauses[int(rng.integers(len(clauses)))]
    place, plural = clause.verb, not clause.plural
    lemma = sentence.lemmas[place]
    form = ("are" if plural else "is") if sentence.pos[place] == "AUX" else (lemma if plural else inflect(lemma))
    numbers = tuple(plural if i == place else each for i, each in enumerate(sentence.plural))
    changed = replace(_replaced(sentence, place, word=form, lemma=lemma), plural=numbers)
    detail = "attractor" if clause.attractors else "no_attractor"
    return Pair("agreement_violation", sentence, changed, (place,), (place,), detail)


_MAKERS: dict[str, Callable[[AnnotatedSentence, np.random.Generator, _Words], Pair | None]] = {
    "synonym": _synonym,
    "role_violation": _role_violation,
    "elimination": _elimination,
    "agreement_violation": _agreement_violation,
}


def _replaced(sentence: AnnotatedSentence, place: int, *, word: str, lemma: str) -> AnnotatedSentence:
    return replace(
        sentence,
        words=(*sentence.words[:place], word, *sentence.words[place + 1 :]),
        lemmas=(*sentence.lemmas[:place], lemma, *sentence.lemmas[place + 1 :]),
    )


def _removed(sentence: AnnotatedSentence, place: int) -> AnnotatedSentence:
    """Without one word; clauses that lose their subject's head or their finite verb are left out."""

    def cut(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return values[:place] + values[place + 1 :]

    pos, plural = cut(sentence.pos), cut(sentence.plural)
    clauses = []
    for clause in sentence.clauses:
        if place in (clause.subject, clause.verb):
            continue
        subject, verb = clause.subject - (clause.subject > place), clause.verb - (clause.verb > place)
        between = range(subject + 1, verb)
        attractors = sum(pos[i] == "NOUN" and plural[i] != clause.plural for i in between)
        clauses.append(replace(clause, subject=subject, verb=verb, attractors=attractors))
    return replace(
        sentence,
        words=cut(sentence.words),
        pos=pos,
        roles=cut(sentence.roles),
        lemmas=cut(sentence.lemmas),
        plural=plural,
        clauses=tuple(clauses),
    )


def _weighted(weights: dict[str, float], rng: np.random.Generator) -> str:
    shares = np.array(list(weights.values()))
    return list(weights)[int(rng.choice(len(shares), p=shares / shares.sum()))]

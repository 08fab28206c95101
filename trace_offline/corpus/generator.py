"""Draws sentences from the grammar and the lexicon: a stream that its seed fixes to the byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from trace_offline.core.errors import UsageError
from trace_offline.corpus.grammar import (
    COMPLEXITIES,
    FRAMES,
    MODIFIER_PREPOSITIONS,
    PLURAL_DETERMINERS,
    SINGULAR_DETERMINERS,
    Frame,
)
from trace_offline.corpus.lexicon import build_lexicon, inflect, participle
from trace_offline.corpus.params import CorpusParams, Origin, write_origin
from trace_offline.corpus.sampling import index_stream, uniform_stream, zipf_probabilities
from trace_offline.corpus.sentence import AnnotatedSentence, Clause, write_jsonl

T = TypeVar("T")


@dataclass(slots=True)
class _Noun:
    position: int
    plural: bool


class _Sentence:
    """Words under construction, one list per annotation."""

    __slots__ = ("clauses", "lemmas", "plural", "pos", "roles", "words")

    def __init__(self) -> None:
        self.words: list[str] = []
        self.pos: list[str] = []
        self.roles: list[str | None] = []
        self.lemmas: list[str] = []
        self.plural: list[bool | None] = []
        self.clauses: list[Clause] = []

    def add(self, word: str, pos: str, lemma: str, plural: bool | None = None, role: str | None = None) -> int:
        self.words.append(word)
        self.pos.append(pos)
        self.roles.append(role)
        self.lemmas.append(lemma)
        self.plural.append(plural)
        return len(self.words) - 1


class _Writer:
    """Holds the streams and builds one sentence per call."""

    def __init__(self, params: CorpusParams, seed: int) -> None:
        lexicon = build_lexicon(params.lexicon, seed=params.lexicon_seed)
        self.params = params
        self.chance = uniform_stream(seed, "structure").__next__
        self.complexity = _drawer(seed, "complexity", params.complexity, COMPLEXITIES)
        frames = list(FRAMES.values())
        self.frame = _drawer(seed, "frame", [frame.weight for frame in frames], frames)
        self.noun = _lemmas(seed, "noun", params.alpha, lexicon.nouns)
        self.adjective = _lemmas(seed, "adjective", params.alpha, lexicon.adjectives)
        self.adverb = _lemmas(seed, "adverb", params.alpha, lexicon.adverbs)
        self.verb = {name: _lemmas(seed, f"verb {name}", params.alpha, v) for name, v in lexicon.verbs.items()}
        determiners = (0.5, 0.2, 0.15, 0.15)
        self.determiner = {
            False: _drawer(seed, "singular determiner", determiners, SINGULAR_DETERMINERS),
            True: _drawer(seed, "plural determiner", determiners, PLURAL_DETERMINERS),
        }
        self.modifier = _drawer(seed, "modifier", (1.0, 1.0), MODIFIER_PREPOSITIONS)

    def sentence(self) -> AnnotatedSentence:
        level = next(self.complexity)
        out = _Sentence()
        rich = level != "simple"
        if level != "complex":
            self._clause(out, rich, oblique=0.35)
        else:
            (self._coordinated_verbs, self._coordinated_clauses, self._relative_on_subject, self._relative_on_object)[
                int(self.chance() * 4)
            ](out)
        return AnnotatedSentence(
            tuple(out.words),
            tuple(out.pos),
            tuple(out.roles),
            tuple(out.lemmas),
            tuple(out.plural),
            out.clauses[0].frame,
            level,
            tuple(out.clauses),
        )

    def _clause(self, out: _Sentence, rich: bool, oblique: float) -> _Noun | None:
        """A whole clause; returns the last noun after its verb, if there is one."""
        frame, passive = self._frame(rich)
        subject = self._subject(out, frame, passive, rich)
        return self._predicate(out, frame, passive, subject, rich, oblique)

    def _coordinated_verbs(self, out: _Sentence) -> None:
        frame, passive = self._frame(True)
        subject = self._subject(out, frame, passive, True)
        self._predicate(out, frame, passive, subject, True, oblique=0.2)
        out.add("and", "CCONJ", "and")
        self._predicate(out, next(self.frame), False, subject, True, oblique=0.2)

    def _coordinated_clauses(self, out: _Sentence) -> None:
        self._clause(out, True, oblique=0.2)
        if self.chance() < 0.5:
            out.add("and", "CCONJ", "and")
        else:
            out.add("while", "SCONJ", "while")
        self._clause(out, True, oblique=0.2)

    def _relative_on_subject(self, out: _Sentence) -> None:
        frame, passive = self._frame(True)
        subject = self._phrase(out, frame.object if passive else frame.subject, True)
        out.add("that", "PRON", "that")
        self._predicate(out, next(self.frame), False, subject, False, oblique=0.0)
        inner = out.clauses.pop()
        self._predicate(out, frame, passive, subject, True, oblique=0.3)
        out.clauses.append(inner)  # the main clause comes first

    def _relative_on_object(self, out: _Sentence) -> None:
        noun = self._clause(out, True, oblique=0.2)
        if noun is None:  # nothing to hang a relative clause on
            out.add("while", "SCONJ", "while")
            self._clause(out, False, oblique=0.0)
            return
        out.add("that", "PRON", "that")
        self._predicate(out, next(self.frame), False, noun, False, oblique=0.0)

    def _frame(self, rich: bool) -> tuple[Frame, bool]:
        frame = next(self.frame)
        return frame, rich and frame.passive and self.chance() < self.params.passive

    def _subject(self, out: _Sentence, frame: Frame, passive: bool, rich: bool) -> _Noun:
        subject = self._phrase(out, frame.object if passive else frame.subject, rich)
        if rich and self.chance() < self.params.attractors:
            preposition = next(self.modifier)
            out.add(preposition, "ADP", preposition)
            self._phrase(out, None, False, plural=(self.chance() < 0.5) != subject.plural)
        return subject

    def _predicate(
        self, out: _Sentence, frame: Frame, passive: bool, subject: _Noun, rich: bool, oblique: float
    ) -> _Noun | None:
        chance = self.chance
        if rich and chance() < self.params.adverbs:
            adverb = next(self.adverb)
            out.add(adverb, "ADV", adverb)
        stem, plural = next(self.verb[frame.name]), subject.plural
        last: _Noun | None = None
        if passive:
            verb = out.add("are" if plural else "is", "AUX", "be", plural)
            out.add(participle(stem), "VERB", stem)
            if chance() < 0.6:
                out.add("by", "ADP", "by")
                last = self._phrase(out, frame.subject, rich)
        else:
            verb = out.add(stem if plural else inflect(stem), "VERB", stem, plural)
            if frame.object:
                last = self._phrase(out, frame.object, rich)
        out.clauses.append(self._agreement(out, frame, subject, verb, passive))
        chosen = [chance() < oblique for _ in frame.obliques] if rich else [False] * len(frame.obliques)
        if sum(chosen) < frame.required:
            chosen[int(chance() * frame.required * 2)] = True  # one of the first two places, which are the frame's own
        for (preposition, role), wanted in zip(frame.obliques, chosen, strict=True):
            if wanted:
                out.add(preposition, "ADP", preposition)
                last = self._phrase(out, role, rich)
        return last

    @staticmethod
    def _agreement(out: _Sentence, frame: Frame, subject: _Noun, verb: int, passive: bool) -> Clause:
        between = range(subject.position + 1, verb)
        others = sum(out.pos[i] == "NOUN" and out.plural[i] != subject.plural for i in between)
        return Clause(frame.name, subject.position, verb, subject.plural, passive, others)

    def _phrase(self, out: _Sentence, role: str | None, rich: bool, plural: bool | None = None) -> _Noun:
        if plural is None:
            plural = self.chance() < self.params.plural
        determiner = next(self.determiner[plural])
        out.add(determiner, "DET", determiner)
        if rich and self.chance() < self.params.adjectives:
            adjective = next(self.adjective)
            out.add(adjective, "ADJ", adjective)
        stem = next(self.noun)
        return _Noun(out.add(inflect(stem) if plural else stem, "NOUN", stem, plural, role), plural)


def _drawer(seed: int, name: str, probabilities: Sequence[float] | np.ndarray, items: Sequence[T]) -> Iterator[T]:
    return map(items.__getitem__, index_stream(seed, name, probabilities))


def _lemmas(seed: int, name: str, alpha: float, stems: Sequence[str]) -> Iterator[str]:
    return _drawer(seed, name, zipf_probabilities(len(stems), alpha), stems)


def generate(seed: int, params: CorpusParams | None = None) -> Iterator[AnnotatedSentence]:
    """Endless stream of sentences. The same seed and parameters give the same sentences, however many are taken."""
    if seed < 0:
        raise UsageError(f"corpus: the seed is a whole number from 0 on, found {seed}.")
    writer = _Writer(params or CorpusParams(), seed)
    while True:
        yield writer.sentence()


def generate_to_file(path: Path | str, sentences: int, seed: int, params: CorpusParams | None = None) -> int:
    """Write the first ``sentences`` sentences of :func:`generate` as JSONL; returns their number.

    Beside the file goes ``FILE.params.json``, from which others can rebuild the grammar (``read_origin``).
    Raises UsageError for a count below 1 or a negative seed.
    """
    if sentences < 1:
        raise UsageError(f"corpus: the number of sentences must be at least 1, found {sentences}.")
    params = params or CorpusParams()
    count = write_jsonl(path, islice(generate(seed, params), sentences))
    write_origin(path, Origin(seed, sentences, params))
    return count

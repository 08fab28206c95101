"""Draws sentences from the grammar and the lexicon: a stream that its seed fixes to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from trace_offline.core.errors import UsageError
from trace_offline.corpus.forms import write_corpus
from trace_offline.corpus.grammar import (
    AGENT_PHRASE,
    COMPLEXITIES,
    DETERMINER_SHARES,
    FRAMES,
    MODIFIER_PREPOSITIONS,
    OBLIQUE,
    PLURAL_DETERMINERS,
    SINGULAR_DETERMINERS,
    Frame,
)
from trace_offline.corpus.lexicon import build_lexicon, inflect, participle
from trace_offline.corpus.lexis import lexis
from trace_offline.corpus.params import CorpusParams, Origin, write_origin
from trace_offline.corpus.sampling import drawer, uniform_stream
from trace_offline.corpus.sentence import AnnotatedSentence, Clause


@dataclass(slots=True)
class _Noun:
    position: int
    plural: bool
    field: int


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
        self.agreement = params.agreement
        self.draw = lexis(lexicon, params, seed).draw
        self.verbs = {name: f"verb {name}" for name in FRAMES}
        self.chance = uniform_stream(seed, "structure").__next__
        self.complexity = drawer(seed, "complexity", params.complexity, COMPLEXITIES)
        frames = list(FRAMES.values())
        weights = list(params.frame_shares.values()) if params.frames else [frame.weight for frame in frames]
        self.frame = drawer(seed, "frame", weights, frames)
        # Without agreement both numbers share their determiners, so that no word tells them apart.
        plurals = PLURAL_DETERMINERS if params.agreement else SINGULAR_DETERMINERS
        self.determiner = {
            False: drawer(seed, "singular determiner", DETERMINER_SHARES, SINGULAR_DETERMINERS),
            True: drawer(seed, "plural determiner", DETERMINER_SHARES, plurals),
        }
        self.modifier = drawer(seed, "modifier", (1.0, 1.0), MODIFIER_PREPOSITIONS)

    def sentence(self) -> AnnotatedSentence:
        level = next(self.complexity)
        out = _Sentence()
        rich = level != "simple"
        if level != "complex":
            self._clause(out, rich, oblique=OBLIQUE["medium"])
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
        self._predicate(out, frame, passive, subject, True, oblique=OBLIQUE["coordinated"])
        out.add("and", "CCONJ", "and")
        self._predicate(out, next(self.frame), False, subject, True, oblique=OBLIQUE["coordinated"])

    def _coordinated_clauses(self, out: _Sentence) -> None:
        self._clause(out, True, oblique=OBLIQUE["coordinated"])
        if self.chance() < 0.5:
            out.add("and", "CCONJ", "and")
        else:
            out.add("while", "SCONJ", "while")
        self._clause(out, True, oblique=OBLIQUE["coordinated"])

    def _relative_on_subject(self, out: _Sentence) -> None:
        frame, passive = self._frame(True)
        subject = self._phrase(out, frame.object if passive else frame.subject, True)
        out.add("that", "PRON", "that")
        self._predicate(out, next(self.frame), False, subject, False, oblique=0.0)
        inner = out.clauses.pop()
        self._predicate(out, frame, passive, subject, True, oblique=OBLIQUE["relative"])
        out.clauses.append(inner)  # the main clause comes first

    def _relative_on_object(self, out: _Sentence) -> None:
        noun = self._clause(out, True, oblique=OBLIQUE["coordinated"])
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
        # The subject of a passive is what the verb would have as its object, and collocates with it all the same.
        stem, field = self.draw(self.verbs[frame.name], subject.field if passive else None)
        if rich and chance() < self.params.adverbs:
            adverb, _ = self.draw("adverb", field)
            out.add(adverb, "ADV", adverb)
        plural, marked = subject.plural, subject.plural if self.agreement else None
        last: _Noun | None = None
        if passive:
            verb = out.add("are" if marked else "is", "AUX", "be", marked)
            out.add(participle(stem), "VERB", stem)
            if chance() < AGENT_PHRASE:
                out.add("by", "ADP", "by")
                last = self._phrase(out, frame.subject, rich)
        else:
            verb = out.add(stem if plural or not self.agreement else inflect(stem), "VERB", stem, marked)
            if frame.object:
                last = self._phrase(out, frame.object, rich, near=field)
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
        number = out.plural[subject.position]
        between = range(subject.position + 1, verb)
        others = sum(out.pos[i] == "NOUN" and out.plural[i] != number for i in between)
        return Clause(frame.name, subject.position, verb, number, passive, others)

    def _phrase(
        self, out: _Sentence, role: str | None, rich: bool, plural: bool | None = None, near: int | None = None
    ) -> _Noun:
        if plural is None:
            plural = self.chance() < self.params.plural
        determiner = next(self.determiner[plural])
        out.add(determiner, "DET", determiner)
        stem, field = self.draw("noun", near)
        if rich and self.chance() < self.params.adjectives:
            adjective, _ = self.draw("adjective", field)
            out.add(adjective, "ADJ", adjective)
        if not self.agreement:
            return _Noun(out.add(stem, "NOUN", stem, None, role), plural, field)
        return _Noun(out.add(inflect(stem) if plural else stem, "NOUN", stem, plural, role), plural, field)


def generate(seed: int, params: CorpusParams | None = None) -> Iterator[AnnotatedSentence]:
    """Endless stream of sentences. The same seed and parameters give the same sentences, however many are taken."""
    if seed < 0:
        raise UsageError(f"corpus: the seed is a whole number from 0 on, found {seed}.")
    writer = _Writer(params or CorpusParams(), seed)
    while True:
        yield writer.sentence()


def generate_to_file(
    path: Path | str, sentences: int, seed: int, params: CorpusParams | None = None, *, form: str = "jsonl"
) -> int:
    """Write the first ``sentences`` sentences of :func:`generate` in one of ``FORMS``; returns their number.

    Beside the file goes ``FILE.params.json``, from which others can rebuild the grammar (``read_origin``).
    Raises UsageError for a count below 1, a negative seed and an unknown form.
    """
    if sentences < 1:
        raise UsageError(f"corpus: the number of sentences must be at least 1, found {sentences}.")
    origin = Origin(seed, sentences, params or CorpusParams())
    count = write_corpus(path, islice(generate(seed, origin.params), sentences), form, origin=origin)
    write_origin(path, origin)
    return count

"""Which words may follow a prefix: a recogniser of the grammar that knows nothing of how sentences are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trace_offline.corpus import FRAMES, Lexicon
from trace_offline.corpus.grammar import MODIFIER_PREPOSITIONS, PLURAL_DETERMINERS, SINGULAR_DETERMINERS

State = tuple[int, bool | None]  # words read, number of the last noun


class Prefixes:
    """``viable(words)``: whether some sentence of the grammar begins with these words."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.nouns = {stem + ending: bool(ending) for stem in lexicon.nouns for ending in ("", "s")}
        self.adjectives, self.adverbs = set(lexicon.adjectives), set(lexicon.adverbs)
        self.finite = {
            (stem + ending, not ending): name
            for name, stems in lexicon.verbs.items()
            for stem in stems
            for ending in ("", "s")
        }
        self.participles = {
            stem + "ed": name for name, stems in lexicon.verbs.items() if FRAMES[name].passive for stem in stems
        }

    def viable(self, words: Sequence[str]) -> bool:
        self.words, self.ended = list(words), False
        # A parse that reads every word, or wants another one when they are all read, makes the prefix viable.
        return any(end == len(words) for end in self.sentence()) or self.ended

    def word(self, at: int) -> str | None:
        if at < len(self.words):
            return self.words[at]
        self.ended = True
        return None

    def phrase(self, at: int, rich: bool) -> Iterator[State]:
        determiner = self.word(at)
        for plural, determiners in ((False, SINGULAR_DETERMINERS), (True, PLURAL_DETERMINERS)):
            if determiner not in determiners:
                continue
            at_noun = at + 1
            if rich and self.word(at_noun) in self.adjectives:
                at_noun += 1
            if self.nouns.get(self.word(at_noun) or "") is plural:
                yield at_noun + 1, plural

    def subject(self, at: int, rich: bool) -> Iterator[State]:
        for end, plural in self.phrase(at, rich):
            yield end, plural
            if rich and self.word(end) in MODIFIER_PREPOSITIONS:
                yield from ((inner, plural) for inner, _ in self.phrase(end + 1, False))

    def predicate(self, at: int, plural: bool | None, rich: bool, passive: bool = True) -> Iterator[State]:
        """Ends of predicates with the number of their last noun (None: no noun)."""
        if rich and self.word(at) in self.adverbs:
            at += 1
        verb = self.word(at)
        if rich and passive and verb == ("are" if plural else "is"):
            name = self.participles.get(self.word(at + 1) or "")
            if name is not None:
                ends: list[State] = [(at + 2, None)]
                if self.word(at + 2) == "by":
                    ends += self.phrase(at + 3, rich)
                for end in ends:
                    yield from self.obliques(name, end, rich)
        name = self.finite.get((verb or "", bool(plural)))
        if name is not None:
            for end in self.phrase(at + 1, rich) if FRAMES[name].object else [(at + 1, None)]:
                yield from self.obliques(name, end, rich)

    def obliques(self, name: str, start: State, rich: bool) -> Iterator[State]:
        frame = FRAMES[name]
        states: list[tuple[State, int]] = [(start, 0)]
        prepositions = [preposition for preposition, _ in frame.obliques]
        for preposition in prepositions:
            for (at, _), count in list(states):
                if self.word(at) == preposition:
                    states += [(state, count + 1) for state in self.phrase(at + 1, rich)]
        for state, count in states:
            if count >= frame.required and (rich or count == frame.required):
                yield state

    def sentence(self) -> Iterator[int]:
        for rich in (False, True):
            for at, plural in self.subject(0, rich):
                yield from (end for end, _ in self.predicate(at, plural, rich))
        for at, plural in self.subject(0, True):
            for end, last in self.predicate(at, plural, True):
                if self.word(end) == "and":
                    yield from (done for done, _ in self.predicate(end + 1, plural, True, passive=False))
                if self.word(end) in ("and", "while"):
                    for rich in (True, False):
                        for second, number in self.subject(end + 1, rich):
                            yield from (done for done, _ in self.predicate(second, number, rich))
                if last is not None and self.word(end) == "that":
                    yield from (done for done, _ in self.predicate(end + 1, last, False))
        for at, plural in self.phrase(0, True):
            if self.word(at) == "that":
                for end, _ in self.predicate(at + 1, plural, False):
                    yield from (done for done, _ in self.predicate(end, plural, True))

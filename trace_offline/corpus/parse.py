"""What reading a sentence gives: the annotations that its words determine, and its structural errors."""

from __future__ import annotations

from dataclasses import dataclass

from trace_offline.corpus.sentence import Clause

ERRORS: dict[str, str] = {
    "unknown_word": "a word that is no form of the lexicon",
    "unknown_frame": "a clause without a verb, or a verb with an argument that its frame does not have there",
    "missing_role": "a subject, object, or prepositional argument that must be there and is not",
    "wrong_class": "a word of a class that cannot stand there",
    "broken_agreement": "a verb that does not agree with its subject, or a determiner with its noun",
    "repetition": "words that repeat the words just before them where the grammar does not allow it",
    "unfinished": "words that end inside a phrase or before the verb, or that were cut off",
}
"""Kinds of structural errors and what they mean."""


@dataclass(frozen=True, slots=True)
class StructuralError:
    """What is wrong at a word; ``position`` may be the number of words: after the last."""

    kind: str
    position: int
    detail: str


@dataclass(frozen=True, slots=True)
class Parse:
    """Annotations read off the words, as in ``AnnotatedSentence``; reliable where ``errors`` is empty."""

    words: tuple[str, ...]
    pos: tuple[str | None, ...]
    roles: tuple[str | None, ...]
    plural: tuple[bool | None, ...]
    clauses: tuple[Clause, ...]
    errors: tuple[StructuralError, ...]

    @property
    def well_formed(self) -> bool:
        """The grammar can make these words."""
        return not self.errors

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of errors found."""
        return frozenset(error.kind for error in self.errors)

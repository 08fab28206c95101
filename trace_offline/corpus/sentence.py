"""One annotated sentence, and its JSONL form: one sentence a line, one annotation per word."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from trace_offline.core.errors import UsageError

_encode = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make a new encoder for every sentence


@dataclass(frozen=True, slots=True)
class Clause:
    """One clause: its frame, the word that agrees and what it agrees with.

    ``verb`` is the position of the finite word (the auxiliary in a passive), ``subject`` that of the subject's head
    noun; ``plural`` is the number of the subject, and of the verb unless agreement was violated on purpose; None where
    words show no number. ``attractors`` counts the nouns of the other number between the two.
    """

    frame: str
    subject: int
    verb: int
    plural: bool | None
    passive: bool
    attractors: int

    def to_record(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "frame": self.frame,
            "subject": self.subject,
            "verb": self.verb,
            "plural": self.plural,
            "passive": self.passive,
            "attractors": self.attractors,
        }


@dataclass(frozen=True, slots=True)
class AnnotatedSentence:
    """Words with one annotation each.

    ``roles`` holds a role at the head noun of each argument and None at every other word, the nouns of modifying
    phrases included. A noun that is an argument of two clauses (the head of a relative clause, the shared subject of
    coordinated verbs) bears the role of the clause that comes first in ``clauses``. ``plural`` is None for words
    without number. ``frame`` is the frame of the first clause.
    """

    words: tuple[str, ...]
    pos: tuple[str, ...]
    roles: tuple[str | None, ...]
    lemmas: tuple[str, ...]
    plural: tuple[bool | None, ...]
    frame: str
    complexity: str
    clauses: tuple[Clause, ...]

    @property
    def text(self) -> str:
        """The words, separated by single spaces."""
        return " ".join(self.words)

    def to_record(self) -> dict[str, Any]:
        """The fields as JSON values; :meth:`from_record` is its inverse."""
        return {
            "words": self.words,
            "pos": self.pos,
            "roles": self.roles,
            "lemmas": self.lemmas,
            "plural": self.plural,
            "frame": self.frame,
            "complexity": self.complexity,
            "clauses": [clause.to_record() for clause in self.clauses],
        }

    def to_json(self) -> str:
        """One line of JSON without the line end."""
        return _encode(self.to_record())

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> AnnotatedSentence:
        """The sentence of one parsed JSON line.

        Raises KeyError or TypeError for missing or unknown fields, ValueError when annotations and words differ in
        number.
        """
        per_word = {name: tuple(record[name]) for name in ("words", "pos", "roles", "lemmas", "plural")}
        lengths = {name: len(values) for name, values in per_word.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(
                "one annotation per word expected, found " + ", ".join(f"{n} {k}" for k, n in lengths.items())
            )
        clauses = tuple(Clause(**clause) for clause in record["clauses"])
        return cls(**per_word, frame=record["frame"], complexity=record["complexity"], clauses=clauses)


@contextmanager
def complete_file(path: Path) -> Iterator[TextIO]:
    """A text file to write (UTF-8) that appears under its name only when the block ends without an error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_jsonl(path: Path | str, sentences: Iterable[AnnotatedSentence]) -> int:
    """Write one sentence a line and return their number; the file appears under its name only when complete."""
    count = 0
    with complete_file(Path(path)) as file:
        for sentence in sentences:
            file.write(sentence.to_json() + "\n")
            count += 1
    return count


def read_jsonl(path: Path | str) -> Iterator[AnnotatedSentence]:
    """Stream the sentences of a file written by :func:`write_jsonl`.

    Raises UsageError naming the line for anything that is not an annotated sentence.
    """
    path = Path(path)
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path}: cannot read the corpus ({error.strerror}). Make one with generate_to_file()."
        ) from None
    with file:
        for number, line in enumerate(file, start=1):
            try:
                yield AnnotatedSentence.from_record(json.loads(line))
            except KeyError as error:
                raise UsageError(
                    f"{path}, line {number}: expected an annotated sentence, field {error} is missing."
                ) from None
            except (TypeError, ValueError) as error:
                raise UsageError(f"{path}, line {number}: expected an annotated sentence: {error}.") from None

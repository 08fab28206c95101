"""A sentence and the same with one word changed, and the file of such pairs: one a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_offline.core.errors import UsageError
from trace_offline.corpus.sentence import AnnotatedSentence, complete_file


@dataclass(frozen=True, slots=True)
class Pair:
    """A sentence and the same with one word changed.

    ``original_positions`` and ``changed_positions`` are the words to compare, one by one. ``detail`` says what was
    changed: the part of speech (``synonym``, ``elimination``), ``preposition`` or ``object`` (``role_violation``), or
    ``attractor``/``no_attractor`` (``agreement_violation``: whether a noun of the wrong number stands in between).
    """

    kind: str
    original: AnnotatedSentence
    changed: AnnotatedSentence
    original_positions: tuple[int, ...]
    changed_positions: tuple[int, ...]
    detail: str

    def to_record(self) -> dict[str, Any]:
        """The fields as JSON values; :meth:`from_record` is its inverse."""
        return {
            "kind": self.kind,
            "original": self.original.to_record(),
            "changed": self.changed.to_record(),
            "original_positions": self.original_positions,
            "changed_positions": self.changed_positions,
            "detail": self.detail,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Pair:
        """The pair of one parsed JSON line; raises KeyError, TypeError or ValueError for anything else."""
        pair = cls(
            str(record["kind"]),
            AnnotatedSentence.from_record(record["original"]),
            AnnotatedSentence.from_record(record["changed"]),
            tuple(record["original_positions"]),
            tuple(record["changed_positions"]),
            str(record.get("detail", "")),
        )
        if len(pair.original_positions) != len(pair.changed_positions) or not pair.original_positions:
            raise ValueError("as many positions in the original as in the changed sentence expected, at least one")
        for sentence, positions in (
            (pair.original, pair.original_positions),
            (pair.changed, pair.changed_positions),
        ):
            if not all(isinstance(each, int) and 0 <= each < len(sentence.words) for each in positions):
                raise ValueError(f"positions of words expected (0 to {len(sentence.words) - 1}), found {positions}")
        return pair


def write_pairs(path: Path | str, pairs: Iterable[Pair]) -> int:
    """Write one pair a line (JSONL) and return their number."""
    count = 0
    with complete_file(Path(path)) as file:
        for pair in pairs:
            file.write(json.dumps(pair.to_record(), separators=(",", ":")) + "\n")
            count += 1
    return count


def read_pairs(path: Path | str) -> Iterator[Pair]:
    """Stream the pairs of a file written by :func:`write_pairs`; UsageError naming the line for anything else."""
    path = Path(path)
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path}: cannot read the pairs ({error.strerror}). Make them with: trace-offline corpus intervene."
        ) from None
    with file:
        for number, line in enumerate(file, start=1):
            try:
                yield Pair.from_record(json.loads(line))
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{path}, line {number}: expected a pair of sentences; {error!r:.160}.") from None

"""Text with labels on stretches of characters: what every source is turned into before tokenization."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trace_offline.core.errors import EvaluationSetError
from trace_offline.evaluation.pairs import Member


@dataclass(frozen=True, slots=True)
class CharSpan:
    """``label`` of ``task`` on the characters ``start`` to ``end`` (exclusive, counted in Unicode code points)."""

    task: str
    start: int
    end: int
    label: str


@dataclass(frozen=True, slots=True)
class CharAlternative:
    """``form`` could stand in the place of the characters ``start`` to ``end`` (exclusive)."""

    start: int
    end: int
    form: str


@dataclass(frozen=True, slots=True)
class Document:
    """One text. ``where`` names file and line for messages; ``unplaced`` counts, by task, labels without characters.

    ``member``: which member of which minimal pair it is, if any.
    """

    text: str
    where: str
    spans: tuple[CharSpan, ...] = ()
    unplaced: dict[str, int] = field(default_factory=dict)
    alternatives: tuple[CharAlternative, ...] = ()
    member: Member | None = None


def document_from_words(
    words: Sequence[str],
    labels: Mapping[str, Sequence[str | None]],
    where: str,
    *,
    space_after: Sequence[bool] | None = None,
    text: str | None = None,
    whole: Mapping[str, str] | None = None,
    alternatives: Sequence[str | None] | None = None,
) -> Document:
    """Words with one label each (None = unlabelled) → text with character spans.

    ``labels``: by task, as many as words. ``space_after``: whether a space follows each word (default: always).
    ``text``: the original text, in which the words are looked up in order, instead of joining them. ``whole``: labels
    of the whole text by task. ``alternatives``: the form to compare each word with (None = none). Raises
    EvaluationSetError when lengths differ or a word is not in ``text``.
    """
    for task, values in [*labels.items(), *([] if alternatives is None else [("alternatives", alternatives)])]:
        if len(values) != len(words):
            raise EvaluationSetError(f'{where}: "{task}" has {len(values)} labels for {len(words)} words.')
    if space_after is not None and len(space_after) != len(words):
        raise EvaluationSetError(f'{where}: "space_after" has {len(space_after)} entries for {len(words)} words.')
    bounds: list[tuple[int, int]] = []
    if text is None:
        pieces: list[str] = []
        position = 0
        for index, word in enumerate(words):
            bounds.append((position, position + len(word)))
            last = index == len(words) - 1
            piece = word if last or (space_after is not None and not space_after[index]) else word + " "
            pieces.append(piece)
            position += len(piece)
        text = "".join(pieces)
    else:
        position = 0
        for index, word in enumerate(words):
            found = text.find(word, position)
            if found < 0:
                raise EvaluationSetError(f'{where}: word {index} ("{word}") does not occur in the text in its place.')
            position = found + len(word)
            bounds.append((found, position))
    spans = [
        CharSpan(task, *bounds[index], label)
        for task, values in labels.items()
        for index, label in enumerate(values)
        if label is not None
    ]
    spans += [whole_span(task, text, label) for task, label in (whole or {}).items()]
    others = [
        CharAlternative(*bounds[index], form) for index, form in enumerate(alternatives or ()) if form is not None
    ]
    return Document(text, where, tuple(spans), alternatives=tuple(others))


def whole_span(task: str, text: str, label: str) -> CharSpan:
    """A label of the whole text: from its first to its last character that is no space."""
    start = len(text) - len(text.lstrip())
    return CharSpan(task, start, max(start, len(text.rstrip())), label)


def merge_counts(documents: Sequence[Document]) -> Counter[str]:
    """Labels without characters, by task, over all documents."""
    total: Counter[str] = Counter()
    for document in documents:
        total.update(document.unplaced)
    return total


def read_text(path: Path) -> str:
    """A UTF-8 text file, plain or gzipped. Raises EvaluationSetError when it cannot be read as such."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except FileNotFoundError as error:
        other = path.with_suffix("") if path.suffix == ".gz" else path.with_name(f"{path.name}.gz")
        hint = f" There is {other}." if other.is_file() else ""
        raise EvaluationSetError(f"{path}: there is no such file.{hint}") from error
    except (OSError, EOFError) as error:
        raise EvaluationSetError(f"{path}: cannot be read: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationSetError(
            f"{path}: expected UTF-8 text, found other bytes at position {error.start}. Convert the file to UTF-8."
        ) from error

"""CoNLL-U (Universal Dependencies): any column as a task.

Format: https://universaldependencies.org/format.html. Multiword ranges give the surface text; the words in one have
characters of their own only when, written together, they are its surface form (``didn't`` = ``did`` + ``n't``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trace_offline.core.errors import EvaluationSetError, nearest
from trace_offline.evaluation.document import CharSpan, Document, read_text

COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
DEFAULT_TASKS = ("upos", "deprel")
_PLAIN = ("form", "lemma", "upos", "xpos", "feats", "deprel")


@dataclass(slots=True)
class Word:
    """A syntactic word: its columns, and its characters in the text (None when it has none of its own)."""

    columns: tuple[str, ...]
    start: int | None
    end: int | None


@dataclass(slots=True)
class Sentence:
    """Words in order and the surface text, rebuilt from forms and ``SpaceAfter=No``."""

    where: str
    text: str = ""
    words: list[Word] = field(default_factory=list)


def read_conllu(path: Path, tasks: Sequence[str] | None = None) -> list[Document]:
    """One document a sentence, with a span for each labelled word.

    Tasks: ``upos``, ``xpos``, ``lemma``, ``form``, ``feats`` (all features together), ``deprel`` (universal part,
    ``nsubj:pass`` → ``nsubj``), ``deprel:full``, ``feats.Number`` (or just ``Number``), ``misc.NAME``. Default: upos
    and deprel. ``_`` and absent features are unlabelled. Raises EvaluationSetError naming file and line for anything
    that is not CoNLL-U, and for tasks no word has.
    """
    sentences = list(parse(read_text(path), str(path)))
    if not sentences:
        raise EvaluationSetError(f"{path}: contains no sentence in CoNLL-U format (ten columns separated by tabs).")
    wanted = tuple(tasks) if tasks is not None else DEFAULT_TASKS
    features = {
        name
        for sentence in sentences
        for word in sentence.words
        for name in _pairs(word.columns[COLUMNS.index("feats")])
    }
    getters = [(task, *_column(task, features, path)) for task in wanted]
    return [_document(sentence, getters) for sentence in sentences]


def parse(text: str, where: str) -> Iterator[Sentence]:
    """Sentences of CoNLL-U text. Raises EvaluationSetError naming the line."""
    builder: _Builder | None = None
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        here = f"{where}, line {number}"
        if not line.strip():
            if builder is not None:
                yield builder.finish(here)
            builder = None
        elif not line.startswith("#"):
            builder = builder or _Builder(Sentence(here))
            builder.add(tuple(line.split("\t")), here)
    if builder is not None:
        yield builder.finish(f"{where}, at the end")


@dataclass(slots=True)
class _Builder:
    """Takes the lines of one sentence in order."""

    sentence: Sentence
    space: bool = False
    range_end: int = 0
    range_start: int = 0
    range_form: str = ""
    range_words: list[Word] = field(default_factory=list)

    def add(self, columns: tuple[str, ...], here: str) -> None:
        if len(columns) != len(COLUMNS):
            raise EvaluationSetError(
                f"{here}: expected the ten columns of CoNLL-U separated by tabs, found {len(columns)}: {columns[0]:.60}"
            )
        found = re.fullmatch(r"(\d+)(?:([-.])(\d+))?", columns[0])
        if not found:
            raise EvaluationSetError(f'{here}: expected a word number such as 3, 3-4 or 3.1; found "{columns[0]}".')
        if found[2] == ".":
            return
        number = int(found[1])
        expected = len(self.sentence.words) + 1
        if number != expected or (found[2] and (self.range_end >= number or int(found[3]) < number)):
            raise EvaluationSetError(f"{here}: expected word {expected}, found {columns[0]}.")
        form = columns[1]
        if not form:
            raise EvaluationSetError(f"{here}: word {columns[0]} has an empty form.")
        if found[2]:
            self.range_end, self.range_form, self.range_words = int(found[3]), form, []
            self.range_start = self._append(form, columns)
        elif number <= self.range_end:
            word = Word(columns, None, None)
            self.sentence.words.append(word)
            self.range_words.append(word)
            if number == self.range_end:
                self._settle_range()
        else:
            start = self._append(form, columns)
            self.sentence.words.append(Word(columns, start, start + len(form)))

    def finish(self, here: str) -> Sentence:
        if len(self.sentence.words) < self.range_end:
            raise EvaluationSetError(f"{here}: the sentence ends inside a multiword range.")
        return self.sentence

    def _append(self, form: str, columns: tuple[str, ...]) -> int:
        """Add a surface form to the text; returns where it starts."""
        if self.space:
            self.sentence.text += " "
        self.space = "SpaceAfter=No" not in columns[-1].split("|")
        start = len(self.sentence.text)
        self.sentence.text += form
        return start

    def _settle_range(self) -> None:
        """Words of a range have characters of their own only when together they spell its surface form."""
        if "".join(word.columns[1] for word in self.range_words) != self.range_form:
            return
        start = self.range_start
        for word in self.range_words:
            word.start, word.end = start, start + len(word.columns[1])
            start = word.end


def _pairs(cell: str) -> dict[str, str]:
    """``Number=Sing|Person=3`` → dictionary; ``_`` and parts without ``=`` give nothing."""
    if cell == "_":
        return {}
    return {name: value for name, _, value in (part.partition("=") for part in cell.split("|")) if value}


def _column(task: str, features: set[str], path: Path) -> tuple[int, str]:
    """Which column a task reads and how: ``""`` whole, ``":"`` universal part, anything else a feature name."""
    name = task.casefold()
    if name == "deprel":
        return COLUMNS.index("deprel"), ":"
    if name == "deprel:full":
        return COLUMNS.index("deprel"), ""
    if name in _PLAIN:
        return COLUMNS.index(name), ""
    prefix, _, feature = task.partition(".")
    if prefix.casefold() == "feats" and feature in features:
        return COLUMNS.index("feats"), feature
    if prefix.casefold() == "misc" and feature:
        return COLUMNS.index("misc"), feature
    if task in features:
        return COLUMNS.index("feats"), task
    known = [*_PLAIN, "deprel:full", *sorted(f"feats.{feature}" for feature in features)]
    raise EvaluationSetError(
        f'{path}: has no task "{task}".{nearest(task, [*known, *features])} There are: {", ".join(known)}, misc.NAME.'
    )


def _document(sentence: Sentence, getters: Sequence[tuple[str, int, str]]) -> Document:
    spans: list[CharSpan] = []
    unplaced: dict[str, int] = {}
    for word in sentence.words:
        for task, column, how in getters:
            label = _label(word.columns, column, how)
            if label is None:
                continue
            if word.start is None or word.end is None:
                unplaced[task] = unplaced.get(task, 0) + 1
            else:
                spans.append(CharSpan(task, word.start, word.end, label))
    return Document(sentence.text, sentence.where, tuple(spans), unplaced)


def _label(columns: tuple[str, ...], column: int, how: str) -> str | None:
    cell = columns[column]
    if how == "":
        # "_" is an empty cell, except for the form or lemma of a literal underscore.
        empty = cell == "_" and not (COLUMNS[column] in ("form", "lemma") and columns[1] == "_")
        return None if empty or not cell else cell
    if how == ":":
        return None if cell == "_" else cell.split(":")[0]
    return _pairs(cell).get(how)

"""JSONL with annotations, one text a line, in either of two forms.

Characters: ``{"text": "…", "spans": [{"task": "entity", "start": 0, "end": 5, "label": "PERSON"}, …]}`` (offsets in
Unicode code points, end exclusive; a span without ``task`` belongs to the task ``span``).
Words: ``{"words": ["…", …], "pos": ["…", …], "roles": [null, "Agent", …]}``: every list as long as ``words`` is a task,
null = unlabelled, ``roles`` is called ``role`` and ``lemmas`` ``lemma`` (left out unless asked for: too many classes).
``tokens`` may stand for ``words``; ``text`` beside it is the original text; ``space_after`` tells where spaces follow.
Both: ``"labels": {"topic": "sport"}`` labels the whole text (the span of all its characters, so that with the default
alignment its last sub-word carries the label). A plain field such as ``"frame": "motion"`` is a label of the whole text
when asked for as a task.

A form to compare a word with, such as the wrong number of a verb: a list ``"alternatives": [null, "walks", …]`` beside
``words``, or ``"alternative": "walks"`` in a span. Records with ``clauses`` (those of ``trace_offline.corpus``) give
``agreement``, ``attractors`` and their alternatives when one of these tasks is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_offline.core.errors import EvaluationSetError, nearest
from trace_offline.evaluation import agreement
from trace_offline.evaluation.document import (
    CharAlternative,
    CharSpan,
    Document,
    document_from_words,
    read_text,
    whole_span,
)

_ALIASES = {"roles": "role", "lemmas": "lemma"}
_NOT_TASKS = frozenset({"words", "tokens", "text", "space_after", "spans", "labels", "alternatives"})
_NOT_BY_DEFAULT = frozenset({"lemma"})


def read_jsonl(path: Path, tasks: Sequence[str] | None = None) -> list[Document]:
    """One document a line. ``tasks`` None: all there are (``lemma`` excepted).

    Raises EvaluationSetError naming file and line for anything else, and for a task that is nowhere in the file.
    """
    records: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise EvaluationSetError(f"{where}: expected one JSON object a line: {error}.") from error
        if not isinstance(record, dict):
            raise EvaluationSetError(f"{where}: expected a JSON object, found {type(record).__name__}.")
        records.append((where, record))
    if not records:
        raise EvaluationSetError(f"{path}: contains no record.")
    return documents_from_records(records, tasks, str(path))


def documents_from_records(
    records: Sequence[tuple[str, dict[str, Any]]], tasks: Sequence[str] | None, source: str
) -> list[Document]:
    """``(where, record)`` pairs → documents; see ``read_jsonl``."""
    if set(tasks or ()) & set(agreement.TASKS) and any("clauses" in record for _, record in records):
        records = agreement.add_agreement(records)
    found: set[str] = set()
    scalars: set[str] = set()
    for where, record in records:
        found |= _tasks_of(record, where)
        scalars |= {
            key
            for key, value in record.items()
            if key not in _NOT_TASKS and isinstance(value, (str, int, bool)) and _alias(key) not in found
        }
    if tasks is None:
        wanted = found - _NOT_BY_DEFAULT
    else:
        wanted = {_alias(task) for task in tasks}
        for task in tasks:
            if _alias(task) not in found | scalars:
                known = sorted(found | scalars)
                raise EvaluationSetError(
                    f'{source}: has no task "{task}".{nearest(task, known)} There are: {", ".join(known) or "none"}.'
                )
    return [_document(record, wanted, where) for where, record in records]


def _alias(key: str) -> str:
    return _ALIASES.get(key, key)


def _words(record: dict[str, Any], where: str) -> list[str] | None:
    words = record.get("words", record.get("tokens"))
    if words is None:
        return None
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise EvaluationSetError(f'{where}: "words" must be a list of words that are not empty.')
    return words


def _is_label(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, bool))


def _label(value: Any) -> str | None:
    """JSON null, text, whole number or truth value as a label."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def _tasks_of(record: dict[str, Any], where: str) -> set[str]:
    """Tasks of one record, without the plain fields."""
    words = _words(record, where)
    tasks: set[str] = set()
    if words is not None:
        tasks |= {
            _alias(key)
            for key, value in record.items()
            if key not in _NOT_TASKS
            and isinstance(value, list)
            and len(value) == len(words)
            and all(_is_label(entry) for entry in value)
        }
    spans = record.get("spans", [])
    if not isinstance(spans, list) or not all(isinstance(span, dict) for span in spans):
        raise EvaluationSetError(f'{where}: "spans" must be a list of objects with start, end and label.')
    tasks |= {str(span.get("task", "span")) for span in spans}
    labels = record.get("labels", {})
    if not isinstance(labels, dict):
        raise EvaluationSetError(f'{where}: "labels" must be an object of task and label of the whole text.')
    return tasks | set(labels)


def _document(record: dict[str, Any], wanted: set[str], where: str) -> Document:
    words = _words(record, where)
    text = record.get("text")
    if text is not None and not isinstance(text, str):
        raise EvaluationSetError(f'{where}: "text" must be text, found {type(text).__name__}.')
    if words is None and not (text or "").strip():
        raise EvaluationSetError(
            f'{where}: expected "text" or "words", found the fields {", ".join(record) or "none"}.'
        )
    per_word: dict[str, list[str | None]] = {}
    whole: dict[str, str] = {}
    for key, value in record.items():
        if key in _NOT_TASKS or _alias(key) not in wanted:
            continue
        if isinstance(value, list) and words is not None:
            if len(value) != len(words) or not all(_is_label(entry) for entry in value):
                raise EvaluationSetError(
                    f'{where}: "{key}" must have one label (text, a whole number, true, false or null) for each of the '
                    f"{len(words)} words; it has {len(value)} entries."
                )
            per_word[_alias(key)] = [_label(entry) for entry in value]
        elif isinstance(value, (str, int, bool)):
            whole[key] = _label(value) or ""
    for task, value in record.get("labels", {}).items():
        label = _label(value) if _is_label(value) else None
        if value is not None and label is None:
            raise EvaluationSetError(f'{where}: "labels": {task} must be text, a whole number, true or false.')
        if task in wanted and label is not None:
            whole[task] = label
    if words is not None:
        document = document_from_words(
            words,
            per_word,
            where,
            space_after=record.get("space_after"),
            text=text,
            whole=whole,
            alternatives=_alternatives(record, words, where),
        )
        spans, alternatives = list(document.spans), list(document.alternatives)
        text = document.text
    else:
        assert text is not None
        alternatives = []
        spans = [whole_span(task, text, label) for task, label in whole.items()]
    for index, given in enumerate(record.get("spans", [])):
        span = _span(given, text, where, index)
        if span.task in wanted:
            spans.append(span)
            if (form := given.get("alternative")) is not None:
                alternatives.append(CharAlternative(span.start, span.end, _form(form, f"{where}, span {index}")))
    return Document(text, where, tuple(spans), alternatives=tuple(alternatives))


def _alternatives(record: dict[str, Any], words: list[str], where: str) -> list[str | None] | None:
    given = record.get("alternatives")
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != len(words):
        raise EvaluationSetError(
            f'{where}: "alternatives" must have a form or null for each of the {len(words)} words; found {given!r:.80}.'
        )
    return [None if form is None else _form(form, where) for form in given]


def _form(form: Any, where: str) -> str:
    if not isinstance(form, str) or not form.strip() or form != form.strip():
        raise EvaluationSetError(f"{where}: an alternative is a word, without spaces around it; found {form!r:.80}.")
    return form


def _span(given: dict[str, Any], text: str, where: str, index: int) -> CharSpan:
    start, end, label = given.get("start"), given.get("end"), given.get("label")
    if type(start) is not int or type(end) is not int or label is None or not _is_label(label):
        raise EvaluationSetError(
            f"{where}, span {index}: expected whole numbers start and end and a label; found {given!r:.100}."
        )
    if not 0 <= start < end <= len(text):
        raise EvaluationSetError(
            f"{where}, span {index}: characters {start} to {end} (end exclusive) do not lie in the text of {len(text)} "
            "characters. Offsets count Unicode characters, not bytes."
        )
    return CharSpan(str(given.get("task", "span")), start, end, str(_label(label)))

"""Files of minimal pairs, JSONL with one pair a line, in either of two forms.

BLiMP: ``{"sentence_good": "…", "sentence_bad": "…", "UID": "…", "linguistics_term": "…", …}``. The kind of a pair is
its ``UID`` (``linguistics_term`` where there is none; ``minimal_pair`` where there is neither). Where the record names
the word to compare (``one_prefix_…``, ``two_prefix_…``), that word is compared, elsewhere the tokens that differ.

Interventions (``trace-offline corpus intervene``): ``{"kind": "…", "original": {…}, "changed": {…},
"original_positions": [3], "changed_positions": [3]}``: two records with ``words`` and their annotations, and the words
to compare.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trace_offline.core.errors import EvaluationSetError, nearest
from trace_offline.evaluation.document import CharSpan, Document, document_from_words, read_text
from trace_offline.evaluation.jsonl import documents_from_records
from trace_offline.evaluation.pairs import VIOLATION, Member

_SENTENCES = ("sentence_good", "sentence_bad")
_MEMBERS = ("original", "changed")
_KIND = "minimal_pair"


def is_pair(record: Any) -> bool:
    """A parsed JSON line is a pair in one of the two forms."""
    return isinstance(record, dict) and (all(k in record for k in _SENTENCES) or all(k in record for k in _MEMBERS))


def read_pair_file(path: Path, tasks: Sequence[str] | None = None) -> list[Document]:
    """Two documents a pair, the original first, each with its ``member``; the words to compare are ``violation`` spans.

    ``tasks``: annotations of the members to keep (None: all that interventions have; BLiMP has none). Raises
    EvaluationSetError naming file and line.
    """
    records: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise EvaluationSetError(f"{where}: expected one JSON object a line: {error}.") from error
            if not is_pair(record):
                raise EvaluationSetError(
                    f"{where}: expected a minimal pair, an object with {' and '.join(_SENTENCES)} or with "
                    f"{' and '.join(_MEMBERS)}; found {record!r:.80}."
                )
            records.append((where, record))
    if not records:
        raise EvaluationSetError(f"{path}: contains no pair.")
    forms = {all(key in record for key in _SENTENCES) for _, record in records}
    if len(forms) > 1:
        raise EvaluationSetError(f"{path}: holds pairs of two forms; put them in two files.")
    return _blimp(records, tasks, path) if forms.pop() else _interventions(records, tasks, path)


def _blimp(records: Sequence[tuple[str, dict[str, Any]]], tasks: Sequence[str] | None, path: Path) -> list[Document]:
    if tasks:
        raise EvaluationSetError(
            f"{path}: sentences of BLiMP have no annotations such as {', '.join(tasks)}; leave --task out. The kinds "
            f'of their pairs are the labels of the task "{VIOLATION}".'
        )
    documents = []
    for where, record in records:
        kind = str(record.get("UID") or record.get("linguistics_term") or _KIND)
        for key in _SENTENCES:
            if not isinstance(record[key], str) or not record[key].strip():
                raise EvaluationSetError(f'{where}: "{key}" must be a sentence; found {record[key]!r:.80}.')
        spans = [_critical_word(record, record[key], key.removeprefix("sentence_"), kind) for key in _SENTENCES]
        marks = int(None not in spans)
        for variant, (key, span) in enumerate(zip(_SENTENCES, spans, strict=True)):
            member = Member(where, variant, kind, marks)
            documents.append(Document(record[key], where, (span,) if span and marks else (), member=member))
    return documents


def _critical_word(record: dict[str, Any], text: str, which: str, kind: str) -> CharSpan | None:
    """The word that BLiMP's prefix methods compare, if the record names one and it stands after its prefix."""
    for prefix, word in (
        ("one_prefix_prefix", f"one_prefix_word_{which}"),
        (f"two_prefix_prefix_{which}", "two_prefix_word"),
    ):
        before, after = record.get(prefix), record.get(word)
        if isinstance(before, str) and isinstance(after, str) and after and text.startswith(before):
            rest = text[len(before) :]
            start = len(text) - len(rest.lstrip())
            if text.startswith(after, start):
                return CharSpan(VIOLATION, start, start + len(after), kind)
    return None


def _interventions(
    records: Sequence[tuple[str, dict[str, Any]]], tasks: Sequence[str] | None, path: Path
) -> list[Document]:
    members: list[tuple[str, dict[str, Any]]] = []
    for where, record in records:
        for key in _MEMBERS:
            if not isinstance(record[key], dict) or not isinstance(record[key].get("words"), list):
                raise EvaluationSetError(f'{where}: "{key}" must be a record with "words"; found {record[key]!r:.80}.')
            members.append((f"{where}, {key}", record[key]))
    if tasks and VIOLATION in tasks:
        tasks = [task for task in tasks if task != VIOLATION]
    documents = documents_from_records(members, tasks, str(path))
    found = []
    for index, (where, record) in enumerate(records):
        kind = record.get("kind")
        if not isinstance(kind, str) or not kind:
            raise EvaluationSetError(f'{where}: "kind" must name the change; found {kind!r:.80}.')
        marked = [_positions(record, key, kind, where) for key in _MEMBERS]
        if len(marked[0]) != len(marked[1]):
            raise EvaluationSetError(
                f'{where}: "original_positions" and "changed_positions" are compared one by one, but they name '
                f"{len(marked[0])} and {len(marked[1])} words."
            )
        for variant, spans in enumerate(marked):
            document = documents[2 * index + variant]
            member = Member(where, variant, kind, len(spans))
            found.append(replace(document, spans=(*document.spans, *spans), member=member))
    return found


def _positions(record: dict[str, Any], key: str, kind: str, where: str) -> list[CharSpan]:
    words, name = record[key]["words"], f"{key}_positions"
    given = record.get(name, [])
    if not isinstance(given, list) or not all(type(place) is int and 0 <= place < len(words) for place in given):
        close = nearest(name, [each for each in record if each != name])
        raise EvaluationSetError(
            f'{where}: "{name}" must be places of words, 0 to {len(words) - 1}; found {given!r:.80}.{close}'
        )
    marked = [kind if place in given else None for place in range(len(words))]
    shape = {"space_after": record[key].get("space_after"), "text": record[key].get("text")}
    return list(document_from_words(words, {VIOLATION: marked}, where, **shape).spans)

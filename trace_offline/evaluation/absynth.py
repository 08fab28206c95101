"""Corpora of ABSynth (arXiv 2507.03668's generator of synthetic sentences), in all four JSON forms.

1. full: ``{"corpus": [record, …]}`` with ``linguistic_annotations.pos_tags`` and positional ``semantic_roles``;
2. semantic annotations: a list of ``{sentence, semantic_roles, semantics, frame}``;
3. sentences only: a list of strings (no annotations);
4. first version: a list (or ``corpus``) of ``{sentence, semantics}``, the roles inside a formula such as
   ``∃e (Agent(e, noun1) ∧ Patient(e, noun7))``.

Tasks: ``pos`` (form 1), ``role`` (1, 2, 4), ``frame`` of the whole sentence (where present). Words without a role are
unlabelled. In form 4 a role goes to the first occurrence of its word that has none yet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_offline.core.errors import EvaluationSetError, nearest
from trace_offline.evaluation.document import Document, document_from_words, read_text
from trace_offline.evaluation.jsonl import documents_from_records

TASKS = ("pos", "role", "frame")
_ROLE = re.compile(r"(\w+)\(\s*e\d*\s*,\s*([^()\s]+)\s*\)")
_FRAME = re.compile(r"∃\s*e\d*\s*\.\s*(\w+)\(")


def read_absynth(path: Path, tasks: Sequence[str] | None = None) -> list[Document]:
    """One document a sentence. ``tasks`` None: those of pos, role and frame that occur.

    A JSON list of objects with ``words`` or ``text`` is read as JSONL is. Raises EvaluationSetError naming the record.
    """
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise EvaluationSetError(f"{path}: cannot be read as JSON: {error}.") from error
    records = content.get("corpus") if isinstance(content, dict) else content
    if not isinstance(records, list) or not records:
        raise EvaluationSetError(
            f'{path}: expected a list of sentences, or an object with a list "corpus"; found '
            f"{'an empty list' if records == [] else 'something else'}."
        )
    numbered = [(f"{path}, record {index}", record) for index, record in enumerate(records)]
    if all(isinstance(record, dict) and "sentence" not in record for record in records):
        return documents_from_records(numbered, tasks, str(path))
    documents = [document_from_record(record, where) for where, record in numbered]
    found = {span.task for document in documents for span in document.spans} | {
        task for document in documents for task in document.unplaced
    }
    wanted = found if tasks is None else set(tasks)
    for task in sorted(wanted - found):
        known = sorted(found)
        raise EvaluationSetError(
            f'{path}: has no task "{task}".{nearest(task, known)} There are: {", ".join(known) or "none"}.'
        )
    return [
        Document(
            document.text,
            document.where,
            tuple(span for span in document.spans if span.task in wanted),
            {task: count for task, count in document.unplaced.items() if task in wanted},
        )
        for document in documents
    ]


def document_from_record(record: Any, where: str) -> Document:
    """A record of any of the four forms. Raises EvaluationSetError when its parts contradict each other."""
    if isinstance(record, str):
        record = {"sentence": record}
    sentence = record.get("sentence") if isinstance(record, dict) else None
    if not isinstance(sentence, str) or not sentence.strip():
        raise EvaluationSetError(f'{where}: expected a sentence or an object with "sentence"; found {record!r:.80}.')
    words = sentence.split()
    labels: dict[str, list[str | None]] = {}
    unplaced: dict[str, int] = {}
    annotations = _object(record, "linguistic_annotations", where)
    pos = annotations.get("pos_tags")
    if pos is not None:
        if not isinstance(pos, list) or len(pos) != len(words):
            raise EvaluationSetError(
                f"{where}: pos_tags must have one tag for each of the {len(words)} words; found {pos!r:.80}."
            )
        labels["pos"] = [str(tag) for tag in pos]
    semantics = record.get("semantics")
    if "semantic_roles" in record:
        labels["role"] = _positional_roles(_object(record, "semantic_roles", where), words, where)
    elif isinstance(semantics, str):
        labels["role"], missing = _roles_from_formula(semantics, words)
        if missing:
            unplaced["role"] = missing
    frame = record.get("frame", _object(record, "metadata", where).get("frame"))
    if frame is None and isinstance(semantics, str) and (found := _FRAME.search(semantics)):
        frame = found[1]
    whole = {} if frame is None else {"frame": str(frame)}
    document = document_from_words(words, labels, where, whole=whole)
    return Document(document.text, where, document.spans, unplaced)


def _object(record: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = record.get(key) or {}
    if not isinstance(value, dict):
        raise EvaluationSetError(f'{where}: "{key}" must be an object; found {value!r:.80}.')
    return value


def _positional_roles(roles: dict[str, Any], words: Sequence[str], where: str) -> list[str | None]:
    labels: list[str | None] = [None] * len(words)
    for key, argument in roles.items():
        position = argument.get("position") if isinstance(argument, dict) else None
        if type(position) is not int or not 0 <= position < len(words) or not isinstance(argument.get("role"), str):
            raise EvaluationSetError(
                f"{where}: {key} must have a role and the position of one of the {len(words)} words; found "
                f"{argument!r:.80}."
            )
        if argument.get("word", words[position]) != words[position]:
            raise EvaluationSetError(
                f'{where}: {key} says that word {position} is "{argument["word"]}", but the sentence has '
                f'"{words[position]}" there. Correct or remove the record.'
            )
        labels[position] = argument["role"]
    return labels


def _roles_from_formula(semantics: str, words: Sequence[str]) -> tuple[list[str | None], int]:
    """Roles by word, and how many name a word that the sentence does not have (any more)."""
    labels: list[str | None] = [None] * len(words)
    missing = 0
    for role, word in _ROLE.findall(semantics):
        place = next((index for index, each in enumerate(words) if each == word and labels[index] is None), None)
        if place is None:
            missing += 1
        else:
            labels[place] = role
    return labels, missing

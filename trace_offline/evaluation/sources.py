"""Files of any kind into documents: plain text, CoNLL-U, JSONL, ABSynth JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from trace_offline.core.errors import EvaluationSetError
from trace_offline.evaluation.absynth import read_absynth
from trace_offline.evaluation.conllu import read_conllu
from trace_offline.evaluation.document import Document, read_text
from trace_offline.evaluation.jsonl import read_jsonl
from trace_offline.evaluation.plain_text import read_plain_text

KINDS = ("text", "conllu", "jsonl", "absynth")
_SUFFIXES = {".conllu": "conllu", ".conll": "conllu", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "absynth"}


def read_source(path: Path, kind: str | None, tasks: Sequence[str] | None, text_unit: str = "auto") -> list[Document]:
    """Documents of one file; ``kind`` None: guessed."""
    found = kind or guess_kind(path)
    if found == "text":
        if tasks:
            raise EvaluationSetError(
                f"{path}: read as plain text, which has no annotations such as {', '.join(tasks)}. If it is annotated, "
                f"say how: one of {', '.join(KINDS[1:])}."
            )
        return read_plain_text(path, text_unit)
    reader: Callable[[Path, Sequence[str] | None], list[Document]]
    reader = {"conllu": read_conllu, "jsonl": read_jsonl, "absynth": read_absynth}[found]
    return reader(path, tasks)


def guess_kind(path: Path) -> str:
    """From the suffix (``.gz`` aside), else from the first line that is no comment."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if suffixes and suffixes[-1] in _SUFFIXES:
        return _SUFFIXES[suffixes[-1]]
    if suffixes and suffixes[-1] == ".txt":
        return "text"
    text = read_text(path)
    first = next((line for line in text.split("\n") if line.strip() and not line.startswith("# ")), "")
    if first.count("\t") == 9:
        return "conllu"
    try:
        if isinstance(json.loads(first), dict):
            return "jsonl"
    except ValueError:
        pass
    return "absynth" if first.strip().startswith(("[", "{")) else "text"

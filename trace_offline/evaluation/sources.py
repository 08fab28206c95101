"""Files of any kind into documents: plain text, CoNLL-U, JSONL, ABSynth JSON, minimal pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from trace_offline.core.errors import EvaluationSetError
from trace_offline.evaluation.absynth import read_absynth
from trace_offline.evaluation.conllu import read_conllu
from trace_offline.evaluation.document import Document, read_text
from trace_offline.evaluation.jsonl import read_jsonl
from trace_offline.evaluation.pair_sources import is_pair, read_pair_file
from trace_offline.evaluation.plain_text import read_plain_text

KINDS = ("text", "conllu", "jsonl", "absynth", "pairs")
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
    reader = {"conllu": read_conllu, "jsonl": read_jsonl, "absynth": read_absynth, "pairs": read_pair_file}[found]
    return reader(path, tasks)


def guess_kind(path: Path) -> str:
    """From the suffix (``.gz`` aside), else from the first line that is no comment; JSONL of pairs from its content."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if suffixes and suffixes[-1] in _SUFFIXES:
        found = _SUFFIXES[suffixes[-1]]
        return _jsonl_or_pairs(next(filter(str.strip, read_text(path).split("\n")), "")) if found == "jsonl" else found
    if suffixes and suffixes[-1] == ".txt":
        return "text"
    text = read_text(path)
    first = next((line for line in text.split("\n") if line.strip() and not line.startswith("# ")), "")
    if first.count("\t") == 9:
        return "conllu"
    try:
        if isinstance(json.loads(first), dict):
            return _jsonl_or_pairs(first)
    except ValueError:
        pass
    return "absynth" if first.strip().startswith(("[", "{")) else "text"


def _jsonl_or_pairs(line: str) -> str:
    try:
        return "pairs" if is_pair(json.loads(line)) else "jsonl"
    except ValueError:
        return "jsonl"

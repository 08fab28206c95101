"""Plain text into documents."""

from __future__ import annotations

import re
from pathlib import Path

from trace_offline.core.errors import EvaluationSetError, UsageError
from trace_offline.evaluation.document import Document, read_text

END_OF_TEXT = "<|endoftext|>"
TEXT_UNITS = ("auto", "mark", "paragraph", "line", "file")


def read_plain_text(path: Path, unit: str = "auto") -> list[Document]:
    """Documents of a text file, stripped, empty ones dropped.

    ``unit``: ``mark`` splits at ``<|endoftext|>``, ``paragraph`` at blank lines, ``line`` at line ends, ``file`` not at
    all; ``auto`` is ``mark`` when the mark occurs, else ``paragraph``. Raises UsageError for another unit,
    EvaluationSetError for an unreadable or empty file.
    """
    if unit not in TEXT_UNITS:
        raise UsageError(f'text unit: expected one of {", ".join(TEXT_UNITS)}; found "{unit}".')
    text = read_text(path).replace("\r\n", "\n")
    if unit == "auto":
        unit = "mark" if END_OF_TEXT in text else "paragraph"
    if unit == "mark":
        parts = text.split(END_OF_TEXT)
    elif unit == "paragraph":
        parts = re.split(r"\n[^\S\n]*(?:\n[^\S\n]*)+", text)
    elif unit == "line":
        parts = text.split("\n")
    else:
        parts = [text]
    kept = [part.strip() for part in parts]
    documents = [Document(part, f"{path}, text {index}") for index, part in enumerate(filter(None, kept), start=1)]
    if not documents:
        raise EvaluationSetError(f"{path}: contains no text.")
    return documents

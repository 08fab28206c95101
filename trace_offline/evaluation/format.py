"""The evaluation-set folder on disk: how it is written, read and hashed.

``batches.safetensors``: ``input_ids [N, T]``, ``attention_mask [N, T]``, optionally ``labels [N, T]``, ``example [N]``
(the number annotations refer to a row by; default the row's own number), ``group [N]``, ``split [N]``,
``alternatives [A, 3]`` (row, position, another token that could stand there), ``pair [N]`` and ``variant [N]`` (module
``pairs``).
``annotations.parquet``: ``example, task, start, end, label``; token positions, end exclusive.
``training_text.safetensors``, optionally: what a training text says about the rows (module ``training_text``).
``tokenizer.json``, optionally: to read tokens as text (module ``origin``).
``evaluation_set.json``: everything else. Format version 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trace_offline.core.errors import EvaluationSetError
from trace_offline.core.hashing import canonical_json
from trace_offline.evaluation import validate
from trace_offline.evaluation.annotations import ANNOTATIONS, BATCHES, Alternatives, Annotations
from trace_offline.evaluation.origin import TOKENIZER
from trace_offline.evaluation.pairs import Pairs, check_pairs
from trace_offline.evaluation.training_text import TRAINING_TEXT, TrainingText

FORMAT = "trace-offline evaluation set"
FORMAT_VERSION = 1
DESCRIPTION = "evaluation_set.json"

_CHUNK = 1 << 20
"""Tokens looked at together while checking and hashing, so that memory does not grow with the set."""

_TEXTS = 1 << 16
"""Labels hashed together."""


@dataclass(frozen=True)
class Description:
    """What ``evaluation_set.json`` says besides counts; the first block changes numbers and is part of the hash."""

    objective: str = "causal_lm"
    labels_shifted: bool = True
    alignment: str = "last"
    special_token_ids: tuple[int, ...] = ()
    multi_label: tuple[str, ...] = ()
    corpus: dict[str, Any] | None = None

    name: str = "evaluation"
    tokenizer_hash: str | None = None
    tokenizer: str | None = None
    source: str = ""
    licence: str = ""
    summary: dict[str, Any] = field(default_factory=dict)

    def meaning(self) -> dict[str, Any]:
        """The part that changes numbers."""
        return {
            "objective": self.objective,
            "labels_shifted": self.labels_shifted,
            "alignment": self.alignment,
            "special_token_ids": sorted(self.special_token_ids),
            **({"multi_label": sorted(self.multi_label)} if self.multi_label else {}),
            **({"corpus": self.corpus} if self.corpus is not None else {}),
        }


@dataclass(frozen=True)
class Contents:
    """All arrays of a set in memory, before it is written."""

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.integer]
    annotations: Annotations
    labels: npt.NDArray[np.int64] | None = None
    group: npt.NDArray[np.int64] | None = None
    split: npt.NDArray[np.int8] | None = None
    alternatives: Alternatives | None = None
    training_text: TrainingText | None = None
    pairs: Pairs | None = None
    tokenizer: str | None = None


class ContentHash:
    """BLAKE2b over the content in a canonical order; independent of storage types, chunking, name and source."""

    def __init__(self, description: Description, n: int, t: int) -> None:
        self._description = description
        self._shape = (n, t)
        self._tensors: dict[str, hashlib.blake2b] = {}

    def update(self, name: str, values: npt.NDArray[Any]) -> None:
        """Add the next rows of a tensor."""
        state = self._tensors.setdefault(name, hashlib.blake2b(digest_size=16))
        state.update(np.ascontiguousarray(values, dtype="<i8").data)

    def update_training_text(self, training: TrainingText) -> None:
        """Add what the training text says."""
        for name, values in training.tensors().items():
            self.update(f"training_text.{name}", values)

    def update_text(self, name: str, text: str) -> None:
        """Add a text."""
        self.update(name, np.frombuffer(text.encode(), np.uint8))

    def finish(self, annotations: Annotations) -> str:
        """32 hex digits."""
        state = hashlib.blake2b(digest_size=16)
        tensors = {name: tensor.hexdigest() for name, tensor in self._tensors.items()}
        state.update(canonical_json([self._description.meaning(), self._shape, tensors]).encode())
        ordered = annotations.ordered()
        for numbers in (ordered.row, ordered.start, ordered.end):
            state.update(np.ascontiguousarray(numbers, dtype="<i8").data)
        for texts in (ordered.task, ordered.label):
            _update_texts(state, texts)
        return state.hexdigest()


def _update_texts(state: hashlib.blake2b, texts: npt.NDArray[np.object_]) -> None:
    """The bytes of ``canonical_json`` of the list, in pieces: the text of millions of annotations is never whole."""
    state.update(b"[")
    for start in range(0, len(texts), _TEXTS):
        piece = canonical_json(texts[start : start + _TEXTS].tolist())[1:-1]
        state.update((b"," if start else b"") + piece.encode())
    state.update(b"]")


def write(folder: Path, contents: Contents, description: Description) -> str:
    """Check everything, then write the folder: a temporary neighbour first, renamed into place. Returns the hash.

    A folder that already holds exactly this set is left as it is (so that a restarted training script may call again).
    Raises EvaluationSetError for bad content, or when ``folder`` holds anything else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.numpy import save_file

    ordered = contents.annotations.ordered()
    _check(contents, ordered, description, str(folder))
    n, t = contents.input_ids.shape
    group = np.arange(n, dtype=np.int64) if contents.group is None else contents.group
    content_hash = ContentHash(description, n, t)
    tensors: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.ascontiguousarray(contents.input_ids),
        "attention_mask": np.ascontiguousarray(contents.attention_mask.astype(np.uint8)),
        "group": np.ascontiguousarray(group),
    }
    if contents.labels is not None:
        tensors["labels"] = np.ascontiguousarray(contents.labels)
    if contents.split is not None:
        tensors["split"] = np.ascontiguousarray(contents.split)
    if contents.alternatives is not None and len(contents.alternatives):
        tensors["alternatives"] = contents.alternatives.table()
    if contents.pairs is not None:
        tensors["pair"], tensors["variant"] = contents.pairs.pair, contents.pairs.variant
    for name, tensor in tensors.items():
        content_hash.update(name, tensor)
    if contents.tokenizer is not None:
        content_hash.update_text(TOKENIZER, contents.tokenizer)
    training = contents.training_text
    if training is not None:
        content_hash.update_training_text(training)
    found = content_hash.finish(ordered)
    tensors["example"] = np.arange(n, dtype=np.int64)

    if folder.exists() and _already_there(folder, found):
        return found
    tasks, counts = np.unique(ordered.task.astype(str), return_counts=True) if len(ordered) else ((), ())
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": description.name,
        "hash": found,
        "tokenizer_hash": description.tokenizer_hash,
        "tokenizer": description.tokenizer,
        "source": description.source,
        "licence": description.licence,
        **description.meaning(),
        "counts": {
            "examples": n,
            "max_length": t,
            "tokens": int(contents.attention_mask.sum(dtype=np.int64)),
            "annotations": {str(task): int(count) for task, count in zip(tasks, counts, strict=True)},
        }
        | ({} if contents.pairs is None else {"pairs": len(contents.pairs)})
        | ({} if "alternatives" not in tensors else {"alternatives": len(tensors["alternatives"])})
        | ({} if training is None else {"training_texts": training.n_texts, "training_tokens": training.n_tokens}),
        "summary": description.summary,
    }
    table = pa.table(
        {
            "example": pa.array(ordered.row, pa.int64()),
            "task": pa.array(ordered.task.tolist(), pa.string()),
            "start": pa.array(ordered.start, pa.int64()),
            "end": pa.array(ordered.end, pa.int64()),
            "label": pa.array(ordered.label.tolist(), pa.string()),
        }
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir()
        save_file(tensors, temporary / BATCHES, metadata={"format": "pt"})
        if training is not None:
            save_file(training.tensors(), temporary / TRAINING_TEXT)
        if contents.tokenizer is not None:
            (temporary / TOKENIZER).write_text(contents.tokenizer, encoding="utf-8", newline="")
        pq.write_table(table, temporary / ANNOTATIONS, compression="zstd")
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        (temporary / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        os.rename(temporary, folder)
    except OSError as error:
        raise EvaluationSetError(f"{folder}: the evaluation set cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def _check(contents: Contents, annotations: Annotations, description: Description, where: str) -> None:
    ids, mask, labels = contents.input_ids, contents.attention_mask, contents.labels
    if ids.ndim != 2 or not ids.size:
        raise EvaluationSetError(f"{where}: input_ids must be [rows, positions] and not empty; found {ids.shape}.")
    for name, other in (("attention_mask", mask), ("labels", labels)):
        if other is not None and other.shape != ids.shape:
            raise EvaluationSetError(
                f"{where}: {name} must have the shape of input_ids {ids.shape}; its shape is {other.shape}."
            )
    n, t = ids.shape
    validate.check_meaning(
        description.objective, description.labels_shifted, description.alignment, labels is not None, where
    )
    validate.check_rows(ids, mask, labels, where)
    validate.check_row_numbers(n, contents.group, contents.split, where)
    validate.check_spans(annotations, n, t, where, description.multi_label)
    validate.check_spans_attended(
        annotations.row,
        annotations.start,
        annotations.end,
        ids,
        mask,
        description.special_token_ids,
        where,
        labels=None if description.labels_shifted else labels,
    )
    if contents.alternatives is not None:
        own = None if description.labels_shifted else labels
        validate.check_alternatives(contents.alternatives, ids, mask, own, where)
    if contents.pairs is not None:
        check_pairs(contents.pairs.pair, contents.pairs.variant, n, contents.split, annotations, where)
    if contents.training_text is not None and description.objective != "causal_lm":
        raise EvaluationSetError(
            f"{where}: a training text can be compared with a set of the objective causal_lm only; this one is "
            f"{description.objective}."
        )


def _already_there(folder: Path, content_hash: str) -> bool:
    """True if ``folder`` is this very set; an empty folder is removed; anything else is refused."""
    if not folder.is_dir():
        raise EvaluationSetError(f"{folder}: a file of this name is in the way; choose another folder.")
    if not any(folder.iterdir()):
        folder.rmdir()
        return False
    if (folder / DESCRIPTION).is_file():
        there = read_description(folder)[1].get("hash")
        if there == content_hash:
            return True
        raise EvaluationSetError(
            f"{folder}: a different evaluation set is already there (hash {there}; the new one has {content_hash}). "
            "An evaluation set stays the same for all checkpoints of a run, so it is never overwritten; choose another "
            "folder or delete the old one."
        )
    raise EvaluationSetError(f"{folder}: the folder exists and holds something else; choose another folder.")


def read_description(folder: Path) -> tuple[Description, dict[str, Any]]:
    """``evaluation_set.json`` as a Description and as the raw document.

    Raises EvaluationSetError when the folder is missing, is no evaluation set, or comes from a newer version.
    """
    path = folder / DESCRIPTION
    if not folder.exists():
        raise EvaluationSetError(
            f"{folder}: there is no such evaluation set. Build one with: trace-offline evaluation-set build {folder} "
            "--from FILE --tokenizer CHECKPOINT"
        )
    if not path.is_file():
        raise EvaluationSetError(
            f"{folder}: not an evaluation set (expected a folder with {BATCHES}, {ANNOTATIONS} and {DESCRIPTION}). "
            "Build one with: trace-offline evaluation-set build"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationSetError(f"{path}: cannot be read as JSON ({error}). Build the evaluation set anew.") from error
    if not isinstance(document, dict) or "format_version" not in document:
        raise EvaluationSetError(f"{path}: has no format_version, so it does not describe an evaluation set.")
    version = document["format_version"]
    if not isinstance(version, int) or version < 1:
        raise EvaluationSetError(f"{path}: format_version must be a whole number from 1; found {version!r}.")
    if version > FORMAT_VERSION:
        raise EvaluationSetError(
            f"{path}: format_version {version} is newer than this version of trace-offline can read "
            f"({FORMAT_VERSION}). Update trace-offline."
        )
    return _description(document, path), document


def _description(document: dict[str, Any], path: Path) -> Description:
    def get(key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = document.get(key, default)
        if not isinstance(value, kind):
            raise EvaluationSetError(f"{path}: {key} has the wrong type: {value!r}.")
        return value

    special = get("special_token_ids", list, [])
    if not all(type(token) is int and token >= 0 for token in special):
        raise EvaluationSetError(f"{path}: special_token_ids must be a list of token ids; found {special!r}.")
    return Description(
        objective=get("objective", str, "causal_lm"),
        labels_shifted=get("labels_shifted", bool, True),
        alignment=get("alignment", str, "last"),
        special_token_ids=tuple(sorted(special)),
        multi_label=tuple(str(task) for task in get("multi_label", list, [])),
        corpus=get("corpus", (dict, type(None)), None),
        name=get("name", str, path.parent.name),
        tokenizer_hash=get("tokenizer_hash", (str, type(None)), None),
        tokenizer=get("tokenizer", (str, type(None)), None),
        source=get("source", str, ""),
        licence=get("licence", str, ""),
        summary=get("summary", dict, {}),
    )


def open_batches(folder: Path) -> Any:
    """The opened ``batches.safetensors`` (numpy). Raises EvaluationSetError when missing or damaged."""
    from safetensors import SafetensorError, safe_open

    path = folder / BATCHES
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError as error:
        raise EvaluationSetError(f"{path}: missing. Build the evaluation set anew.") from error
    except (SafetensorError, OSError) as error:
        raise EvaluationSetError(f"{path}: damaged or incomplete ({error}). Build the evaluation set anew.") from error


def row_chunks(n: int, t: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about a million tokens that cover all N rows."""
    step = max(1, _CHUNK // max(1, t))
    for start in range(0, n, step):
        yield start, min(n, start + step)

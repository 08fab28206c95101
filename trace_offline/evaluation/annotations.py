"""``annotations.parquet``: stretches of tokens that carry a label, as columns, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trace_offline.core.errors import EvaluationSetError

if TYPE_CHECKING:
    import pyarrow as pa

ANNOTATIONS = "annotations.parquet"
BATCHES = "batches.safetensors"

_COLUMNS = ("example", "task", "start", "end", "label")
_PIECE = 1 << 16


@dataclass(frozen=True)
class Annotations:
    """M annotations by column: ``row``, ``start``, ``end`` (exclusive) int64; ``task``, ``label`` text."""

    row: npt.NDArray[np.int64]
    task: npt.NDArray[np.object_]
    start: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    label: npt.NDArray[np.object_]

    def __len__(self) -> int:
        return len(self.row)

    def ordered(self) -> Annotations:
        """Sorted by row, start, end, task, label: the order that is written and hashed."""
        order = np.lexsort((ranks(self.label), ranks(self.task), self.end, self.start, self.row))
        if bool((order[1:] > order[:-1]).all()):
            return self  # files are written in this order: no second copy of a large one
        return Annotations(self.row[order], self.task[order], self.start[order], self.end[order], self.label[order])

    def where(self, wanted: npt.NDArray[np.bool_]) -> Annotations:
        """Those for which ``wanted [M]`` is true."""
        return Annotations(
            self.row[wanted], self.task[wanted], self.start[wanted], self.end[wanted], self.label[wanted]
        )

    @classmethod
    def from_tuples(cls, rows: list[tuple[int, str, int, int, str]]) -> Annotations:
        """From ``(row, task, start, end, label)``."""
        row, task, start, end, label = zip(*rows, strict=True) if rows else ((),) * 5
        return cls(
            np.asarray(row, np.int64),
            np.asarray(task, object),
            np.asarray(start, np.int64),
            np.asarray(end, np.int64),
            np.asarray(label, object),
        )


@dataclass(frozen=True)
class Alternatives:
    """Tokens that could stand in the place of others, int64 ``[A]``: the wrong form of a verb, say.

    ``position``: of the token that is there; ``token``: the other one. Ordered by row, then position; one a place.
    """

    row: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def from_tuples(cls, rows: list[tuple[int, int, int]]) -> Alternatives:
        """From ``(row, position, token)`` in any order."""
        return cls.from_table(np.asarray(sorted(rows), np.int64).reshape(-1, 3))

    @classmethod
    def from_table(cls, table: npt.NDArray[np.integer]) -> Alternatives:
        """From ``[A, 3]``."""
        return cls(*np.ascontiguousarray(table.astype(np.int64).T))

    def table(self) -> npt.NDArray[np.int64]:
        """``[A, 3]``: row, position, token."""
        return np.stack([self.row, self.position, self.token], axis=1)


def ranks(texts: npt.NDArray[np.object_]) -> npt.NDArray[np.int32]:
    """Place of each text ``[M]`` among the distinct ones in the order of their characters."""
    place = {text: number for number, text in enumerate(sorted(set(texts.tolist())))}
    return np.fromiter((place[text] for text in texts), np.int32, len(texts))


def read_annotations(folder: Path, example: npt.NDArray[np.int64], task: str | None = None) -> Annotations:
    """Annotations of one task (or all), with ``example`` numbers turned into rows.

    ``example [N]``: the number of each row. Read in pieces, each text of a piece held once however often it occurs: a
    large set has millions of annotations and a handful of labels. Raises EvaluationSetError when the file is missing,
    damaged or refers to an example that is not there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / ANNOTATIONS
    if not path.exists():
        raise EvaluationSetError(f"{path}: missing. Build the evaluation set anew.")
    try:
        # Filtered in numpy: filters, like most of pyarrow, would import pandas, which takes a second.
        with pq.ParquetFile(path) as file:
            missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise EvaluationSetError(
                f"{path}: expected the columns {', '.join(_COLUMNS)}; {', '.join(missing)} not found. Build the "
                "evaluation set anew."
            )
        order = np.argsort(example, kind="stable")
        with pq.ParquetFile(path, read_dictionary=["task", "label"]) as file:
            piece = partial(_piece, path=path, sorted_example=example[order], order=order, task=task)
            parts = [piece(batch) for batch in file.iter_batches(_PIECE, columns=list(_COLUMNS))]
        pa.default_memory_pool().release_unused()  # it would keep the pages of a large file for itself
    except (pa.ArrowException, OSError) as error:
        raise EvaluationSetError(f"{path}: damaged or incomplete ({error}). Build the evaluation set anew.") from error
    if not parts:
        return Annotations.from_tuples([])
    fields = ("row", "task", "start", "end", "label")
    return Annotations(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def _piece(
    batch: pa.RecordBatch,
    path: Path,
    sorted_example: npt.NDArray[np.int64],
    order: npt.NDArray[np.int64],
    task: str | None,
) -> Annotations:
    for name in _COLUMNS:
        if batch.column(name).null_count:
            raise EvaluationSetError(f"{path}: column {name} has {batch.column(name).null_count} missing values.")
    numbers = _integers(batch, "example", path)
    place = np.minimum(np.searchsorted(sorted_example, numbers), len(order) - 1)
    unknown = np.flatnonzero(sorted_example[place] != numbers)
    if len(unknown):
        raise EvaluationSetError(f"{path}: refers to example {numbers[unknown[0]]}, which {BATCHES} does not have.")
    found = Annotations(
        order[place],
        _strings(batch, "task", path),
        _integers(batch, "start", path),
        _integers(batch, "end", path),
        _strings(batch, "label", path),
    )
    return found if task is None else found.where(found.task == task)


def _integers(batch: pa.RecordBatch, name: str, path: Path) -> npt.NDArray[np.int64]:
    import pyarrow as pa

    column = batch.column(name)
    if not pa.types.is_integer(column.type):
        raise EvaluationSetError(f"{path}: column {name} must hold whole numbers, not {column.type}.")
    return np.array(np.from_dlpack(column), dtype=np.int64)


def _strings(batch: pa.RecordBatch, name: str, path: Path) -> npt.NDArray[np.object_]:
    import pyarrow as pa

    column = batch.column(name)
    listed = pa.types.is_dictionary(column.type)
    texts = (column.dictionary if listed else column).to_pylist()
    if not all(isinstance(text, str) for text in texts):
        kind = column.type.value_type if listed else column.type
        raise EvaluationSetError(f"{path}: column {name} must hold text, not {kind}.")
    values = np.empty(len(texts), dtype=object)
    values[:] = texts
    return values[np.from_dlpack(column.indices)] if listed else values

"""``annotations.parquet``: stretches of tokens that carry a label, as columns, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trace_offline.core.errors import EvaluationSetError

if TYPE_CHECKING:
    import pyarrow as pa

ANNOTATIONS = "annotations.parquet"
BATCHES = "batches.safetensors"


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
        order = np.lexsort((self.label.astype(str), self.task.astype(str), self.end, self.start, self.row))
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


def read_annotations(folder: Path, example: npt.NDArray[np.int64], task: str | None = None) -> Annotations:
    """Annotations of one task (or all), with ``example`` numbers turned into rows.

    ``example [N]``: the number of each row. Raises EvaluationSetError when the file is missing, damaged or refers to an
    example that is not there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / ANNOTATIONS
    if not path.exists():
        raise EvaluationSetError(f"{path}: missing. Build the evaluation set anew.")
    try:
        # Read whole and filtered in numpy: filters, like most of pyarrow, would import pandas, which takes a second.
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise EvaluationSetError(f"{path}: damaged or incomplete ({error}). Build the evaluation set anew.") from error
    wanted = ("example", "task", "start", "end", "label")
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise EvaluationSetError(
            f"{path}: expected the columns {', '.join(wanted)}; {', '.join(missing)} not found. Build the evaluation "
            "set anew."
        )
    for name in wanted:
        if table[name].null_count:
            raise EvaluationSetError(f"{path}: column {name} has {table[name].null_count} missing values.")
    numbers = _integers(table, "example", path)
    order = np.argsort(example, kind="stable")
    place = np.minimum(np.searchsorted(example[order], numbers), len(example) - 1)
    row = order[place]
    unknown = np.flatnonzero(example[row] != numbers)
    if len(unknown):
        raise EvaluationSetError(f"{path}: refers to example {numbers[unknown[0]]}, which {BATCHES} does not have.")
    found = Annotations(
        row,
        _strings(table, "task", path),
        _integers(table, "start", path),
        _integers(table, "end", path),
        _strings(table, "label", path),
    )
    return found if task is None else found.where(found.task == task)


def _integers(table: pa.Table, name: str, path: Path) -> npt.NDArray[np.int64]:
    import pyarrow as pa

    if not pa.types.is_integer(table.schema.field(name).type):
        raise EvaluationSetError(f"{path}: column {name} must hold whole numbers, not {table.schema.field(name).type}.")
    return np.array(np.from_dlpack(table[name].combine_chunks()), dtype=np.int64)


def _strings(table: pa.Table, name: str, path: Path) -> npt.NDArray[np.object_]:
    values = np.asarray(table[name].to_pylist(), dtype=object)
    if not all(isinstance(value, str) for value in values):
        raise EvaluationSetError(f"{path}: column {name} must hold text, not {table.schema.field(name).type}.")
    return values

"""Parts of ``batches.safetensors``, read and checked. ``where`` names the file in messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trace_offline.core.errors import EvaluationSetError
from trace_offline.evaluation import validate
from trace_offline.evaluation.annotations import Alternatives, Annotations
from trace_offline.evaluation.pairs import Pairs, check_pairs


def numbers(batches: Any, names: set[str], name: str, n: int, where: str) -> npt.NDArray[np.int64]:
    """``[N]`` whole numbers, or the row numbers when the tensor is absent."""
    if name not in names:
        return np.arange(n, dtype=np.int64)
    values = batches.get_tensor(name)
    if values.shape != (n,) or values.dtype.kind not in "iu":
        raise EvaluationSetError(
            f"{where}: {name} must be whole numbers, one for each of the {n} rows; found {values.dtype} {values.shape}."
        )
    return values.astype(np.int64)


def alternatives(batches: Any, names: set[str], n: int, where: str) -> Alternatives | None:
    """The tokens that could stand in the place of others, or None."""
    if "alternatives" not in names:
        return None
    table = batches.get_tensor("alternatives")
    if table.ndim != 2 or table.shape[1] != 3 or table.dtype.kind not in "iu":
        raise EvaluationSetError(
            f"{where}: alternatives must be whole numbers [A, 3] (row, position, token); found {table.dtype} "
            f"{table.shape}."
        )
    found = Alternatives.from_table(table)
    order = np.lexsort((found.position, found.row))
    if len(found) and (found.row.min() < 0 or found.row.max() >= n or (order != np.arange(len(order))).any()):
        raise EvaluationSetError(f"{where}: alternatives must be ordered by row and position, with rows 0 to {n - 1}.")
    return found


def pairs(
    batches: Any, names: set[str], n: int, split: npt.NDArray[np.int64] | None, annotations: Annotations, where: str
) -> Pairs | None:
    """Which rows are minimal pairs, or None."""
    given = {"pair", "variant"} & names
    if not given:
        return None
    if len(given) == 1:
        raise EvaluationSetError(f"{where}: has {given.pop()} alone; minimal pairs need both pair and variant.")
    return check_pairs(batches.get_tensor("pair"), batches.get_tensor("variant"), n, split, annotations, where)


def rows_of(alternatives: Alternatives, start: int, stop: int) -> Alternatives:
    """Those of some rows."""
    low, high = np.searchsorted(alternatives.row, [start, stop])
    return Alternatives(alternatives.row[low:high], alternatives.position[low:high], alternatives.token[low:high])


def read_rows(
    batches: Any, start: int, stop: int, shape: tuple[int, int], has_labels: bool, where: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """``input_ids``, ``attention_mask`` and ``labels`` (or None) of rows ``start`` to ``stop``, int64."""
    found = []
    for name in ("input_ids", "attention_mask", *(["labels"] if has_labels else [])):
        part = batches.get_slice(name)
        if tuple(part.get_shape()) != shape:
            raise EvaluationSetError(
                f"{where}: {name} must have the shape {list(shape)} of input_ids; found {part.get_shape()}."
            )
        values = part[start:stop]
        if values.dtype.kind not in "iub":
            raise EvaluationSetError(f"{where}: {name} must hold whole numbers; found {values.dtype}.")
        found.append(values.astype(np.int64))
    ids, mask = found[0], found[1]
    labels = found[2] if has_labels else None
    validate.check_rows(ids, mask, labels, where, start)
    return ids, mask, labels

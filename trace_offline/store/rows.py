"""Values → rows: the only place that knows the column order of the long tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from trace_offline.core.hashing import digest
from trace_offline.core.types import Array, Checkpoint, Measurement

_MEASUREMENTS = pa.schema(
    [
        ("analysis", pa.int32()), ("layer", pa.int16()), ("component", pa.string()), ("task", pa.string()),
        ("label", pa.string()), ("metric", pa.string()), ("value", pa.float64()), ("stderr", pa.float64()),
        ("n", pa.int64()), ("reason", pa.string()),
    ]
)  # fmt: skip
_ARRAYS = pa.schema(
    [
        ("analysis", pa.int32()), ("layer", pa.int16()), ("component", pa.string()), ("task", pa.string()),
        ("label", pa.string()), ("name", pa.string()), ("values", pa.list_(pa.float64())),
    ]
)  # fmt: skip


def checkpoint_id(run: str, checkpoint: Checkpoint) -> str:
    """Identity of a place in a series: run, stage and step. Set-aside finds without a step go by their location."""
    place = str(checkpoint.step) if checkpoint.step is not None else checkpoint.location
    if not checkpoint.state.analyzable:
        place = f"{checkpoint.location}\0set aside"
    return digest(run, checkpoint.stage or "", place)


def checkpoint_row(run: str, name: str, checkpoint: Checkpoint) -> list[Any]:
    """One row of ``checkpoints`` in column order."""
    return [
        checkpoint_id(run, checkpoint), run, name, checkpoint.step, checkpoint.tokens_seen, checkpoint.stage,
        checkpoint.epoch, checkpoint.layout, checkpoint.location, checkpoint.revision, checkpoint.state.value,
        checkpoint.reason, checkpoint.fingerprint, checkpoint.size_bytes, checkpoint.duplicate_of,
    ]  # fmt: skip


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def measurement_table(key: int, measurements: Sequence[Measurement]) -> pa.Table:
    """Measurements → Arrow. A value that is not finite becomes NULL with a reason: NaN poisons every aggregate."""
    rows = []
    for item in measurements:
        value, reason = _finite(item.value), item.reason
        if value is None and reason is None:
            reason = "the value is not a finite number" if item.value is not None else "not measured (no reason given)"
        rows.append(
            {
                "analysis": key, "layer": item.layer, "component": item.component, "task": item.task,
                "label": item.label, "metric": item.metric, "value": value,
                "stderr": _finite(item.stderr) if value is not None else None, "n": item.n, "reason": reason,
            }
        )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=_MEASUREMENTS)


def array_table(key: int, arrays: Sequence[Array]) -> pa.Table:
    """Arrays → Arrow; entries that are not finite become NULL."""
    rows = [
        {
            "analysis": key, "layer": item.layer, "component": item.component, "task": item.task, "label": item.label,
            "name": item.name, "values": [_finite(value) for value in item.values],
        }
        for item in arrays
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=_ARRAYS)

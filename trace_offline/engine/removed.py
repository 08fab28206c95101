"""Checkpoints that the training removed after they were read: comparisons still count them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from trace_offline.core.types import Checkpoint, CheckpointState
from trace_offline.store.rows import checkpoint_id

if TYPE_CHECKING:
    from trace_offline.store.writer import Writer

_COLUMNS = (
    "location", "layout", "state", "step", "tokens_seen", "stage", "epoch", "revision", "size_bytes", "duplicate_of",
    "fingerprint",
)  # fmt: skip


def removed_since(writer: Writer, run: str, there: Iterable[Checkpoint]) -> list[Checkpoint]:
    """What the store knows of this run and is not ``there`` any more, as far as it is of the same training.

    A training saves its steps in order. What was saved before a lower step was belongs to a training that has begun
    anew since, or gone back to that lower step.
    """
    rows = writer.read(
        f"select {', '.join(_COLUMNS)} from checkpoints where run = ? and fingerprint is not null "
        "and step is not null and state in ('complete', 'duplicate')",
        [run],
    )
    present = [item for item in there if item.step is not None]
    known = {checkpoint_id(run, item) for item in present}
    earlier = []
    for row in rows:
        values = dict(zip(_COLUMNS, row, strict=True))
        item = Checkpoint(**{**values, "state": CheckpointState(values["state"])})
        if checkpoint_id(run, item) not in known and not os.path.exists(item.location):
            earlier.append(item)
    if not earlier:
        return []
    saved, gone = _saved(writer), {id(item) for item in earlier}
    found: list[Checkpoint] = []
    newest = 0
    for item in in_order([*present, *earlier]):
        at = saved.get(os.path.abspath(item.location))
        if id(item) in gone:
            if at is None or at < newest:
                continue
            found.append(item)
        newest = max(newest, at or 0)
    return found


def in_order(series: Iterable[Checkpoint]) -> list[Checkpoint]:
    """By step; those without one last."""
    return sorted(series, key=lambda item: (item.step is None, item.step or 0))


def _saved(writer: Writer) -> dict[str, int]:
    """Place → when the latest of the files that were read there was written (ns)."""
    saved: dict[str, int] = {}
    for path, mtime in writer.read("select path, max(mtime_ns) from fingerprints where mtime_ns > 0 group by path"):
        place = str(path)
        while place not in ("", os.path.dirname(place)):
            saved[place] = max(saved.get(place, 0), int(mtime))
            place = os.path.dirname(place)
    return saved

"""Imported numbers → store: checkpoints that are only known by name, one analysis for each file and task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from trace_offline.core.errors import UsageError
from trace_offline.core.hashing import canonical_json, digest
from trace_offline.core.types import Checkpoint, CheckpointState, Measurement
from trace_offline.importers.lm_eval import ResultFile, TaskResult, expand, read_results
from trace_offline.store.rows import checkpoint_id, checkpoint_row, measurement_table
from trace_offline.store.writer import Writer

if TYPE_CHECKING:
    import duckdb

LM_EVAL = "lm-eval"


@dataclass
class ImportSummary:
    """How an import ended: files read, analyses (file and task) that are new or were there, steps of each run."""

    store: Path
    files: int = 0
    new: int = 0
    unchanged: int = 0
    numbers: int = 0
    steps: dict[str, list[int]] = field(default_factory=dict)


def import_lm_eval(
    files: Sequence[str | Path] | str | Path, store: str | Path, *, run: str | None = None, step: int | None = None
) -> ImportSummary:
    """Result files of lm-evaluation-harness (or folders of them) → ``history``, as analyzer ``lm-eval``.

    ``run``: name in the store (default: the model's name in the file); ``step``: for a single file that does not say.
    The same numbers twice are a no-op; changed numbers are a new analysis, and the latest word. All files are read
    before anything is written. Raises UsageError for files that are no results, or without step or model.
    """
    given = [files] if isinstance(files, str | Path) else list(files)
    paths = expand(Path(item) for item in given)
    if not paths:
        raise UsageError("import lm-eval: expected at least one result file, found none.")
    if step is not None and len(paths) > 1:
        raise UsageError(f"--step {step}: one step for {len(paths)} files cannot be right; import them one at a time.")
    found = [read_results(path, step=step) for path in paths]
    for item in found:
        if run is None and item.run is None:
            raise UsageError(f"{item.path}: the file does not name its model; name the run with --run.")
    summary = ImportSummary(Path(store), files=len(found))
    with Writer.open(Path(store)) as writer, writer.transaction() as con:
        batch = _Batch(con)
        for item in found:
            name = run or item.run or ""
            new = batch.add(item, name)
            summary.new += new
            summary.unchanged += len(item.tasks) - new
            summary.steps.setdefault(name, []).append(item.step)
        summary.numbers = batch.write()
    summary.steps = {name: sorted(set(steps)) for name, steps in summary.steps.items()}
    return summary


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


class _Batch:
    """The new analyses of all files of an import, written together: a statement for each would be slow."""

    def __init__(self, con: duckdb.DuckDBPyConnection) -> None:
        self._con = con
        found = con.execute("select analysis_id, is_latest from linked where analyzer = ?", [LM_EVAL]).fetchall()
        self._known: dict[str, bool] = dict(found)
        ((self._key, self._sequence),) = con.execute(
            "select coalesce(max(analysis), 0), coalesce(max(sequence), 0) from analyses"
        ).fetchall()
        self._latest: dict[tuple[str, str, str], str] = {}
        self._analyses: dict[str, dict[str, Any]] = {}
        self._planned: list[dict[str, Any]] = []
        self._tables: list[pa.Table] = []

    def add(self, item: ResultFile, run: str) -> int:
        """One file; how many analyses of it are new."""
        place = _checkpoint(self._con, item, run)
        shots = {task.num_fewshot for task in item.tasks}
        sets = {fewshot: _evaluation_set(self._con, item, fewshot) for fewshot in shots}
        return sum(self._add_task(item, task, place, sets[task.num_fewshot]) for task in item.tasks)

    def _add_task(self, item: ResultFile, task: TaskResult, place: str, evaluation: str) -> bool:
        content = canonical_json([_plain(measurement) for measurement in task.measurements])
        params = canonical_json({"limit": item.limit, "num_fewshot": task.num_fewshot})
        stamps = {"lm_eval": item.harness, **({"task_version": task.version} if task.version else {})}
        identity = digest(LM_EVAL, place, evaluation, task.task, params, canonical_json(stamps), content)
        part = (place, evaluation, task.task)
        before, self._latest[part] = self._latest.get(part), identity
        self._sequence += 1
        if identity in self._analyses:
            self._analyses[identity]["sequence"] = self._sequence
            return False
        if identity in self._known:
            if not self._known[identity] or before not in (None, identity):
                # Numbers that were replaced once and come again are the latest word again.
                self._con.execute("update analyses set sequence = ? where analysis_id = ?", [self._sequence, identity])
            return False
        self._key += 1
        common = {
            "analysis_id": identity, "fingerprint": f"imported:{digest(task.task)[:16]}:{digest(content)[:16]}",
            "analyzer": LM_EVAL, "analyzer_version": item.harness, "params": params, "evaluation_set": evaluation,
            "dtype": item.dtype or "unknown", "seed": item.seed,
        }  # fmt: skip
        self._analyses[identity] = {
            "analysis": self._key, **common, "status": "ok", "message": None, "seconds": None, "device": item.device,
            "versions": json.dumps(stamps, sort_keys=True), "sequence": self._sequence, "finished_at": _now(),
        }  # fmt: skip
        self._planned.append({"checkpoint_id": place, **common, "planned_at": _now()})
        self._tables.append(measurement_table(self._key, task.measurements))
        return True

    def write(self) -> int:
        """Insert everything that is new; how many numbers that were."""
        if not self._analyses:
            return 0
        numbers = pa.concat_tables(self._tables)
        _insert(self._con, "analyses", pa.Table.from_pylist(list(self._analyses.values())))
        _insert(self._con, "planned", pa.Table.from_pylist(self._planned))
        _insert(self._con, "measurements", numbers)
        return numbers.num_rows


def _plain(measurement: Measurement) -> list[object]:
    item = measurement
    return [item.metric, item.label, item.value, item.stderr, item.n, item.reason]


def _insert(con: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    con.register("imported_rows", rows)
    con.execute(f"insert into {table} by name select * from imported_rows")
    con.unregister("imported_rows")


def _checkpoint(con: duckdb.DuckDBPyConnection, item: ResultFile, run: str) -> str:
    """The checkpoint the numbers belong to: the one of that step in the run, or a new one known by name only."""
    con.execute(
        "insert or ignore into runs values (?, ?, ?, ?)", [run, f"{LM_EVAL}: {item.model or run}", None, _now()]
    )
    there = con.execute(
        "select checkpoint_id from checkpoints where run = ? and step = ? and state in ('complete', 'duplicate')",
        [run, item.step],
    ).fetchall()
    if len(there) == 1:
        return str(there[0][0])
    fresh = Checkpoint(
        location=f"{item.model or run}@{item.revision or f'step{item.step}'}",
        layout=LM_EVAL,
        state=CheckpointState.COMPLETE,
        step=item.step,
        revision=item.revision,
    )
    con.execute(
        f"insert or ignore into checkpoints values ({', '.join('?' * 15)})",
        checkpoint_row(run, f"step{item.step}", fresh),
    )
    return checkpoint_id(run, fresh)


def _evaluation_set(con: duckdb.DuckDBPyConnection, item: ResultFile, fewshot: int | None) -> str:
    """The row that stands for the harness's own data in one setting; returns its hash."""
    setting = canonical_json({"limit": item.limit, "num_fewshot": fewshot})
    shots = f" {fewshot}-shot" if fewshot is not None else ""
    name = f"{LM_EVAL}{shots}{f', limit {item.limit:g}' if item.limit is not None else ''}"
    key = digest(LM_EVAL, setting)
    con.execute(
        "insert or ignore into evaluation_sets (hash, name, path, n_examples, n_tokens, source) "
        "values (?, ?, ?, ?, ?, ?)",
        [key, name, "", 0, 0, "tasks of lm-evaluation-harness; their sizes are not recorded"],
    )
    return key

"""Imported numbers → store: checkpoints that are only known by name, one analysis for each file and task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from trace_offline.core.errors import UsageError
from trace_offline.core.hashing import canonical_json, digest
from trace_offline.core.types import Checkpoint, CheckpointState, Measurement
from trace_offline.importers.lm_eval import ResultFile, expand, read_results
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
    summary = ImportSummary(Path(store))
    with Writer.open(Path(store)) as writer:
        for item in found:
            name = run or item.run or ""
            with writer.transaction() as con:
                new, numbers = _write(con, item, name)
            summary.files += 1
            summary.new += new
            summary.unchanged += len(item.tasks) - new
            summary.numbers += numbers
            summary.steps.setdefault(name, []).append(item.step)
    summary.steps = {name: sorted(set(steps)) for name, steps in summary.steps.items()}
    return summary


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


def _write(con: duckdb.DuckDBPyConnection, item: ResultFile, run: str) -> tuple[int, int]:
    """One file in the open transaction; how many analyses and numbers are new."""
    place = _checkpoint(con, item, run)
    sets = {fewshot: _evaluation_set(con, item, fewshot) for fewshot in {task.num_fewshot for task in item.tasks}}
    found = con.execute(
        "select analysis_id, is_latest from linked where checkpoint_id = ? and analyzer = ?", [place, LM_EVAL]
    ).fetchall()
    known: dict[str, bool] = dict(found)
    ((key, sequence),) = con.execute(
        "select coalesce(max(analysis), 0), coalesce(max(sequence), 0) from analyses"
    ).fetchall()
    analyses, planned, tables = [], [], []
    for task in item.tasks:
        content = canonical_json([_plain(measurement) for measurement in task.measurements])
        params = canonical_json({"limit": item.limit, "num_fewshot": task.num_fewshot})
        evaluation = sets[task.num_fewshot]
        stamps = {"lm_eval": item.harness, **({"task_version": task.version} if task.version else {})}
        identity = digest(LM_EVAL, place, evaluation, task.task, params, canonical_json(stamps), content)
        sequence += 1
        if identity in known:
            if not known[identity]:  # replaced once, and now the latest word again
                con.execute("update analyses set sequence = ? where analysis_id = ?", [sequence, identity])
            continue
        key += 1
        common = {
            "analysis_id": identity, "fingerprint": f"imported:{digest(task.task)[:16]}:{digest(content)[:16]}",
            "analyzer": LM_EVAL, "analyzer_version": item.harness, "params": params, "evaluation_set": evaluation,
            "dtype": item.dtype or "unknown", "seed": item.seed,
        }  # fmt: skip
        analyses.append(
            {
                "analysis": key, **common, "status": "ok", "message": None, "seconds": None, "device": item.device,
                "versions": json.dumps(stamps, sort_keys=True), "sequence": sequence, "finished_at": _now(),
            }
        )  # fmt: skip
        planned.append({"checkpoint_id": place, **common, "planned_at": _now()})
        tables.append(measurement_table(key, task.measurements))
    if not analyses:
        return 0, 0
    _insert(con, "analyses", pa.Table.from_pylist(analyses))
    _insert(con, "planned", pa.Table.from_pylist(planned))
    numbers = pa.concat_tables(tables)
    _insert(con, "measurements", numbers)
    return len(analyses), numbers.num_rows


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

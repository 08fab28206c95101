"""The stores that bench_store.py measures: runs × steps × layers × metrics, written by the writer itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trace_offline.core.types import AnalysisStatus, Checkpoint, CheckpointState, Measurement, Outcome
from trace_offline.store.rows import checkpoint_id
from trace_offline.store.writer import Writer

RUNS, STEPS, LAYERS = 10, 150, 24
# analyzer → (metrics, tasks, labels per task): 280 numbers for each layer.
SHAPE = {
    "probe": (("macro_f1", "accuracy", "control_accuracy", "selectivity", "nll", "confidence"), ("pos", "role"), 21),
    "intrinsic_dimension": (("twonn", "mle", "pca_participation_ratio", "pca_90"), (None,), 2),
    "hessian": (("eigenvalue", "trace", "residual", "negative_mass"), (None,), 5),
}


def steps_of_a_run() -> list[int]:
    return [0, *(2**i for i in range(10)), *range(1000, (STEPS - 10) * 1000, 1000)]


def layer_rows() -> list[tuple[str, str, str | None, str | None]]:
    """(analyzer, metric, task, label) of the numbers of one layer."""
    rows = []
    for analyzer, (metrics, tasks, labels) in SHAPE.items():
        for metric in metrics:
            for task in tasks:
                rows += [(analyzer, metric, task, None if i == 0 else str(i)) for i in range(labels)]
    return rows[:280]


def identity(fingerprint: str, analyzer: str) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint, "analyzer": analyzer, "analyzer_version": "1", "params": "{}",
        "evaluation_set": "e", "dtype": "float32", "seed": 0,
    }  # fmt: skip


def generate(path: Path, runs: Iterable[int]) -> int:
    """Fill a store through its writer's own transactions; the number of measurements."""
    shape = layer_rows()
    numbers = 0
    with Writer.open(path) as writer:
        writer.register_evaluation_set({"hash": "e", "name": "eval", "path": "", "n_examples": 1, "n_tokens": 1})
        for run in runs:
            rng = np.random.default_rng(run)
            key = run * 3 * (STEPS + 1)
            name = f"run{run}"
            checkpoints = [
                Checkpoint(
                    f"{name}/step{s}", "hf_folder", CheckpointState.COMPLETE, s, s * 2097152, fingerprint=f"{run}-{s}"
                )
                for s in steps_of_a_run()
            ]
            writer.register_run(name, name, "e", {"dtype": "float32", "seed": 0, "model_factory": None, "blocks": None})
            writer.register_checkpoints(name, [(f"step{c.step}", c) for c in checkpoints])
            analyses, planned, chunks = [], [], []
            for checkpoint in checkpoints:
                for analyzer in SHAPE:
                    key += 1
                    rows = [row for row in shape if row[0] == analyzer]
                    count = len(rows) * LAYERS
                    analyses.append((key, f"{key:032x}", checkpoint.fingerprint, analyzer))
                    planned.append((checkpoint_id(name, checkpoint), f"{key:032x}", checkpoint.fingerprint, analyzer))
                    chunks.append(
                        pa.table(
                            {
                                "analysis": pa.array(np.full(count, key, np.int32)),
                                "layer": pa.array(np.repeat(np.arange(LAYERS, dtype=np.int16), len(rows))),
                                "component": pa.array(["residual"] * count),
                                "task": pa.array([row[2] for row in rows] * LAYERS, pa.string()),
                                "label": pa.array([row[3] for row in rows] * LAYERS, pa.string()),
                                "metric": pa.array([row[1] for row in rows] * LAYERS),
                                "value": pa.array(rng.random(count)),
                                "stderr": pa.array(rng.random(count)),
                                "n": pa.array(np.full(count, 1000, np.int64)),
                                "reason": pa.array([None] * count, pa.string()),
                            }
                        )
                    )
                    numbers += count
            with writer.transaction() as con:
                con.register("chunk", pa.concat_tables(chunks))
                con.execute("insert into measurements select * from chunk")
                con.executemany(
                    "insert into analyses values (?, ?, ?, ?, '1', '{}', 'e', 'float32', 0, 'ok', null, 1.0, 'cpu', "
                    f"'{{}}', {run}, now()::timestamp)",
                    analyses,
                )
                con.executemany(
                    "insert into planned values (?, ?, ?, ?, '1', '{}', 'e', 'float32', 0, now()::timestamp)", planned
                )
    return numbers


def outcomes(run: int, step: int, analyzer: str, rows: int | None = None) -> Outcome:
    """Numbers of one analysis of the shape above."""
    rng = np.random.default_rng(step)
    shape = [row for row in layer_rows() if row[0] == analyzer]
    found = tuple(
        Measurement(metric, float(rng.random()), float(rng.random()), 1000, layer, "residual", task, label)
        for layer in range(LAYERS)
        for _, metric, task, label in shape
    )
    key = run * 3 * (STEPS + 1) + 3 * steps_of_a_run().index(step) + list(SHAPE).index(analyzer) + 1
    return Outcome(f"{key:032x}", AnalysisStatus.OK, seconds=1.0, measurements=found[:rows])


def halves_in(folder: Path, runs: int = RUNS) -> list[Path]:
    """Two stores that share the runs, made where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name, part in (("first", range(runs // 2)), ("second", range(runs // 2, runs))):
        path = folder / f"{name}.duckdb"
        if not path.exists():
            fresh = folder / f"{name}.making.duckdb"
            fresh.unlink(missing_ok=True)
            generate(fresh, part)
            fresh.rename(path)
        found.append(path)
    return found

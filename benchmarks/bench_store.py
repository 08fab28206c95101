"""Query times on a store of ten million numbers: 10 runs × 150 steps × 24 layers × 280 metrics.

The queries are read out of README.md, so that what is measured is what the reader is told to type.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from common import median_seconds, result, save, versions

from trace_offline import Store
from trace_offline.core.types import Checkpoint, CheckpointState
from trace_offline.store.rows import checkpoint_id
from trace_offline.store.writer import Writer

RUNS, STEPS, LAYERS = 10, 150, 24
# analyzer → (metrics, tasks, labels per task): 280 numbers for each layer.
SHAPE = {
    "probe": (("macro_f1", "accuracy", "control_accuracy", "selectivity", "nll", "confidence"), ("pos", "role"), 21),
    "intrinsic_dimension": (("twonn", "mle", "pca_participation_ratio", "pca_90"), (None,), 2),
    "hessian": (("eigenvalue", "trace", "residual", "negative_mass"), (None,), 5),
}


def layer_rows() -> list[tuple[str, str, str | None, str | None]]:
    """(analyzer, metric, task, label) of the numbers of one layer."""
    rows = []
    for analyzer, (metrics, tasks, labels) in SHAPE.items():
        for metric in metrics:
            for task in tasks:
                rows += [(analyzer, metric, task, None if i == 0 else str(i)) for i in range(labels)]
    return rows[:280]


def generate(path: Path) -> int:
    """Fill a store through its writer's own transactions; the number of measurements."""
    rng = np.random.default_rng(0)
    shape = layer_rows()
    numbers = 0
    steps = [0, *(2**i for i in range(10)), *range(1000, (STEPS - 10) * 1000, 1000)]
    with Writer.open(path) as writer:
        writer.register_evaluation_set({"hash": "e", "name": "eval", "path": "", "n_examples": 1, "n_tokens": 1})
        key = 0
        for run in range(RUNS):
            name = f"run{run}"
            checkpoints = [
                Checkpoint(
                    f"{name}/step{s}", "hf_folder", CheckpointState.COMPLETE, s, s * 2097152, fingerprint=f"{run}-{s}"
                )
                for s in steps
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


def readme_queries() -> list[str]:
    """The SQL blocks of README.md."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    return [block.split("```", 1)[0].strip() for block in text.split("```sql\n")[1:]]


def main() -> int:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ten_million.duckdb"
        numbers = generate(path)
        store = Store.open(path)
        assert store.scalar("select count(*) from history") == numbers
        for query in readme_queries():
            seconds = median_seconds(lambda query=query: store.sql(query))
            first = " ".join(query.split())
            rows.append(
                result(
                    f"README query: {first[:90]}", seconds, "s", limit=0.3, numbers=numbers,
                    rows=store.sql(query).num_rows, versions=versions("duckdb", "pyarrow"),
                )
            )  # fmt: skip
        rows.append(result("size of the store", path.stat().st_size / 1e6, "MB", numbers=numbers))
    save("store", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

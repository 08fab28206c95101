"""What TRACE's flattened dimension says of the shipped series, beside the dimension of its tokens.

    python benchmarks/bench_flattened_dimension.py            about two minutes on one core
    python benchmarks/bench_flattened_dimension.py --table    the committed result as the table of the documentation

Each number is taken with three seeds, which choose other rows (and tokens): what differs between them is noise. TRACE
takes another batch at every step.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import common
import numpy as np

import trace_offline

DATA = Path(__file__).parents[1] / "data"
STEPS = (0, 64, 256, 1024, 4096)
ROWS = (32, 128, 512)
SEEDS = (0, 1, 2)
LAYER = 4


def measure() -> None:
    found: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows in ROWS:
            for seed in SEEDS:
                store = Path(folder) / f"{rows}-{seed}.duckdb"
                params = {"trace_flattened": True, "trace_flattened_rows": rows, "subsamples": 4}
                trace_offline.analyze(
                    DATA / "tiny_series",
                    DATA / "tiny_evaluation",
                    store,
                    analyzers=["intrinsic_dimension"],
                    params={"intrinsic_dimension": params},
                    steps=",".join(map(str, STEPS)),
                    seed=seed,
                    jobs=1,
                )
                numbers = trace_offline.Store.open(store).sql(
                    "SELECT metric, step, value FROM history WHERE layer = "
                    f"{LAYER} AND metric IN ('twonn', 'trace_flattened_twonn', 'trace_flattened_padding')"
                )
                for row in numbers.to_pylist():
                    name = (
                        f"{row['metric']}, {rows} rows" if row["metric"] == "trace_flattened_twonn" else row["metric"]
                    )
                    found.setdefault((name, row["step"]), []).append(row["value"])
                print(rows, seed, file=sys.stderr, flush=True)
    result = [
        common.result(
            f"tiny_series step {step}, layer {LAYER}: {name}",
            float(np.mean(values)),
            "1" if name == "trace_flattened_padding" else "dimensions",
            sd=float(np.std(values[: len(SEEDS)], ddof=1)),
            estimator=name,
            step=step,
            seeds=len(SEEDS),
            versions=common.versions("torch", "transformers"),
        )
        for (name, step), values in sorted(found.items())
    ]
    common.save("flattened_dimension", result)


def table() -> str:
    """The committed result as Markdown: mean (standard deviation over seeds)."""
    rows = json.loads((common.RESULTS / "flattened_dimension.json").read_text())
    names = [f"trace_flattened_twonn, {n} rows" for n in ROWS] + ["twonn"]
    titles = [f"`trace_flattened_twonn`, {n} rows" for n in ROWS] + ["`twonn`, 2,000 tokens"]
    lines = ["| step | " + " | ".join(titles) + " |", "|---" * (1 + len(names)) + "|"]
    for step in STEPS:
        mine = {row["estimator"]: f"{row['ours']:.1f} ({row['sd']:.1f})" for row in rows if row["step"] == step}
        lines.append(f"| {step} | " + " | ".join(mine[name] for name in names) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--table" in sys.argv[1:]:
        print(table())
    else:
        measure()

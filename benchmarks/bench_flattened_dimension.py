"""What TRACE's flattened dimension says of the shipped series, beside the dimension of its tokens.

    python benchmarks/bench_flattened_dimension.py            about two minutes on one core
    python benchmarks/bench_flattened_dimension.py --table    the committed result as the table of the documentation

Each number is taken with three seeds, which choose other rows (and tokens): what differs between them is noise. TRACE
takes another batch at every step.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import common
import numpy as np
import torch

import trace_offline
from trace_offline.activations.forward import run_pass
from trace_offline.analyzers.base import Context
from trace_offline.analyzers.intrinsic_dimension import IntrinsicDimensionAnalyzer
from trace_offline.checkpoints.loading import load_model
from trace_offline.core.types import Measurement
from trace_offline.evaluation.evaluation_set import EvaluationSet

DATA = Path(__file__).parents[1] / "data"
STEPS = (0, 128, 512, 4096)
ROWS = (32, 128, 512)
SEEDS = (0, 1, 2)
LAYER = 4
WANTED = ("twonn", "trace_flattened_twonn", "trace_flattened_padding")


def measure() -> None:
    torch.set_num_threads(1)
    found: dict[tuple[str, int], list[float]] = {}
    evaluation = EvaluationSet.load(DATA / "tiny_evaluation")
    analyzer = IntrinsicDimensionAnalyzer()
    for checkpoint in trace_offline.discover(DATA / "tiny_series"):
        if checkpoint.step not in STEPS:
            continue
        model = load_model(checkpoint)
        for rows, seed in itertools.product(ROWS, SEEDS):
            params = analyzer.Params(trace_flattened=True, trace_flattened_rows=rows, subsamples=4, gride_to=0)
            context = Context(model, evaluation, params, seed)
            collectors = analyzer.collectors(context)
            failed = run_pass(model, evaluation, collectors)
            assert not failed, failed
            collected = {name: collector.finish() for name, collector in collectors.items()}
            # Only the layer that is shown is measured.
            collected = {name: replace(item, points=item.points[[LAYER]]) for name, item in collected.items()}
            for item in analyzer.measure(Context(model, evaluation, params, seed, collected)):
                if isinstance(item, Measurement) and item.metric in WANTED and item.value is not None:
                    name = f"{item.metric}, {rows} rows" if item.metric == "trace_flattened_twonn" else item.metric
                    found.setdefault((name, checkpoint.step), []).append(item.value)
        print(checkpoint.step, file=sys.stderr, flush=True)
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

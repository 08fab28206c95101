"""The whole job: ``analyze`` with its five default analyzers against a script of peers doing the same five analyses.

    python benchmarks/bench_whole_job.py

The script is ``peer_script.py``: transformers, scikit-learn, scikit-dimension, PyHessian, in one process, the network
on both cores, the rest on the one that is faster for it. Both see the same checkpoints of the shipped series, the same
words, splits, control labels, penalties, points and sequences. Ours is the whole command with two workers, from the
folder to the store, start of Python included; the script's clock starts when Python and its libraries are there.

What the script does not compute: standard errors (twenty subsamples of each dimension alone are most of our time for
dimensions), GRIDE, selectivity, effective rank and negative mass, residuals that say how good an eigenvalue is, a
store that can be asked later. Its eigenvalues are the largest by size and only as good as the power iteration is.
What it does more: nothing.

The parts: ours are the seconds of each analysis in the store, where two workers share two cores (their sum is about
twice the time waited for); the script's are those of one process. The floor of the whole is what our own five analyses
take when nothing is added to them: their seconds over two cores.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "2"

import numpy as np
import torch
from common import result, save, versions
from peer_script import Data, Task, analyze
from threadpoolctl import threadpool_limits

from trace_offline import EvaluationSet, Store
from trace_offline.analyzers._curvature_batch import choose_rows
from trace_offline.analyzers._dimension_points import eligible, sample
from trace_offline.analyzers._probe_data import choose_words, prepare

DATA = Path(__file__).parents[1] / "data"
STEPS = (0, 64, 512, 4096)
THREADS = 2
ROUNDS = 2
FIVE = ("loss", "output", "probe", "intrinsic_dimension", "hessian")
PEER = "transformers + scikit-learn + scikit-dimension + PyHessian"


def data(evaluation: EvaluationSet) -> Data:
    """The evaluation set as arrays, with the choices of the default analyzers at seed 0."""
    batch = evaluation.tokens(0, evaluation.n_examples)
    length = batch.input_ids.shape[1]
    tasks = {}
    _, words = choose_words(evaluation, evaluation.tasks, 20_000, 0)
    for task in words:
        ready = prepare(task, evaluation, 5, True, 0)
        assert ready.control is not None
        row, start, end = ready.words.span.T
        tasks[task.task] = Task(
            row * length + end - 1, row * length + start - 1, ready.label, ready.words.part, ready.control,
            tuple(task.classes[code] for code in ready.kept),
        )  # fmt: skip
    rows, positions = eligible(evaluation)
    keep = sample(len(rows), 2000, np.random.default_rng(0))
    chosen = choose_rows(evaluation, 16, 2048, 0).places
    return Data(
        batch.input_ids, batch.attention_mask, batch.targets, tasks, rows[keep] * length + positions[keep], list(chosen)
    )


def ours(store: Path) -> tuple[float, dict[str, float]]:
    """Seconds of the command, and of each analyzer over all checkpoints."""
    command = [sys.executable, "-m", "trace_offline.cli.main", "analyze", str(DATA / "tiny_series")]
    command += ["--evaluation-set", str(DATA / "tiny_evaluation"), "--store", str(store), "--jobs", str(THREADS)]
    command += ["--steps", ",".join(map(str, STEPS))]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - started
    rows = Store.open(store).sql("select analyzer, status, seconds from analyses").to_pylist()
    assert len(rows) == len(FIVE) * len(STEPS), rows
    assert all(row["status"] == "ok" for row in rows), rows
    return seconds, {name: sum(row["seconds"] for row in rows if row["analyzer"] == name) for name in FIVE}


def main() -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    given = data(EvaluationSet.load(DATA / "tiny_evaluation"))
    folders = [DATA / "tiny_series" / f"step{step}" for step in STEPS]
    mine: list[tuple[float, dict[str, float]]] = []
    theirs: list[tuple[float, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(THREADS):
        for _ in range(ROUNDS):
            mine.append(ours(Path(folder) / f"{len(mine)}.duckdb"))
            started = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                _, parts = analyze(folders, given)
            theirs.append((time.perf_counter() - started, parts))

    def middle(runs: list[tuple[float, dict[str, float]]], *parts: str) -> float:
        return statistics.median(sum(found[part] for part in parts) if parts else whole for whole, found in runs)

    more = {
        "unit": "s",
        "peer_name": PEER,
        "n": len(theirs),
        "threads": THREADS,
        "versions": versions("torch", "transformers", "scikit-learn", "scikit-dimension", "PyHessian", "duckdb"),
    }
    floor = middle(mine, *FIVE) / THREADS
    whole = (middle(mine), middle(theirs))
    cases = [(f"five default analyses of {len(STEPS)} shipped checkpoints, two cores", *whole, floor)]
    cases += [(f"part: {name}", middle(mine, name), middle(theirs, name), None) for name in FIVE]
    cases.append(
        ("part: start, opening, forward pass, store", whole[0] - floor, middle(theirs, "load", "forward"), None)
    )
    rows = [result(case, a, peer=b, ratio=b / a, floor=least, **more) for case, a, b, least in cases]
    save("whole_job", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

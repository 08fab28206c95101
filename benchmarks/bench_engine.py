"""What the engine adds to the mathematics, what a second worker brings, what a larger evaluation set takes in memory.

``five``, ``cheap``, ``larger``: ``analyze`` into a new store (discovery, hashing of the weights, planning,
transactions) against the same functions called in a loop: load, one pass, measure. ``start``: what a process needs
before. ``workers``: whole commands with one worker and with two, beside the same mathematics in two
plain processes that share nothing, which is what the machine can give.
``memory``: the peak of the whole process for an evaluation set and for one ten times as large.

``python benchmarks/bench_engine.py five workers``: only these; the rows of the others stay.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import alternating, load, median_seconds, result, save, versions

from trace_offline import analyze, discover
from trace_offline.checkpoints.discover import select
from trace_offline.core.types import Checkpoint

DATA = Path(__file__).parents[1] / "data"
SERIES, EVALUATION = DATA / "tiny_series", DATA / "tiny_evaluation"
DEFAULT = ("loss", "output", "probe", "intrinsic_dimension", "hessian")
FOUR = DEFAULT[:4]
CHEAP = ("loss", "output", "intrinsic_dimension")
ROUNDS = 2
LIBRARIES = ("torch", "transformers", "duckdb", "joblib")
PARAMS = {"hessian": {"k": 3, "slq_probes": 2, "trace_probes": 4}}
"""A smaller curvature, so that more checkpoints fit into the minutes there are; it makes the engine's share larger."""


def mathematics(checkpoints: Sequence[Checkpoint], folder: Path, names: Sequence[str]) -> int:
    """Load, one pass, measure: no plan, no hashing, no store. The number of results."""
    from trace_offline.checkpoints.loading import ModelCache
    from trace_offline.evaluation.evaluation_set import EvaluationSet

    evaluation = EvaluationSet.load(folder).originals()
    cache = ModelCache()
    return sum(_one(checkpoint, evaluation, names, cache) for checkpoint in checkpoints)


def _one(checkpoint: Checkpoint, evaluation: object, names: Sequence[str], cache: object) -> int:
    from trace_offline.activations.forward import run_pass
    from trace_offline.analyzers.base import Context
    from trace_offline.analyzers.registry import registry
    from trace_offline.checkpoints.loading import load_model

    model = load_model(checkpoint, cache=cache)
    jobs, collectors = [], {}
    for name in names:
        kind = registry().get(name)
        context = Context(model, evaluation, kind.Params(**PARAMS.get(name, {})), 0, step=checkpoint.step)
        jobs.append((name, kind(), context))
        collectors |= {f"{name}/{key}": item for key, item in jobs[-1][1].collectors(context).items()}
    assert run_pass(model, evaluation, collectors) == {}
    found = 0
    for name, analyzer, context in jobs:
        context.collected = {
            key.split("/", 1)[1]: item.finish() for key, item in collectors.items() if key.split("/", 1)[0] == name
        }
        found += len(list(analyzer.measure(context)))
        context.collected = {}
    return found


def engine(source: Path, evaluation: Path, store: Path, names: Sequence[str], steps: str | None) -> None:
    """The same through the engine, in this process, into a new store."""
    store.unlink(missing_ok=True)
    params = {name: PARAMS[name] for name in names if name in PARAMS}
    summary = analyze(source, evaluation, store, analyzers=names, params=params, steps=steps, jobs=1, executor="inline")
    assert summary.ok, summary.problems
    assert summary.exit_code == 0, summary.problems


def pythia_14m(folder: Path, steps: Sequence[int]) -> tuple[Path, Path]:
    """A random GPT-NeoX of 6 blocks, width 128, vocabulary 50,304 at each step, and 16 rows of 64 tokens."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from trace_offline.recording import save_checkpoint, save_evaluation_set

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=2048,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    for step in steps:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        save_checkpoint(model, folder / "pythia_14m", step)
    save_evaluation_set(folder / "tokens", torch.randint(0, 50304, (16, 64)), name="random")
    return folder / "pythia_14m", folder / "tokens"


def compared(name: str, source: Path, evaluation: Path, analyzers: Sequence[str], count: int) -> dict[str, object]:
    """Both ways on the first ``count`` checkpoints, in turn."""
    import torch

    from trace_offline.engine.options import choose_jobs

    torch.set_num_threads(choose_jobs(1, "cpu", 1)[1])
    chosen = discover(str(source))[:count]
    steps = ",".join(str(item.step) for item in chosen)
    with tempfile.TemporaryDirectory() as temporary:
        store = Path(temporary) / "s.duckdb"
        mathematics(chosen[:1], evaluation, analyzers)  # imports, for both
        engine(source, evaluation, store, analyzers, str(chosen[0].step))
        seconds = alternating(
            {
                "engine": lambda: engine(source, evaluation, store, analyzers, steps),
                "mathematics": lambda: mathematics(chosen, evaluation, analyzers),
            },
            repeats=ROUNDS, warmup=0,
        )  # fmt: skip
    ours, theirs = (statistics.median(seconds[which]) for which in ("engine", "mathematics"))
    return result(
        f"engine over the mathematics: {name}", ours, "s", peer=theirs, peer_name="load, pass and analyzers in a loop",
        floor=theirs, ratio=theirs / ours, limit=1.1 * theirs, overhead=ours / theirs - 1, checkpoints=count,
        rounds=ROUNDS, versions=versions(*LIBRARIES),
    )  # fmt: skip


def five() -> list[dict[str, object]]:
    name = "five analyzers, 3 checkpoints of the shipped series"
    return [compared(name, SERIES, EVALUATION, DEFAULT, 3)]


def cheap() -> list[dict[str, object]]:
    name = "loss, output and dimension, 14 checkpoints of the shipped series"
    return [compared(name, SERIES, EVALUATION, CHEAP, 14)]


def larger() -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as temporary:
        places = pythia_14m(Path(temporary), range(8))
        name = "loss and dimension, 8 checkpoints of 14 million parameters"
        return [compared(name, *places, (CHEAP[0], CHEAP[2]), 8)]


def start() -> list[dict[str, object]]:
    imports = [sys.executable, "-c", "import trace_offline.engine.worker, torch, transformers.models.gpt_neox"]
    seconds = median_seconds(lambda: subprocess.run(imports, check=True), repeats=3)
    return [result("start of a process and its imports, once a command", seconds, "s", versions=versions(*LIBRARIES))]


def twice(folder: Path) -> Path:
    """The shipped series, and once more with a little noise on the weights, as later steps."""
    import torch
    from safetensors.torch import load_file, save_file

    for item in discover(str(SERIES)):
        place = Path(item.location)
        shutil.copytree(place, folder / "twice" / place.name)
        step = 10_000 + (item.step or 0)
        later = folder / "twice" / f"step{step}"
        shutil.copytree(place, later)
        (later / "trace_offline.json").write_text(json.dumps({"format_version": 1, "step": step}))
        generator = torch.Generator().manual_seed(item.step or 0)
        weights = load_file(later / "model.safetensors")
        noisy = {name: each + 1e-3 * torch.randn(each.shape, generator=generator) for name, each in weights.items()}
        save_file(noisy, later / "model.safetensors", metadata={"format": "pt"})
    return folder / "twice"


def command(series: Path, jobs: int, store: Path) -> None:
    """The whole command, with one thread a worker."""
    store.unlink(missing_ok=True)
    words = ["analyze", series, "--evaluation-set", EVALUATION, "--store", store, "--jobs", jobs]
    for name in FOUR:
        words += ["--analyzer", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "trace_offline.cli.main", *map(str, words)], check=True, capture_output=True,
        env=environment,
    )  # fmt: skip


def plain(series: Path, processes: int) -> None:
    """The mathematics alone in so many processes at once, the series dealt out among them, one thread each."""
    code = "import sys, bench_engine; bench_engine.share(*sys.argv[1:])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(series), str(index), str(processes)], env=environment)
        for index in range(processes)
    ]
    for process in running:
        assert process.wait() == 0


def share(series: str, index: str, count: str) -> None:
    """What one of ``count`` plain processes does."""
    import torch

    torch.set_num_threads(1)
    mathematics(discover(series)[int(index) :: int(count)], EVALUATION, FOUR)


def workers() -> list[dict[str, object]]:
    """The floor is what this machine gives two plain processes that share nothing and keep nothing."""
    with tempfile.TemporaryDirectory() as temporary:
        store, series = Path(temporary) / "s.duckdb", twice(Path(temporary))
        bodies = {
            "two": lambda: command(series, 2, store), "one": lambda: command(series, 1, store),
            "plain two": lambda: plain(series, 2),
        }  # fmt: skip
        seconds = alternating(bodies, repeats=1, warmup=0)
        two, one, both = (statistics.median(seconds[which]) for which in bodies)
        count = len(select(discover(str(series))))
    assert count == 2 * len(discover(str(SERIES)))
    return [
        result(
            f"two workers: {len(FOUR)} analyzers on {count} checkpoints (the shipped series twice), whole command", two,
            "s", peer=one, peer_name="one worker", floor=both, ratio=one / two, limit=one / 1.7, rounds=1,
            versions=versions(*LIBRARIES),
        )
    ]  # fmt: skip


PEAK = """
import importlib, re, runpy, sys
name, sys.argv = sys.argv[1], sys.argv[1:]
try:
    if len(sys.argv) > 1:
        runpy.run_module(name, run_name="__main__")
    else:
        importlib.import_module(name)
except SystemExit as end:
    assert not end.code, end.code
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
"""
"""Runs a module, or imports it when there are no words for it, and says what the process held at most. Not
``ru_maxrss``: that begins with what the parent holds."""


def peak_megabytes(module: str, *words: object) -> float:
    """The most memory a module held, with all its libraries (Linux)."""
    command = [sys.executable, "-c", PEAK, module, *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stderr.rsplit("peak ", 1)[1]) * 1024 / 1e6


SENTENCES, WORDS = 3_000, 4_000
"""Enough for every sample to be full: the probe's words of each task (fewer than usual), the dimension's tokens."""


def annotated(folder: Path, sentences: int) -> Path:
    """Sentences of the shipped grammar with their two tasks, in the shipped tokenizer."""
    from trace_offline.corpus import generate_to_file
    from trace_offline.evaluation.build import build_evaluation_set

    text, out = folder / f"{sentences}.jsonl", folder / f"set_{sentences}"
    generate_to_file(text, sentences, 1)
    build_evaluation_set(out, [text], tokenizer=discover(str(SERIES))[0].location)
    return out


def memory() -> list[dict[str, object]]:
    """The smaller set fills every sample that the analyzers draw; what grows after that is the engine's own."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        small, large = (annotated(place, count) for count in (SENTENCES, 10 * SENTENCES))
        bare = peak_megabytes("transformers.models.gpt_neox.modeling_gpt_neox")
        step = discover(str(SERIES))[-1].step
        peaks: dict[Path, list[float]] = {large: [], small: []}
        for _ in range(1):
            for folder, found in peaks.items():
                store = place / "m.duckdb"
                store.unlink(missing_ok=True)
                words = ["trace_offline.cli.main", "analyze", SERIES, "--evaluation-set", folder]
                words += ["--set", f"probe.max_words={WORDS}", "--steps", step, "--jobs", 1, "--store", store]
                found.append(peak_megabytes(*words))
        ours, theirs = (statistics.median(found) for found in peaks.values())
    return [
        result(
            f"peak memory of five analyzers, {10 * SENTENCES:,} annotated sentences", ours, "MB", peer=theirs,
            peer_name=f"{SENTENCES:,} sentences", floor=bare, ratio=theirs / ours, limit=1.1 * theirs, rounds=1,
            versions=versions(*LIBRARIES),
        )
    ]  # fmt: skip


CASES = {"five": five, "cheap": cheap, "larger": larger, "start": start, "workers": workers, "memory": memory}


def main() -> int:
    for name in sys.argv[1:] or list(CASES):
        rows = [{**row, "part": name} for row in CASES[name]()]
        save("engine", [row for row in load("engine") if row["part"] != name] + rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The cost model of docs/scale.md against measurement: 154 checkpoints of a 14 million parameter GPT-NeoX.

Random weights at the steps of Pythia, float16 files, one thread a worker. The rates of the machine (matrix products,
softmax, hashing, …) are measured on their own; the model turns them and the sizes into seconds for each component, and
these are compared with the components themselves, timed one by one, and with whole runs.

``python benchmarks/bench_scale.py [components] [whole] [hessian] [predict] [--folder F]``: only these parts; with a
folder the files are kept there and a part that was interrupted can be begun again. ``--table`` prints the tables of
docs/scale.md. ``predict`` writes what the model says of the Pythia suite: theory, from data sheets.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import scale_model as model
from common import load, median_seconds, result, save, versions
from scale_tables import prediction_tables, saturation_table, table

LIBRARIES = ("torch", "transformers", "duckdb")
SMALL = model.Network("14m", 6, 128, 50304)
PLAN = model.Plan(rows=32, positions=32, points=1024, words=1024, classes=17)
ANALYZERS = ("loss", "output", "intrinsic_dimension", "probe")
CURVATURE = {"k": 3, "slq_probes": 2, "slq_steps": 5, "trace_probes": 4, "max_sequences": 4}
PARAMS = {"intrinsic_dimension": {"max_samples": PLAN.points}}
WORKERS = 2
PIECES = 2
"""The whole run is made in so many pieces, each of a few minutes."""


def make_series(folder: Path, steps: tuple[int, ...] = model.PYTHIA_STEPS) -> tuple[Path, Path]:
    """Checkpoints whose weights change with the step, and 32 rows of 32 tokens with a class for each token."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from trace_offline.recording import save_checkpoint, save_evaluation_set

    series, texts = folder / "14m", folder / "texts"
    if not texts.exists():
        ids = np.random.default_rng(0).integers(0, SMALL.vocabulary, (PLAN.rows, PLAN.positions))
        labels = [
            (row, "kind", at, at + 1, f"k{ids[row, at] % PLAN.classes:02d}")
            for row in range(PLAN.rows)
            for at in range(PLAN.positions)
        ]
        save_evaluation_set(texts, ids, annotations=labels, name="random tokens")
    config = GPTNeoXConfig(
        vocab_size=SMALL.vocabulary, hidden_size=SMALL.width, num_hidden_layers=SMALL.layers, num_attention_heads=4,
        intermediate_size=4 * SMALL.width, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    network = GPTNeoXForCausalLM(config).half()
    assert sum(p.numel() for p in network.parameters()) == SMALL.parameters
    start = {name: each.clone() for name, each in network.state_dict().items()}
    for step in steps:
        if not (series / f"step{step}").exists():
            noise = torch.Generator().manual_seed(step)
            moved = 0.02 * step / (step + 2000)
            network.load_state_dict({
                name: each + (moved * torch.randn(each.shape, generator=noise)).half() for name, each in start.items()
            })  # fmt: skip
            save_checkpoint(network, series, step)
    return series, texts


def rates(folder: Path) -> model.Machine:
    """What this machine does in a second, each thing by itself and at the sizes that occur; writing left out."""
    import torch

    rows, width = PLAN.tokens, SMALL.width
    states, weights = torch.randn(rows, width), torch.randn(width, 4 * width)
    head = torch.randn(width, 8192)
    flops = 2 * rows * width * (4 * width + 8192)
    product = median_seconds(lambda: (states @ weights, states @ head), 9)
    logits = torch.randn(rows, 8192)
    passes = median_seconds(lambda: logits.exp(), 9)
    copied = median_seconds(lambda: logits.clone(), 9)
    small = torch.zeros(4, 4)
    calls = median_seconds(lambda: [small + small for _ in range(1000)], 9) / 1000
    content = np.random.default_rng(0).bytes(32 << 20)
    file = folder / "rate.bin"
    file.write_bytes(content)
    read = median_seconds(file.read_bytes)
    hashed = median_seconds(lambda: hashlib.blake2b(content, digest_size=16).digest(), 3)
    file.unlink()
    count = logits.numel()
    return model.Machine(
        "this machine, one thread", flops / product, count / passes, 8 * count / copied, len(content) / read,
        len(content) / hashed, calls, 0.0, 0.0,
    )  # fmt: skip


def writing() -> tuple[float, float]:
    """Seconds of one analysis in a store of ten million numbers, and of each number in it; by bench_store."""
    rows = sorted((row["rows"], row["ours"]) for row in load("store") if row["case"].startswith("append one analysis"))
    if len(rows) < 2:
        raise SystemExit("bench_scale: what writing costs comes from bench_store; run python benchmarks/bench_store.py")
    (few, short), (many, long) = rows[0], rows[-1]
    number = (long - short) / (many - few)
    return short - few * number, number


class Timed:
    """A collector whose time is taken."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seconds = inner, 0.0
        self.needs_hidden, self.needs_logits = inner.needs_hidden, inner.needs_logits

    def update(self, batch: Any) -> None:
        """Hand on."""
        started = time.perf_counter()
        self.inner.update(batch)
        self.seconds += time.perf_counter() - started


class Listener:
    """Asks for everything and keeps nothing."""

    needs_hidden = needs_logits = True

    def update(self, batch: Any) -> None:
        """Nothing."""


def timed(body: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    found = body()
    return found, time.perf_counter() - started


def measure_components(series: Path, texts: Path, count: int) -> Iterator[dict[str, float]]:
    """Seconds of each component on ``count`` checkpoints spread over the series."""
    from trace_offline import discover
    from trace_offline.activations.forward import run_pass
    from trace_offline.analyzers.base import Context
    from trace_offline.analyzers.registry import registry
    from trace_offline.checkpoints.fingerprint import fingerprint
    from trace_offline.checkpoints.loading import ModelCache, load_model
    from trace_offline.evaluation.evaluation_set import EvaluationSet

    evaluation = EvaluationSet.load(texts).originals()
    cache = ModelCache()
    found = discover(str(series))
    for checkpoint in found[:: max(1, len(found) // count)][:count]:
        seconds = {"hash": timed(lambda c=checkpoint: fingerprint(c, None))[1]}
        view, seconds["load"] = timed(lambda c=checkpoint: load_model(c, cache=cache))
        seconds["pass"] = timed(lambda v=view: run_pass(v, evaluation, {"all": Listener()}))[1]
        for name in ANALYZERS:
            kind = registry().get(name)
            context = Context(view, evaluation, kind.Params(**PARAMS.get(name, {})), 0, step=checkpoint.step)
            analyzer = kind()
            collectors = {key: Timed(each) for key, each in analyzer.collectors(context).items()}
            assert run_pass(view, evaluation, collectors) == {}
            context.collected = {key: each.inner.finish() for key, each in collectors.items()}
            _, spent = timed(lambda a=analyzer, c=context: list(a.measure(c)))
            seconds[name] = spent + sum(each.seconds for each in collectors.values())
        del view, context
        yield seconds


def components(series: Path, texts: Path) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(1)
    machine = rates(series.parent)
    taken = list(measure_components(series, texts, 9))[1:]  # the first imports
    work = model.checkpoint_work(SMALL, PLAN)
    # every analyzer took its own log-softmax here; in a run it is shared, and counted with the loss
    work["output"] += model.softmax_work(SMALL, PLAN)
    rows = []
    for name in ("hash", "load", "pass", *ANALYZERS):
        rows.append(
            compared(f"14m, one checkpoint: {name}", [each[name] for each in taken], machine.seconds(work[name]))
        )
    rows[0]["rates"] = {key: value for key, value in asdict(machine).items() if key != "name"}
    return rows


def compared(case: str, taken: list[float], predicted: float, **more: Any) -> dict[str, Any]:
    measured = statistics.median(taken)
    return result(
        case, measured, "s", peer=predicted, peer_name="the cost model", ratio=predicted / measured,
        checkpoints=len(taken), versions=versions(*LIBRARIES), **more,
    )  # fmt: skip


def whole(series: Path, texts: Path) -> list[dict[str, Any]]:
    """All 154 through the engine with two workers, in pieces; each piece into a store of its own."""
    from trace_offline import Store, analyze, discover
    from trace_offline.store.merge import merge

    steps = [item.step for item in discover(str(series))]
    pieces = [steps[start::PIECES] for start in range(PIECES)]
    stores = []
    for number, piece in enumerate(pieces):
        mark = series.parent / f"piece{number}.seconds"
        store = series.parent / f"piece{number}.duckdb"
        stores.append(store)
        if mark.exists():
            continue
        store.unlink(missing_ok=True)
        started = time.perf_counter()
        summary = analyze(
            series, texts, store, analyzers=ANALYZERS, params=PARAMS, steps=",".join(map(str, piece)), jobs=WORKERS
        )
        assert summary.exit_code == 0, summary.problems
        mark.write_text(repr(time.perf_counter() - started))
    seconds = sum(float((series.parent / f"piece{n}.seconds").read_text()) for n in range(PIECES))
    target = series.parent / "whole.duckdb"
    target.unlink(missing_ok=True)
    merge(stores, target)
    kept = Store.open(target)
    numbers = {
        analyzer: (whole_network / len(steps), per_layer / len(steps) / (SMALL.layers + 1))
        for analyzer, whole_network, per_layer in zip(
            *(
                column.to_pylist()
                for column in kept.sql(
                    "select analyzer, count(*) filter (where layer is null), count(*) filter (where layer is not null) "
                    "from history where is_latest group by analyzer order by analyzer"
                ).columns
            ),
            strict=True,
        )
    }
    machine = machine_of_results()
    work = model.checkpoint_work(SMALL, PLAN)
    one = sum(machine.seconds(work[name]) for name in ("hash", "load", "pass", *ANALYZERS))
    count = sum(a + b * (SMALL.layers + 1) for a, b in numbers.values())
    stored = machine.seconds(model.Work(analyses=len(ANALYZERS), numbers=count))
    start = next(row["ours"] for row in load("engine") if row["case"].startswith("start of a process"))
    # the writer works beside the workers, on the same two cores
    predicted = len(steps) * (one + stored) / WORKERS + PIECES * start
    row = compared(f"14m, whole run: {len(steps)} checkpoints, two workers", [seconds], predicted)
    row |= {"checkpoints": len(steps), "numbers": numbers, "bytes": len(steps) * 2 * SMALL.parameters}
    return [row]


def machine_of_results() -> model.Machine:
    """The rates measured with the components, and those of writing."""
    found = dict(next(row["rates"] for row in load("scale") if "rates" in row))
    found["analysis"], found["number"] = writing()
    return model.Machine("this machine, one thread", **found)


def hessian(series: Path, texts: Path) -> list[dict[str, Any]]:
    """A small curvature analysis on a few checkpoints, in seconds a product."""
    import torch

    from trace_offline import discover
    from trace_offline.analyzers.base import Context
    from trace_offline.analyzers.registry import registry
    from trace_offline.checkpoints.loading import load_model
    from trace_offline.evaluation.evaluation_set import EvaluationSet

    torch.set_num_threads(1)
    evaluation = EvaluationSet.load(texts).originals()
    kind = registry().get("hessian")
    taken, products = [], []
    found = discover(str(series))
    for checkpoint in (found[0], found[len(found) // 2], found[-1]):
        context = Context(load_model(checkpoint), evaluation, kind.Params(**CURVATURE), 0, step=checkpoint.step)
        numbers, seconds = timed(lambda c=context: list(kind().measure(c)))
        products.append(next(item.value for item in numbers if getattr(item, "metric", "") == "products"))
        taken.append(seconds / products[-1])
        del context
    small = model.Plan(
        rows=PLAN.rows, positions=PLAN.positions, hessian_rows=CURVATURE["max_sequences"], eigen_products=30,
        slq_probes=CURVATURE["slq_probes"], slq_steps=CURVATURE["slq_steps"], trace_probes=CURVATURE["trace_probes"],
    )  # fmt: skip
    machine = machine_of_results()
    each = machine.seconds(model.product_work(SMALL, small))
    each += machine.seconds(model.orthogonalisation(SMALL, small)) / small.products
    return [compared("14m, one Hessian-vector product", taken, each, products=products, tokens=small.curvature_tokens)]


HOST_GB = 1000.0
NODES = {"one GPU": 1, "eight GPUs": 8, "64 GPUs": 64}
LINK = 1.25e9
"""Bytes a second from where the checkpoints are: 10 Gbit/s, shared by all."""


def predict() -> list[dict[str, Any]]:
    """The Pythia suite by the model: theory."""
    measured = next((row["numbers"] for row in load("scale") if "numbers" in row), {})
    numbers = {name: tuple(each) for name, each in measured.items()}
    # without a whole run and a store measured, what writing costs is left out
    machine = model.h100(*(writing() if numbers else (0.0, 0.0)))
    plan = model.Plan()
    rows = []
    for network in model.PYTHIA:
        found = model.predict(network, plan, machine, numbers, HOST_GB)
        row = result(
            f"Pythia {network.name}", found.seconds, "s (theory)", versions=versions("duckdb"), theory=True,
            **{key: value for key, value in asdict(found).items() if key not in ("network", "seconds")},
        )  # fmt: skip
        product = machine.seconds(model.product_work(network, plan))
        row |= {"device": machine.name, "parameters": network.parameters, "tokens": plan.tokens}
        rows.append(row | {"product_seconds": product})
    count = len(model.PYTHIA_STEPS) * model.PYTHIA_COPIES
    for name, gpus in NODES.items():
        compute = count * sum(row["ours"] for row in rows if "parameters" in row) / gpus
        curvature = count * sum(row["seconds_with_hessian"] for row in rows if "parameters" in row) / gpus
        reading = count * sum(row["bytes_read"] for row in rows if "parameters" in row) / LINK
        writes = count * sum(row["write_seconds"] for row in rows if "parameters" in row)
        row = result(
            f"the Pythia suite, 16 × 154 checkpoints, {name}", max(compute, reading, writes), "s (theory)",
            versions=versions("duckdb"), theory=True, compute=compute, with_hessian=curvature, reading=reading,
            writing=writes, gpus=gpus,
        )  # fmt: skip
        rows.append(row | {"device": machine.name})
    return rows


PARTS: Mapping[str, Callable[[Path, Path], list[dict[str, Any]]]] = {
    "components": components, "whole": whole, "hessian": hessian,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "predict", []], help="only these")
    parser.add_argument("--folder", type=Path, help="keep the files here")
    parser.add_argument("--table", action="store_true", help="print the tables of docs/scale.md")
    asked = parser.parse_args()
    if asked.table:
        print(table(), prediction_tables(), saturation_table(), sep="\n\n")
        return 0
    parts = asked.parts or [*PARTS, "predict"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if set(parts) & set(PARTS):
            places = make_series(folder)
        for name in PARTS:
            if name in parts:
                rows = [{**row, "part": name} for row in PARTS[name](*places)]
                save("scale", [row for row in load("scale") if row["part"] != name] + rows)
        if "predict" in parts:
            save("scale_prediction", predict())
    return 0


if __name__ == "__main__":
    sys.exit(main())

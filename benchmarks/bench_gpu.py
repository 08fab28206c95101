"""What a GPU does with checkpoints of Pythia's shapes: 70m, 410m and 1.4b with random weights.

For each shape: checkpoints a minute through the engine, the share of the device's matrix-product rate that the forward
pass reaches, a Hessian-vector product over a gradient, the copy of the weights to the device, and the share of a run in
which the device waits. On a machine without CUDA it says so and measures nothing. ``--device cpu --shape tiny`` goes
the same way in seconds, to prove that it runs; what it prints is no result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scale_model as model
from common import result, save, versions

TINY = model.Network("tiny", 2, 32, 128)
SHAPES = {each.name: each for each in (TINY, *model.PYTHIA)}
DEFAULT = ("70m", "410m", "1.4b")
LIBRARIES = ("torch", "transformers")
ANALYZERS = ("loss", "intrinsic_dimension")
CHECKPOINTS = 3


def make_run(network: model.Network, folder: Path, rows: int, positions: int) -> tuple[Path, Path]:
    """Float16 checkpoints with random weights, and random tokens."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from trace_offline.recording import save_checkpoint, save_evaluation_set

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=network.vocabulary, hidden_size=network.width, num_hidden_layers=network.layers,
        num_attention_heads=max(1, network.width // 64), intermediate_size=4 * network.width,
        max_position_embeddings=max(2048, positions),
    )  # fmt: skip
    network_module = GPTNeoXForCausalLM(config).half()
    for step in range(CHECKPOINTS):
        with torch.no_grad():
            network_module.get_output_embeddings().weight.mul_(1.01)
        save_checkpoint(network_module, folder / "run", step)
    save_evaluation_set(folder / "texts", torch.randint(0, network.vocabulary, (rows, positions)), name="random tokens")
    return folder / "run", folder / "texts"


def seconds_of(body: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Median with the device at rest before and after."""
    import torch

    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times = []
    for _ in range(repeats + 1):
        wait()
        started = time.perf_counter()
        body()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def product_rate(device: str, size: int) -> float:
    """Float32 FLOP/s of one large matrix product: the peak that a pass is compared with."""
    import torch

    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: left @ right, device)


class Listener:
    """Asks for hidden states and logits and keeps nothing."""

    needs_hidden = needs_logits = True

    def update(self, batch: Any) -> None:
        """Nothing."""


def measure(shape: str, device: str, rows: int = 64, positions: int = 512) -> list[dict[str, Any]]:
    """All rows of one shape."""
    import torch

    from trace_offline import discover
    from trace_offline.activations.forward import run_pass
    from trace_offline.checkpoints.loading import load_model
    from trace_offline.evaluation.evaluation_set import EvaluationSet

    network = SHAPES[shape]
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    more = {"device": name, "versions": versions(*LIBRARIES), "parameters": network.parameters}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run, texts = make_run(network, folder, rows, positions)
        found = [run_row(shape, run, texts, folder, device, more)]
        checkpoint = discover(str(run))[-1]
        loading = seconds_of(lambda: load_model(checkpoint, device=device), device, 3)
        on_host = seconds_of(lambda: load_model(checkpoint, device="cpu"), device, 3)
        view = load_model(checkpoint, device=device)
        size = 4 * network.parameters
        copied = seconds_of(lambda: [each.detach().cpu() for each in view.module.parameters()], device, 3)
        found.append(
            result(
                f"{shape}: a checkpoint loaded onto the device", loading, "s", peer=on_host, ratio=on_host / loading,
                peer_name="loaded into host memory", floor=copied,
                floor_name="its weights copied back", bytes=size, **more,
            )
        )  # fmt: skip
        evaluation = EvaluationSet.load(texts)
        passed = seconds_of(lambda: run_pass(view, evaluation, {"all": Listener()}), device)
        work = model.pass_flops(network, rows * positions, positions, head=True)
        rate = product_rate(device, 8192 if device.startswith("cuda") else 256)
        found.append(
            result(
                f"{shape}: forward pass over {rows * positions:,} tokens", passed, "s", floor=work / rate,
                floor_name="its matrix products at the rate of one large product", ratio=work / rate / passed,
                share_of_peak=work / rate / passed, flops=work, rate=rate, **more,
            )
        )  # fmt: skip
        found.append(curvature_row(shape, view, evaluation, device, more))
    return found


def run_row(shape: str, run: Path, texts: Path, folder: Path, device: str, more: dict[str, Any]) -> dict[str, Any]:
    """Whole runs: checkpoints a minute, and how long the device had nothing to do."""
    from torch.profiler import ProfilerActivity, profile

    from trace_offline import analyze

    def once() -> float:
        store = folder / "s.duckdb"
        store.unlink(missing_ok=True)
        started = time.perf_counter()
        summary = analyze(run, texts, store, analyzers=ANALYZERS, device=device, jobs=1, executor="inline")
        assert summary.exit_code == 0, summary.problems
        return time.perf_counter() - started

    once()
    seconds = statistics.median(once() for _ in range(3))
    cuda = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        profiled = once()
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    busy = sum(getattr(event, field) for event in profiler.key_averages()) / 1e6
    return result(
        f"{shape}: checkpoints a minute, {' and '.join(ANALYZERS)}", 60 * CHECKPOINTS / seconds, "checkpoints/min",
        seconds=seconds, idle_share=max(0.0, 1 - busy / profiled), **more,
    )  # fmt: skip


def curvature_row(shape: str, view: Any, evaluation: Any, device: str, more: dict[str, Any]) -> dict[str, Any]:
    """One Hessian-vector product over one gradient of the same loss."""
    import torch

    from trace_offline.activations.losses import double_backward_attention
    from trace_offline.analyzers._curvature_batch import choose_rows, losses_of, plan_batches, weights_of
    from trace_offline.estimators.hvp import HessianOperator, require_gradients

    rows = choose_rows(evaluation, 8, 1024, 0)
    parameters = weights_of(view)
    with require_gradients(parameters), double_backward_attention():
        plan = plan_batches(view, parameters, rows, None, 40.0)
        losses = losses_of(view, rows, plan.micro_batches)

        def gradient() -> None:
            for body in losses:
                torch.autograd.grad(body(), parameters)

        first = seconds_of(gradient, device)
        with HessianOperator(losses, parameters, keep_graphs=plan.keep_graphs) as operator:
            vector = torch.randn(operator.n, device=device)
            product = seconds_of(lambda: operator.product(vector), device)
    return result(
        f"{shape}: Hessian-vector product", product, "s", floor=2 * first, floor_name="two gradients (theory)",
        ratio=2 * first / product, over_gradient=product / first, graphs_kept=plan.keep_graphs, **more,
    )  # fmt: skip


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="default: 70m, 410m and 1.4b")
    asked = parser.parse_args(words)
    import torch

    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        print("bench_gpu: no CUDA device here; nothing measured.", file=sys.stderr)
        return 0
    sizes = {"tiny": (4, 16)}
    rows = [
        row for shape in asked.shape or DEFAULT for row in measure(shape, asked.device, *sizes.get(shape, (64, 512)))
    ]
    if asked.device.startswith("cuda"):
        save("gpu", rows)
    else:
        print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""On a machine with a GPU: what the tests of test_gpus.py and test_gpu_memory.py show with devices that are made up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallSeries
from test_architectures import FakeSet, Keep

from trace_offline import Store, analyze
from trace_offline.activations import forward
from trace_offline.activations.batch_size import rows_that_fit
from trace_offline.activations.forward import run_pass
from trace_offline.activations.memory import Memory, free_memory
from trace_offline.activations.precision import products, true_float32
from trace_offline.analyzers import _curvature_plan
from trace_offline.checkpoints.blocks import find_blocks
from trace_offline.checkpoints.model_view import ModelView
from trace_offline.core.types import AnalysisStatus, Checkpoint, CheckpointState, Outcome
from trace_offline.engine.devices import device_facts, visible_gpus
from trace_offline.engine.executors import run_joblib
from trace_offline.engine.shared_pass import collect
from trace_offline.engine.unit import AnalysisRequest, Unit, WorkSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and a CUDA build of PyTorch")

VALUES = "select analyzer, layer, component, task, label, metric, value from history order by all"


def network(device: str) -> ModelView:
    from tiny_models import gpt_neox

    module = gpt_neox().to(device)
    return ModelView(module, find_blocks(module), device, "float32")


def test_hidden_states_and_logits_are_those_of_the_cpu() -> None:
    true_float32()
    found = []
    for device in ("cpu", "cuda"):
        keep = Keep(logits=True)
        assert run_pass(network(device), FakeSet(), {"k": keep}) == {}
        found.append([layer.cpu() for layer in keep.layers()] + [part.cpu() for part in keep.logits])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def where(work: Unit) -> list[Outcome]:
    """How many GPUs CUDA shows in this process, and which."""
    text = f"{torch.cuda.device_count()} {torch.cuda.get_device_properties(0).uuid}"
    return [Outcome("", AnalysisStatus.OK, text)]


def test_each_worker_sees_one_gpu() -> None:
    gpus = visible_gpus()
    checkpoint = Checkpoint("c", "hf_folder", CheckpointState.COMPLETE, step=0)
    settings = WorkSettings("e", "e", "cuda", "float32", 0, 1)
    units = [Unit(checkpoint, (AnalysisRequest(str(i), "a", "1", {}),), settings) for i in range(4 * len(gpus))]
    seen = {str(done[0].message) for _, done in run_joblib(units, where, len(gpus), gpus=gpus)}
    assert {text.split()[0] for text in seen} == {"1"}
    assert len(seen) <= len(gpus)


PROGRAM = """
import sys, torch
from trace_offline import analyze
analyzers = ("loss", "output", "probe", "intrinsic_dimension", "hessian")
summary = analyze(*sys.argv[1:4], device="cuda", jobs=1, timeout=600, analyzers=analyzers, steps="0")
assert summary.failed == summary.crashed == 0, summary.problems
print(torch.cuda.is_initialized())
"""


def test_a_run_on_the_gpu_gives_the_numbers_of_the_cpu(small_series: SmallSeries, tmp_path: Path) -> None:
    arguments = [str(small_series.run), str(small_series.evaluation), str(tmp_path / "gpu.duckdb")]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]  # the process of the run opened no GPU
    analyzers = ("loss", "output", "probe", "intrinsic_dimension", "hessian")
    analyze(*arguments[:2], tmp_path / "cpu.duckdb", device="cpu", jobs=1, analyzers=analyzers, steps="0")
    ours, theirs = (Store.open(tmp_path / f"{name}.duckdb").sql(VALUES).to_pylist() for name in ("gpu", "cpu"))
    assert [{**row, "value": None} for row in ours] == [{**row, "value": None} for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        if row["analyzer"] == "loss" and other["value"] is not None:
            assert row["value"] == pytest.approx(other["value"], rel=1e-3, abs=1e-4), row
    stamp = Store.open(tmp_path / "gpu.duckdb").sql(
        "select distinct device, versions->>'gpu' as gpu, versions->>'cuda' as cuda from analyses"
    )
    assert stamp.to_pylist() == [{"device": "cuda", **device_facts("cuda")}]


def test_float32_keeps_its_digits_and_tf32_does_not() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()

    def error() -> float:
        return float(((left.cuda() @ right.cuda()).cpu().double() - exact).abs().max())

    true_float32()
    assert error() < 1e-3
    with products("tf32"):
        assert error() > 1e-3
    assert error() < 1e-3


class Hungry(torch.nn.Module):
    """Takes a share of the free memory for each row."""

    def __init__(self, bytes_per_row: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.bytes_per_row = bytes_per_row

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        torch.empty(len(input_ids) * self.bytes_per_row, dtype=torch.uint8, device=input_ids.device)
        return self.scale * torch.nn.functional.one_hot(input_ids, 100).float()


def test_memory_that_runs_out_is_given_back_and_half_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_memory(torch.device("cuda")).device
    assert free is not None
    monkeypatch.setattr(forward, "rows_that_fit", lambda found, bytes_: 8)
    model = ModelView(Hungry(free // 6).cuda(), None, "cuda", "float32")
    rows = FakeSet((12,) * 20)

    def run(collectors: Any, most: int | None) -> Any:
        return run_pass(model, rows, collectors, rows_at_most=most)

    found = collect(lambda: {"k": Keep(hidden=False, logits=True)}, run)
    assert found.broken == {}
    assert found.remark == "the GPU ran out of memory with 8 sequences at once; measured anew with 4"
    assert [shape[0] for shape in found.collectors["k"].shapes] == [4] * 5


def test_what_the_formula_allows_fits() -> None:
    import transformers

    config = transformers.GPTNeoXConfig(
        vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048
    )
    module = transformers.GPTNeoXForCausalLM(config).eval().cuda()
    model, rows = ModelView(module, find_blocks(module), "cuda", "float32"), FakeSet((128,) * 600)
    free = free_memory(torch.device("cuda")).device
    assert free is not None
    shape = forward._shape(model, forward.examine(model, rows), rows)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    class Reads:
        needs_hidden = needs_logits = True

        def update(self, batch: Any) -> None:
            batch.log_probabilities.max(-1)

        def finish(self) -> None: ...

    assert run_pass(model, rows, {"r": Reads()}) == {}
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= shape.bytes_per_position * 128 * min(600, rows_that_fit(shape, free))


def test_curvature_with_its_vectors_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    from analyzer_fakes import one
    from test_analyzer_hessian import evaluation, tied_net

    from trace_offline.analyzers.hessian import HessianAnalyzer
    from trace_offline.core.params import parse_params

    true_float32()
    params = parse_params(HessianAnalyzer.Params, "hessian", {"k": 2})
    found = []
    for free in (None, 10):
        from trace_offline.analyzers._curvature import measure_curvature

        if free is not None:
            monkeypatch.setattr(_curvature_plan, "free_memory", lambda device: Memory(10, 1 << 40))
        model = ModelView(tied_net().cuda(), None, "cuda", "float32")
        found.append([item for item in measure_curvature(model, evaluation(), params, 0) if hasattr(item, "metric")])
    assert [one(items, "basis_on_host").value for items in found] == [0, 1]
    for rank in ("1", "2"):
        values = [one(items, "eigenvalue", label=rank).value for items in found]
        assert values[0] == pytest.approx(values[1], rel=2e-3)

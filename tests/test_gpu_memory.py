"""Batches by free memory, half as much once when it runs out, nothing counted twice; all without a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from conftest import SmallSeries
from test_architectures import FakeSet, Keep, view
from torch.utils._python_dispatch import TorchDispatchMode

from trace_offline import Store, analyze
from trace_offline.activations import forward
from trace_offline.activations.batch import ForwardBatch
from trace_offline.activations.batch_size import (
    MOST_POSITIONS,
    PassOutOfMemory,
    PassShape,
    attention_heads,
    rows_that_fit,
)
from trace_offline.activations.forward import run_pass
from trace_offline.activations.memory import Memory, at_once, halved, is_halved, ran_out
from trace_offline.analyzers import _curvature_batch, _curvature_plan
from trace_offline.analyzers._curvature_batch import choose_rows, plan_batches, weights_of
from trace_offline.core.errors import DeviceMemoryError, NotApplicable
from trace_offline.core.types import AnalysisStatus
from trace_offline.engine.shared_pass import collect, once_more
from trace_offline.engine.worker import ended
from trace_offline.estimators.hvp import HessianOperator

GB = 10**9
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."
HISTORY = "select * exclude (is_latest) from history order by all"


def shape(**values: int) -> PassShape:
    usual = {"layers": 6, "width": 512, "classes": 50304, "heads": 8, "itemsize": 4, "length": 2048}
    return PassShape(**{**usual, **values})


def test_the_cost_of_a_position_is_the_documented_sum() -> None:
    kept, inside, attention, output = 7 * 512 * 4, 24 * 512 * 4, 8 * 2048 * 12, 50304 * 20
    assert shape().bytes_per_position == kept + inside + attention + output
    assert shape(itemsize=2).bytes_per_position == (kept + inside) // 2 + 8 * 2048 * 8 + 50304 * 16


def test_the_batch_is_the_largest_power_of_two_that_fits() -> None:
    for free in (10**6, GB, 7 * GB, 16 * GB, 80 * GB, 10**15):
        for length in (1, 14, 128, 2048):
            case = shape(length=length)
            rows = rows_that_fit(case, free)
            assert rows & (rows - 1) == 0

            def fits(count: int, case: PassShape = case, free: int = free) -> bool:
                positions = count * case.length
                return positions <= MOST_POSITIONS and positions * case.bytes_per_position <= 0.6 * free

            assert rows == 1 or fits(rows)
            assert not fits(2 * rows)
    assert rows_that_fit(shape(), 0) == 1
    # What else uses the GPU changes nothing unless it takes a good part of it.
    assert {rows_that_fit(shape(length=128), int(share * 80 * GB)) for share in (0.9, 0.95, 1.0)} == {256}


def test_heads_are_those_of_the_configuration() -> None:
    assert attention_heads(view("gpt2").module.config, 32) == 4
    assert attention_heads(view("gpt_neox").module.config, 32) == 4
    assert attention_heads(None, 512) == 8
    assert attention_heads(None, 1) == 1


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for item in made if isinstance(made, tuple | list) else (made,):
            if isinstance(item, torch.Tensor) and not self._known(item.untyped_storage()):
                self._add(item.untyped_storage())
        return made

    def _known(self, storage: Any) -> bool:
        return storage.data_ptr() in self._seen

    def _add(self, storage: Any) -> None:
        size, place = storage.nbytes(), storage.data_ptr()
        self.now += size
        self.most = max(self.most, self.now)
        self._seen.add(place)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self.now -= size
        self._seen.discard(place)


class Reads:
    """Listens to everything and needs what the analyzers of logits need."""

    needs_hidden = needs_logits = True

    def update(self, batch: ForwardBatch) -> None:
        batch.log_probabilities.max(-1)

    def finish(self) -> None: ...


@pytest.mark.parametrize("name", sorted(tiny_models.ARCHITECTURES))
def test_the_formula_covers_what_networks_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = view(name), FakeSet((40,) * 32)
    run_pass(model, rows, {"r": Reads()})  # what is made once: rotary tables, buffers
    anatomy = forward.examine(model, rows)
    reckoned = forward._shape(model, anatomy, rows).bytes_per_position * 40 * 32
    live = Live()
    with live:
        assert run_pass(model, rows, {"r": Reads()}) == {}
    assert reckoned / 8 < live.most <= reckoned


def with_free(monkeypatch: pytest.MonkeyPatch, rows: int, length: int = 14) -> None:
    """As on a device whose free memory has room for so many rows at once."""
    monkeypatch.setattr(forward, "rows_that_fit", lambda found, free: rows if found.length == length else 1)
    monkeypatch.setattr(forward, "free_memory", lambda device: Memory(GB, GB))


def test_the_pass_takes_what_fits_and_gives_the_same_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = view("gpt_neox"), FakeSet()
    usual, here = Keep(logits=True), Keep(logits=True)
    run_pass(model, rows, {"k": usual})
    assert [found[0] for found in usual.shapes] == [7]
    monkeypatch.setattr(forward, "free_memory", lambda device: Memory(int(3.2 * 12 * 5760 / 0.6), GB))
    assert forward._shape(model, forward.examine(model, rows), rows).bytes_per_position == 5760
    run_pass(model, rows, {"k": here})
    assert [found[0] for found in here.shapes] == [2, 2, 2, 1]
    for ours, theirs in zip(here.layers(), usual.layers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@contextmanager
def full_above(rows: int, monkeypatch: pytest.MonkeyPatch, *, where: str) -> Iterator[list[int]]:
    """The device holds no batch of more than ``rows``, which shows in the middle of the pass; sizes that were tried."""
    tried: list[int] = []
    forward_of, log_p = forward._forward, ForwardBatch.__dict__["log_probabilities"].func

    def refuse(first: int, count: int) -> None:
        tried.append(count)
        if count > rows and first >= 16:
            raise torch.OutOfMemoryError(FULL)

    def network(model: Any, evaluation: Any, start: int, stop: int, collectors: Any) -> ForwardBatch:
        refuse(start, stop - start)
        return forward_of(model, evaluation, start, stop, collectors)

    def collected(self: ForwardBatch) -> torch.Tensor:
        refuse(int(self.examples[0]), len(self.examples))
        found: torch.Tensor = log_p(self)
        return found

    with monkeypatch.context() as patch:
        if where == "network":
            patch.setattr(forward, "_forward", network)
        else:
            patch.setattr(ForwardBatch, "log_probabilities", property(collected))
        yield tried


ANALYZERS = ("loss", "output", "probe", "weights")


def history(small: SmallSeries, store: Path, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    summary = analyze(
        small.run, small.evaluation, store, jobs=1, device="cpu", analyzers=ANALYZERS, steps="0", **options
    )
    rows = Store.open(store).sql(HISTORY).to_pylist()
    return summary, rows


def messages(store: Path) -> dict[str, Any]:
    rows = Store.open(store).sql("select analyzer, message from analyses").to_pylist()
    return {row["analyzer"]: row["message"] for row in rows}


@pytest.mark.parametrize("where", ["network", "collector"])
def test_out_of_memory_halves_the_batch_once_and_nothing_is_counted_twice(
    where: str, small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 4)
    calm, expected = history(small_series, tmp_path / "calm.duckdb")
    assert calm.ok == 4
    assert calm.warnings == []
    with_free(monkeypatch, 8)
    with full_above(4, monkeypatch, where=where) as tried:
        summary, rows = history(small_series, tmp_path / "short.duckdb")
    # Two batches were collected when the third did not fit; from then on all are half as large.
    assert tried[:3] == [8, 8, 8]
    assert (set(tried), tried) == ({8, 4}, sorted(tried, reverse=True))
    # To the last bit: everything was collected anew, with batches as if half had been taken from the start.
    assert rows == expected
    remark = "the GPU ran out of memory with 8 sequences at once; measured anew with 4"
    assert summary.warnings == [f"step 0: {remark}"]
    texts, calm_texts = messages(tmp_path / "short.duckdb"), messages(tmp_path / "calm.duckdb")
    for name in ("loss", "output", "probe"):
        assert texts[name] == "; ".join([remark, *([calm_texts[name]] if calm_texts[name] else [])])
    assert texts["weights"] == calm_texts["weights"]


def test_twice_too_much_fails_what_listened_and_nothing_else(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 8)
    for where, lost in (("network", {"loss", "output", "probe"}), ("collector", {"loss", "output"})):
        store = tmp_path / f"{where}.duckdb"
        with full_above(2, monkeypatch, where=where):
            summary, _ = history(small_series, store)
        assert summary.failed == len(lost)
        assert summary.ok == 4 - len(lost)
        failed = Store.open(store).sql("select analyzer, message from analyses where status = 'failed'").to_pylist()
        assert {row["analyzer"] for row in failed} == lost
        for row in failed:
            assert row["message"].startswith("The GPU has too little memory for ")
            assert f"of 4 sequences ({FULL}). Use a GPU with more memory, fewer workers" in row["message"]


def test_a_single_row_is_not_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Any] = []

    def run(collectors: Any, most: int | None) -> Any:
        tries.append(most)
        with_free(monkeypatch, 1, length=12)
        with full_above(0, monkeypatch, where="network"):
            return run_pass(view("gpt2"), FakeSet((12,) * 20), collectors, rows_at_most=most)

    found = collect(lambda: {"k": Keep()}, run)
    assert tries == [None]
    assert isinstance(found.broken["k"], DeviceMemoryError)
    assert found.remark is None


def test_a_second_attempt_begins_with_collectors_that_have_seen_nothing() -> None:
    made: list[dict[str, Any]] = []
    sizes: list[Any] = []

    def prepare() -> dict[str, Any]:
        made.append({"k": Keep()})
        return made[-1]

    def run(collectors: Any, most: int | None) -> Any:
        sizes.append(most)
        if most is None:
            raise PassOutOfMemory(9)
        return {}

    found = collect(prepare, run)
    assert (sizes, len(made)) == ([None, 4], 2)
    assert found.collectors is made[1]
    assert found.collectors != {}
    assert collect(dict, run).broken == {}  # nobody listens: no pass


def test_what_was_collected_is_not_measured_twice() -> None:
    def work() -> None:
        raise torch.OutOfMemoryError(FULL)

    remarks: list[str] = []
    with pytest.raises(DeviceMemoryError, match=r"^The GPU has too little memory for probe \(CUDA out of memory"):
        once_more(work, "probe", remarks, repeatable=False)
    assert remarks == []
    outcome = ended("id", torch.OutOfMemoryError(FULL), "cuda")
    assert outcome.status is AnalysisStatus.FAILED
    assert str(outcome.message).startswith(f"The GPU has too little memory for this checkpoint ({FULL}). Use a GPU")


def test_cuda_and_its_libraries_run_out_in_words_of_their_own() -> None:
    assert ran_out(torch.OutOfMemoryError(FULL))
    assert ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert ran_out(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"))
    assert not ran_out(RuntimeError("CUDA error: device-side assert triggered"))
    assert not ran_out(MemoryError("out of memory"))  # the host's
    outcome = ended("id", RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "cuda")
    assert str(outcome.message).startswith("RuntimeError: mat1")


def test_halves_are_taken_inside_and_only_there() -> None:
    assert (is_halved(), at_once(9)) == (False, 9)
    with halved() as mark:
        assert (at_once(1), mark.asked) == (1, False)  # there is no half of one row
        assert (at_once(2), at_once(9), mark.asked) == (1, 5, True)
    assert at_once(9) == 9


CURVATURE = {
    "hessian": {"k": 2, "tolerance": 1e-2, "max_steps": 100, "slq_probes": 2, "slq_steps": 4, "trace_probes": 2}
}


def fails(monkeypatch: pytest.MonkeyPatch, times: int) -> Callable[[], list[bool]]:
    """The device is full at the third product, so many times; whether graphs were kept at each attempt."""
    product, left, kept = HessianOperator.product, [times], []

    def short(self: HessianOperator, vector: torch.Tensor) -> torch.Tensor:
        if self.products == 0:
            kept.append(self.kept)
        if self.products == 2 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError(FULL)
        return product(self, vector)

    monkeypatch.setattr(HessianOperator, "product", short)
    return lambda: kept


def test_curvature_takes_half_a_micro_batch_and_gives_the_same_numbers(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(name: str) -> tuple[Any, list[dict[str, Any]]]:
        summary = analyze(
            small_series.run, small_series.evaluation, tmp_path / name, jobs=1, device="cpu", analyzers=("hessian",),
            params=CURVATURE, steps="0",
        )  # fmt: skip
        sql = "select metric, label, value, n from history order by all"
        return summary, Store.open(tmp_path / name).sql(sql).to_pylist()

    calm, expected = found("calm.duckdb")
    kept = fails(monkeypatch, 1)
    summary, rows = found("short.duckdb")
    assert kept() == [True, False]
    remark = "the GPU ran out of memory in hessian; measured anew with half as much at once"
    assert summary.warnings == [f"step 0: {remark}"]
    assert Store.open(tmp_path / "short.duckdb").scalar("select message from analyses").startswith(remark)
    for ours, theirs in zip(rows, expected, strict=True):
        assert (ours["metric"], ours["label"], ours["n"]) == (theirs["metric"], theirs["label"], theirs["n"])
        assert (ours["value"] is None) == (theirs["value"] is None), ours
        if ours["value"] is not None and ours["metric"] not in ("residual", "products"):
            assert ours["value"] == pytest.approx(theirs["value"], rel=1e-2, abs=1e-4), ours
    assert [row["value"] is not None for row in rows if row["metric"] == "eigenvalue"] == [True, True]
    monkeypatch.undo()
    fails(monkeypatch, 2)
    summary, _ = found("shorter.duckdb")
    assert (calm.ok, summary.ok, summary.failed) == (1, 0, 1)
    assert "too little memory for hessian, also with half as much at once (CUDA out of memory" in summary.problems[0]
    assert "Lower its max_tokens or max_sequences, or use a GPU with more memory" in summary.problems[0]


def test_graphs_stay_within_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_analyzer_hessian import evaluation, tied_net

    net = tied_net()
    model = forward.ModelView(net, None, "cpu", "float32")
    parameters = weights_of(model)
    rows = choose_rows(evaluation(), 4, 10**6, 0)
    usual = plan_batches(model, parameters, rows, None, 4.0)
    assert usual.keep_graphs
    assert len(usual.micro_batches) == 1
    monkeypatch.setattr(_curvature_batch, "free_memory", lambda device: Memory(1 << 40, 1 << 40))
    assert plan_batches(model, parameters, rows, None, 4.0) == usual
    with halved():
        half = plan_batches(model, parameters, rows, None, 4.0)
    assert [len(part) for part in half.micro_batches] == [2, 2]
    assert not half.keep_graphs
    monkeypatch.setattr(_curvature_batch, "free_memory", lambda device: Memory(2 * usual.graph_bytes - 2, 1 << 40))
    short = plan_batches(model, parameters, rows, None, 4.0)
    assert len(short.micro_batches) > 1
    assert sorted(row for part in short.micro_batches for row in part) == [0, 1, 2, 3]
    monkeypatch.setattr(_curvature_batch, "free_memory", lambda device: Memory(10, 1 << 40))
    with pytest.raises(NotApplicable, match=r"the GPU has .* GiB free, half of it for graphs: take a larger one, or"):
        plan_batches(model, parameters, rows, None, 4.0)


def test_vectors_go_to_the_host_sooner_after_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_curvature_plan, "free_memory", lambda device: Memory(1000, 5000))
    cpu = torch.device("cpu")
    assert not _curvature_plan.place_for(600, cpu, 100).host
    with halved() as mark:
        assert _curvature_plan.place_for(600, cpu, 100).host
    assert mark.asked

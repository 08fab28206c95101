"""Which GPUs there are, one for each worker, what is recorded of them; all without a GPU."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallSeries
from test_architectures import FakeSet

from trace_offline import Store, analyze
from trace_offline.activations.forward import run_pass
from trace_offline.activations.precision import products, true_float32
from trace_offline.checkpoints.model_view import ModelView
from trace_offline.core.errors import UsageError
from trace_offline.core.types import AnalysisStatus, Checkpoint, CheckpointState, Outcome
from trace_offline.engine import devices, options, worker
from trace_offline.engine.beside import in_two_lanes
from trace_offline.engine.devices import VISIBLE, Placement, Slots, gpu_names, place
from trace_offline.engine.executors import run_joblib
from trace_offline.engine.options import AnalyzeOptions
from trace_offline.engine.unit import AnalysisRequest, Unit, WorkSettings, analysis_id

MIG = ("MIG-1f", "MIG-2e")


@pytest.mark.parametrize(
    ("count", "setting", "expected"),
    [
        (0, None, ()),
        (3, None, ("0", "1", "2")),
        (2, "3,1", ("3", "1")),
        (1, " 5 ", ("5",)),
        (0, "", ()),
        (0, "-1", ()),
        (1, "0,9", ("0",)),  # CUDA stops at the first that does not exist
        (2, "GPU-8f, GPU-77", ("GPU-8f", "GPU-77")),
        (1, "MIG-1f,MIG-2e", MIG),  # one process sees one slice, two processes two
    ],
)
def test_names_are_those_that_the_environment_gives(count: int, setting: str | None, expected: tuple[str, ...]) -> None:
    assert gpu_names(count, setting) == expected


def test_gpus_are_counted_without_opening_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def started() -> None:
        raise AssertionError("this opens a GPU")

    monkeypatch.setattr(torch.cuda, "_lazy_init", started)
    monkeypatch.setattr(torch.cuda, "is_available", started)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "_NODES", ("/",))
    monkeypatch.delenv(VISIBLE, raising=False)
    for asked, expected in (
        ("auto", Placement("cuda", "cuda", ("0", "1"))),
        ("cuda", Placement("cuda", "cuda", ("0", "1"))),
        ("cuda:1", Placement("cuda", "cuda:1", ("1",))),
        ("cuda:1,0", Placement("cuda", "cuda:1", ("1", "0"))),
        ("cpu", Placement("cpu", "cpu")),
    ):
        assert options.choose_device(AnalyzeOptions("s", Path("e"), Path("f"), device=asked)) == expected
    monkeypatch.setattr(torch.cuda, "device_count", started)
    monkeypatch.setenv(VISIBLE, ",".join(MIG))
    assert devices.visible_gpus() == MIG
    monkeypatch.setattr(devices, "_NODES", ("/there/is/no/such/node",))
    assert devices.visible_gpus() == ()
    # Dask's workers look on their own machines.
    away = AnalyzeOptions("s", Path("e"), Path("f"), device="auto", executor="dask", scheduler="tcp://h:1")
    assert options.choose_device(away) == Placement("auto", "auto")
    dataclasses.replace(away, device="cuda").check()


def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert place("auto", ()) == Placement("cpu", "cpu")
    assert place("cuda:2,0", ("GPU-a", "GPU-b", "GPU-c")) == Placement("cuda", "cuda:2", ("GPU-c", "GPU-a"))


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("gpu", r'--device: "gpu" is not known\. .*auto, cpu, cuda, cuda:N, and cuda:N,M for several'),
        ("cuda:", "is not known"),
        ("cuda:1,", "is not known"),
        ("cuda:x", "is not known"),
        ("cuda:1,1", "names a GPU twice"),
        ("cuda:2", r"expected GPUs from cuda:0 to cuda:1, those that CUDA_VISIBLE_DEVICES .* found cuda:2"),
    ],
)
def test_a_device_that_is_not_there_is_refused(asked: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "visible_gpus", lambda surely=False: ("0", "1"))
    with pytest.raises(UsageError, match=text):
        devices.check_device(asked)
    devices.check_device("cuda:1,0")


def test_a_worker_for_each_gpu_and_the_cores_shared_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "cores", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    # workers × two lanes × threads = cores
    assert options.choose_jobs(None, 4, 10**9) == (4, 2)
    assert options.choose_jobs(None, 1, 10**9) == (1, 8)
    assert options.choose_jobs(8, 4, 10**9) == (8, 1)
    assert options.choose_jobs(8, 0, 10**9) == (8, 2)  # one lane without GPUs


def unit(number: int, folder: Path, workers: int) -> Unit:
    checkpoint = Checkpoint(f"step{number}", "hf_folder", CheckpointState.COMPLETE, step=number)
    settings = WorkSettings("e", "e", "cuda", "float32", 0, workers, board=str(folder))
    return Unit(checkpoint, (AnalysisRequest(str(number), "a", "1", {}),), settings)


def where(work: Unit) -> list[Outcome]:
    """The GPU that CUDA would show in this process, told once all workers (``threads`` of them) are at work."""
    folder = Path(str(work.settings.board))
    (folder / str(os.getpid())).touch()
    until = time.monotonic() + 120
    while len(list(folder.iterdir())) < work.settings.threads and time.monotonic() < until:
        time.sleep(0.02)
    return [Outcome("", AnalysisStatus.OK, f"{os.environ.get(VISIBLE)} {os.getpid()}")]


def dies_at_two(work: Unit) -> list[Outcome]:
    if work.checkpoint.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return where(work)


def seats(folder: Path, body: Any, jobs: int, gpus: tuple[str, ...]) -> list[tuple[str, str]]:
    """(GPU, process) of each unit that was done."""
    found = []
    for _, (outcome,) in run_joblib([unit(i, folder, jobs) for i in range(6)], body, jobs, gpus=gpus):
        if outcome.status is AnalysisStatus.OK:
            name, process = str(outcome.message).split()
            found.append((name, process))
    return found


def test_each_worker_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    found = seats(tmp_path, where, 2, ("GPU-a", "MIG-b"))
    assert len(found) == 6
    assert {name for name, _ in found} == {"GPU-a", "MIG-b"}
    assert len({name for name, _ in found}) == len(set(found)) == 2


def test_more_workers_than_gpus_share_them_evenly(tmp_path: Path) -> None:
    found = {process: name for name, process in seats(tmp_path, where, 4, ("a", "b"))}
    assert sorted(found.values()) == ["a", "a", "b", "b"]


def test_one_job_is_one_process_on_one_gpu(tmp_path: Path) -> None:
    found = seats(tmp_path, where, 1, ("7",))
    assert len(found) == 6
    assert {name for name, _ in found} == {"7"}
    assert len(set(found)) == 1  # joblib starts two; the other one stands by


def test_a_dead_worker_gives_its_gpu_back(tmp_path: Path) -> None:
    found = seats(tmp_path, dies_at_two, 2, ("GPU-a", "GPU-b"))
    assert len(found) == 5
    assert {name for name, _ in found} <= {"GPU-a", "GPU-b"}


def test_without_gpus_nothing_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Slots.of((), 2) is None


def test_a_gpu_is_not_chosen_after_cuda_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots.of(("0",), 1)
    assert slots is not None
    assert slots == Slots.of(("0",), 1)  # else every run of a process would start new workers
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA was started in this worker"):
        slots.bind()


def test_a_gpu_that_pytorch_cannot_use_is_named() -> None:
    devices.open_device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match=r"PyTorch cannot use the GPU \(cuda, CUDA_VISIBLE_DEVICES=.*--device cpu"):
            devices.open_device("cuda")
    assert devices.device_facts("cpu") == {}


def test_the_gpu_is_recorded_with_each_analysis(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"gpu": "Some Accelerator 80GB", "cuda": "12.9"}
    monkeypatch.setattr(worker, "device_facts", lambda device: facts)
    summary = analyze(small_series.run, small_series.evaluation, tmp_path / "s.duckdb", analyzers=("loss",), jobs=1)
    assert summary.ok == 3
    rows = Store.open(tmp_path / "s.duckdb").sql(
        "select distinct device, dtype, versions->>'gpu' as gpu, versions->>'cuda' as cuda from analyses"
    )
    assert rows.to_pylist() == [{"device": "cpu", "dtype": "float32", **facts}]


def allowed() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def fails_in_tf32() -> None:
    with products("tf32"):
        assert allowed() == (True, True)
        raise ZeroDivisionError


def test_float32_is_float32_unless_tf32_is_asked_for_by_name() -> None:
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
    true_float32()
    assert allowed() == (False, False)
    with products("float32"):
        assert allowed() == (False, False)
    with pytest.raises(ZeroDivisionError):
        fails_in_tf32()
    assert allowed() == (False, False)
    torch.backends.cudnn.allow_tf32 = True
    worker.limit_threads(torch.get_num_threads())
    assert allowed() == (False, False)


class Asks(torch.nn.Module):
    """A network, and a collector, that note how float32 would be multiplied."""

    needs_hidden, needs_logits = False, True

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.inside: list[tuple[bool, bool]] = []
        self.outside: list[tuple[bool, bool]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        self.inside.append(allowed())
        return self.scale * torch.nn.functional.one_hot(input_ids, 100).float()

    def update(self, batch: Any) -> None:
        self.outside.append(allowed())

    def finish(self) -> None: ...


@pytest.mark.parametrize(("dtype", "expected"), [("float32", False), ("tf32", True)])
def test_tf32_is_for_the_network_and_not_for_what_measures(dtype: str, expected: bool) -> None:
    true_float32()
    net = Asks()
    assert run_pass(ModelView(net, None, "cpu", dtype), FakeSet(), {"asks": net}) == {}
    assert set(net.inside) == {(expected, expected)}
    assert set(net.outside) == {(False, False)}


def test_tf32_is_another_analysis_and_needs_a_gpu(small_series: SmallSeries, tmp_path: Path) -> None:
    keys = {analysis_id("f", "loss", "1", {}, "e", dtype, 0) for dtype in ("float32", "tf32")}
    assert len(keys) == 2
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match=r"--dtype tf32 is a way in which GPUs multiply.*Use --dtype float32"):
            analyze(small_series.run, small_series.evaluation, tmp_path / "s.duckdb", dtype="tf32")


def test_two_lanes_run_side_by_side_and_say_what_is_at_stake() -> None:
    import threading

    told: list[tuple[str, tuple[str, ...]]] = []
    threads: dict[str, int] = {}
    met = threading.Barrier(2, timeout=30)

    def work(name: str) -> None:
        threads[name] = threading.get_ident()
        if name in ("gpu 1", "cpu 1"):
            met.wait()  # passes only when both are at work at once
        if name == "cpu 2":
            time.sleep(0.3)

    in_two_lanes(
        ["gpu 1", "gpu 2"], ["cpu 1", "cpu 2"], work, lambda item, others: told.append((item, tuple(others))),
        lambda: threads.update(prepared=threading.get_ident()),
    )  # fmt: skip
    here = threading.get_ident()
    assert threads["gpu 1"] == threads["gpu 2"] == here
    assert threads["cpu 1"] == threads["cpu 2"] == threads["prepared"] != here
    assert told[0] == ("gpu 1", ("cpu 1", "cpu 2"))
    assert told[1][0] == "gpu 2"
    assert told[1][1] in (("cpu 1", "cpu 2"), ("cpu 2",))
    assert told[-1] == ("cpu 2", ())


@pytest.mark.parametrize(("here", "beside"), [([], ["a", "b"]), (["a", "b"], []), ([], [])])
def test_one_lane_needs_no_thread(here: list[str], beside: list[str]) -> None:
    import threading

    seen: list[tuple[str, int]] = []
    told: list[tuple[str, tuple[str, ...]]] = []
    in_two_lanes(
        here, beside, lambda item: seen.append((item, threading.get_ident())),
        lambda item, others: told.append((item, tuple(others))), lambda: pytest.fail("no thread, nothing to prepare"),
    )  # fmt: skip
    assert seen == [(item, threading.get_ident()) for item in here + beside]
    assert told == [(item, ()) for item in here + beside]


def test_what_the_other_lane_raises_is_raised_here() -> None:
    def work(item: str) -> None:
        if item == "cpu":
            raise KeyboardInterrupt("from a plug-in")

    with pytest.raises(KeyboardInterrupt, match="from a plug-in"):
        in_two_lanes(["gpu"], ["cpu", "never"], work, lambda item, others: None, lambda: None)


FIVE = ("hessian", "loss", "intrinsic_dimension", "output", "geometry")


def test_numbers_beside_a_gpu_are_those_one_after_another(
    tmp_path: Path, small_series: SmallSeries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is played by the CPU: the device is the same, but analyzers that do not need it get the other lane."""
    import threading

    from trace_offline.analyzers.geometry import GeometryAnalyzer
    from trace_offline.analyzers.hessian import HessianAnalyzer

    threads: dict[str, int] = {}
    for kind in (GeometryAnalyzer, HessianAnalyzer):

        def measure(self: Any, context: Any, plain: Any = kind.measure) -> Any:
            threads[self.name] = threading.get_ident()
            yield from plain(self, context)

        monkeypatch.setattr(kind, "measure", measure)

    def history(name: str) -> list[Any]:
        summary = analyze(
            small_series.run, small_series.evaluation, tmp_path / name, analyzers=FIVE, executor="inline", jobs=1,
            params={"hessian": {"k": 2, "slq_probes": 2, "slq_steps": 4, "trace_probes": 3}},
        )  # fmt: skip
        assert summary.exit_code == 0, summary.problems
        columns = "step, analyzer, layer, task, label, metric, value, stderr, n, reason"
        return sorted(map(repr, Store.open(tmp_path / name).sql(f"select {columns} from history").to_pylist()))

    expected = history("one.duckdb")
    assert threads["geometry"] == threads["hessian"] == threading.get_ident()
    monkeypatch.setattr(worker, "has_gpu", lambda device: True)
    assert history("two.duckdb") == expected
    assert threads["hessian"] == threading.get_ident()
    assert threads["geometry"] != threading.get_ident()
    assert expected

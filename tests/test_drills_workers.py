"""Workers killed and stopped from outside, out of memory, hung: each costs one analysis at most, and says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SmallSeries
from drills import PLUG_INS, Drill, Witness, contents, environment, nothing_left, same_content, save_steps, until

from trace_offline import Store
from trace_offline.core.types import AnalysisStatus, Checkpoint, CheckpointState, Outcome
from trace_offline.engine.board import Board, Doing
from trace_offline.engine.executors import run_alone, run_joblib
from trace_offline.engine.unit import AnalysisRequest, Unit, WorkSettings
from trace_offline.engine.watchdog import COMPARING, STARTING, Watchdog

STATUS = "select step, analyzer, status, message from status where status <> 'ok' order by step"


def unit(number: int, board: Path) -> Unit:
    checkpoint = Checkpoint(f"step{number}", "hf_folder", CheckpointState.COMPLETE, step=number)
    requests = tuple(AnalysisRequest(f"{number}-{name}", name, "1", {}) for name in ("first", "waits", "last"))
    return Unit(checkpoint, requests, WorkSettings("e", "e", "cpu", "float32", 0, 1, board=str(board)))


def body(work: Unit) -> list[Outcome]:
    """Leaves a mark of each analysis; one waits for what comes from outside, another the first time only."""
    board = Board(work.settings.board or "")
    done = []
    for request in work.requests:
        board.tell(work.key, f"step {work.checkpoint.step}", request.analyzer, (request.analysis_id,))
        mark = board.folder.parent / request.analysis_id
        known = mark.exists()
        with mark.open("a") as file:
            file.write("x")
        if request.analyzer == "waits" and (work.checkpoint.step == 3 or (work.checkpoint.step == 1 and not known)):
            time.sleep(600)
        done.append(Outcome(request.analysis_id, AnalysisStatus.OK))
        board.keep(done[-1])
    return done


def when(board: Board, analysis: str, act: Callable[[int], None]) -> threading.Thread:
    """Do something to the worker that is at this analysis, once."""

    def look() -> None:
        until(lambda: any(analysis in item.analyses for item in board.read()))
        act(next(item.pid for item in board.read() if analysis in item.analyses))

    thread = threading.Thread(target=look)
    thread.start()
    return thread


def test_workers_killed_and_stopped_from_outside(tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    board.open()
    threads = [
        when(board, "1-waits", lambda pid: os.kill(pid, signal.SIGKILL)),
        when(board, "3-waits", lambda pid: os.kill(pid, signal.SIGSTOP)),
    ]
    found: dict[str, Outcome] = {}
    for _, outcomes in run_joblib([unit(number, board.folder) for number in range(5)], body, 2, board, timeout=4.0):
        for outcome in outcomes:
            assert outcome.analysis_id not in found
            found[outcome.analysis_id] = outcome
    for thread in threads:
        thread.join()
    assert len(found) == 15
    bad = {key: str(item.message) for key, item in found.items() if item.status is not AnalysisStatus.OK}
    # The one that was killed went well at the second try.
    assert sorted(bad) == ["3-waits"]
    assert "longer than --timeout 4 allows" in bad["3-waits"]
    assert len((tmp_path / "1-waits").read_text()) == 2
    for number in range(5):
        for name in ("first", "last"):
            assert len((tmp_path / f"{number}-{name}").read_text()) == 1


def compare(task: tuple[str, str]) -> list[Outcome]:
    board, way = Board(task[0]), task[1]
    board.tell("whole", "weight_change", COMPARING, ("a", "b"))
    mark = board.folder.parent / way
    known = mark.exists()
    mark.touch()
    if way == "hangs" or (way == "waits" and not known):
        time.sleep(600)
    if way == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return [Outcome(key, AnalysisStatus.OK) for key in ("a", "b")]


def test_a_comparison_that_hangs_is_ended_and_one_whose_worker_is_killed_is_tried_again(tmp_path: Path) -> None:
    from concurrent.futures.process import BrokenProcessPool

    board = Board(tmp_path / "board")
    board.open()
    with pytest.raises(BrokenProcessPool, match=r"was ended after . s while the series was compared: longer than"):
        run_alone(compare, (str(board.folder), "hangs"), 1, board, 3.0)
    board.clear()
    board.open()
    with pytest.raises(BrokenProcessPool):
        run_alone(compare, (str(board.folder), "dies"), 2, board)
    board.clear()
    board.open()
    thread = when(board, "a", lambda pid: os.kill(pid, signal.SIGKILL))
    outcomes = run_alone(compare, (str(board.folder), "waits"), 2, board)
    thread.join()
    assert [item.status for item in outcomes] == [AnalysisStatus.OK] * 2


def test_a_limit_for_analyses_is_none_for_a_worker_that_starts(tmp_path: Path) -> None:
    import socket

    board = Board(tmp_path / "board")
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    watchdog = Watchdog(board, timeout=5.0)

    def at(task: str, seconds: float) -> Doing:
        return Doing(worker.pid, socket.gethostname(), "u", "step 1", task, ("a", "b"), time.time() - seconds)

    try:
        watchdog._judge(at(STARTING, 60.0))
        assert worker.poll() is None
        watchdog._judge(at(STARTING, 601.0))
        assert worker.wait(timeout=20) == -signal.SIGKILL
    finally:
        worker.kill()
        worker.wait()
    assert watchdog.hung == {}  # what it was about to do is done by another


def test_an_analysis_that_runs_out_of_memory_costs_itself(small_series: SmallSeries, tmp_path: Path) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("the analyzer of this drill reads its own size in /proc; a kernel's OOM kill cannot be provoked")
    drill, store = Drill(tmp_path / "drill"), tmp_path / "s.duckdb"
    drill.order("second", 1, "eat")
    assert drill.run(small_series.run, small_series.evaluation, store) == 1, drill.said()
    assert "step 1: second failed: MemoryError" in drill.said()
    (bad,) = Store.open(store).sql(STATUS).to_pylist()
    assert (bad["step"], bad["analyzer"], bad["status"]) == (1, "second", "failed")
    assert len(contents(Store.open(store))) == 8
    assert set(drill.ran().values()) == {1}
    # What failed is tried again, and nothing else.
    assert drill.run(small_series.run, small_series.evaluation, store) == 1
    assert {key: times for key, times in drill.ran().items() if times > 1} == {("second", 1): 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "jobs", "timeout", "said"),
    [
        ("die", 1, None, "died while second ran alone"),
        ("die", 2, None, "died while second ran alone"),
        ("hang", 1, 30.0, "longer than --timeout 30 allows"),
    ],
)
def test_what_goes_wrong_beside_a_gpu_costs_itself(
    small_series: SmallSeries, tmp_path: Path, order: str, jobs: int, timeout: float | None, said: str
) -> None:
    """``second`` and ``third`` run in the lane of the CPU; ``first`` uses the GPU meanwhile and is not to blame."""
    drill = Drill(tmp_path / "drill", {"DRILL_GPU": "1", "DRILL_PAUSE": "0.2"})
    store = tmp_path / "s.duckdb"
    drill.order("second", 1, order)
    more = {"jobs": jobs, "executor": "joblib", "timeout": timeout}
    assert drill.run(small_series.run, small_series.evaluation, store, **more) == 1, drill.said()
    (bad,) = Store.open(store).sql(STATUS).to_pylist()
    assert (bad["step"], bad["analyzer"], bad["status"]) == (1, "second", "crashed"), bad
    assert said in bad["message"]
    assert len(contents(Store.open(store))) == 8
    # With two workers the other one may be at a task of step 0, which ends with the pool and runs once more.
    assert all(times <= jobs for (_, step), times in drill.ran().items() if step == 0)


@pytest.mark.slow
def test_a_bad_day(small_series: SmallSeries, tmp_path: Path) -> None:
    """Everything in one run of the real command line, with two workers."""
    drill, run, store = Drill(tmp_path / "drill"), tmp_path / "run", tmp_path / "s.duckdb"
    save_steps(run, range(8))
    drill.order("first", 1, "hang")
    drill.order("second", 2, "eat")
    drill.order("second", 3, "die")
    drill.order("third", 4, "hang once")
    drill.order("second", 5, "hang once")
    process = drill.command(run, small_series.evaluation, store, "--jobs", "2", "--timeout", "15")
    board, acts = Board.of(store), {("third", 4): signal.SIGKILL, ("second", 5): signal.SIGSTOP}

    def disturb() -> None:
        while acts and process.poll() is None:
            for item in board.read():
                act = acts.pop((item.task, int(item.checkpoint.removeprefix("step "))), None)
                if act is not None:
                    os.kill(item.pid, act)
            time.sleep(0.02)

    thread = threading.Thread(target=disturb)
    thread.start()
    _, said = process.communicate(timeout=400)
    thread.join()
    assert process.returncode == 1, said
    assert not acts
    assert "Traceback" not in said
    bad = {(row["analyzer"], row["step"]): row for row in Store.open(store).sql(STATUS).to_pylist()}
    found = {key: row["status"] for key, row in bad.items()}
    # The worker that was stopped may be ended with the pool of one that died before its time is up; then it is tried
    # again, and goes well.
    stopped = bad.pop(("second", 5), None)
    assert found.pop(("second", 5), "crashed") == "crashed"
    assert found == {("first", 1): "crashed", ("second", 2): "failed", ("second", 3): "crashed"}
    for row in [bad["first", 1], *([stopped] if stopped else [])]:
        assert "longer than --timeout 15 allows" in row["message"]
    assert bad["second", 2]["message"].startswith("MemoryError")
    assert "The worker process died while second ran alone on this checkpoint" in bad["second", 3]["message"]
    assert len(contents(Store.open(store))) == 8 * 3 - (4 if stopped else 3)
    # Everything else ran once, but what was under way beside a worker that died.
    assert all(times <= 3 for times in drill.ran().values())
    for path in (drill.folder / "orders").iterdir():
        path.unlink()
    witness = Witness(store, drill)
    witness.look()
    assert drill.run(run, small_series.evaluation, store) == 0, drill.said()
    assert witness.look() == 24
    whole = Drill(tmp_path / "whole")
    assert whole.run(run, small_series.evaluation, tmp_path / "whole.duckdb") == 0
    same_content(store, tmp_path / "whole.duckdb")
    nothing_left(store)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_dask_with_a_worker_that_always_dies_on_one_checkpoint(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed", reason="needs the optional extra dask")
    import dask

    drill, run, store = Drill(tmp_path / "drill"), tmp_path / "run", tmp_path / "s.duckdb"
    save_steps(run, range(6))
    drill.order("second", 3, "die")  # at once: its last words may never be heard
    for name, value in environment(drill.folder).items():
        monkeypatch.setenv(name, value)
    # Worker processes that are spawned take over this list, and not PYTHONPATH.
    for folder in reversed(os.environ["PYTHONPATH"].split(os.pathsep)):
        monkeypatch.syspath_prepend(folder)
    ways: Any = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1, "temporary-directory": str(tmp_path / "dask")}),
        distributed.LocalCluster(**ways) as cluster,
    ):
        address = cluster.scheduler_address
        process = drill.command(run, small_series.evaluation, store, "--executor", "dask", "--scheduler", address)
        _, said = process.communicate(timeout=400)
    assert process.returncode == 1, said
    everything = Store.open(store).sql(STATUS).to_pylist()
    assert len(everything) == 1, (everything, said)
    (bad,) = everything
    assert (bad["step"], bad["analyzer"], bad["status"]) == (3, "second", "crashed")
    assert "second killed its Dask worker again and again (KilledWorker" in bad["message"]
    assert len(contents(Store.open(store))) == 6 * len(PLUG_INS) - 1
    assert drill.ran()["second", 3] >= 2
    # What it had finished before it died was not lost with it.
    assert drill.ran()["first", 3] == 1
    drill.folder.joinpath("orders", "second-3").unlink()
    assert drill.run(run, small_series.evaluation, store) == 0, drill.said()
    whole = Drill(tmp_path / "whole")
    assert whole.run(run, small_series.evaluation, tmp_path / "whole.duckdb") == 0
    same_content(store, tmp_path / "whole.duckdb")
    nothing_left(store)

"""Workers that hang or die, runs that are killed or asked to stop: exactly the analysis at fault is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SmallSeries

from trace_offline import Store, analyze
from trace_offline.core.errors import UsageError
from trace_offline.core.types import AnalysisStatus, Array, Artifact, Checkpoint, CheckpointState, Measurement, Outcome
from trace_offline.engine import execution
from trace_offline.engine.board import Board
from trace_offline.engine.costs import Costs
from trace_offline.engine.executors import run_joblib
from trace_offline.engine.options import AnalyzeOptions, Shard
from trace_offline.engine.unit import AnalysisRequest, Unit, WorkSettings

HISTORY = "select * exclude (is_latest) from history order by all"


def unit(number: int, board: Path, analyzers: tuple[str, ...]) -> Unit:
    checkpoint = Checkpoint(f"step{number}", "hf_folder", CheckpointState.COMPLETE, step=number)
    requests = tuple(AnalysisRequest(f"{number}-{name}", name, "1", {}) for name in analyzers)
    return Unit(checkpoint, requests, WorkSettings("e", "e", "cpu", "float32", 0, 1, board=str(board)))


def body(work: Unit) -> list[Outcome]:
    """A worker whose analyses sleep, die or end well by their names, and who leaves a mark of each that it began."""
    board = Board(work.settings.board or "")
    step, done = work.checkpoint.step, []
    for request in work.requests:
        name = request.analyzer
        board.tell(work.key, f"step {step}", name, (request.analysis_id,))
        mark = board.folder.parent / "begun" / request.analysis_id
        with mark.open("a") as file:
            file.write("x")
        if name == "hangs" and step == 1:
            time.sleep(600)
        if name == "dies" and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(Outcome(request.analysis_id, AnalysisStatus.OK))
        board.keep(done[-1])
    return done


def test_a_hang_and_a_death_cost_one_analysis_each_and_nothing_is_done_twice(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    board = Board(tmp_path / "board")
    board.open()
    names = ("first", "hangs", "dies", "last")
    units = [unit(number, board.folder, names) for number in range(5)]
    found: dict[str, Outcome] = {}
    for _, outcomes in run_joblib(units, body, 2, board, timeout=4.0):
        for outcome in outcomes:
            assert outcome.analysis_id not in found
            found[outcome.analysis_id] = outcome
    assert len(found) == 20
    bad = {key: outcome for key, outcome in found.items() if outcome.status is not AnalysisStatus.OK}
    assert sorted(bad) == ["1-hangs", "2-dies"]
    assert {outcome.status for outcome in bad.values()} == {AnalysisStatus.CRASHED}
    assert "longer than --timeout 4 allows" in str(bad["1-hangs"].message)
    assert "died while dies ran alone" in str(bad["2-dies"].message)
    times = {path.name: len(path.read_text()) for path in (tmp_path / "begun").iterdir()}
    # Once more, alone, to be sure that it is the one: a death does not say which of the workers died.
    assert times["1-hangs"] <= 2
    assert times["2-dies"] == 2
    # What had ended before its worker was killed is not measured again.
    assert times["1-first"] == times["2-first"] == times["2-hangs"] == 1


def forward_hangs(work: Unit) -> list[Outcome]:
    """Only one of three hangs in the pass that they share."""
    board = Board(work.settings.board or "")
    ids = [request.analysis_id for request in work.requests]
    board.tell(work.key, "step", "forward pass", ids)
    if any(request.analyzer == "hangs" for request in work.requests):
        time.sleep(600)
    return [Outcome(key, AnalysisStatus.OK) for key in ids]


def test_a_hang_in_the_shared_pass_blames_only_the_one_that_hangs_alone(tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    board.open()
    found = {
        outcome.analysis_id: outcome.status
        for _, outcomes in run_joblib(
            [unit(0, board.folder, ("a", "hangs", "b"))], forward_hangs, 2, board, timeout=3.0
        )
        for outcome in outcomes
    }
    assert found == {"0-a": AnalysisStatus.OK, "0-hangs": AnalysisStatus.CRASHED, "0-b": AnalysisStatus.OK}


def test_an_outcome_survives_the_board_exactly(tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    board.open()
    outcome = Outcome(
        "id", AnalysisStatus.OK, "text", 1.5, "cpu",
        (Measurement("m", 0.1 + 0.2, 1e-300, 7, 3, "residual", "pos", "NOUN"), Measurement("n", None, reason="why")),
        (Array("a", (1.0, 1 / 3)),), (Artifact("w", bytes(range(256)), ".safetensors"),), {"torch": "1"},
    )  # fmt: skip
    board.keep(outcome)
    assert board.kept(["id", "unknown"]) == [outcome]
    assert board.all_kept() == [outcome]
    board.forget(["id"])
    assert board.all_kept() == []
    board.clear()
    board.keep(outcome)  # a worker that comes too late
    assert not board.folder.exists()


def test_what_a_killed_run_had_finished_is_stored_by_the_next(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, whole = tmp_path / "s.duckdb", tmp_path / "whole.duckdb"
    analyze(small_series.run, small_series.evaluation, whole, analyzers=("loss", "output"), jobs=1)
    real = execution.run_unit

    def killed(work: Unit) -> list[Outcome]:
        outcomes = real(work)
        if work.checkpoint.step == 1:
            raise KeyboardInterrupt  # after the analyses, before the parent could store them
        return outcomes

    monkeypatch.setattr(execution, "run_unit", killed)
    monkeypatch.setattr(Board, "clear", lambda self: None)  # as when the process was killed
    with pytest.raises(KeyboardInterrupt):
        analyze(small_series.run, small_series.evaluation, store, analyzers=("loss", "output"), jobs=1)
    monkeypatch.undo()
    begun: list[Any] = []
    monkeypatch.setattr(execution, "run_unit", lambda work: begun.append(work.checkpoint.step) or real(work))
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss", "output"), jobs=1)
    assert begun == [2]  # 0 was stored, 1 lay on the board, 4 has the weights of 2
    assert Store.open(store).sql(HISTORY).equals(Store.open(whole).sql(HISTORY))
    assert not Board.of(store).folder.exists()


SLOW = """
import time
from trace_offline import Analyzer, Measurement, MetricSpec

class Slow(Analyzer):
    name = "slow"
    version = "1"
    summary = reference = "a test"
    metrics = (MetricSpec("m", "1", "one"),)
    def measure(self, context):
        time.sleep(4)
        yield Measurement("m", float(context.step))
"""


@pytest.fixture
def slow_plug_in(tmp_path: Path) -> dict[str, str]:
    site = tmp_path / "site"
    info = site / "slow_party-1.dist-info"
    info.mkdir(parents=True)
    (site / "slow_party.py").write_text(SLOW)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slow-party\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[trace_offline.analyzers]\nslow = slow_party:Slow\n")
    return {**os.environ, "PYTHONPATH": str(site)}


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_once_finishes_what_runs(
    small_series: SmallSeries, tmp_path: Path, slow_plug_in: dict[str, str], jobs: int
) -> None:
    store = tmp_path / "s.duckdb"
    order = [
        *(sys.executable, "-m", "trace_offline.cli.main", "analyze", str(small_series.run), "--jobs", str(jobs)),
        *("--evaluation-set", str(small_series.evaluation), "--store", str(store), "--analyzer", "slow"),
    ]
    process = subprocess.Popen(order, stderr=subprocess.PIPE, text=True, env=slow_plug_in, start_new_session=True)
    board = Board.of(store)
    deadline = time.monotonic() + 120
    while not any(item.task == "slow" for item in board.read()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Finishing the checkpoints under way" in said
    assert "Interrupted. What was finished is stored" in said
    assert "Traceback" not in said
    rows = Store.open(store).sql("select step, status from status order by step").to_pylist()
    done = sum(row["status"] == "ok" for row in rows)
    assert 1 <= done <= jobs
    assert all(row["status"] in ("ok", "planned") for row in rows)
    assert not board.folder.exists()


def test_shards_merge_to_the_whole(small_series: SmallSeries, tmp_path: Path) -> None:
    from trace_offline.store.merge import merge

    names = ("loss", "weight_change")
    whole = tmp_path / "whole.duckdb"
    analyze(small_series.run, small_series.evaluation, whole, analyzers=names, jobs=1)
    shards = []
    for index in (1, 2):
        shards.append(tmp_path / f"shard{index}.duckdb")
        summary = analyze(
            small_series.run, small_series.evaluation, shards[-1], analyzers=names, jobs=1, shard=Shard(index, 2)
        )
        assert "weight_change compare the whole series: this shard only extracts" in summary.warnings[-1]
    store = tmp_path / "s.duckdb"
    merge(shards, store)
    summary = analyze(small_series.run, small_series.evaluation, store, analyzers=names, jobs=1)
    assert summary.already_done >= 3  # the losses
    assert Store.open(store).sql(HISTORY).equals(Store.open(whole).sql(HISTORY))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"executor": "dusk"}, '"dusk" is not known. Did you mean "dask"?'),
        ({"timeout": 0.0}, "expected seconds above 0, found 0"),
        ({"executor": "inline", "timeout": 5.0}, "cannot end an analysis that hangs"),
        ({"executor": "inline", "jobs": 2}, "is one process; --jobs 2 needs --executor joblib"),
        ({"executor": "dask"}, "--executor dask and --scheduler ADDRESS go together"),
    ],
)
def test_unusable_executors_are_refused_in_words(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        AnalyzeOptions("run", Path("e"), Path("s.duckdb"), **options).check()
    assert text in caught.value.message


@pytest.mark.parametrize("text", ["0/3", "4/3", "a/b", "3", "-1/2", "1/0"])
def test_unusable_shards_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected i/n with i from 1 to n"):
        Shard.parse(text)


def test_the_time_left_is_what_the_rest_costs() -> None:
    from collections import Counter

    costs = Costs(2, Counter(loss=3, hessian=2), {"hessian": 100.0})
    assert costs.seconds_left() is None  # nobody knows what a loss costs
    for seconds in (1.0, 3.0):
        costs.observe("loss", seconds)
    assert costs.seconds_left() == pytest.approx((1 * 2.0 + 2 * 100.0) / 2)
    costs.observe("hessian", 10.0)
    assert costs.seconds_left() == pytest.approx((2.0 + 10.0) / 2)


def test_threads_are_cores_over_jobs_and_never_more_than_the_user_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    from trace_offline.engine import options

    monkeypatch.setattr(options, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert options.choose_jobs(2, 0, 1000) == (2, 4)
    assert options.choose_jobs(16, 0, 1000) == (16, 1)
    for asked, threads in (("1", 1), ("3", 3), ("99", 4), ("", 4), ("many", 4), ("0", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert options.choose_jobs(2, 0, 1000) == (2, threads)


def test_a_run_over_dask_tells_downloads_and_time_left_how_many_workers_there_are(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trace_offline.engine import cluster
    from trace_offline.engine.downloads import Downloads

    def three(units: Any, body: Any, address: Any, timeout: Any, staffed: Any) -> Any:
        staffed(3)
        for unit in units:
            yield unit, body(unit)

    downloads: list[int] = []
    costs: list[int] = []
    left = Costs.seconds_left
    monkeypatch.setattr(cluster, "run_dask", three)
    monkeypatch.setattr(Downloads, "staffed", lambda self, jobs: downloads.append(jobs))
    monkeypatch.setattr(Costs, "seconds_left", lambda self: (costs.append(self.jobs), left(self))[1])
    options: dict[str, Any] = {"executor": "dask", "scheduler": "tcp://127.0.0.1:1", "jobs": 1}
    store = tmp_path / "s.duckdb"
    assert analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), **options).exit_code == 0
    assert downloads == [3]
    assert costs
    assert set(costs) == {3}

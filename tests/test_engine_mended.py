"""What a careful reader broke: shards of chosen steps, reruns of parts, plug-ins that exit, readers that stay."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SmallSeries

from trace_offline import Store, UsageError, analyze, rerun
from trace_offline.checkpoints.discover import discover, select
from trace_offline.core.beside import beside
from trace_offline.core.errors import CheckpointError, StoreError
from trace_offline.core.steps import parse_steps
from trace_offline.core.types import AnalysisStatus, Checkpoint, CheckpointState, Outcome
from trace_offline.engine import execution, executors
from trace_offline.engine.analyze import analyze as run_analysis
from trace_offline.engine.board import Board
from trace_offline.engine.options import AnalyzeOptions, Shard
from trace_offline.engine.progress import Silent
from trace_offline.engine.removed import removed_since
from trace_offline.engine.unit import AnalysisRequest, Unit, WorkSettings
from trace_offline.engine.watch import Watch
from trace_offline.store.connection import connection
from trace_offline.store.writer import Writer


def measured(store: Path, analyzer: str) -> list[int]:
    """Steps with a number of the analyzer, in order."""
    sql = "select distinct step from history where analyzer = ? order by step"
    found: list[int] = Store.open(store).sql(sql, [analyzer]).column(0).to_pylist()
    return found


def six_steps(series: SmallSeries, folder: Path) -> Path:
    """Steps 0, 1, 2, 4, 8 and 16."""
    run = folder / "run"
    shutil.copytree(series.run, run)
    for step, like in ((8, "step0"), (16, "step1")):
        shutil.copytree(run / like, run / f"step{step}")
    for said in run.rglob("trace_offline.json"):
        said.unlink()
    return run


def test_shards_of_chosen_steps_measure_each_of_them_once(small_series: SmallSeries, tmp_path: Path) -> None:
    run = six_steps(small_series, tmp_path)
    names = ("loss", "weight_change")
    found = []
    for index in (1, 2):
        store = tmp_path / f"{index}.duckdb"
        summary = analyze(
            run, small_series.evaluation, store, analyzers=names, jobs=1, steps="1,4,16", shard=Shard(index, 2)
        )
        assert summary.exit_code == 0
        found.append(measured(store, "loss"))
    assert found == [[1, 16], [4]]
    extracts = [{path.name for path in (tmp_path / f"{i}.extracts").rglob("*.safetensors")} for i in (1, 2)]
    assert len(extracts[0] | extracts[1]) == 3  # of three different weights


def test_rerun_repeats_the_steps_that_were_asked_for(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1, steps="1,4")
    analyze(small_series.run, small_series.evaluation, store, analyzers=("weight_change",), jobs=1)
    (again,) = rerun(store, "loss", jobs=1, force=True)
    assert (again.ok, again.checkpoints) == (2, 2)
    assert measured(store, "loss") == [1, 4]
    # An analyzer that was never asked for measures where any was; steps that are named are measured in any case.
    (other,) = rerun(store, "output", jobs=1)
    assert measured(store, "output") == [0, 1, 2, 4]
    assert other.checkpoints == 4
    (named,) = rerun(store, "loss", jobs=1, steps="0")
    assert named.ok == 1
    assert measured(store, "loss") == [0, 1, 4]


def test_rerun_says_when_nothing_of_it_is_left(small_series: SmallSeries, tmp_path: Path) -> None:
    run, store = six_steps(small_series, tmp_path), tmp_path / "s.duckdb"
    analyze(run, small_series.evaluation, store, analyzers=("loss",), jobs=1, steps="16")
    shutil.rmtree(run / "step16")
    with pytest.raises(UsageError, match=r'None of the checkpoints at which run "run" was measured is in .*--source'):
        rerun(store, "loss", jobs=1)


def hub_cache(series: SmallSeries, root: Path) -> Path:
    """Steps 0, 1 and 2 as revisions step1, step2 and step4 of a repository in the hub's cache."""
    folder = root / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    for like, step in ((0, 1), (1, 2), (2, 4)):
        commit = f"{step:040x}"
        shutil.copytree(series.run / f"step{like}", folder / "snapshots" / commit)
        (folder / "snapshots" / commit / "trace_offline.json").unlink(missing_ok=True)
        (folder / "refs" / f"step{step}").write_text(commit)
    return folder


def test_rerun_repeats_every_pattern_of_revisions_once(small_series: SmallSeries, tmp_path: Path) -> None:
    source, store = hub_cache(small_series, tmp_path), tmp_path / "s.duckdb"
    for pattern in ("step1", "step[24]", "step[12]"):
        analyze(source, small_series.evaluation, store, analyzers=("loss",), jobs=1, revisions=pattern)
    assert measured(store, "loss") == [1, 2, 4]
    summaries = rerun(store, "loss", jobs=1, force=True)
    assert sum(item.ok for item in summaries) == 3
    assert not any(item.problems for item in summaries)
    finished = "select count(*), max(sequence) from analyses"
    assert list(Store.open(store).sql(finished).to_pylist()[0].values()) == [3, 6]


def test_rerun_starts_from_parameters_that_failed(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s.duckdb"

    def broken(*_: object, **__: object) -> None:
        raise MemoryError("planned")

    monkeypatch.setattr("trace_offline.analyzers.probe.ProbeAnalyzer.measure", broken)
    first = analyze(
        small_series.run, small_series.evaluation, store, analyzers=("probe",), jobs=1, steps="0",
        params={"probe": {"max_words": 77}},
    )  # fmt: skip
    assert first.failed == 1
    monkeypatch.undo()
    (again,) = rerun(store, "probe", jobs=1)
    assert again.ok == 1
    assert Store.open(store).scalar("select distinct params->>'max_words' from history") == "77"


def exits(self: Any, batch: Any) -> None:
    """A collector of a plug-in that calls ``sys.exit``."""
    sys.exit(0)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_plug_in_that_exits_in_the_pass_costs_its_own_analysis(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    store = tmp_path / "s.duckdb"
    real = execution.run_unit

    def meddling(unit: Any) -> Any:
        if unit.checkpoint.step != 1:
            return real(unit)
        with pytest.MonkeyPatch.context() as patch:  # in a worker as well: the body travels by value
            patch.setattr("trace_offline.analyzers.loss.PredictionCollector.update", exits)
            return real(unit)

    monkeypatch.setattr(execution, "run_unit", meddling)
    names = ("loss", "output")
    summary = analyze(small_series.run, small_series.evaluation, store, analyzers=names, jobs=jobs, steps="0-2")
    assert (summary.ok, summary.failed, summary.crashed) == (5, 1, 0)
    assert summary.problems == ["step 1: loss failed: SystemExit: 0"]


def test_code_of_the_user_that_exits_costs_its_own_checkpoint(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trace_offline.checkpoints import loading

    real = loading.load_model

    def leaves(checkpoint: Any, **rest: Any) -> Any:
        if checkpoint.step == 1:
            sys.exit("no such model")
        return real(checkpoint, **rest)

    monkeypatch.setattr(loading, "load_model", leaves)
    store = tmp_path / "s.duckdb"
    summary = analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1, steps="0-2")
    assert (summary.ok, summary.failed) == (2, 1)
    assert summary.problems == ["step 1: loss failed: SystemExit: no such model"]


READER = """
import sys, duckdb
con = duckdb.connect(sys.argv[1], read_only=True)
print("reading", flush=True)
sys.stdin.readline()
"""


class Listening(Silent):
    """Progress with a reader of another process, which opens the store after the first checkpoint and stays."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.notes: list[str] = []
        self.reader: subprocess.Popen[str] | None = None

    def finished(self, *_: Any) -> None:
        if self.reader is None:
            order = [sys.executable, "-c", READER, str(self.store)]
            self.reader = subprocess.Popen(order, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self.reader.stdout is not None
            assert self.reader.stdout.readline() == "reading\n"

    def note(self, message: str) -> None:
        self.notes.append(message)
        if "waiting for" in message and self.reader is not None:
            self.close()

    def close(self) -> None:
        assert self.reader is not None
        if self.reader.poll() is None:
            self.reader.communicate("\n", timeout=60)


def test_a_reader_that_stays_is_waited_for(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connection.__wrapped__.__kwdefaults__, "patience", 0.3)  # type: ignore[attr-defined]
    monkeypatch.setattr("trace_offline.store.connection._NOTE_AFTER", 0.6, raising=False)
    store = tmp_path / "s.duckdb"
    progress = Listening(store)
    options = AnalyzeOptions(str(small_series.run), small_series.evaluation, store, ("loss",), jobs=1)
    try:
        summary = run_analysis(options, progress)
    finally:
        progress.close()
    assert (summary.ok, summary.exit_code) == (3, 0)
    assert progress.reader is not None
    (said,) = [text for text in progress.notes if "waiting for" in text]
    assert f"another program (PID {progress.reader.pid})" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.duckdb"]


def test_what_could_not_be_stored_is_stored_by_the_next_run(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s.duckdb"
    real, record = execution.run_unit, Writer.record

    def full(self: Writer, outcome: Any, identity: Any) -> None:
        if recorded:  # the second analysis does not fit
            raise StoreError("the disk is full")
        recorded.append(outcome.analysis_id)
        record(self, outcome, identity)

    recorded: list[str] = []
    monkeypatch.setattr(Writer, "record", full)
    with pytest.raises(StoreError, match="the disk is full"):
        analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1)
    board = Board.of(store)
    assert len(board.all_kept()) == 1
    assert sorted(path.name for path in board.folder.iterdir()) == ["done"]
    monkeypatch.undo()
    begun: list[int] = []

    def counting(unit: Any) -> Any:
        begun.append(unit.checkpoint.step)
        return real(unit)

    monkeypatch.setattr(execution, "run_unit", counting)
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1)
    assert begun == [2]  # 0 was stored, 1 lay on the board
    assert measured(store, "loss") == [0, 1, 2, 4]
    assert not board.folder.exists()


def test_reading_beside_a_run_in_the_same_program(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1, steps="0")
    over, counts, errors = threading.Event(), [], []

    def read() -> None:
        while not over.is_set():
            try:
                counts.append(Store.open(store).scalar("select count(*) from history"))
            except Exception as error:
                errors.append(error)
            time.sleep(0.02)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        summary = analyze(small_series.run, small_series.evaluation, store, analyzers=("loss", "output"), jobs=1)
    finally:
        over.set()
        reader.join()
    assert summary.exit_code == 0
    assert errors == []
    assert counts
    assert counts == sorted(counts)


def test_a_connection_left_open_in_the_same_program_is_named(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import duckdb

    monkeypatch.setitem(connection.__wrapped__.__kwdefaults__, "patience", 0.3)  # type: ignore[attr-defined]
    store = tmp_path / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1, steps="0")
    with duckdb.connect(str(store), read_only=True), pytest.raises(StoreError, match="in this very program"):
        analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "null"])
def test_a_board_cut_off_by_a_loss_of_power_is_measured_again(
    small_series: SmallSeries, tmp_path: Path, content: str
) -> None:
    store = tmp_path / "s.duckdb"
    board = Board.of(store)
    board.open()
    for name in ("done/abc.json", "host-1.json", "progress.json"):
        (board.folder / name).write_text(content)
    assert board.all_kept() == []
    assert board.read() == []
    assert board.read_progress() is None or content == '{"pid": 1}'
    if content == "":
        board.open()
        (board.folder / "done" / "abc.json").write_text(content)
        found = analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1, steps="0")
        assert found.ok == 1
        assert not board.folder.exists()


def test_an_analysis_that_ended_when_its_time_was_over_counts_once(tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    board.open()
    checkpoint = Checkpoint("step1", "hf_folder", CheckpointState.COMPLETE, step=1)
    requests = tuple(AnalysisRequest(name, name, "1", {}) for name in ("ended", "hangs"))
    unit = Unit(checkpoint, requests, WorkSettings("e", "e", "cpu", "float32", 0, 1))
    done = Outcome("ended", AnalysisStatus.OK)
    board.keep(done)
    pool = executors._Pool(iter(()), lambda _: [], 1, board, 1.0)
    hung = {"ended": "took too long", "hangs": "took too long"}
    assert list(pool._settle(unit, ("ended", "hangs"), hung)) == [
        (unit, [done, Outcome("hangs", AnalysisStatus.CRASHED, "hangs took too long")])
    ]


def test_stores_whose_names_differ_after_a_dot_share_nothing(tmp_path: Path) -> None:
    names = ("pythia-1.4b", "pythia-1.2b", "a.db", "a.duckdb", "a")
    assert len({Board.of(tmp_path / name).folder for name in names}) == 5
    found = {name: beside(tmp_path / name, ".extracts").name for name in names}
    assert found["a.duckdb"] == "a.extracts"  # as ever
    assert len({found[name] for name in ("pythia-1.4b", "pythia-1.2b", "a.db", "a.duckdb")}) == 4
    (tmp_path / "old.extracts").mkdir()  # of an earlier release
    assert beside(tmp_path / "old.db", ".extracts").name == "old.extracts"
    (tmp_path / "old.duckdb").touch()  # no: of this one
    assert beside(tmp_path / "old.db", ".extracts").name == "old.db.extracts"


def watching(series: SmallSeries, run: Path, store: Path, *analyzers: str, **rest: Any) -> Watch:
    options = AnalyzeOptions(str(run), series.evaluation, store, analyzers, jobs=1, **rest)
    return Watch(options, interval=0.01, quiet=0.0)


def whole_series(series: SmallSeries, store: Path, *analyzers: str) -> Path:
    analyze(series.run, series.evaluation, store, analyzers=analyzers, jobs=1)
    return store


COMPARED = "select * exclude (is_latest, checkpoint) from history where analyzer = 'weight_change' order by all"


def test_watch_compares_a_series_that_is_complete(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    summary = watching(small_series, small_series.run, store, "weight_change").run()
    assert (summary.ok, summary.exit_code) == (4, 0)
    whole = whole_series(small_series, tmp_path / "whole.duckdb", "weight_change")
    assert Store.open(store).sql(COMPARED).equals(Store.open(whole).sql(COMPARED))
    again = watching(small_series, small_series.run, store, "weight_change").run()
    assert (again.ok, again.failed) == (0, 0)


@pytest.mark.parametrize("stopped", [False, True])
def test_watch_compares_what_the_training_removed(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    run, store = tmp_path / "run", tmp_path / "s.duckdb"
    watch = watching(small_series, run, store, "loss", "weight_change")
    coming = [0, 1, 2, 4]

    def wait(seconds: float) -> None:
        if coming:  # the training keeps its last checkpoint only
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(small_series.run / f"step{coming[0]}", run / f"step{coming.pop(0)}")
        else:
            watch.quiet = 0.0
            watch.stop.requested = stopped

    watch.quiet = None
    monkeypatch.setattr(watch, "_wait", wait)
    summary = watch.run()
    assert summary.exit_code == (130 if stopped else 0)
    assert summary.problems == []
    assert measured(store, "loss") == [0, 1, 2, 4]
    whole = Store.open(whole_series(small_series, tmp_path / "whole.duckdb", "weight_change"))
    exact = "select step, layer, component, metric, value from history where analyzer = 'weight_change' order by all"
    assert Store.open(store).sql(exact).to_pylist() == whole.sql(exact).to_pylist()


def test_watch_leaves_out_what_an_earlier_training_saved_into_the_folder(
    small_series: SmallSeries, tmp_path: Path
) -> None:
    run, store = tmp_path / "run", tmp_path / "s.duckdb"
    for begun, steps in ((1e9, (1, 2)), (1.1e9, (0, 1))):  # the second training has come to its step 1
        shutil.rmtree(run, ignore_errors=True)
        for step in steps:
            folder = shutil.copytree(small_series.run / f"step{step}", run / f"step{step}")
            for path in folder.iterdir():
                os.utime(path, (begun + step, begun + step))
        watching(small_series, run, store, "weight_change").run()
    with Writer.open(store) as writer:
        here = select(discover(str(run)))
        assert removed_since(writer, "run", here) == []
        os.rename(run / "step1", tmp_path / "step1")  # of the one that goes on
        assert [item.step for item in removed_since(writer, "run", here[:1])] == [1]


def test_watch_says_when_nothing_ever_came(small_series: SmallSeries, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"watch saw no checkpoint in .*nowhere.*--quiet.*trace-offline discover"):
        watching(small_series, tmp_path / "nowhere", tmp_path / "s.duckdb", "loss").run()
    assert not (tmp_path / "s.duckdb").exists()


@pytest.mark.parametrize("analyzers", [("loss",), ("loss", "weight_change")])
def test_watch_waits_for_the_steps_it_was_asked_for(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, analyzers: tuple[str, ...]
) -> None:
    run, store = tmp_path / "run", tmp_path / "s.duckdb"
    watch = watching(small_series, run, store, *analyzers, steps=parse_steps("2-9"))
    watch.quiet = None
    coming = [0, 1, 2, 4]

    def wait(seconds: float) -> None:
        if coming:
            shutil.copytree(small_series.run / f"step{coming[0]}", run / f"step{coming.pop(0)}")
        else:
            watch.quiet = 0.0

    monkeypatch.setattr(watch, "_wait", wait)
    assert watch.run().exit_code == 0
    assert measured(store, "loss") == [2, 4]
    assert measured(store, "weight_change") == ([0, 1, 2, 4] if len(analyzers) > 1 else [])


def test_an_extract_that_fails_where_nothing_is_compared_is_a_failure(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError("planned")

    monkeypatch.setattr("trace_offline.analyzers.weight_change.WeightChangeAnalyzer.extract", broken)
    summary = analyze(
        small_series.run, small_series.evaluation, tmp_path / "s.duckdb", analyzers=("weight_change",), jobs=1,
        shard=Shard(1, 2),
    )  # fmt: skip
    assert summary.exit_code == 1
    assert summary.problems[0] == "step 0: weight_change (extract) failed: MemoryError: planned"

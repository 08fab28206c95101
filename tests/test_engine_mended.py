"""What a careful reader broke: plug-ins that exit, readers that stay, boards cut off, names that look alike."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SmallSeries, measured

from trace_offline import Store, analyze
from trace_offline.core.beside import beside
from trace_offline.core.errors import StoreError
from trace_offline.core.types import AnalysisStatus, Checkpoint, CheckpointState, Outcome
from trace_offline.engine import execution, executors
from trace_offline.engine.analyze import analyze as run_analysis
from trace_offline.engine.board import Board
from trace_offline.engine.options import AnalyzeOptions, Shard
from trace_offline.engine.progress import Silent
from trace_offline.engine.unit import AnalysisRequest, Unit, WorkSettings
from trace_offline.store.connection import connection
from trace_offline.store.writer import Writer


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

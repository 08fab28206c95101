"""Runs killed with SIGKILL at random moments: nothing acknowledged is lost, nothing is there or computed twice."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SmallSeries
from drills import PLUG_INS, Drill, Witness, nothing_left, places, same_content, save_steps, until

from trace_offline import Store
from trace_offline.core.errors import StoreError
from trace_offline.engine.board import Board
from trace_offline.store.writer import Writer


@pytest.mark.parametrize(
    ("kills", "analyzers"),
    [(5, ("first", "second")), pytest.param(50, (*PLUG_INS, "weight_change"), marks=pytest.mark.slow)],
)
def test_killed_runs_lose_nothing_acknowledged_and_do_nothing_twice(
    small_series: SmallSeries, tmp_path: Path, kills: int, analyzers: tuple[str, ...]
) -> None:
    chance = random.Random(kills)
    drill, run, store = Drill(tmp_path / "drill"), tmp_path / "run", tmp_path / "s.duckdb"
    steps, single = 5, sum(name in PLUG_INS for name in analyzers)
    save_steps(run, range(steps))
    witness, killed, before, window = Witness(store, drill), 0, 0, 1.0
    while killed < kills:
        process = drill.start(run, small_series.evaluation, store, analyzers=analyzers)
        time.sleep(chance.uniform(0, window))
        killed += process.kill()
        assert process.code in (0, -signal.SIGKILL), drill.said()
        there = witness.look()
        # Now before anything is stored, now after several: whatever the machine is busy with.
        window = min(30.0, window * (0.8 if there > before + 2 else 1.25 if there == before else 1.0))
        before = there
        if len(places(Store.open(store)) if store.exists() else ()) >= single * steps - 3:
            save_steps(run, range(steps, steps + 3))  # the training goes on, so that there is always more to do
            steps += 3
    assert drill.run(run, small_series.evaluation, store, analyzers=analyzers) == 0, drill.said()
    assert witness.look() > 0
    whole = Drill(tmp_path / "whole")
    assert whole.run(run, small_series.evaluation, tmp_path / "whole.duckdb", analyzers=analyzers) == 0, whole.said()
    same_content(store, tmp_path / "whole.duckdb")
    nothing_left(store)
    assert "Traceback" not in drill.said()
    # And once more there is nothing to do.
    ran = drill.ran()
    assert drill.run(run, small_series.evaluation, store, analyzers=analyzers) == 0
    assert drill.ran() == ran


@pytest.mark.slow
@pytest.mark.parametrize("workers_too", [True, False])
def test_a_killed_command_and_its_workers(small_series: SmallSeries, tmp_path: Path, workers_too: bool) -> None:
    chance = random.Random(7)
    drill, run, store = Drill(tmp_path / "drill", {"DRILL_PAUSE": "0.2"}), tmp_path / "run", tmp_path / "s.duckdb"
    save_steps(run, range(14))
    witness = Witness(store, drill)
    for _ in range(3):
        there = witness.look()
        process = drill.command(run, small_series.evaluation, store, "--jobs", "2")
        until(lambda there=there: witness.store.exists() and Store.open(store).scalar(
            "select count(*) from analyses where status = 'ok'") > there)  # fmt: skip
        time.sleep(chance.uniform(0, 1.5))
        # Workers of a run that was killed alone end by themselves; the next run begins while they may still be there.
        (os.killpg if workers_too else os.kill)(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    if workers_too:
        witness.look()
    process = drill.command(run, small_series.evaluation, store, "--jobs", "2")
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    whole = Drill(tmp_path / "whole")
    assert whole.run(run, small_series.evaluation, tmp_path / "whole.duckdb") == 0, whole.said()
    same_content(store, tmp_path / "whole.duckdb")
    nothing_left(store)


def test_a_lock_that_a_killed_run_left_holds_nobody_up(small_series: SmallSeries, tmp_path: Path) -> None:
    drill, store = Drill(tmp_path / "drill", {"DRILL_PAUSE": "0.5"}), tmp_path / "s.duckdb"
    lock = Path(f"{store}.lock")
    process = drill.start(small_series.run, small_series.evaluation, store)
    until(lambda: bool(drill.ran()))
    assert lock.read_text().startswith(f"process {process.pid} on ")
    assert process.kill()
    assert lock.exists()
    lock.write_text(f"process {os.getpid()} on {os.uname().nodename} since 2026-01-01 00:00 UTC")  # that one is alive
    drill.more.clear()
    assert drill.run(small_series.run, small_series.evaluation, store) == 0, drill.said()
    assert Store.open(store).scalar("select count(*) from analyses where status = 'ok'") == 9
    nothing_left(store)


def test_who_holds_the_store_is_said(small_series: SmallSeries, tmp_path: Path) -> None:
    drill, store = Drill(tmp_path / "drill"), tmp_path / "s.duckdb"
    with Writer.open(store):
        assert drill.run(small_series.run, small_series.evaluation, store) == 2
        assert f"Another run is writing to {store} (process {os.getpid()} on " in drill.said()
        assert "UTC holds s.duckdb.lock). Wait for it to end, or give --store another file." in drill.said()
        assert "Traceback" not in drill.said()
        # A mark that is not ours is neither believed nor overwritten.
        Path(f"{store}.lock").write_text("1\nother\n")
        with pytest.raises(StoreError, match=r"\(it holds s\.duckdb\.lock\)"):
            Writer.open(store)
        assert Path(f"{store}.lock").read_text() == "1\nother\n"
    assert not drill.ran()


def test_what_a_killed_run_left_of_a_store_that_is_gone(tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    with Writer.open(store):
        pass
    code = (
        "import duckdb, os, signal, sys; con = duckdb.connect(sys.argv[1]); con.execute('create table t (a int)');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    for path in (store, store.with_name("s.duckdb.new")):
        subprocess.run([sys.executable, "-c", code, str(path)], check=False)
        assert Path(f"{path}.wal").exists()
    store.unlink()
    with Writer.open(store) as writer:
        assert writer.read("select count(*) from analyses") == [(0,)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.duckdb"]


def test_a_damaged_board_costs_what_was_on_it(small_series: SmallSeries, tmp_path: Path) -> None:
    drill, store = Drill(tmp_path / "drill", {"DRILL_PAUSE": "0.3"}), tmp_path / "s.duckdb"
    process = drill.start(small_series.run, small_series.evaluation, store)
    done = Board.of(store).folder / "done"
    until(lambda: len(list(done.glob("*.json"))) >= 2)
    process.kill()
    kept = sorted(done.glob("*.json"))
    kept[0].write_bytes(b"")  # a power failure: the name is there, the bytes are not
    kept[1].write_text('{"analysis_id": "of another release"}')
    drill.more.clear()
    assert drill.run(small_series.run, small_series.evaluation, store) == 0, drill.said()
    assert Store.open(store).scalar("select count(*) from analyses where status = 'ok'") == 9


def test_half_written_files_of_killed_runs_are_removed(small_series: SmallSeries, tmp_path: Path) -> None:
    drill, store = Drill(tmp_path / "drill"), tmp_path / "s.duckdb"
    left = [tmp_path / "s.extracts" / "weight_change" / "x.safetensors.1.new", tmp_path / "s.artifacts" / "y.txt.new"]
    for path in left:
        path.parent.mkdir(parents=True)
        path.write_text("half")
    assert drill.run(small_series.run, small_series.evaluation, store) == 0, drill.said()
    assert not any(path.exists() for path in left)
    assert len(list((tmp_path / "s.artifacts").rglob("*.txt"))) == 9


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_twice_stops_now_and_keeps_what_was_finished(
    small_series: SmallSeries, tmp_path: Path, jobs: int
) -> None:
    drill, store = Drill(tmp_path / "drill"), tmp_path / "s.duckdb"
    drill.order("third", 0, "hang once")
    process = drill.command(small_series.run, small_series.evaluation, store, "--jobs", str(jobs))
    board = Board.of(store)
    until(lambda: any(item.task == "third" and item.checkpoint == "step 0" for item in board.read()))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Finishing the checkpoints under way; press Ctrl-C again to stop at once." in said
    assert "Interrupted. What was finished is stored; the same command goes on from there." in said
    assert "Traceback" not in said
    before = drill.ran()
    assert before["first", 0] == before["second", 0] == 1
    assert drill.run(small_series.run, small_series.evaluation, store) == 0, drill.said()
    # The two that were finished beside the one that hung could not be stored any more, and are not computed again.
    assert drill.ran()["first", 0] == drill.ran()["second", 0] == 1
    assert Store.open(store).scalar("select count(*) from analyses where status = 'ok'") == 9
    nothing_left(store)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_once_and_again_until_all_is_done(small_series: SmallSeries, tmp_path: Path, jobs: int) -> None:
    # Slow enough that a signal sent after the first analysis comes before the last, on a busy machine too.
    drill, run, store = Drill(tmp_path / "drill", {"DRILL_PAUSE": "0.4"}), tmp_path / "run", tmp_path / "s.duckdb"
    shutil.copytree(small_series.run, run)
    save_steps(run, range(10, 18))
    witness, codes, there = Witness(store, drill), [], 0
    while there < 3 * 11:
        assert len(codes) < 12
        process = drill.command(run, small_series.evaluation, store, "--jobs", str(jobs))
        until(lambda there=there, process=process: process.poll() is not None or (store.exists() and Store.open(
            store).scalar("select count(*) from analyses where status = 'ok'") > there))  # fmt: skip
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=120)
        codes.append(process.returncode)
        there = witness.look()
        # The last one may be through, and its summary printed, before the signal comes.
        assert process.returncode in (0, 130) or there == 3 * 11, said
        assert "Traceback" not in said
    assert codes.count(130) >= 2
    assert set(drill.ran().values()) == {1}
    nothing_left(store)

"""Checkpoints that change under a run, disks that are full, readers that look on: no wrong number, no half of one."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import SmallSeries
from drills import (
    LAYERS,
    PLUG_INS,
    Drill,
    contents,
    enlarge,
    environment,
    nothing_left,
    same_content,
    save_steps,
    small_disk,
    until,
)

from trace_offline import Store, analyze
from trace_offline.checkpoints.discover import discover
from trace_offline.checkpoints.fingerprint import fingerprint
from trace_offline.core.errors import StoreError
from trace_offline.core.types import AnalysisStatus, Outcome
from trace_offline.engine.board import Board
from trace_offline.engine.series import SeriesPlan
from trace_offline.engine.unit import AnalysisRequest, WorkSettings
from trace_offline.store.writer import Writer

FULL = "The disk is full (or a quota is reached): free some space and run the same command again"


def weights(folder: Path, step: int) -> Path:
    return folder / f"step{step}" / "model.safetensors"


def totals(store: Path) -> dict[tuple[str, str], float]:
    """(fingerprint, analyzer) → the sum of the weights that it saw."""
    rows = Store.open(store).sql(
        """select a.fingerprint, a.analyzer, m.value from analyses a join measurements m using (analysis)
        where m.layer = 0 and m.metric = 'weight'"""
    )
    return {(row["fingerprint"], row["analyzer"]): row["value"] for row in rows.to_pylist()}


def others(folder: Path, where: Path, shift: int) -> Path:
    """Checkpoints of the same steps and sizes with other weights."""
    save_steps(where / "more", range(shift, shift + len(list(folder.glob("step*")))))
    for path in (where / "more").glob("step*"):
        path.rename(where / f"step{int(path.name[4:]) - shift}")
    return where


def truth(*folders: Path) -> dict[tuple[str, str], Any]:
    """What the weights in these folders really sum to, read without any of the engine."""
    from safetensors.torch import load_file

    found = {}
    for item in [item for folder in folders for item in discover(str(folder))]:
        total = sum(tensor.double().sum().item() for tensor in load_file(item.weight_files[0]).values())
        found.update({(fingerprint(item), name): pytest.approx(total, rel=1e-12) for name in PLUG_INS})
    return found


def all_true(store: Path, known: dict[tuple[str, str], Any]) -> bool:
    """Whether every number belongs to the weights it stands under."""
    return all(known[key] == value for key, value in totals(store).items())


def test_checkpoints_damaged_while_a_run_is_under_way(small_series: SmallSeries, tmp_path: Path) -> None:
    drill, run, store = Drill(tmp_path / "drill"), tmp_path / "run", tmp_path / "s.duckdb"
    save_steps(run, range(6))
    other = others(run, tmp_path / "other", 100)
    known = truth(run, other)
    # Before they are read: truncated, overwritten in place, another file under the same name, deleted.
    drill.order("first", 0, f"truncate {weights(run, 2)}")
    drill.order("second", 0, f"overwrite {weights(other, 3)} {weights(run, 3)}")
    drill.order("third", 0, f"replace {weights(other, 4)} {weights(run, 4)}")
    drill.order("first", 1, f"remove {run / 'step5'}")
    # While it is measured: what was loaded stays what it was.
    drill.order("second", 1, f"overwrite {weights(other, 1)} {weights(run, 1)}")
    assert drill.run(run, small_series.evaluation, store) == 1, drill.said()
    said = drill.said()
    assert "Traceback" not in said
    for step in (2, 3, 4):
        assert said.count(f"step {step}: ") == len(PLUG_INS)
        assert f"{run / f'step{step}'} changed after the run began; what is there now is another checkpoint." in said
    assert f"{weights(run, 5)} is gone or cannot be read" in said
    status = Store.open(store).sql("select step, status, count(*) as n from status group by all order by all")
    assert status.to_pylist() == [
        {"step": step, "status": "ok" if step < 2 else "failed", "n": len(PLUG_INS)} for step in range(6)
    ]
    assert len(totals(store)) == 2 * len(PLUG_INS)
    assert all_true(store, known)
    # Other weights at a step could be another training: whoever says that they are not has them measured.
    shutil.rmtree(drill.folder / "orders")
    assert drill.run(run, small_series.evaluation, store) == 2
    assert '--run "run"' in drill.said()
    assert drill.run(run, small_series.evaluation, store, run="run") == 0, drill.said()
    assert f"{run / 'step2'}: " in drill.said()
    assert "so it is probably still being written: look again later" in drill.said()
    assert all_true(store, known)
    rows = Store.open(store).sql(
        "select step, value from history where is_latest and layer = 0 and analyzer = 'third' order by step"
    )
    now = [truth(run / f"step{step}") for step in (0, 1, 3, 4)]
    assert [row["step"] for row in rows.to_pylist()] == [0, 1, 3, 4]
    assert all(row["value"] in each.values() for row, each in zip(rows.to_pylist(), now, strict=True))


def test_weights_that_are_overwritten_while_they_are_measured(small_series: SmallSeries, tmp_path: Path) -> None:
    """The loaded network holds no view of the file: neither its numbers nor the process depend on it any more."""
    drill, run, store = Drill(tmp_path / "drill"), tmp_path / "run", tmp_path / "s.duckdb"
    save_steps(run, range(3))
    known = truth(run)
    other = others(run, tmp_path / "other", 100)
    drill.order("first", 0, f"overwrite {weights(other, 0)} {weights(run, 0)}")
    drill.order("first", 1, f"truncate {weights(run, 1)}")
    drill.order("first", 2, f"remove {run / 'step2'}")
    assert drill.run(run, small_series.evaluation, store) == 0, drill.said()
    assert totals(store).keys() == known.keys()
    assert all_true(store, known)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_no_number_ever_stands_under_other_weights(small_series: SmallSeries, tmp_path: Path, seed: int) -> None:
    """A thread replaces and deletes checkpoints at random moments of a run."""
    chance = random.Random(seed)
    drill, run, store = Drill(tmp_path / "drill", {"DRILL_PAUSE": "0.02"}), tmp_path / "run", tmp_path / "s.duckdb"
    save_steps(run, range(16))
    other = others(run, tmp_path / "other", 100)
    known = truth(run, other)
    over = threading.Event()

    def meddle() -> None:
        left = list(range(16))
        while left and not over.wait(chance.uniform(0, 0.15)):
            step = left.pop(chance.randrange(len(left)))
            source, target = weights(other, step), weights(run, step)
            verb = chance.choice(("overwrite", "replace", "remove"))
            if verb == "overwrite":
                with target.open("r+b") as file:
                    file.write(source.read_bytes())
            elif verb == "replace":
                shutil.copyfile(source, tmp_path / "fresh")
                os.replace(tmp_path / "fresh", target)
            else:
                shutil.rmtree(target.parent)

    process = drill.start(run, small_series.evaluation, store)
    thread = threading.Thread(target=meddle)
    thread.start()
    code = process.wait()
    over.set()
    thread.join()
    assert code in (0, 1, 2), drill.said()
    assert "Traceback" not in drill.said()
    assert drill.run(run, small_series.evaluation, store, run="run") == 0, drill.said()
    assert totals(store)
    assert all_true(store, known)


def test_the_disk_of_the_store_is_full(small_series: SmallSeries, tmp_path: Path) -> None:
    drill, run = Drill(tmp_path / "drill", {"DRILL_ARRAY": "60000"}), tmp_path / "run"
    save_steps(run, range(6))
    with small_disk(tmp_path / "disk", "12m") as disk:
        store = disk / "s.duckdb"
        assert drill.run(run, small_series.evaluation, store) == 2
        said = drill.said()
        assert f"Error: Could not write to the store {store}: " in said
        assert f"No space left on device. {FULL}; everything stored so far is safe" in said
        assert "Traceback" not in said
        there, ran = contents(Store.open(store)), drill.ran()
        assert 1 <= len(there) < 18
        assert drill.run(run, small_series.evaluation, store) == 2  # nothing was freed
        assert there.items() <= contents(Store.open(store)).items()
        enlarge(disk, "100m")
        assert drill.run(run, small_series.evaluation, store) == 0, drill.said()
        assert there.items() <= contents(Store.open(store)).items()
        assert sum(drill.ran().values()) - sum(ran.values()) <= 18 - len(there) + 3  # one unit at most was tried twice
        assert "Traceback" not in drill.said()
        assert totals(store).keys() == truth(run).keys()
        assert all_true(store, truth(run))
        nothing_left(store)


def test_a_limit_on_the_size_of_files_is_a_full_disk(small_series: SmallSeries, tmp_path: Path) -> None:
    drill, run, store = Drill(tmp_path / "drill", {"DRILL_ARRAY": "30000"}), tmp_path / "run", tmp_path / "s.duckdb"
    save_steps(run, range(4))
    assert drill.run(run, small_series.evaluation, store, largest_file=2_000_000) == 2
    assert "Could not write to the store" in drill.said()
    assert FULL in drill.said()
    assert "Traceback" not in drill.said()
    there = contents(Store.open(store))
    assert 1 <= len(there) < 12
    assert drill.run(run, small_series.evaluation, store) == 0, drill.said()
    assert there.items() <= contents(Store.open(store)).items()
    assert len(contents(Store.open(store))) == 12
    nothing_left(store)


def test_a_full_disk_for_the_lock_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("filelock.FileLock.acquire", full)
    with pytest.raises(StoreError) as caught:
        Writer.open(tmp_path / "s.duckdb")
    assert FULL in caught.value.message


def test_a_full_disk_for_the_cache_costs_the_cache_only(small_series: SmallSeries, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "96k") as disk:
        summary = analyze(
            small_series.run, small_series.evaluation, tmp_path / "s.duckdb", analyzers=("geometry",), jobs=1,
            cache=str(disk),
        )  # fmt: skip
        assert (summary.ok, summary.exit_code) == (3, 0)
        assert (
            sum("cannot be written" in text and "the run goes on without it" in text for text in summary.warnings) == 3
        )
        assert not list(disk.glob("*.new"))


def test_a_full_disk_for_extracts_is_said_and_made_good(small_series: SmallSeries, tmp_path: Path) -> None:
    store, names = tmp_path / "s.duckdb", ("loss", "weight_change")
    with small_disk(tmp_path / "disk", "150k") as disk:  # room for one of the three
        (tmp_path / "s.extracts").symlink_to(disk)
        summary = analyze(small_series.run, small_series.evaluation, store, analyzers=names, jobs=1)
        bad = [text for text in summary.problems if "weight_change" in text]
        assert summary.failed == len(bad) >= 2
        assert all(
            f"Could not write to the extracts beside the store {tmp_path / 's.extracts'}" in text for text in bad
        )
        assert all(FULL in text and "Traceback" not in text for text in bad)
        assert not list(disk.rglob("*.new"))
        enlarge(disk, "10m")
        summary = analyze(small_series.run, small_series.evaluation, store, analyzers=names, jobs=1)
        assert (summary.failed, summary.exit_code) == (0, 0)
        analyze(small_series.run, small_series.evaluation, tmp_path / "whole.duckdb", analyzers=names, jobs=1)
        same_content(store, tmp_path / "whole.duckdb")


def test_a_full_disk_for_the_board_costs_the_view_only(small_series: SmallSeries, tmp_path: Path) -> None:
    drill, store = Drill(tmp_path / "drill"), tmp_path / "s.duckdb"
    with small_disk(tmp_path / "disk", "16k") as disk:
        with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        Board.of(store).folder.symlink_to(disk)
        assert drill.run(small_series.run, small_series.evaluation, store) == 0, drill.said()
        assert len(contents(Store.open(store))) == 9


def test_a_mark_that_cannot_be_written_is_not_written_by_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SeriesPlan("run", (), WorkSettings("e", "e", "cpu", "float32", 0, 1), tmp_path, {})
    request = AnalysisRequest("id", "weight_change", "1", {}, str(tmp_path / "x.safetensors"))
    outcome = Outcome("id", AnalysisStatus.NOT_APPLICABLE, "not applicable because it is a drill")

    def full(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        plan.extracted(request, outcome)
    assert not (tmp_path / "x.not_applicable").exists()  # an empty one would say so without a reason for ever
    assert plan._lost("id", tmp_path / "x.safetensors") == outcome
    plan.extracted(request, outcome)
    assert (tmp_path / "x.not_applicable").read_text() == outcome.message


def test_a_reader_never_sees_half_of_an_analysis(small_series: SmallSeries, tmp_path: Path) -> None:
    """This process asks without a pause; ``query`` and ``status`` ask beside it."""
    drill, run, store = Drill(tmp_path / "drill", {"DRILL_PAUSE": "0.05"}), tmp_path / "run", tmp_path / "s.duckdb"
    save_steps(run, range(8))
    process = drill.start(run, small_series.evaluation, store)
    until(store.exists)
    command = [sys.executable, "-m", "trace_offline.cli.main"]
    sql = (
        "select analysis_id, count(*) as n from history group by 1 "
        f"having n <> {LAYERS} union all select 'seen', count(*) from analyses"
    )
    whole = {**os.environ, **environment(drill.folder)}
    verbs = (["query", str(store), sql, "--format", "csv"], ["status", str(store)])
    beside = [
        subprocess.Popen([*command, *verb], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=whole)
        for verb in verbs
    ]
    looks = [0]
    while looks[-1] < 3 * 8:
        found = contents(Store.open(store))  # asserts that each is whole
        looks.append(len(found))
        assert looks[-1] >= looks[-2]
        assert all((tmp_path / path).exists() for path in artifacts(store))
    assert process.wait() == 0, drill.said()
    assert len(set(looks)) > 5  # it was watched on its way
    for reader in beside:
        answer, said = reader.communicate(timeout=60)
        assert (reader.returncode, said) == (0, "")
        assert "Traceback" not in answer
    nothing_left(store)


def artifacts(store: Path) -> list[str]:
    return [str(path) for path in Store.open(store).sql("select path from artifacts").column(0).to_pylist()]

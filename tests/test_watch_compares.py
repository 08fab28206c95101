"""Comparisons of a series that a training still writes, and of what it has removed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SmallSeries, measured

from trace_offline import Store, analyze
from trace_offline.checkpoints.discover import discover, select
from trace_offline.core.errors import CheckpointError
from trace_offline.core.steps import parse_steps
from trace_offline.engine.options import AnalyzeOptions
from trace_offline.engine.removed import removed_since
from trace_offline.engine.watch import Watch
from trace_offline.store.writer import Writer


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

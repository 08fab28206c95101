"""Shards and reruns measure what was asked for, from what is there, once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import SmallSeries, measured

from trace_offline import Store, UsageError, analyze, rerun
from trace_offline.engine.options import Shard


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

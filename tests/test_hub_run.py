"""A whole run over the revisions of a hub repository: one ahead, none twice, offline when cached."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SmallSeries, shared_data
from hub_server import Hub, Repository, files_of, serve

from trace_offline import CheckpointError, Store, UsageError, analyze, build_evaluation_set, rerun
from trace_offline.checkpoints.hub_tokenizer import fetch_tokenizer
from trace_offline.cli.config import merge_settings, read_config
from trace_offline.cli.status import running
from trace_offline.engine.options import AnalyzeOptions

REPO = "hf://org/tiny"


@pytest.fixture
def server(small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    repository = Repository()
    for step, names in ((0, ("step0",)), (1, ("step1",)), (2, ("step2", "main")), (4, ("step4",))):
        files = files_of(small_series.run / f"step{step}")
        files.pop("trace_offline.json")
        files["README.md"] = str(step).encode()  # another commit, also where the weights are the same
        repository.commit(files, *names)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with serve({"org/tiny": repository}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def downloads(server: Hub) -> list[str]:
    return [line for line in server.requests if line.startswith("GET") and "model.safetensors" in line]


def test_a_series_on_the_hub(
    server: Hub, small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, local = tmp_path / "s.duckdb", tmp_path / "local.duckdb"
    order = {"analyzers": ("loss",), "jobs": 1, "revisions": "step*"}
    summary = analyze(REPO, small_series.evaluation, store, **order)
    assert summary.exit_code == 0, summary.problems
    assert summary.run == "org/tiny"
    # steps 2 and 4 hold the same bytes, which the cache keeps once
    assert len(downloads(server)) == 3
    analyze(small_series.run, small_series.evaluation, local, analyzers=("loss",), jobs=1)
    question = "select step, metric, value, stderr from history order by all"
    assert Store.open(store).sql(question).to_pylist() == Store.open(local).sql(question).to_pylist()
    assert set(Store.open(store).sql("select checkpoint from history").column(0).to_pylist()) == {
        "step0", "step1", "step2", "step4",
    }  # fmt: skip

    server.forget()
    again = analyze(REPO, small_series.evaluation, store, **order)
    assert (again.ok, again.already_done) == (0, 4)
    assert downloads(server) == []

    server.forget()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = analyze(REPO, small_series.evaluation, tmp_path / "offline.duckdb", **order)
    assert offline.exit_code == 0, offline.problems
    assert server.requests == []
    assert (
        Store.open(tmp_path / "offline.duckdb").sql(question).to_pylist() == Store.open(store).sql(question).to_pylist()
    )


def test_a_pattern_that_matches_nothing(server: Hub, small_series: SmallSeries, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no revision that matches"):
        analyze(REPO, small_series.evaluation, tmp_path / "s.duckdb", revisions="epoch*")


def test_the_tokenizer_alone(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hf://org/tiny@main holds no tokenizer"):
        fetch_tokenizer(REPO)
    with pytest.raises(CheckpointError, match="nothing"):
        fetch_tokenizer("hf://org/nothing")
    repository = Repository()
    repository.commit(files_of(shared_data("stories260K_hf")), "main")
    with serve({"org/stories": repository}) as running:
        folder = fetch_tokenizer("hf://org/stories", endpoint=running.endpoint)
        assert downloads(running) == []
        (tmp_path / "text.txt").write_text("Once upon a time there was a cat.")
        made = build_evaluation_set(tmp_path / "e", [tmp_path / "text.txt"], tokenizer=folder)
        assert made.n_examples == 1


def cached(tmp_path: Path) -> list[str]:
    """Weights and parts of weights in the cache."""
    folder = tmp_path / "home/hub/models--org--tiny"
    return sorted(path.name for path in (*folder.glob("snapshots/*/model.safetensors"), *folder.glob("blobs/*")))


QUESTION = "select step, analyzer, metric, layer, task, label, value, stderr from history where is_latest order by all"


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_removed_after_use_and_downloaded_again_for_a_rerun(
    server: Hub, small_series: SmallSeries, tmp_path: Path, jobs: int
) -> None:
    store, kept = tmp_path / "s.duckdb", tmp_path / "kept.duckdb"
    order = {"analyzers": ("loss", "similarity"), "jobs": jobs, "revisions": "step*"}
    # room for two: with two workers the second has to wait for what the first has used
    size = sum(path.stat().st_size for path in (small_series.run / "step0").iterdir())
    limit = f"{int(2.5 * size)}B"
    server.portion, server.pause = size // 4, 0.02
    options = {"hub_disk_limit": limit, "remove_downloads": True}
    summary = analyze(REPO, small_series.evaluation, store, **order, **options)
    assert summary.exit_code == 0, summary.problems
    measured = Store.open(store).sql(QUESTION).to_pylist()
    assert not any("hub" in text for text in summary.warnings)
    assert cached(tmp_path) == []
    assert not (tmp_path / "s.downloads.json").exists()
    server.pause = 0.0

    server.forget()
    assert analyze(REPO, small_series.evaluation, store, **order, **options).ok == 0
    # the comparison alone is made from what was extracted, without the weights
    (again,) = rerun(store, "similarity", {"k": 5})
    assert (again.ok, again.exit_code) == (4, 0), again.problems
    assert downloads(server) == []
    # the loss needs them; the options are recorded
    (again,) = rerun(store, "loss", force=True)
    assert (again.ok, again.exit_code) == (3, 0), again.problems
    # the weights of step 4 are those of step 2: they are there still, if its turn comes early enough
    assert len(downloads(server)) in (3, 4)
    assert cached(tmp_path) == []

    analyze(REPO, small_series.evaluation, kept, **order)
    assert measured == Store.open(kept).sql(QUESTION).to_pylist()
    before = cached(tmp_path)
    assert len(before) > 4
    # what lies in the cache now is not this store's: it stays
    analyze(REPO, small_series.evaluation, store, **{**order, "analyzers": ("output",)}, remove_downloads=True)
    assert cached(tmp_path) == before


def test_a_limit_that_is_reached_is_a_problem_that_says_what_to_do(
    server: Hub, small_series: SmallSeries, tmp_path: Path
) -> None:
    size = sum(path.stat().st_size for path in (small_series.run / "step0").iterdir())
    store = tmp_path / "s.duckdb"
    order = {"analyzers": ("loss",), "jobs": 1, "revisions": "step*"}
    summary = analyze(REPO, small_series.evaluation, store, **order, hub_disk_limit=f"{int(1.5 * size)}B")
    assert (summary.ok, summary.failed, summary.exit_code) == (1, 3, 1)
    (problem,) = summary.problems
    assert problem.startswith("3 revisions not downloaded, so not analyzed: --hub-disk-limit ")
    assert "Add --remove-downloads" in problem
    assert Store.open(store).sql("select count(*) from status where status = 'failed'").column(0).to_pylist() == [0]
    with pytest.raises(UsageError, match=r"step1 takes .* more than --hub-disk-limit 9kB allows for all downloads"):
        analyze(REPO, small_series.evaluation, store, **order, hub_disk_limit="9kB", remove_downloads=True)
    done = analyze(REPO, small_series.evaluation, store, **order, hub_disk_limit=f"{size}B", remove_downloads=True)
    assert (done.exit_code, done.already_done) == (0, 1), done.problems
    assert cached(tmp_path) == []


def test_a_killed_run_goes_on_within_its_limit(server: Hub, small_series: SmallSeries, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in (small_series.run / "step0").iterdir())
    server.portion, server.pause = size // 20, 0.1
    store = tmp_path / "s.duckdb"
    command = [
        sys.executable, "-m", "trace_offline.cli.main", "analyze", REPO, "--revisions", "step*", "--analyzer", "loss",
        "--evaluation-set", str(small_series.evaluation), "--store", str(store), "--jobs", "1",
        "--hub-disk-limit", f"{int(2.5 * size)}B", "--remove-downloads",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen(command, stderr=log, stdout=log, env=os.environ)
        lines: list[str] = []
        until = time.monotonic() + 100
        while time.monotonic() < until and child.poll() is None:
            lines += running(store)
            if len(server.times) >= 2 and any("downloading step 1 (" in line for line in lines):
                break
            time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert any("downloading step 1 (" in line and " of " in line for line in lines), (tmp_path / "log").read_text()
    listed = json.loads((tmp_path / "s.downloads.json").read_text())["downloads"]
    assert listed
    assert cached(tmp_path) != []
    server.pause = 0.0
    done = analyze(
        REPO, small_series.evaluation, store, analyzers=("loss",), jobs=1, revisions="step*",
        hub_disk_limit=f"{int(2.5 * size)}B", remove_downloads=True,
    )  # fmt: skip
    assert done.exit_code == 0, done.problems
    assert Store.open(store).sql("select count(distinct step) from history").column(0).to_pylist() == [4]
    assert cached(tmp_path) == []
    assert not (tmp_path / "s.downloads.json").exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "hub-download"]


def test_the_options_are_checked_recorded_and_read_from_a_file(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('hub_disk_limit = "2GB"\nremove_downloads = true\n')
    merged, _ = merge_settings({"hub_disk_limit": "3GB", "remove_downloads": None}, [], read_config(config))
    assert merged == {"hub_disk_limit": "3GB", "remove_downloads": True}
    merged, _ = merge_settings({"remove_downloads": False}, [], read_config(config))
    assert merged["remove_downloads"] is False
    options = AnalyzeOptions("run", tmp_path, tmp_path / "s.duckdb", hub_disk_limit="3GB", remove_downloads=True)
    assert (options.stored()["hub_disk_limit"], options.stored()["remove_downloads"]) == ("3GB", True)
    with pytest.raises(UsageError, match='--hub-disk-limit: expected a size such as 20GB, 500MB or 2GiB; found "much"'):
        AnalyzeOptions("run", tmp_path, tmp_path / "s.duckdb", hub_disk_limit="much").check()

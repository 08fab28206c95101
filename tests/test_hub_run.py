"""A whole run over the revisions of a hub repository: one ahead, none twice, offline when cached."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SmallSeries, shared_data
from hub_server import Hub, Repository, files_of, serve

from trace_offline import CheckpointError, Store, analyze, build_evaluation_set
from trace_offline.checkpoints.hub_tokenizer import fetch_tokenizer

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

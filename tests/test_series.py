"""Analyzers that compare checkpoints: extracted once each, compared over all, redone when the series grows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallSeries

from trace_offline import Measurement, MetricSpec, NotApplicable, Params, Store, analyze, rerun
from trace_offline.analyzers import registry as registry_module
from trace_offline.analyzers.base import Context, SeriesAnalyzer, SeriesContext

CALLS: list[int | None] = []


class Drift(SeriesAnalyzer):
    """Distance of the first parameter to that of the previous checkpoint."""

    name = "drift"
    version = "1"
    summary = reference = "a test"
    metrics = (MetricSpec("distance", "1", "distance to the previous checkpoint"),)

    class Params(Params):
        power: int = 2
        fail_at: int = -1
        unfit: bool = False

    def extract(self, context: Context) -> Mapping[str, torch.Tensor]:
        CALLS.append(context.step)
        if context.params.unfit:
            raise NotApplicable("no drift here, because it is a test")
        if context.step == context.params.fail_at:
            raise ValueError("planned")
        return {"weight": next(context.model.module.parameters())}

    def extract_params(self, params: Any) -> Mapping[str, Any]:
        return {"fail_at": params.fail_at, "unfit": params.unfit}

    def compare(self, series: SeriesContext) -> Iterator[tuple[int, Measurement]]:
        for extract, previous in zip(series.extracts[1:], series.extracts[:-1], strict=True):
            distance = (extract.load("weight") - previous.load("weight")).norm(p=series.params.power)
            yield extract.position, Measurement("distance", float(distance))


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("drift", "test_series:Drift", registry_module.GROUP)
    loss = EntryPoint("loss", "trace_offline.analyzers.loss:LossAnalyzer", registry_module.GROUP)
    found = registry_module.load_registry((entry, loss))
    assert not found.broken
    for module in ("analyze", "worker", "series", "rerun"):
        monkeypatch.setattr(f"trace_offline.engine.{module}.registry", lambda: found, raising=False)
    monkeypatch.setattr(registry_module, "registry", lambda: found)
    CALLS.clear()


def rows(store: Path) -> list[dict[str, Any]]:
    question = "select step, value, is_latest from history where metric = 'distance' order by all"
    return Store.open(store).sql(question).to_pylist()


def weight(series: SmallSeries, step: int) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(series.run / f"step{step}", dtype=torch.float32)
    return next(model.parameters()).detach()


def test_each_checkpoint_is_extracted_once_and_compared_with_the_one_before(
    small_series: SmallSeries, tmp_path: Path
) -> None:
    store = tmp_path / "s.duckdb"
    summary = analyze(small_series.run, small_series.evaluation, store, analyzers=("drift", "loss"), jobs=1)
    assert CALLS == [0, 1, 2]  # step 4 has the weights of step 2
    assert (summary.ok, summary.not_applicable, summary.failed) == (3 + 3, 1, 0)
    got = rows(store)
    assert [row["step"] for row in got] == [1, 2, 4]
    expected = [float((weight(small_series, b) - weight(small_series, a)).norm()) for a, b in ((0, 1), (1, 2), (2, 4))]
    assert [row["value"] for row in got] == pytest.approx(expected, rel=1e-6)
    assert expected[2] == 0
    assert all(row["is_latest"] for row in got)
    again = analyze(small_series.run, small_series.evaluation, store, analyzers=("drift", "loss"), jobs=1)
    assert (again.ok, again.not_applicable, again.already_done) == (0, 0, 8 - again.shared)
    assert CALLS == [0, 1, 2]


def test_another_way_of_comparing_loads_no_model(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, store, analyzers=("drift",), jobs=1)
    CALLS.clear()
    (summary,) = rerun(store, "drift", {"power": 1}, jobs=1)
    assert summary.ok == 3
    assert CALLS == []
    assert [row["is_latest"] for row in rows(store) if row["step"] == 1] == [False, True]


def test_a_longer_series_extracts_only_what_is_new(small_series: SmallSeries, tmp_path: Path) -> None:
    store, run = tmp_path / "s.duckdb", tmp_path / "run"
    run.mkdir()
    for step in (0, 2):
        shutil.copytree(small_series.run / f"step{step}", run / f"step{step}")
    analyze(run, small_series.evaluation, store, analyzers=("drift",), jobs=1)
    shutil.copytree(small_series.run / "step1", run / "step1")
    CALLS.clear()
    analyze(run, small_series.evaluation, store, analyzers=("drift",), jobs=1)
    assert CALLS == [1]
    latest = {row["step"]: row["value"] for row in rows(store) if row["is_latest"]}
    assert latest[2] == pytest.approx(float((weight(small_series, 2) - weight(small_series, 1)).norm()), rel=1e-6)


def test_one_failed_extract_leaves_the_rest_comparable(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    summary = analyze(
        small_series.run, small_series.evaluation, store, analyzers=("drift",), params={"drift": {"fail_at": 1}}, jobs=1
    )
    assert (summary.ok, summary.failed, summary.not_applicable) == (2, 1, 1)
    status = {r["step"]: r for r in Store.open(store).sql("select step, status, message from status").to_pylist()}
    assert status[1]["message"] == "ValueError: planned"
    expected = float((weight(small_series, 2) - weight(small_series, 0)).norm())
    assert rows(store)[0]["value"] == pytest.approx(expected, rel=1e-6)


def test_not_applicable_is_remembered(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    unfit = {"drift": {"unfit": True}}
    first = analyze(small_series.run, small_series.evaluation, store, analyzers=("drift",), params=unfit, jobs=1)
    assert (first.not_applicable, first.failed) == (4, 0)
    CALLS.clear()
    again = analyze(small_series.run, small_series.evaluation, store, analyzers=("drift",), params=unfit, jobs=1)
    assert (CALLS, again.not_applicable, again.already_done) == ([], 0, 4)
    messages = Store.open(store).sql("select distinct message from status").column(0).to_pylist()
    assert messages == ["no drift here, because it is a test"]

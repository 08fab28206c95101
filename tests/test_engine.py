"""The main job: analyze, do it again, rerun one analyzer, survive what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SmallSeries

from trace_offline import Store, UsageError, analyze, rerun
from trace_offline.core.errors import CheckpointError, EvaluationSetError, StoreError

FAST = ("loss", "output")
NUMBERS = (
    "select step, analyzer, params, layer, component, task, label, metric, value, stderr, n, is_latest from history "
    "order by all"
)


def numbers(path: Path) -> list[dict[str, object]]:
    return Store.open(path).sql(NUMBERS).to_pylist()


def test_analyze_fills_the_history(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    summary = analyze(small_series.run, small_series.evaluation, store, analyzers=FAST, jobs=1)
    assert (summary.ok, summary.failed, summary.exit_code) == (6, 0, 0)
    # step 4 has the weights of step 2: computed once, there for both
    assert summary.shared == 2
    assert "step 4 has the same weights as step 2" in summary.warnings[0]
    rows = (
        Store.open(store)
        .sql(
            "select step, tokens_seen, value, stderr, n from history "
            "where metric = 'loss' and analyzer = 'loss' order by step"
        )
        .to_pylist()
    )
    assert [row["step"] for row in rows] == [0, 1, 2, 4]
    assert [row["tokens_seen"] for row in rows] == [0, 1000, 2000, 4000]
    assert rows[2]["value"] == rows[3]["value"]
    assert all(row["stderr"] > 0 and row["n"] > 0 for row in rows)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["s.duckdb"]


def test_doing_it_twice_is_a_no_op(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1)
    before = Store.open(store).sql("select * from analyses order by analysis").to_pylist()
    summary = analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1)
    assert summary.ok == 0
    assert summary.already_done == 4
    assert Store.open(store).sql("select * from analyses order by analysis").to_pylist() == before


def test_force_computes_again_and_gives_the_same_numbers(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, store, analyzers=FAST, jobs=1)
    before = numbers(store)
    summary = analyze(small_series.run, small_series.evaluation, store, analyzers=FAST, jobs=1, force=True)
    assert summary.ok == 6
    assert numbers(store) == before


def test_rerun_changes_one_analyzer_only(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    analyze(
        small_series.run, small_series.evaluation, store, analyzers=("loss", "probe"), jobs=1,
        params={"probe": {"min_class_count": 3}},
    )  # fmt: skip
    before = numbers(store)
    (summary,) = rerun(store, "probe", {"max_words": 200}, jobs=1)
    assert summary.ok == 3
    after = numbers(store)
    loss = [row for row in before if row["analyzer"] == "loss"]
    assert [row for row in after if row["analyzer"] == "loss"] == loss
    old = [{**row, "is_latest": False} for row in before if row["analyzer"] == "probe"]
    assert [row for row in after if row["analyzer"] == "probe" and not row["is_latest"]] == old
    (params,) = {str(row["params"]) for row in after if row["analyzer"] == "probe" and row["is_latest"]}
    # one parameter changed, the other kept from the run before
    assert (json.loads(params)["max_words"], json.loads(params)["min_class_count"]) == (200, 3)
    (again,) = rerun(store, "probe", jobs=1)
    assert (again.ok, again.already_done) == (0, 4)


def test_numbers_do_not_depend_on_company(small_series: SmallSeries, tmp_path: Path) -> None:
    together, apart = tmp_path / "a.duckdb", tmp_path / "b.duckdb"
    analyze(small_series.run, small_series.evaluation, together, analyzers=("loss", "probe"), jobs=2)
    for name in ("probe", "loss"):
        analyze(small_series.run, small_series.evaluation, apart, analyzers=(name,), jobs=2)
    assert numbers(together) == numbers(apart)


def test_only_the_chosen_steps(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1, steps="1-2")
    assert Store.open(store).sql("select distinct step from history order by step").column(0).to_pylist() == [1, 2]
    with pytest.raises(UsageError, match=r"--steps selects none of the checkpoints.*there are steps 0, 1, 2, 4"):
        analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), steps="77")


def test_a_damaged_checkpoint_costs_only_itself(small_series: SmallSeries, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_series.run, run)
    weights = run / "step1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    os.utime(weights, (1e9, 1e9))  # long ago: nobody is writing it any more
    summary = analyze(run, small_series.evaluation, tmp_path / "s.duckdb", analyzers=("loss",), jobs=1)
    assert summary.ok == 2
    assert len(summary.set_aside) == 1
    assert "step1" in summary.set_aside[0]
    state = Store.open(tmp_path / "s.duckdb").sql("select state, reason from checkpoints where step = 1").to_pylist()
    assert state[0]["state"] in ("unreadable", "partial")
    assert state[0]["reason"]


def test_another_series_under_the_same_name_is_refused(small_series: SmallSeries, tmp_path: Path) -> None:
    import torch
    from tiny_models import gpt_neox

    from trace_offline.recording import save_checkpoint

    store = tmp_path / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1)
    model = gpt_neox(seed=5)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_checkpoint(model, tmp_path / "run", 0)
    with pytest.raises(UsageError, match=r'already has a run "run".*--run NAME'):
        analyze(tmp_path / "run", small_series.evaluation, store, analyzers=("loss",), jobs=1)
    assert analyze(tmp_path / "run", small_series.evaluation, store, analyzers=("loss",), jobs=1, run="b").ok == 1


def test_a_moved_folder_is_the_same_run(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1)
    shutil.copytree(small_series.run, tmp_path / "elsewhere" / "run")
    summary = analyze(tmp_path / "elsewhere" / "run", small_series.evaluation, store, analyzers=("loss",), jobs=1)
    assert (summary.ok, summary.already_done) == (0, 4)
    assert Store.open(store).scalar("select count(*) from checkpoints") == 4


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"analyzers": ("prob",)}, UsageError, 'There is no analyzer "prob". Did you mean "probe"?'),
        ({"params": {"loss": {"bin": 3}}}, UsageError, 'loss has no parameter "bin".'),
        ({"analyzers": ("loss",), "params": {"probe": {}}}, UsageError, "which is not among the analyzers of this run"),
        ({"params": {"probe": {"max_words": 3}}}, UsageError, "probe.max_words: Input should be greater than or equal"),
        ({"dtype": "float31"}, UsageError, 'Did you mean "float32"?'),
        ({"device": "cpux"}, UsageError, 'Did you mean "cpu"?'),
        ({"jobs": 0}, UsageError, "--jobs: expected 1 or more"),
        ({"evaluation_set": "nowhere"}, EvaluationSetError, "nowhere"),
        ({"source": "nowhere"}, CheckpointError, "nowhere"),
        ({"store": "nowhere/s.duckdb"}, StoreError, "make it first"),
    ],
)
def test_unusable_input_is_refused_in_words(
    small_series: SmallSeries, tmp_path: Path, arguments: dict[str, object], kind: type[Exception], words: str
) -> None:
    given: dict[str, object] = {"source": small_series.run, "evaluation_set": small_series.evaluation}
    given |= {"store": tmp_path / "s.duckdb"} | arguments
    with pytest.raises(kind) as caught:
        analyze(**given)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert not (tmp_path / "s.duckdb").exists()


PLUG_IN = """
import os, sys
from trace_offline import Analyzer, Measurement, MetricSpec, NotApplicable

class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(a)

class Base(Analyzer):
    version = "1"
    summary = reference = "a test"
    metrics = (MetricSpec("m", "1", "one"),)

class Raises(Base):
    name = "raises"
    def measure(self, context):
        raise Odd("cannot be", "unpickled")
        yield

class Exits(Base):
    name = "exits"
    def measure(self, context):
        sys.exit(3)
        yield

class Dies(Base):
    name = "dies"
    def measure(self, context):
        if context.step == 1:
            os.kill(os.getpid(), 9)
        yield Measurement("m", float(context.step))

class Unfit(Base):
    name = "unfit"
    def measure(self, context):
        raise NotApplicable("not here, because it is a test")
        yield

class Nan(Base):
    name = "nan"
    def measure(self, context):
        yield Measurement("m", float("nan"))
        yield Measurement("m", None, label="x", reason="nothing to see")
"""
BROKEN = "raise RuntimeError('this module is broken')\n"


@pytest.fixture
def plug_ins(tmp_path: Path) -> dict[str, str]:
    """An environment in which a third party's analyzers are installed."""
    site = tmp_path / "site"
    info = site / "third_party-1.dist-info"
    info.mkdir(parents=True)
    (site / "third_party_analyzers.py").write_text(PLUG_IN)
    (site / "third_party_broken.py").write_text(BROKEN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1\n")
    names = ("raises", "exits", "dies", "unfit", "nan")
    lines = [f"{name} = third_party_analyzers:{name.capitalize()}" for name in names]
    lines.append("broken = third_party_broken:X")
    (info / "entry_points.txt").write_text("[trace_offline.analyzers]\n" + "\n".join(lines) + "\n")
    return {**os.environ, "PYTHONPATH": str(site)}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "trace_offline.cli.main", *map(str, arguments)]


def test_what_third_parties_do_wrong_costs_exactly_their_own_analysis(
    small_series: SmallSeries, tmp_path: Path, plug_ins: dict[str, str]
) -> None:
    store = tmp_path / "s.duckdb"
    names = ("loss", "raises", "exits", "dies", "unfit", "nan")
    chosen = [part for name in names for part in ("--analyzer", name)]
    done = subprocess.run(
        command("analyze", small_series.run, "--evaluation-set", small_series.evaluation, "--store", store, "--jobs", 2,
                *chosen),
        env=plug_ins, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    status = Store.open(store).sql("select step, analyzer, status, message from status").to_pylist()
    by = {(row["step"], row["analyzer"]): row for row in status}
    for step in (0, 1, 2, 4):
        assert by[step, "loss"]["status"] == "ok"
        assert by[step, "raises"]["status"] == "failed"
        assert by[step, "raises"]["message"] == "Odd: cannot be"
        assert by[step, "exits"]["message"] == "SystemExit: 3"
        assert by[step, "unfit"]["status"] == "not_applicable"
        assert by[step, "unfit"]["message"] == "not here, because it is a test"
        assert by[step, "nan"]["status"] == "ok"
        assert by[step, "dies"]["status"] == ("crashed" if step == 1 else "ok")
    assert "worker process died" in by[1, "dies"]["message"]
    assert Store.open(store).scalar("select count(*) from history where isnan(value)") == 0
    reasons = Store.open(store).sql("select distinct reason from history where analyzer = 'nan'").column(0).to_pylist()
    assert sorted(reasons) == ["nothing to see", "the value is not a finite number"]
    listed = subprocess.run(command("analyzers"), env=plug_ins, capture_output=True, text=True, check=True, timeout=120)
    assert "broken is installed but cannot be loaded: RuntimeError: this module is broken" in listed.stderr
    assert "unfit" in listed.stdout


def kill_and_resume(series: SmallSeries, folder: Path, after_lines: int) -> Path:
    """Kill the run (and its workers) once it has printed so many lines, then give the same command again."""
    folder.mkdir()
    store = folder / "s.duckdb"
    order = command("analyze", series.run, "--evaluation-set", series.evaluation, "--store", store, "--jobs", 2,
                    "--analyzer", "loss", "--analyzer", "probe")  # fmt: skip
    process = subprocess.Popen(order, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    for _ in range(after_lines):
        process.stderr.readline()
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.stderr.close()
    process.wait(timeout=60)
    kept = "select analysis_id, sequence, finished_at from analyses"
    before = Store.open(store).sql(kept).to_pylist() if store.exists() else []
    done = subprocess.run(order, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    after = Store.open(store).sql(kept).to_pylist()
    assert all(row in after for row in before)  # nothing that was stored is done again
    return store


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills a Unix process group")
def test_a_killed_run_resumes_and_equals_an_uninterrupted_one(small_series: SmallSeries, tmp_path: Path) -> None:
    whole = tmp_path / "whole.duckdb"
    analyze(small_series.run, small_series.evaluation, whole, analyzers=("loss", "probe"), jobs=2)
    expected = numbers(whole)
    for after in (1, 2):
        store = kill_and_resume(small_series, tmp_path / str(after), after)
        assert numbers(store) == expected


def test_results_reach_the_store_while_the_run_goes_on(small_series: SmallSeries, tmp_path: Path) -> None:
    from trace_offline.engine.progress import Silent

    store = tmp_path / "s.duckdb"
    seen = []

    class Watching(Silent):
        def finished(self, *_: object) -> None:
            seen.append(Store.open(store).scalar("select count(*) from analyses"))

    from trace_offline.engine.analyze import AnalyzeOptions
    from trace_offline.engine.analyze import analyze as run

    run(AnalyzeOptions(str(small_series.run), small_series.evaluation, store, ("loss",), jobs=1), Watching())
    assert seen == [1, 2, 3]


def test_the_worker_never_raises(small_series: SmallSeries, tmp_path: Path) -> None:
    from trace_offline.core.types import AnalysisStatus, Checkpoint, CheckpointState
    from trace_offline.engine.unit import AnalysisRequest, Unit, WorkSettings
    from trace_offline.engine.worker import run_unit

    gone = Checkpoint("gone", "hf_folder", CheckpointState.COMPLETE, 3, weight_files=(str(tmp_path / "gone"),))
    settings = WorkSettings(str(tmp_path / "no evaluation set"), "hash", "cpu", "float32", 0, 1)
    (outcome,) = run_unit(Unit(gone, (AnalysisRequest("id", "loss", "1", {}),), settings))
    assert outcome.status is AnalysisStatus.FAILED
    assert "no evaluation set" in str(outcome.message)


def test_the_demo_says_where_it_looked(tmp_path: Path) -> None:
    from trace_offline.cli.demo import find_data

    with pytest.raises(UsageError, match="The shipped series was not found"):
        find_data(tmp_path)

"""What must not go wrong quietly: replaced weights, failed repetitions, twin names, interrupts, orphans."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallSeries

from trace_offline import EvaluationSetError, Store, StoreError, UsageError, analyze, rerun
from trace_offline.core.types import Checkpoint, CheckpointState
from trace_offline.engine import execution
from trace_offline.engine.options import AnalyzeOptions
from trace_offline.engine.remarks import remark_warnings
from trace_offline.engine.watch import Watch
from trace_offline.recording import save_evaluation_set

LOSS = (
    "select step, evaluation_set, value, is_latest from history where metric = 'loss' and analyzer = 'loss' "
    "order by all"
)


def losses(store: Path) -> list[dict[str, Any]]:
    return Store.open(store).sql(LOSS).to_pylist()


@pytest.fixture
def run(small_series: SmallSeries, tmp_path: Path) -> Path:
    shutil.copytree(small_series.run, tmp_path / "run")
    return tmp_path / "run"


def test_weights_replaced_during_a_run_are_not_stored_under_the_old_ones(
    small_series: SmallSeries, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s.duckdb"
    body = execution.run_unit

    def meddling(unit: Any) -> Any:
        if unit.checkpoint.step == 1:
            shutil.copyfile(run / "step0" / "model.safetensors", run / "step1" / "model.safetensors")
        return body(unit)

    monkeypatch.setattr(execution, "run_unit", meddling)
    summary = analyze(run, small_series.evaluation, store, analyzers=("loss",), jobs=1, steps="0-2")
    assert (summary.ok, summary.failed) == (2, 1)
    assert "changed after the run began" in summary.problems[0]
    assert [row["step"] for row in losses(store)] == [0, 2]
    monkeypatch.undo()
    again = analyze(run, small_series.evaluation, store, analyzers=("loss",), jobs=1, steps="0-2", run="run")
    assert again.failed == 0
    assert 'run "run" was analyzed with other weights at step 1' in again.warnings[0]
    rows = losses(store)
    assert rows[1]["value"] == rows[0]["value"]  # step 1 now has the weights of step 0


@pytest.fixture
def retrained(small_series: SmallSeries, run: Path) -> Path:
    """The folder of a training that was analyzed, then made anew with other weights, without step 1."""
    from tiny_models import gpt_neox

    from trace_offline.recording import save_checkpoint

    analyze(run, small_series.evaluation, run.parent / "s.duckdb", analyzers=("loss",), jobs=1)
    shutil.rmtree(run)
    shutil.copytree(small_series.run / "step0", run / "step0")
    for step in (2, 4):
        save_checkpoint(gpt_neox(seed=step), run, step)
    return run


def test_another_training_in_the_same_folder_is_refused(small_series: SmallSeries, retrained: Path) -> None:
    store = retrained.parent / "s.duckdb"
    before = losses(store)
    text = (
        r'run "run" was analyzed with other weights at step 2, 4\. If this is another training, give it a history of '
        r'its own with --run NAME.*say so with --run "run"'
    )
    with pytest.raises(UsageError, match=text):
        analyze(retrained, small_series.evaluation, store, analyzers=("loss",), jobs=1)
    with pytest.raises(UsageError, match=text):
        rerun(store, "loss", jobs=1)
    assert losses(store) == before
    other = analyze(retrained, small_series.evaluation, store, analyzers=("loss",), jobs=1, run="second")
    assert (other.warnings, other.ok + other.already_done) == ([], 3)


def test_naming_the_run_says_that_its_weights_were_replaced_on_purpose(
    small_series: SmallSeries, retrained: Path
) -> None:
    store = retrained.parent / "s.duckdb"
    summary = analyze(retrained, small_series.evaluation, store, analyzers=("loss",), jobs=1, run="run")
    assert (summary.ok, len(summary.warnings)) == (2, 1)
    assert 'run "run" was analyzed with other weights at step 2, 4. What the store has of other' in summary.warnings[0]
    assert [row["step"] for row in losses(store) if row["is_latest"]] == [0, 1, 2, 4]
    assert analyze(retrained, small_series.evaluation, store, analyzers=("loss",), jobs=1).warnings == []


def test_watch_goes_on_when_a_resumed_training_writes_steps_again(small_series: SmallSeries, retrained: Path) -> None:
    store = retrained.parent / "s.duckdb"
    options = AnalyzeOptions(str(retrained), small_series.evaluation, store, ("loss",), jobs=1)
    summary = Watch(options, interval=0.01, quiet=0.0).run()
    assert (summary.ok, summary.exit_code, len(summary.warnings)) == (2, 0, 1)
    assert "other weights at step 2, 4" in summary.warnings[0]


def test_what_discovery_remarks_is_a_warning(small_series: SmallSeries, tmp_path: Path) -> None:
    for place, steps in (("lr1", (0, 1)), ("lr2", (2, 4))):
        for step in steps:
            shutil.copytree(small_series.run / f"step{step}", tmp_path / "both" / place / f"checkpoint-{step}")
    summary = analyze(tmp_path / "both", small_series.evaluation, tmp_path / "s.duckdb", analyzers=("loss",), jobs=1)
    (repeated, two_runs) = summary.warnings
    assert "step 4 has the same weights as step 2" in repeated
    assert two_runs.startswith("step 2: it lies in ")
    assert "if these are two runs, analyze each on its own. The same of other steps: trace-offline discover" in two_runs


def test_remarks_that_differ_in_numbers_only_are_one_warning() -> None:
    reasons = (None, "The name gives an epoch (1), no step.", "The name gives an epoch (2), no step.", "Else.")
    items = [Checkpoint(f"/x/{i}", "raw", CheckpointState.COMPLETE, i, reason=text) for i, text in enumerate(reasons)]
    alone = Checkpoint("/x/m", "raw", CheckpointState.COMPLETE, reason="Warning: its step is unknown.")
    same = Checkpoint("/x/9", "raw", CheckpointState.DUPLICATE, 9, reason="The same weights as step 1: computed once.")
    assert remark_warnings([*items, alone, same]) == [
        "step 1: The name gives an epoch (1), no step. The same of other steps: trace-offline discover lists them.",
        "step 3: Else.",
        "/x/m: its step is unknown.",
    ]


def test_a_failed_repetition_keeps_the_numbers_there_are(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1)
    before = losses(store)

    def broken(*_: object, **__: object) -> None:
        raise MemoryError("planned")

    monkeypatch.setattr("trace_offline.analyzers.loss.LossAnalyzer.measure", broken)
    summary = analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1, force=True)
    assert summary.failed == 3
    assert losses(store) == before
    messages = Store.open(store).sql("select distinct message from status").column(0).to_pylist()
    assert messages == ["a later attempt failed: MemoryError: planned"]


def other_set(folder: Path) -> Path:
    ids = torch.randint(3, 80, (20, 10), generator=torch.Generator().manual_seed(9))
    return save_evaluation_set(folder, ids, name="small")


def test_two_evaluation_sets_of_one_name_stay_apart(small_series: SmallSeries, tmp_path: Path) -> None:
    store, second = tmp_path / "s.duckdb", other_set(tmp_path / "second")
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1, steps="0")
    summary = analyze(small_series.run, second, store, analyzers=("loss",), jobs=1, steps="0")
    assert 'another evaluation set of this store is called "small"' in summary.warnings[-1]
    once = losses(store)
    names = [row["evaluation_set"] for row in once]
    assert len(set(names)) == 2
    assert names[0] == "small"
    assert names[1].startswith("small-")
    # a rerun goes over both, from nothing but the store
    summaries = rerun(store, "loss", force=True, jobs=1, steps=None)
    assert [item.ok for item in summaries] == [1, 1]
    assert losses(store) == once


def test_other_options_later_do_not_change_what_rerun_repeats(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, store, analyzers=("probe",), jobs=1)
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1, dtype="float64")
    (summary,) = rerun(store, "probe", {"max_words": 300}, jobs=1)
    assert summary.ok == 3
    assert Store.open(store).sql("select distinct dtype from analyses where analyzer = 'probe'").to_pylist() == [
        {"dtype": "float32"}
    ]


def test_naming_blocks_for_one_analyzer_hides_no_other(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1)
    analyze(small_series.run, small_series.evaluation, store, analyzers=("output",), jobs=1, blocks="gpt_neox.layers.*")
    assert all(row["is_latest"] for row in losses(store))


def test_a_wrong_evaluation_set_leaves_no_trace_in_a_store(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1)
    ids = torch.full((4, 8), 500)  # beyond the vocabulary
    wrong = save_evaluation_set(tmp_path / "wrong", ids, name="wrong")
    summary = analyze(small_series.run, wrong, store, analyzers=("loss",), jobs=1, steps="0")
    assert "token id 500" in summary.problems[0]
    with pytest.raises(EvaluationSetError):
        analyze(small_series.run, tmp_path / "nowhere", store, analyzers=("loss",), jobs=1)
    assert len(losses(store)) == 4


def test_one_damaged_file_costs_only_its_checkpoint(small_series: SmallSeries, tmp_path: Path) -> None:
    from tiny_models import unknown_net

    run = tmp_path / "raw"
    run.mkdir()
    for step in (1, 2, 3):
        torch.save(unknown_net(seed=step).state_dict(), run / f"step_{step}.pt")
    data = bytearray((run / "step_2.pt").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (run / "step_2.pt").write_bytes(bytes(data))
    os.utime(run / "step_2.pt", (1e9, 1e9))
    store = tmp_path / "s.duckdb"
    summary = analyze(
        run, small_series.evaluation, store, analyzers=("loss",), jobs=1, model_factory="test_main_job:factory"
    )
    assert [row["step"] for row in losses(store)] == [1, 3]
    assert any("step_2" in text for text in [*summary.set_aside, *summary.problems])


def test_what_was_repaired_is_no_longer_set_aside(small_series: SmallSeries, run: Path, tmp_path: Path) -> None:
    store, weights = tmp_path / "s.duckdb", run / "step1" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-50])
    os.utime(weights, (1e9, 1e9))
    assert analyze(run, small_series.evaluation, store, analyzers=("loss",), jobs=1).set_aside
    weights.write_bytes(whole)
    assert not analyze(run, small_series.evaluation, store, analyzers=("loss",), jobs=1).set_aside
    states = Store.open(store).sql("select step, state from checkpoints order by step").to_pylist()
    assert [row["step"] for row in states] == [0, 1, 2, 4]
    assert {row["state"] for row in states} == {"complete", "duplicate"}


def test_two_folders_of_one_name_that_share_no_step(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    for place, step in (("a", 1), ("b", 2)):
        shutil.copytree(small_series.run / f"step{step}", tmp_path / place / "run" / f"step{step}")
    analyze(tmp_path / "a" / "run", small_series.evaluation, store, analyzers=("loss",), jobs=1)
    with pytest.raises(UsageError, match=r"shares no later step with it.*--run NAME"):
        analyze(tmp_path / "b" / "run", small_series.evaluation, store, analyzers=("loss",), jobs=1)


def test_rerun_reports_a_run_that_is_gone_and_does_the_others(
    small_series: SmallSeries, run: Path, tmp_path: Path
) -> None:
    store = tmp_path / "s.duckdb"
    analyze(run, small_series.evaluation, store, analyzers=("loss",), jobs=1, run="gone", steps="0")
    analyze(small_series.run, small_series.evaluation, store, analyzers=("loss",), jobs=1, run="here", steps="0")
    shutil.rmtree(run)
    gone, here = rerun(store, "loss", force=True, jobs=1)
    assert (gone.failed, here.ok) == (1, 1)
    assert "gone on small" in gone.problems[0]


def start(series: SmallSeries, store: Path) -> subprocess.Popen[str]:
    endless = "max_steps=2000", "tolerance=1e-9", "k=300"
    order = [
        *(sys.executable, "-m", "trace_offline.cli.main", "analyze", str(series.run), "--jobs", "2"),
        *("--evaluation-set", str(series.evaluation), "--store", str(store), "--analyzer", "hessian"),
        *(part for text in endless for part in ("--set", f"hessian.{text}")),
    ]
    return subprocess.Popen(order, stderr=subprocess.PIPE, text=True, start_new_session=True)


def descendants(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_ended_run_leaves_no_worker_behind(
    small_series: SmallSeries, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    process = start(small_series, tmp_path / "s.duckdb")
    assert process.stderr is not None
    workers: list[int] = []
    deadline = time.monotonic() + 60
    while len(workers) < 3 and time.monotonic() < deadline:  # two workers and their resource tracker
        workers = descendants(process.pid)
        time.sleep(0.1)
    time.sleep(1.5)
    workers = descendants(process.pid)
    assert len(workers) >= 2
    process.send_signal(sent)
    if sent is signal.SIGINT:  # once would finish what runs
        time.sleep(1)
        process.send_signal(sent)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, said
    if sent is not signal.SIGKILL:
        assert "Interrupted. What was finished is stored; the same command goes on from there." in said
        assert "Traceback" not in said
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in workers if alive(pid)]


def loky_workers(pid: int) -> list[int]:
    found = []
    for child in descendants(pid):
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if any("loky" in word and "popen" in word for word in words):
            found.append(child)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_workers_that_were_started_early_end_with_what_stops_the_planning(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trace_offline.engine import analyze as verb

    seen: list[int] = []

    def refuse(*_: Any) -> None:
        seen[:] = loky_workers(os.getpid())
        raise StoreError("no place for it")

    plain = verb.Writer.open
    monkeypatch.setattr(verb.Writer, "open", refuse)
    more: dict[str, Any] = {"analyzers": ["loss"], "jobs": 2}
    with pytest.raises(StoreError, match="no place for it"):
        analyze(small_series.run, small_series.evaluation, tmp_path / "s.duckdb", **more)
    assert seen  # at least the one that checked
    assert not any(alive(pid) for pid in seen)
    assert not (tmp_path / "s.duckdb").exists()
    monkeypatch.setattr(verb.Writer, "open", plain)
    assert analyze(small_series.run, small_series.evaluation, tmp_path / "s.duckdb", **more).exit_code == 0


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_another_tokenizer_is_said_before_anything_is_made(tmp_path: Path, jobs: str) -> None:
    """With several workers one of them finds it out; the user reads the same."""
    data = Path(__file__).parents[1] / "data"
    shutil.copytree(data / "tiny_series" / "step0", tmp_path / "run" / "step0")
    tokenizer = tmp_path / "run" / "step0" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = sorted(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    tokenizer.write_text(json.dumps(content))
    order = [
        *(sys.executable, "-m", "trace_offline.cli.main", "analyze", str(tmp_path / "run"), "--jobs", jobs),
        *("--evaluation-set", str(data / "tiny_evaluation"), "--store", str(tmp_path / "s.duckdb")),
    ]
    done = subprocess.run(order, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "was made with the tokenizer" in done.stderr
    assert "The same token ids would mean other words" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

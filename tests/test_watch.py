"""``watch`` beside a real training script that saves, rotates, is killed and started again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SmallSeries
from drills import Drill, Witness, environment, places, until

from trace_offline import Store
from trace_offline.engine.interrupt import StopRequest
from trace_offline.engine.options import AnalyzeOptions
from trace_offline.engine.watch import Watch

# Goes on from the last step it finds, keeps the newest three, and leaves what a killed save leaves.
TRAINING = """
import shutil, sys, time
from pathlib import Path
import torch
from tiny_models import gpt_neox
from trace_offline.recording import save_checkpoint

folder, last = Path(sys.argv[1]), int(sys.argv[2])
there = sorted(int(path.name[4:]) for path in folder.glob("step*"))
model = gpt_neox()
for step in range(there[-1] + 1 if there else 0, last):
    torch.manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    save_checkpoint(model, folder, step)
    for old in sorted(folder.glob("step*"), key=lambda path: int(path.name[4:]))[:-3]:
        shutil.rmtree(old)
    time.sleep(0.4)
"""

# The Trainer of transformers; it saves the optimizer, too, and rotates by itself.
TRAINER = """
import sys, time
from pathlib import Path
import torch
from tiny_models import gpt_neox
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

class Slowly(TrainerCallback):
    def on_save(self, arguments, state, control, **more):
        time.sleep(1.0)

folder, last = Path(sys.argv[1]), int(sys.argv[2])
# what a killed save left has no trainer_state.json, which is written last; it is saved again
whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
newest = max(whole, key=lambda path: int(path.name[11:]), default=None)
torch.manual_seed(0)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 60, (64, 8))]
arguments = TrainingArguments(
    folder, max_steps=last, save_steps=2, save_total_limit=3, per_device_train_batch_size=4, use_cpu=True,
    lr_scheduler_type="constant", report_to=[], disable_tqdm=True, logging_steps=10**6,
)
trainer = Trainer(gpt_neox(), arguments, default_data_collator, train_dataset=rows, callbacks=[Slowly()])
trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
"""


def training(tmp_path: Path, folder: Path, last: int, text: str) -> subprocess.Popen[bytes]:
    script = tmp_path / "train.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n" + text)
    return subprocess.Popen([sys.executable, str(script), str(folder), str(last)])


def steps(folder: Path) -> set[int]:
    return {int(re.sub(r"\D", "", path.name)) for path in folder.iterdir() if re.search(r"\d$", path.name)}


def counts(store: Path) -> dict[int, int]:
    rows = Store.open(store).sql(
        "select step, count(*) as n from history where metric = 'loss' and analyzer = 'loss' and task is null "
        "and layer is null group by step"
    )
    return {row["step"]: row["n"] for row in rows.to_pylist()}


@pytest.mark.slow
@pytest.mark.parametrize("script", [TRAINING, TRAINER], ids=["plain", "Trainer"])
def test_every_surviving_checkpoint_is_analyzed_exactly_once(
    small_series: SmallSeries, tmp_path: Path, script: str
) -> None:
    if script == TRAINER:
        pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate (test extra)")
    folder, store, drill = tmp_path / "run", tmp_path / "s.duckdb", Drill(tmp_path / "drill")
    order = [
        *(sys.executable, "-m", "trace_offline.cli.main", "watch", str(folder), "--jobs", "1", "--analyzer", "first"),
        *("--evaluation-set", str(small_series.evaluation), "--store", str(store)),
        *("--interval", "0.3", "--quiet", "15"),
    ]
    whole, witness = {**os.environ, **environment(drill.folder)}, Witness(store, drill)
    for number in range(3):
        # The first time before the training has made its folder; in turns the one and the other is killed first.
        watching = subprocess.Popen(order, stderr=subprocess.DEVNULL, env=whole)
        trainer = training(tmp_path, folder, 1000, script)
        before = witness.look()
        until(lambda before=before: store.exists() and len(places(Store.open(store))) >= before + 2)
        time.sleep(0.3 * number)
        for process in (trainer, watching) if number % 2 else (watching, trainer):
            process.kill()
            process.wait()
        assert witness.look() > before
    trainer = training(tmp_path, folder, max(steps(folder)) + 10, script)
    last = subprocess.Popen(order, stderr=subprocess.PIPE, text=True, env=whole)
    trainer.wait(timeout=300)
    _, said = last.communicate(timeout=300)
    assert last.returncode == 0, said
    assert "Traceback" not in said
    witness.look()
    done = {step for _, step in places(Store.open(store))}
    surviving = steps(folder)
    assert len(surviving) == 3
    assert surviving <= done
    assert {drill.ran()["first", step] for step in surviving} == {1}
    assert Store.open(store).scalar("select count(*) = count(distinct (analyzer, step)) from status")
    bad = Store.open(store).sql("select * from status where status in ('failed', 'crashed')")
    assert bad.num_rows == 0


def options(small_series: SmallSeries, run: Path, store: Path, *analyzers: str) -> AnalyzeOptions:
    return AnalyzeOptions(str(run), small_series.evaluation, store, analyzers, jobs=1)


def test_what_comes_is_analyzed_when_it_comes_and_compared_at_the_end(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = tmp_path / "run", tmp_path / "s.duckdb"
    watch = Watch(options(small_series, run, store, "loss", "weight_change"), interval=10.0, quiet=25.0)
    now, coming = [0.0], [["step0"], [], ["step1", "step2"], [], [], [], []]
    seen: list[dict[int, int]] = []

    def wait(seconds: float) -> None:
        seen.append(counts(store) if store.exists() else {})
        now[0] += seconds
        for name in coming.pop(0):
            shutil.copytree(small_series.run / name, run / name)

    monkeypatch.setattr(watch, "clock", lambda: now[0])
    monkeypatch.setattr(watch, "_wait", wait)
    summary = watch.run()
    assert seen == [{}, {0: 1}, {0: 1}, *([{0: 1, 1: 1, 2: 1}] * (len(seen) - 3))]
    assert summary.exit_code == 0
    assert summary.ok >= 6
    compared = Store.open(store).sql("select distinct step from history where analyzer = 'weight_change'")
    assert sorted(compared.column(0).to_pylist()) == [0, 1, 2]


def test_a_checkpoint_removed_before_it_was_read_is_no_failure(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trace_offline.engine import execution

    run, store = tmp_path / "run", tmp_path / "s.duckdb"
    shutil.copytree(small_series.run, run)
    real = execution.run_unit

    def rotating(unit: object) -> object:
        if unit.checkpoint.step == 1:  # type: ignore[attr-defined]
            shutil.rmtree(run / "step1")
        return real(unit)  # type: ignore[arg-type]

    monkeypatch.setattr(execution, "run_unit", rotating)
    watch = Watch(options(small_series, run, store, "loss"), interval=0.01, quiet=0.0)
    summary = watch.run()
    assert summary.removed == ["step 1"]
    assert (summary.failed, summary.exit_code) == (0, 0)
    assert set(counts(store)) == {0, 2, 4}
    status = Store.open(store).sql("select step, status from status where analyzer = 'loss' order by step").to_pylist()
    assert [row["step"] for row in status] == [0, 2, 4]


def test_what_was_measured_before_the_removal_is_kept(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trace_offline.engine import execution

    run, store = tmp_path / "run", tmp_path / "s.duckdb"
    shutil.copytree(small_series.run, run)
    real = execution.run_unit

    def rotating(unit: object) -> object:
        outcomes = real(unit)  # type: ignore[arg-type]
        if unit.checkpoint.step == 1:  # type: ignore[attr-defined]
            shutil.rmtree(run / "step1")
        return outcomes

    def broken(*_: object, **__: object) -> None:
        raise MemoryError("planned")

    monkeypatch.setattr(execution, "run_unit", rotating)
    monkeypatch.setattr("trace_offline.analyzers.output.OutputAnalyzer.measure", broken)
    summary = Watch(options(small_series, run, store, "loss", "output"), interval=0.01, quiet=0.0).run()
    assert summary.removed == []
    assert summary.failed == 3  # a real failure stays one, though its checkpoint is gone by now
    assert set(counts(store)) == {0, 1, 2, 4}


def test_another_writer_is_waited_for(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trace_offline.store.writer import Writer

    run, store = small_series.run, tmp_path / "s.duckdb"
    holder = Writer.open(store)
    notes: list[str] = []
    watch = Watch(options(small_series, run, store, "loss"), interval=0.01, quiet=1.0)
    monkeypatch.setattr(watch.progress, "note", notes.append, raising=False)
    looks = []

    def wait(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            holder.close()
        time.sleep(0.6)

    monkeypatch.setattr(watch, "_wait", wait)
    summary = watch.run()
    assert summary.ok == 3
    assert sum("Another run is writing" in note for note in notes) == 2


def test_a_request_to_stop_ends_it_between_two_looks(small_series: SmallSeries, tmp_path: Path) -> None:
    stop = StopRequest(requested=True)
    watch = Watch(options(small_series, small_series.run, tmp_path / "s.duckdb", "loss"), stop=stop)
    summary = watch.run()
    assert summary.interrupted
    assert summary.exit_code == 130
    assert not (tmp_path / "s.duckdb").exists()
    assert replace(watch.options, rotating=False).rotating is False

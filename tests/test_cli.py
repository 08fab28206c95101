"""The command line as a user meets it: exit codes, where output goes, and one clear message for every mistake."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import SmallSeries, shared_data

from trace_offline import Store, analyze
from trace_offline.cli.main import main


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run one command in this process."""

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["trace-offline", *map(str, arguments)])
        capfd.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        out, err = capfd.readouterr()
        return Ended(code if isinstance(code, int) else int(code is not None), out, err)

    return call


@pytest.fixture(scope="module")
def store(small_series: SmallSeries, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, path, analyzers=("loss", "output"), jobs=1)
    return path


def test_discover_lists_in_order_and_as_json(run: Run, small_series: SmallSeries) -> None:
    shown = run("discover", small_series.run)
    assert shown.code == 0
    assert "duplicate" in shown.out
    listed = json.loads(run("discover", small_series.run, "--json").out)
    assert [item["step"] for item in listed] == [0, 1, 2, 4]
    assert {"step", "tokens_seen", "layout", "location", "state", "reason"} <= set(listed[0])
    assert listed[3]["state"] == "duplicate"


def test_analyze_says_what_it_did_on_stderr_only(run: Run, small_series: SmallSeries, tmp_path: Path) -> None:
    order = ("analyze", small_series.run, "--evaluation-set", small_series.evaluation, "--store", tmp_path / "s.duckdb",
             "--analyzer", "loss", "--jobs", 1)  # fmt: skip
    first = run(*order)
    assert (first.code, first.out) == (0, "")
    assert "3 analyses ok" in first.err
    assert "same weights as step 2" in first.err
    started = time.perf_counter()
    second = run(*order)
    assert time.perf_counter() - started < 3
    assert second.code == 0
    assert "nothing to do: all 4 analyses of 4 checkpoints are already in" in second.err
    summary = json.loads(run(*order, "--json").out)
    assert summary[0]["already_done"] == 4


def test_a_configuration_file_and_options_that_win_over_it(run: Run, small_series: SmallSeries, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'source = "{small_series.run}"\nevaluation_set = "{small_series.evaluation}"\n'
        f'store = "{tmp_path / "s.duckdb"}"\nanalyzers = ["probe"]\njobs = 1\nsteps = "0"\n'
        "[analyzer.probe]\nmax_words = 300\nmin_class_count = 4\n"
    )
    assert run("analyze", "--config", config, "--set", "probe.max_words=400").code == 0
    params = json.loads(Store.open(tmp_path / "s.duckdb").scalar("select params from analyses"))
    assert (params["max_words"], params["min_class_count"]) == (400, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('evaluation_sett = "x"', 'unknown key "evaluation_sett". Did you mean "evaluation_set"?'),
        ("jobs = 'many'", "jobs: Input should be a valid integer"),
        ("jobs = ", "is not valid TOML"),
    ],
)
def test_a_configuration_file_that_is_wrong(run: Run, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    ended = run("analyze", "--config", tmp_path / "run.toml")
    assert ended.code == 2
    assert words in ended.err


def test_query_formats_agree(run: Run, store: Path, tmp_path: Path) -> None:
    question = "select step, metric, value from history where metric in ('loss', 'accuracy') and analyzer = 'loss'"
    rows = Store.open(store).sql(question).to_pylist()
    as_json = run("query", store, question, "--format", "json")
    assert json.loads(as_json.out) == rows
    as_csv = list(csv.DictReader(io.StringIO(run("query", store, question, "--format", "csv").out)))
    assert [float(row["value"]) for row in as_csv] == [row["value"] for row in rows]
    table = run("query", store, question).out
    assert table.splitlines()[0].split() == ["step", "metric", "value"]
    assert f"({len(rows)} rows)" in table
    done = run("query", store, question, "--format", "parquet", "--output", tmp_path / "x.parquet")
    assert (done.code, done.out) == (0, "")
    import pyarrow.parquet

    assert pyarrow.parquet.ParquetFile(tmp_path / "x.parquet").read().to_pylist() == rows


def test_status_shows_what_is_done_and_what_failed(run: Run, store: Path) -> None:
    shown = run("status", store)
    assert shown.code == 0
    assert "output" in shown.out
    assert len(json.loads(run("status", store, "--json").out)) == 8


def test_rerun_by_command(run: Run, small_series: SmallSeries, tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    analyze(small_series.run, small_series.evaluation, path, analyzers=("loss", "probe"), jobs=1, steps="0")
    before = Store.open(path).sql("select * from history where analyzer = 'loss' order by all").to_pylist()
    done = run("rerun", path, "--analyzer", "probe", "--set", "max_words=200", "--jobs", 1, "--steps", "0")
    assert done.code == 0, done.err
    opened = Store.open(path)
    assert opened.sql("select * from history where analyzer = 'loss' order by all").to_pylist() == before
    assert opened.scalar("select count(distinct analysis_id) from history where analyzer = 'probe'") == 2
    assert opened.scalar("select count(distinct analysis_id) from history where analyzer = 'probe' and is_latest") == 1
    nothing = run("rerun", path, "--analyzer", "probe", "--set", "max_words=200", "--jobs", 1, "--steps", "0")
    assert "nothing to do" in nothing.err
    wrong = run("rerun", path, "--analyzer", "probe", "--set", "max_word=200")
    assert wrong.code == 2
    assert 'Did you mean "max_words"?' in wrong.err


def test_analyzers_are_described(run: Run) -> None:
    listed = run("analyzers").out
    names = ("loss", "probe", "intrinsic_dimension", "hessian", "output")
    assert all(name in listed for name in names)
    for name in names:
        shown = json.loads(run("analyzers", name, "--json").out)
        assert shown["metrics"]
        assert all(metric["unit"] and metric["meaning"] for metric in shown["metrics"])
        assert all(parameter["meaning"] for parameter in shown["parameters"])
        assert shown["reference"]


def test_mistakes_end_in_one_message_and_code_2(
    run: Run, small_series: SmallSeries, store: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("nothing here")
    base = ("--evaluation-set", small_series.evaluation, "--store", tmp_path / "x.duckdb")
    mistakes: list[tuple[tuple[object, ...], str]] = [
        (("discover", tmp_path / "missing"), "missing"),
        (("discover", empty), "empty"),
        (("discover", other), "found 1 × .txt in 1 folder"),
        (("analyze", empty, *base), "empty"),
        (("analyze", small_series.run), "analyze needs --evaluation-set"),
        (("analyze", small_series.run, "--evaluation-set", empty, "--store", tmp_path / "x.duckdb"), str(empty)),
        (("analyze", small_series.run, *base, "--analyzer", "hesian"), 'Did you mean "hessian"?'),
        (("analyze", small_series.run, *base, "--set", "probe.max_word=3"), 'Did you mean "max_words"?'),
        (("analyze", small_series.run, *base, "--set", "max_words=3"), "expected ANALYZER.PARAM=VALUE"),
        (("analyze", small_series.run, *base, "--set", "probe.max_words"), "expected NAME=VALUE"),
        (("analyze", small_series.run, *base, "--steps", "1..3"), "expected steps and ranges"),
        (("analyze", small_series.run, *base, "--device", "cuda"), "PyTorch sees no CUDA device"),
        (("analyze", small_series.run, *base, "--model-factory", "nowhere"), "--model-factory"),
        (("query", tmp_path / "none.duckdb", "select 1"), "No store at"),
        (("query", store, "select * from hstory"), 'Did you mean "history"?'),
        (("query", store, "select 1", "--format", "xml"), "--format"),
        (("query", store, "select 1", "--output", tmp_path / "no" / "x.csv"), "cannot write"),
        (("status", store.parent), "cannot be opened as a store"),
        (("rerun", store, "--analyzer", "probes"), 'Did you mean "probe"?'),
        (("rerun", store, "--analyzer", "probe", "--run", "rum"), 'Did you mean "run"?'),
        (("analyzers", "los"), 'Did you mean "loss"?'),
        (("corpus", "generate", tmp_path / "no" / "c.jsonl", "--sentences", 1), "no"),
        (("analyze", "--nonsense"), "nonsense"),
    ]
    for arguments, words in mistakes:
        ended = run(*arguments)
        text = " ".join(ended.err.split())
        assert ended.code == 2, (arguments, ended)
        assert words in text, (arguments, ended.err)
        assert "Traceback" not in ended.err, (arguments, ended.err)
        assert ended.out == "", arguments
    assert not (tmp_path / "x.duckdb").exists()


BAD_FILES = [
    ("truncated.safetensors", ("bytes",)),
    ("html_page_named_model.safetensors", ("HTML",)),
    ("git_lfs_pointer_epoch_0.pt", ("git lfs pull",)),
    ("empty_0_tensors.safetensors", ("zero tensors: nothing was saved",)),
    ("nan_weights.safetensors", ("--model-factory", "NaN")),
]


@pytest.mark.parametrize(("name", "words"), BAD_FILES, ids=[name for name, _ in BAD_FILES])
def test_bad_files_are_explained(
    run: Run, small_series: SmallSeries, tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    import os

    folder = tmp_path / "run"
    folder.mkdir()
    stem, suffix = name.rsplit(".", 1)
    target = folder / f"{stem.rstrip('_0')}_step7.{suffix}"
    shutil.copyfile(shared_data("bad_files", name), target)
    os.utime(target, (1e9, 1e9))
    shown = run("discover", folder)
    assert shown.code == 0
    assert "Traceback" not in shown.out + shown.err
    ended = run("analyze", folder, "--evaluation-set", small_series.evaluation, "--store", tmp_path / "s.duckdb",
                "--analyzer", "loss", "--jobs", 1)  # fmt: skip
    assert ended.code in (1, 2)
    assert "Traceback" not in ended.err
    said = (shown.out + ended.err).replace(name, "").replace(target.name, "")
    assert any(word in said for word in words), said


def test_nan_weights_fail_with_the_count(run: Run, small_series: SmallSeries, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "run"
    shutil.copytree(small_series.run, folder)
    path = folder / "step1" / "model.safetensors"
    weights = load_file(path)
    first = sorted(weights)[0]
    weights[first] = torch.full_like(weights[first], float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    ended = run("analyze", folder, "--evaluation-set", small_series.evaluation, "--store", tmp_path / "s.duckdb",
                "--analyzer", "loss", "--jobs", 1)  # fmt: skip
    assert ended.code == 1
    assert "NaN" in ended.err
    assert f"{weights[first].numel()} of" in ended.err.replace(",", "")
    assert Store.open(tmp_path / "s.duckdb").scalar("select count(*) from status where status = 'ok'") == 3


def test_the_evaluation_set_command(run: Run, stories_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "tale.txt"
    text.write_text("Once upon a time there was a cat.<|endoftext|>It slept all day.\n")
    made = run("evaluation-set", "build", tmp_path / "e", "--from", text, "--tokenizer", stories_model)
    assert made.code == 0, made.err
    assert "2 sequences" in made.out
    shown = run("evaluation-set", "show", tmp_path / "e")
    assert "causal_lm" in shown.out
    again = run("evaluation-set", "build", tmp_path / "e2", "--from", tmp_path / "gone", "--tokenizer", stories_model)
    assert again.code == 2
    assert "gone" in again.err


def test_help_is_quick() -> None:
    best = min(_seconds("--help") for _ in range(3))
    # the claim is half a second on a quiet machine (benchmarks/bench_cli.py); a busy one gets some slack here
    assert best < 1.0


def _seconds(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "trace_offline.cli.main", *arguments], check=True, capture_output=True)
    return time.perf_counter() - started

"""Results of lm-evaluation-harness in a store: both formats, steps, idempotence, the latest word, errors in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import shared_data
from typer.testing import CliRunner

from trace_offline.cli.main import app
from trace_offline.core.errors import UsageError
from trace_offline.core.types import Checkpoint, CheckpointState
from trace_offline.importers.lm_eval import read_results
from trace_offline.importers.writing import import_lm_eval
from trace_offline.query.reader import Store
from trace_offline.report import write_report
from trace_offline.store.writer import Writer


def old(step: int | str = "step512", acc: object = 0.25, **more: Any) -> dict[str, Any]:
    """A file as the harness wrote it in 2023."""
    return {
        "results": {
            "lambada_openai": {"ppl": 100.5, "ppl_stderr": 4.0, "acc": acc, "acc_stderr": 0.01},
            "piqa": {"acc": 0.6, "acc_stderr": 0.02, "acc_norm": 0.61, "acc_norm_stderr": 0.02},
        },
        "versions": {"lambada_openai": 0, "piqa": 0},
        "config": {
            "model": "hf-causal", "model_args": f"use_accelerate=True,pretrained=Org/pythia-v1.1-70m,revision={step}",
            "num_fewshot": 0, "batch_size": 32, "device": None, "limit": None,
        },
        **more,
    }  # fmt: skip


def new(model_args: object = "pretrained=Org/pythia-70m,revision=step1000,dtype=float") -> dict[str, Any]:
    """A file as the harness writes it today."""
    return {
        "results": {
            "blimp": {"acc,none": 0.7, "acc_stderr,none": "N/A", "alias": "blimp"},
            "blimp_agreement": {"alias": " - blimp_agreement", "acc,none": 0.75, "acc_stderr,none": 0.0137},
            "gsm8k": {
                "alias": "gsm8k", "exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": 0.008,
                "exact_match,flexible-extract": 0.125, "exact_match_stderr,flexible-extract": 0.009,
            },
            "wikitext": {"word_perplexity,none": float("nan"), "word_perplexity_stderr,none": "N/A", "alias": ""},
            "empty_group": {"alias": "empty_group", " ": " "},
        },
        "versions": {"blimp_agreement": 1.0, "gsm8k": 3.0},
        "n-shot": {"blimp_agreement": 0, "gsm8k": 5, "blimp": 0, "wikitext": 0},
        "n-samples": {"blimp_agreement": {"original": 1000, "effective": 1000}},
        "higher_is_better": {"gsm8k": {"exact_match": True}},
        "config": {
            "model": "hf", "model_args": model_args, "model_dtype": "torch.float32", "limit": None, "device": "cuda:0",
            "random_seed": 7,
        },
        "git_hash": "abc1234", "lm_eval_version": "0.4.9", "model_name": "Org/pythia-70m",
    }  # fmt: skip


def put(folder: Path, name: str, content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_the_old_format_becomes_history(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    done = import_lm_eval(put(tmp_path, "anything.json", old()), path)
    assert (done.files, done.new, done.unchanged, done.numbers) == (1, 2, 0, 4)
    assert done.steps == {"pythia-v1.1-70m": [512]}
    rows = Store.open(path).sql("select * from history order by task, metric").to_pylist()
    assert [(row["task"], row["metric"], row["value"], row["stderr"]) for row in rows] == [
        ("lambada_openai", "acc", 0.25, 0.01),
        ("lambada_openai", "ppl", 100.5, 4.0),
        ("piqa", "acc", 0.6, 0.02),
        ("piqa", "acc_norm", 0.61, 0.02),
    ]
    first = rows[0]
    assert (first["run"], first["step"], first["checkpoint"], first["analyzer"]) == (
        "pythia-v1.1-70m", 512, "step512", "lm-eval",
    )  # fmt: skip
    assert (first["evaluation_set"], first["analyzer_version"]) == ("lm-eval 0-shot", "unknown")
    assert all(row["is_latest"] for row in rows)
    status = Store.open(path).sql("select status, count(*) as n from status group by all").to_pylist()
    assert status == [{"status": "ok", "n": 2}]


def test_the_new_format_becomes_history(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    import_lm_eval(put(tmp_path, "results_2025-01-01T00-00-00.json", new()), path)
    rows = Store.open(path).sql("select * from history order by task, label").to_pylist()
    got = [(row["task"], row["label"], row["metric"], row["value"], row["stderr"], row["n"]) for row in rows]
    assert got == [
        ("blimp", None, "acc", 0.7, None, None),
        ("blimp_agreement", None, "acc", 0.75, 0.0137, 1000),
        ("gsm8k", "flexible-extract", "exact_match", 0.125, 0.009, None),
        ("gsm8k", "strict-match", "exact_match", 0.1, 0.008, None),
        ("wikitext", None, "word_perplexity", None, None, None),
    ]
    assert rows[-1]["reason"] == "lm-evaluation-harness recorded nan for this metric"
    assert {row["analyzer_version"] for row in rows} == {"0.4.9"}
    assert {row["evaluation_set"] for row in rows} == {"lm-eval 0-shot", "lm-eval 5-shot"}
    (stamp,) = (
        Store.open(path).sql("select dtype, seed, device, versions from analyses where params like '%:5%'").to_pylist()
    )
    assert (stamp["dtype"], stamp["seed"], stamp["device"]) == ("float32", 7, "cuda:0")
    assert json.loads(stamp["versions"]) == {"lm_eval": "0.4.9", "task_version": "3.0"}


@pytest.mark.parametrize(
    ("folder", "name", "content", "step", "run"),
    [
        ("x", "a.json", old("step143000"), 143000, "pythia-v1.1-70m"),
        ("x", "70m_step64.json", old("main"), 64, "pythia-v1.1-70m"),
        ("x", "70m_step64.json", old("step8"), 8, "pythia-v1.1-70m"),  # the file's own record wins over its name
        ("step2000", "results.json", old("main"), 2000, "pythia-v1.1-70m"),
        ("x", "a.json", new("pretrained=runs/first/checkpoint-500"), 500, "first"),
        ("x", "a.json", new({"pretrained": "Org/m", "revision": "step16"}), 16, "m"),
        ("x", "a.json", new("revision=step4"), 4, "pythia-70m"),
    ],
)
def test_the_step_comes_from_the_record_or_the_name(
    tmp_path: Path, folder: str, name: str, content: dict[str, Any], step: int, run: str
) -> None:
    found = read_results(put(tmp_path / folder, name, content))
    assert (found.step, found.run) == (step, run)


def test_twice_is_a_no_op_and_changed_numbers_are_the_latest_word(tmp_path: Path) -> None:
    path, file = tmp_path / "s.duckdb", put(tmp_path, "a.json", old(acc=0.25))
    import_lm_eval(file, path)
    everything = "select * from history order by all"  # without an order rows come in any
    before = Store.open(path).sql(everything).to_pylist()
    again = import_lm_eval([file, file], path)
    assert (again.new, again.unchanged) == (0, 4)
    assert Store.open(path).sql(everything).to_pylist() == before
    changed = import_lm_eval(put(tmp_path, "b.json", old(acc=0.5)), path)
    assert (changed.new, changed.unchanged) == (1, 1)
    latest = "select value, is_latest from history where task = 'lambada_openai' and metric = 'acc' order by value"
    assert Store.open(path).sql(latest).to_pylist() == [
        {"value": 0.25, "is_latest": False}, {"value": 0.5, "is_latest": True},
    ]  # fmt: skip
    assert import_lm_eval(file, path).new == 0  # the first numbers again: theirs is the latest word again
    assert [row["is_latest"] for row in Store.open(path).sql(latest).to_pylist()] == [True, False]


def test_files_with_different_tasks_of_one_step_stand_side_by_side(tmp_path: Path) -> None:
    parts = []
    for task in ("lambada_openai", "piqa"):
        content = old()
        content["results"] = {task: content["results"][task]}
        parts.append(put(tmp_path, f"{task}.json", content))
    import_lm_eval(parts, tmp_path / "s.duckdb")
    rows = Store.open(tmp_path / "s.duckdb").sql("select distinct task, is_latest from history order by 1").to_pylist()
    assert rows == [{"task": "lambada_openai", "is_latest": True}, {"task": "piqa", "is_latest": True}]


def test_imported_numbers_stand_beside_measured_ones_and_stay_when_the_weights_come_later(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    import_lm_eval(put(tmp_path, "a.json", old()), path, run="r")
    real = Checkpoint("run/step512", "hf_folder", CheckpointState.COMPLETE, step=512, fingerprint="f")
    with Writer.open(path) as writer:
        writer.register_checkpoints("r", [("step512", real)])
    store = Store.open(path)
    assert store.sql("select layout, fingerprint from checkpoints").to_pylist() == [
        {"layout": "hf_folder", "fingerprint": "f"}
    ]
    assert store.scalar("select bool_and(is_latest) from history")
    again = import_lm_eval(put(tmp_path, "b.json", old(acc=0.75)), path, run="r")
    assert again.new == 1
    assert store.sql("select layout, fingerprint from checkpoints").to_pylist() == [
        {"layout": "hf_folder", "fingerprint": "f"}
    ]


def test_a_report_can_be_written(tmp_path: Path) -> None:
    files = [put(tmp_path, f"step{step}.json", old(f"step{step}", acc=step / 100)) for step in (0, 1, 2)]
    import_lm_eval(files, tmp_path / "s.duckdb")
    page = write_report(tmp_path / "s.duckdb", tmp_path / "page.html")
    text = page.read_text(encoding="utf-8")
    assert "lambada_openai" in text
    assert "The parameters differ between steps" not in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{not json", "expected JSON, found something else at line 1"),
        ("[1]", 'expected a JSON object with a table "results", found list'),
        ('{"loss": 1, "step": 2}', 'with a table "results", found the keys: loss, step'),
        ('{"results": {}}', 'with a table "results", found the keys: results'),
        ('{"results": {"piqa": 0.5}}', 'expected a table of numbers for task "piqa", found 0.5'),
        ('{"results": {"piqa": {"alias": "piqa"}}}', 'the table "results" has no number in it'),
    ],
)
def test_what_is_no_result_file_is_said_to_be_none(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "step1.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=words) as caught:
        import_lm_eval(path, tmp_path / "s.duckdb")
    assert str(path) in caught.value.message
    assert not (tmp_path / "s.duckdb").exists()


def test_a_file_without_a_step_asks_for_it(tmp_path: Path) -> None:
    file = put(tmp_path / "x", "results.json", old("main"))
    with pytest.raises(UsageError, match=r'no training step.*revision "main".*--step N'):
        import_lm_eval(file, tmp_path / "s.duckdb")
    assert import_lm_eval(file, tmp_path / "s.duckdb", step=77).steps == {"pythia-v1.1-70m": [77]}
    with pytest.raises(UsageError, match="one step for 2 files cannot be right"):
        import_lm_eval([file, file], tmp_path / "s.duckdb", step=77)


def test_a_file_without_a_model_asks_for_the_run(tmp_path: Path) -> None:
    content = new("revision=step4")
    del content["model_name"]
    file = put(tmp_path, "a.json", content)
    with pytest.raises(UsageError, match="name the run with --run"):
        import_lm_eval(file, tmp_path / "s.duckdb")
    assert import_lm_eval(file, tmp_path / "s.duckdb", run="mine").steps == {"mine": [4]}


def test_missing_files_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        import_lm_eval(tmp_path / "nothing.json", tmp_path / "s.duckdb")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"found no \.json file in it"):
        import_lm_eval(tmp_path / "empty", tmp_path / "s.duckdb")
    with pytest.raises(UsageError, match="at least one result file"):
        import_lm_eval([], tmp_path / "s.duckdb")


def test_the_command(tmp_path: Path) -> None:
    put(tmp_path / "in", "step0.json", old("step0"))
    put(tmp_path / "in", "step1.json", old("step1"))
    store = tmp_path / "s.duckdb"
    done = CliRunner().invoke(app, ["import", "lm-eval", str(tmp_path / "in"), "--store", str(store), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "store": str(store), "files": 2, "new": 4, "unchanged": 0, "numbers": 8, "steps": {"pythia-v1.1-70m": [0, 1]},
    }  # fmt: skip
    assert "pythia-v1.1-70m: 2 steps from 0 to 1" in done.stderr


def test_the_original_files_of_pythia_70m(tmp_path: Path) -> None:
    folder = shared_data("pythia_evals", "raw_70m_zeroshot")
    files = [folder / f"70m_step{step}.json" for step in (0, 512, 143000)]
    done = import_lm_eval(files, tmp_path / "s.duckdb")
    assert done.steps == {"pythia-v1.1-70m": [0, 512, 143000]}
    found = Store.open(tmp_path / "s.duckdb").sql(
        "select step, value, stderr from history where task = 'lambada_openai' and metric = 'acc' order by step"
    )
    for row, file in zip(found.to_pylist(), files, strict=True):
        asked = json.loads(file.read_text())["results"]["lambada_openai"]
        assert (row["value"], row["stderr"]) == (asked["acc"], asked["acc_stderr"])

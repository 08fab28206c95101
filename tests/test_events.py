"""``trace-offline events``: from a store to the table, orders and stopping; Pythia's histories; the shipped series."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shared_data
from planted_histories import LOG_SPACED, noise, sigmoid
from typer.testing import CliRunner

import trace_offline
from trace_offline.cli.main import app
from trace_offline.core.errors import StoreError, UsageError
from trace_offline.core.types import Checkpoint, CheckpointState, Measurement
from trace_offline.events.find import Settings
from trace_offline.events.ordering import order_metrics
from trace_offline.events.selection import MAIN_METRICS, Selection
from trace_offline.events.stopping import find_stop
from trace_offline.importers.writing import import_lm_eval
from trace_offline.query.reader import Store
from trace_offline.report import write_report
from trace_offline.store.rows import checkpoint_row, measurement_table
from trace_offline.store.writer import Writer

ROOT = Path(__file__).parents[1]


def fill(path: Path, numbers: dict[int, list[Measurement]], run: str = "r", analyzer: str = "loss") -> None:
    """A store with one analysis for each step, written in one transaction."""
    with Writer.open(path) as writer, writer.transaction() as con:
        con.execute("insert into runs values (?, 'x', null, current_timestamp::timestamp)", [run])
        con.execute(
            "insert or ignore into evaluation_sets values ('e1', 'eval', 'eval', 3, 30, null, null, null, null)"
        )
        ((first,),) = con.execute("select coalesce(max(analysis), 0) + 1 from analyses").fetchall()
        for key, (step, measurements) in enumerate(numbers.items(), first):
            item = Checkpoint(f"{run}/{step}", "hf_folder", CheckpointState.COMPLETE, step, fingerprint=f"{run}{step}")
            row = checkpoint_row(run, f"step{step}", item)
            con.execute(f"insert into checkpoints values ({', '.join('?' * 15)})", row)
            same = [f"{run}-{step}", f"{run}{step}", analyzer, "1", "{}", "e1", "float32", 0]
            con.execute(
                "insert into analyses values (?, ?, ?, ?, ?, ?, ?, ?, ?, 'ok', null, 0.1, 'cpu', '{}', ?, "
                "current_timestamp::timestamp)",
                [key, *same, key],
            )
            con.execute(
                "insert into planned values (?, ?, ?, ?, ?, ?, ?, ?, ?, current_timestamp::timestamp)", [row[0], *same]
            )
            table = measurement_table(key, measurements)
            con.register("new_numbers", table)
            con.execute("insert into measurements select * from new_numbers")
            con.unregister("new_numbers")


def curves(seed: int, centres: dict[str, float], size: float = 0.01) -> dict[int, list[Measurement]]:
    """Planted sigmoids by metric name on logarithmic steps."""
    rng = np.random.default_rng(seed)
    values = {name: sigmoid(LOG_SPACED, at, 0.3) + size * noise(14, rng) for name, at in centres.items()}
    return {
        int(step): [Measurement(name, float(line[i]), size, 100) for name, line in values.items()]
        for i, step in enumerate(LOG_SPACED)
    }


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "s.duckdb"
    numbers = curves(0, {"accuracy": 100})
    for step, found in numbers.items():
        found += [
            Measurement("loss", 5 - 3 * found[0].value, 0.03, 100),  # type: ignore[operator]
            Measurement("accuracy", 0.5, 0.01, 10, label="NOUN"),
            Measurement("missing", None, reason="not measured"),
            Measurement("flat", 1.0 + step * 0, 0.1),
        ]
    fill(path, numbers)
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return Store.open(path).sql("select * from events order by all").to_pylist()


def test_events_are_stored_and_replaced_for_the_selection_only(store: Path) -> None:
    found = trace_offline.find_events(store, ["loss.accuracy"])
    assert rows(store) == sorted(found.to_arrow().to_pylist(), key=lambda row: (row["kind"], row["step"]))
    (event,) = [row for row in rows(store) if row["kind"] == "emergence"]
    assert event["step_low"] < 100 < event["step_high"]
    assert (event["run"], event["analyzer"], event["metric"], event["label"]) == ("r", "loss", "accuracy", None)
    assert event["evaluation_set"] == "eval"
    detail = json.loads(event["detail"])
    assert (detail["direction"], detail["direction_from"], detail["noise"]) == ("rises", "name", "stderr")
    assert detail["threshold"] == pytest.approx(0.25, abs=0.02)
    before = rows(store)
    trace_offline.find_events(store, ["loss.loss"])
    assert [row for row in rows(store) if row["metric"] == "accuracy"] == before
    falls = next(row for row in rows(store) if row["metric"] == "loss" and row["kind"] == "emergence")
    assert json.loads(falls["detail"])["direction"] == "falls"
    trace_offline.find_events(store, ["loss.accuracy"], share=0.9, kinds=("emergence",))
    again = [row for row in rows(store) if row["metric"] == "accuracy"]
    assert len(again) == len(before)  # the other kinds stay
    (late,) = [row for row in again if row["kind"] == "emergence"]
    assert late["step"] > event["step"]


def test_what_is_not_found_has_a_reason(store: Path) -> None:
    found = trace_offline.find_events(store, ["flat", "missing"])
    assert found.events == []
    reasons = {(key.metric, kind): reason for key, kind, reason in found.without}
    assert reasons["missing", None] == "0 checkpoints with a number: at least 4 are needed"
    assert "no rise beyond noise" in reasons["flat", "emergence"]


def test_selection(store: Path) -> None:
    assert trace_offline.find_events(store).series == 1  # the main metric of the loss
    assert trace_offline.find_events(store, ["accuracy"]).series == 1
    assert trace_offline.find_events(store, ["accuracy"], labels=["NOUN"]).series == 1
    assert trace_offline.find_events(store, ["accuracy"], labels=["*"]).series == 2
    assert trace_offline.find_events(store, ["accuracy[label=NOUN]"]).series == 1
    assert trace_offline.find_events(store, ["accuracy", "loss.loss"], runs=["r"]).series == 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"metrics": ["acuracy"]}, r'--metric: .* has no "acuracy"\. Did you mean "accuracy"\?'),
        ({"runs": ["q"]}, r'--run: .* has no "q"\. There are: r\.|Did you mean'),
        ({"layers": [3]}, r'--layer: .* has no "3"'),
        ({"labels": ["VERB"]}, r'--label: .* has no "VERB"'),
        ({"metrics": ["accuracy[shape=3]"]}, r'--metric: expected "metric", "analyzer\.metric" or'),
        ({"metrics": ["loss.loss[task=pos]"]}, "nothing matches the selection"),
        ({"share": 1.5}, "--share: expected a number between 0 and 1, found 1.5"),
        ({"direction": "up"}, '--direction: "up" is not known'),
        ({"model": "cubic"}, "--model: expected slope or mean"),
        ({"kinds": ("emergense",)}, 'Did you mean "emergence"'),
    ],
)
def test_a_selection_that_cannot_be_met_is_explained(store: Path, call: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        trace_offline.find_events(store, **call)


def test_no_store_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No store at"):
        trace_offline.find_events(tmp_path / "nothing.duckdb")
    with Writer.open(tmp_path / "s.duckdb"):
        pass
    with pytest.raises(UsageError, match="has no numbers with a step"):
        trace_offline.find_events(tmp_path / "s.duckdb")


def test_order_within_a_run_and_over_seeds(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    for seed in range(6):
        fill(path, curves(seed, {"accuracy": 20 + seed, "f1": 600 + seed}), run=f"seed{seed}")
    found = order_metrics(path, "accuracy", "loss.f1", Selection(), Settings())
    assert [one.verdict for one in found.runs] == ["accuracy first"] * 6
    over = found.over_runs
    assert over is not None
    assert (over.first, over.second, over.p_sign) == (6, 0, 2**-5)
    planted = np.exp(np.mean([np.log(21 + seed) - np.log(601 + seed) for seed in range(6)]))
    assert over.ratio_low is not None
    assert over.ratio_low < planted < over.ratio_high
    same = order_metrics(path, "f1", "f1", Selection(runs=["seed0"]), Settings())
    assert same.runs[0].verdict == "not told apart: the intervals overlap"
    with pytest.raises(UsageError, match="nothing matches"):
        order_metrics(path, "f1[task=pos]", "f1", Selection(), Settings())


def test_order_asks_which_series_is_meant(store: Path) -> None:
    with pytest.raises(UsageError, match=r"means several series of run r.*\[task=…,layer=…\]"):
        order_metrics(store, "accuracy", "loss.loss", Selection(labels=["*"]), Settings())
    found = order_metrics(store, "accuracy", "flat", Selection(), Settings())
    assert found.over_runs is None
    assert found.runs[0].verdict.startswith("flat does not emerge: no rise beyond noise")


def test_stop(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    fill(path, curves(0, {"accuracy": 20, "f1": 500}))
    (one,) = find_stop(path, Selection(metrics=["accuracy", "f1"]), Settings())
    steps = {stop.key.metric: stop.step for stop in one.series}
    assert one.step == steps["f1"] > steps["accuracy"] >= 32
    assert [key.metric for key in one.last] == ["f1"]
    assert one.final_step == 4096
    (rough,) = find_stop(path, Selection(metrics=["f1"]), Settings(), absolute=0.5)
    assert rough.step < one.step
    with pytest.raises(UsageError, match="at least 0"):
        find_stop(path, Selection(metrics=["f1"]), Settings(), stderrs=-1)


@pytest.mark.parametrize("metric", ["loss", "unheard_of"])
def test_an_amount_needs_no_noise(tmp_path: Path, metric: str) -> None:
    path = tmp_path / "s.duckdb"
    fill(path, {step: [Measurement(metric, value)] for step, value in enumerate((3.0, 2.0, 1.0))})
    (one,) = find_stop(path, Selection(metrics=[metric]), Settings(), absolute=0.1)
    (stop,) = one.series
    assert (one.step, stop.best, stop.missed, stop.improved, stop.direction) == (2, 1.0, 0.0, True, "falls")
    (coarse,) = find_stop(path, Selection(metrics=[metric]), Settings(), absolute=1.5)
    assert (coarse.step, coarse.series[0].best, coarse.series[0].missed) == (1, 2.0, 1.0)
    (upwards,) = find_stop(path, Selection(metrics=[metric]), Settings(direction="rises"), absolute=0.1)
    assert (upwards.step, upwards.series[0].direction, upwards.last) == (0, "rises", ())
    with pytest.raises(UsageError, match=r"3 checkpoints without standard errors.*Give --stop-amount"):
        find_stop(path, Selection(metrics=[metric]), Settings())


def test_the_command(store: Path) -> None:
    run = CliRunner()
    done = run.invoke(app, ["events", str(store), "--metric", "accuracy", "--json"])
    assert done.exit_code == 0, done.output
    listed = json.loads(done.stdout)
    assert {row["kind"] for row in listed} >= {"emergence", "convergence"}
    assert listed[0]["detail"]["text"]
    assert "events in 1 series" in done.stderr
    table = run.invoke(app, ["events", str(store), "--metric", "accuracy", "--metric", "loss"])
    assert "emergence" in table.stdout
    assert "series of pure noise would show an event by chance" in table.stderr
    order = run.invoke(app, ["events", str(store), "--order", "loss.accuracy", "loss.loss"])
    assert "not told apart" in order.stdout
    assert json.loads(run.invoke(app, ["events", str(store), "--order", "accuracy", "flat", "--json"]).stdout)["runs"]
    stop = run.invoke(app, ["events", str(store), "--stop", "--metric", "accuracy"])
    assert re.search(r"r: nothing improved after step \d+ of 4096; last to improve: loss\.accuracy", stop.stdout)
    assert json.loads(run.invoke(app, ["events", str(store), "--stop", "--metric", "loss", "--json"]).stdout)
    with pytest.raises(UsageError, match="one at a time"):
        run.invoke(app, ["events", str(store), "--stop", "--order", "a", "b"], catch_exceptions=False)


def test_the_report_of_a_store_with_events(store: Path, tmp_path: Path) -> None:
    trace_offline.find_events(store)
    assert write_report(store, tmp_path / "page.html").stat().st_size > 1000


def test_the_page_names_the_main_metrics_and_the_columns() -> None:
    page = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
    for analyzer, metrics in MAIN_METRICS.items():
        for metric in metrics:
            assert (f"`{metric}`" if analyzer == "lm-eval" else f"`{analyzer}.{metric}`") in page
    for option in ("--metric", "--share", "--order", "--stop", "--direction", "--model", "--confidence", "--label"):
        assert option in page


@pytest.mark.slow
def test_the_shipped_series(tmp_path: Path) -> None:
    """The example of the README's question: when did the loss turn, and was it over before the end?"""
    path = tmp_path / "s.duckdb"
    summary = trace_offline.analyze(
        ROOT / "data" / "tiny_series", ROOT / "data" / "tiny_evaluation", path, analyzers=("loss",), jobs=1
    )
    assert summary.exit_code == 0
    trace_offline.find_events(path)
    found = {row["kind"]: row for row in rows(path)}
    assert (found["emergence"]["step_low"], found["emergence"]["step_high"]) == (16, 32)
    assert 16 <= found["emergence"]["step"] <= 32
    assert "regress" not in found
    assert "peak" not in found


def write_old_format(table: Path, folder: Path) -> None:
    """Files as the harness wrote them, from EleutherAI's table of the zero-shot results of LAMBADA."""
    results: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    with gzip.open(table, "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if (row["task"], row["split"]) == ("lambada_openai", "zero-shot"):
                results[row["model"], row["step"]][row["metric"]] = float(row["value"])
    for (model, step), numbers in results.items():
        content = {
            "results": {"lambada_openai": numbers}, "versions": {"lambada_openai": 0},
            "config": {"model_args": f"pretrained=EleutherAI/{model},revision=step{step}", "num_fewshot": 0},
        }  # fmt: skip
        (folder / f"{model}_{step}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def pythia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The events of all Pythia models on LAMBADA."""
    folder = tmp_path_factory.mktemp("pythia")
    write_old_format(shared_data("pythia_evals", "pythia_v1_core.csv.gz"), folder)
    import_lm_eval(folder, folder / "s.duckdb")
    trace_offline.find_events(folder / "s.duckdb")
    return folder / "s.duckdb"


def test_lambada_emerges_between_512_and_3000_in_every_model(pythia: Path) -> None:
    found = [row for row in rows(pythia) if row["metric"] == "acc" and row["kind"] == "emergence"]
    models = {row["run"] for row in Store.open(pythia).sql("select run from runs").to_pylist()}
    assert len(models) == 16
    assert {row["run"] for row in found} == models
    for row in found:
        assert 512 <= row["step_low"] <= row["step"] <= row["step_high"] <= 3000, row


def test_the_late_regress_of_pythia_70m_is_reported_as_such(pythia: Path) -> None:
    (row,) = [
        row for row in rows(pythia) if (row["run"], row["metric"], row["kind"]) == ("pythia-70m", "acc", "regress")
    ]
    assert 53000 <= row["step_low"] < row["step"] < row["step_high"] <= 143000
    detail = json.loads(row["detail"])
    assert detail["best_step"] == 53000
    assert detail["best"] == pytest.approx(0.2534, abs=1e-4)
    larger = [
        r["run"] for r in rows(pythia) if r["kind"] == "regress" and re.match(r"pythia-(1\.4|2\.8|6\.9|12)b", r["run"])
    ]
    assert larger == []


def test_early_perplexities_that_rise_and_return_are_no_emergence(pythia: Path) -> None:
    """Of pythia-12b the perplexity is 1.2e7 at first, 6.5e8 at step 8, and back at 9.5e6 at step 32."""
    early = Store.open(pythia).sql(
        "select run from history where metric = 'ppl' and is_latest group by run "
        "having max(value) filter (where step between 4 and 32) > 1.02 * min(value) filter (where step = 0)"
    )
    models = {row["run"] for row in early.to_pylist()}
    assert {"pythia-12b", "pythia-12b-deduped", "pythia-6.9b"} <= models
    found = {row["run"]: row for row in rows(pythia) if row["metric"] == "ppl" and row["kind"] == "emergence"}
    for model in models:
        assert found[model]["step_low"] >= 128, found[model]
        assert json.loads(found[model]["detail"])["scale"] == "log"


def test_the_original_files_of_pythia_70m(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    import_lm_eval(shared_data("pythia_evals", "raw_70m_zeroshot"), path)
    trace_offline.find_events(path, tasks=["lambada_openai"])
    found = {(row["metric"], row["kind"]): row for row in rows(path)}
    assert 512 <= found["acc", "emergence"]["step_low"] < found["acc", "emergence"]["step_high"] <= 3000
    assert json.loads(found["acc", "regress"]["detail"])["best_step"] == 53000
    (stop,) = find_stop(path, Selection(tasks=["lambada_openai"]), Settings())
    assert (stop.step, stop.final_step) == (53000, 143000)

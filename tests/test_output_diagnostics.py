"""From a folder of checkpoints to numbers in the store: all analyzers of outputs on one set that has all they need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import SmallSeries

from trace_offline import Store, analyze
from trace_offline.recording import save_evaluation_set

ANALYZERS = ("output", "agreement", "ngram", "memorization", "repetition", "generation")


def test_outputs_of_a_series(small_series: SmallSeries, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(3, 80, (30, 12))
    rows[:, 0] = 1
    training = [*rng.integers(3, 80, (50, 12)), *rows[:10]]
    set_ = save_evaluation_set(
        tmp_path / "set",
        rows,
        annotations=[(row, "agreement", 4, 5, "singular" if row % 2 else "plural") for row in range(30)],
        alternatives=[(row, 4, 79 if rows[row, 4] != 79 else 78) for row in range(30)],
        special_token_ids=[0, 1, 2],
        training_ids=training,
    )
    few = {"generation": {"samples": 6, "max_new_tokens": 5}}
    summary = analyze(
        small_series.run, set_, tmp_path / "s.duckdb", analyzers=ANALYZERS, params=few, jobs=1, steps="0-1"
    )
    assert summary.exit_code == 0, summary.problems
    found = Store.open(tmp_path / "s.duckdb").sql("select * from history").to_pylist()
    assert {(row["analyzer"], row["step"]) for row in found} == {(name, step) for name in ANALYZERS for step in (0, 1)}
    assert all(np.isfinite(row["value"]) for row in found if row["value"] is not None)

    def value(analyzer: str, metric: str, step: int = 0, **where: str) -> float:
        (row,) = (
            row
            for row in found
            if (row["analyzer"], row["metric"], row["step"]) == (analyzer, metric, step)
            and all(row[name] == where.get(name) for name in ("task", "label"))
        )
        return float(row["value"])

    # one forward pass, several readers: where they measure the same they say the same
    loss = value("ngram", "loss")
    seen = [value("memorization", "loss", task="text", label=side) for side in ("seen", "novel")]
    share = value("memorization", "share_seen", task="text")
    assert share == pytest.approx(1 / 3)
    assert share * seen[0] + (1 - share) * seen[1] == pytest.approx(loss, rel=1e-6)
    assert value("output", "class_mass_chance", task="agreement", label="singular") <= 1
    assert value("generation", "length") == 5


def test_sets_that_lack_something_say_what_to_do(small_series: SmallSeries, tmp_path: Path) -> None:
    summary = analyze(
        small_series.run,
        small_series.evaluation,
        tmp_path / "s.duckdb",
        analyzers=("agreement", "ngram", "memorization"),
        jobs=1,
        steps="0",
    )
    assert summary.exit_code == 0
    rows = Store.open(tmp_path / "s.duckdb").sql("select analyzer, status, message from analyses").to_pylist()
    messages = {row["analyzer"]: row["message"] for row in rows}
    assert {row["status"] for row in rows} == {"not_applicable"}
    assert "--training-text FILE" in messages["ngram"]
    assert "--training-text FILE" in messages["memorization"]
    assert "--task agreement" in messages["agreement"]

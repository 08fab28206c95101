"""The control of every comparison: equal weights at two steps, through the whole way, give exactly neutral values."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from conftest import SmallSeries

from trace_offline import Store, analyze
from trace_offline.analyzers import registry as registry_module

NEUTRAL = {
    "similarity": {"cka": 1, "cka_debiased": 1, "procrustes_distance": 0, "pwcca": 1, "neighbourhood_overlap": 1},
    "weight_change": {
        "distance": 0,
        "relative_distance": 0,
        "cosine": 1,
        "update_to_weight_ratio": 0,
        "update_to_weight_ratio_per_step": 0,
        "weight_cka": 1,
        "weight_cka_debiased": 1,
        "weight_pwcca": 1,
    },
    "gradient_change": {
        "gradient_distance": 0,
        "gradient_relative_distance": 0,
        "gradient_cosine_checkpoints": 1,
        "gradient_cka": 1,
        "gradient_cka_debiased": 1,
        "gradient_pwcca": 1,
    },
}


CLASSES = {
    "similarity": "SimilarityAnalyzer",
    "weight_change": "WeightChangeAnalyzer",
    "gradient_change": "GradientChangeAnalyzer",
}


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint(name, f"trace_offline.analyzers.{name}:{kind}", registry_module.GROUP)
        for name, kind in CLASSES.items()
    ]
    found = registry_module.load_registry(tuple(entries))
    assert not found.broken
    for module in ("analyze", "worker", "series", "rerun"):
        monkeypatch.setattr(f"trace_offline.engine.{module}.registry", lambda: found, raising=False)
    monkeypatch.setattr(registry_module, "registry", lambda: found)


@pytest.mark.parametrize("name", NEUTRAL)
def test_equal_weights_give_neutral_values(name: str, small_series: SmallSeries, tmp_path: Path) -> None:
    quick = {"similarity": {"max_samples": 120, "jackknife_parts": 3}} if name == "similarity" else None
    summary = analyze(
        small_series.run, small_series.evaluation, tmp_path / "s.duckdb", analyzers=(name,), params=quick, jobs=1
    )
    assert summary.exit_code == 0, summary.problems
    rows = (
        Store.open(tmp_path / "s.duckdb")
        .sql("select step, metric, label, layer, value, stderr from history")
        .to_pylist()
    )
    # A matrix by itself has the label label|name.
    for row in rows:
        row["label"] = row["label"] and row["label"].split("|")[0]
    # Steps 2 and 4 hold equal weights: 4 against its previous, both against the final one, 0 against the first.
    same = [
        row
        for row in rows
        if (row["step"] == 4 and row["label"] in ("previous", "final"))
        or (row["step"] == 2 and row["label"] == "final")
        or (row["step"] == 0 and row["label"] == "first")
        or (row["step"] == 4 and row["label"] is None)
    ]
    measured = {row["metric"] for row in same} & set(NEUTRAL[name])
    assert measured == set(NEUTRAL[name])
    for row in same:
        if row["metric"] in NEUTRAL[name] and row["value"] is not None:
            assert row["value"] == NEUTRAL[name][row["metric"]], row
            assert row["stderr"] in (None, 0.0), row
    moved = [row for row in rows if row["step"] == 2 and row["label"] == "previous" and row["metric"] in NEUTRAL[name]]
    assert moved
    assert all(row["value"] != NEUTRAL[name][row["metric"]] for row in moved if row["layer"] is not None)

"""Every registered analyzer on the shipped series, and every one of them again by itself with another parameter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from trace_offline import Store, analyze, rerun
from trace_offline.analyzers.registry import registry
from trace_offline.core.errors import UsageError
from trace_offline.core.params import parse_params

DATA = Path(__file__).parents[1] / "data"
STEPS = (64, 4096)
ANSWERS = frozenset(
    {"curvature_overlap", "empirical_fisher", "gauss_newton", "geometry", "gradient_change", "gradients", "hessian"}
    | {"hessian_blocks", "intrinsic_dimension", "loss", "output", "probe", "probe_transfer", "similarity"}
    | {"train_heldout_curvature", "weight_change", "weights"}
)
"""These have numbers of the shipped series; others may say why not (no pairs of sentences, no training text)."""

ANALYSES = "select distinct analyzer, params, analysis_id, checkpoint, status, message from status order by all"
NUMBERS = """
select analyzer, analysis_id, step, layer, component, task, label, metric, value, stderr, n, is_latest from history
order by all
"""
ARRAYS = "select analyzer, analysis_id, step, layer, component, task, label, name, values from arrays order by all"


def changed(name: str) -> dict[str, Any]:
    """One parameter with a value that is allowed and is not its default: a number a little smaller, or a switch."""
    kind: type[BaseModel] = registry().get(name).Params
    candidates: list[tuple[str, Any]] = []
    for field, info in kind.model_fields.items():
        default = info.default
        if isinstance(default, bool):
            candidates.append((field, not default))
        elif isinstance(default, int) and not field.startswith("max_"):
            candidates += [(field, default - 1), (field, default + 1), (field, default // 2)]
        elif isinstance(default, float):
            candidates.append((field, default * 0.9))
        elif isinstance(default, int):
            candidates.append((field, default - 1))
        elif isinstance(default, tuple) and len(default) > 1:
            candidates.append((field, list(default[:-1])))
    # Numbers first: a switch may turn on what takes long.
    for field, value in sorted(candidates, key=lambda item: isinstance(item[1], bool)):
        try:
            parse_params(kind, name, {field: value})
        except UsageError:
            continue
        return {field: value}
    return {}


def contents(path: Path) -> dict[str, list[dict[str, Any]]]:
    store = Store.open(path)
    return {query.split("from ")[1].split()[0]: store.sql(query).to_pylist() for query in (ANALYSES, NUMBERS, ARRAYS)}


def of(rows: list[dict[str, Any]], name: str, *, other: bool) -> list[dict[str, Any]]:
    return [row for row in rows if (row["analyzer"] != name) == other]


@pytest.mark.parametrize("name", sorted(registry().analyzers))
def test_every_analyzer_has_a_parameter_to_change(name: str) -> None:
    defaults = registry().get(name).Params()
    for field, value in changed(name).items():
        assert getattr(defaults, field) != value
    assert changed(name) or not registry().get(name).Params.model_fields


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every analyzer with its defaults over two checkpoints of the shipped series."""
    root = tmp_path_factory.mktemp("everything")
    for step in STEPS:
        shutil.copytree(DATA / "tiny_series" / f"step{step}", root / "run" / f"step{step}")
    path = root / "s.duckdb"
    summary = analyze(
        root / "run", DATA / "tiny_evaluation", path, analyzers=tuple(sorted(registry().analyzers)), jobs=2
    )
    assert summary.exit_code == 0, summary.problems
    return path


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", sorted(registry().analyzers))
def test_every_analyzer_runs_on_the_shipped_series_and_again_by_itself(name: str, store: Path) -> None:
    before = contents(store)
    mine = of(before["status"], name, other=False)
    assert len(mine) == len(STEPS)
    assert {row["status"] for row in mine} <= {"ok", "not_applicable"}, mine
    assert all(row["status"] == "ok" or (row["message"] and name not in ANSWERS) for row in mine), mine
    found = rerun(store, name, changed(name), force=not changed(name), jobs=2)
    assert [one.exit_code for one in found] == [0], found[0].problems
    after = contents(store)
    for table in before:
        assert of(after[table], name, other=True) == of(before[table], name, other=True), table
    assert {row["status"] for row in of(after["status"], name, other=False)} == {row["status"] for row in mine}
    if changed(name):
        # The earlier analyses stay, beside those with the changed parameter, which are now the latest.
        kept = {row["analysis_id"] for row in of(before["history"], name, other=False)}
        numbers = of(after["history"], name, other=False)
        assert kept <= {row["analysis_id"] for row in numbers}
        assert not [row for row in numbers if row["is_latest"] and row["analysis_id"] in kept]
        steps = {row["step"] for row in of(before["history"], name, other=False)}
        assert {row["step"] for row in numbers if row["is_latest"]} == steps

"""Every registered analyzer on the shipped series, and every one of them again by itself with another parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from trace_offline import Store, analyze, rerun
from trace_offline.analyzers.registry import registry
from trace_offline.core.errors import UsageError
from trace_offline.core.params import parse_params

DATA = Path(__file__).parents[1] / "data"
STEPS = "0,64,4096"

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


@pytest.mark.slow
def test_every_analyzer_runs_on_the_shipped_series_and_again_by_itself(tmp_path: Path) -> None:
    path, names = tmp_path / "s.duckdb", sorted(registry().analyzers)
    summary = analyze(DATA / "tiny_series", DATA / "tiny_evaluation", path, analyzers=tuple(names), steps=STEPS, jobs=1)
    assert summary.exit_code == 0, summary.problems
    before = contents(path)
    outcomes = {name: {row["status"] for row in of(before["status"], name, other=False)} for name in names}
    assert all(found and found <= {"ok", "not_applicable"} for found in outcomes.values()), outcomes
    for name in names:
        found = rerun(path, name, changed(name), force=not changed(name), jobs=1)
        assert [one.exit_code for one in found] == [0], (name, found[0].problems)
        after = contents(path)
        for table in before:
            assert of(after[table], name, other=True) == of(before[table], name, other=True), (name, table)
        if changed(name):
            # The earlier analyses stay, beside those with the changed parameter, which are now the latest.
            kept = {row["analysis_id"] for row in of(before["history"], name, other=False)}
            mine = of(after["history"], name, other=False)
            assert kept <= {row["analysis_id"] for row in mine}
            assert not [row for row in mine if row["is_latest"] and row["analysis_id"] in kept], name
            steps = {row["step"] for row in of(before["history"], name, other=False)}
            assert {row["step"] for row in mine if row["is_latest"]} == steps
        before = after

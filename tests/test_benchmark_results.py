"""The committed results of benchmarks: every row says what it must, and the page is made from them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))
FIELDS = {"case", "ours", "peer", "peer_name", "floor", "ratio", "unit", "device", "versions", "date"}


def _table() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_table", BENCHMARKS / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_from_the_results() -> None:
    page = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text()
    assert page == _table().page(), "run python benchmarks/table.py"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_row_says_what_was_measured_where_and_with_what(path: Path) -> None:
    rows = json.loads(path.read_text())
    assert rows
    for row in rows:
        assert row.keys() >= FIELDS, FIELDS - row.keys()
        assert isinstance(row["versions"], dict)
        assert isinstance(row["ours"], (int, float))
        assert (row["peer"] is None) == (row["peer_name"] is None)
        if row["peer"] is not None and row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(row["peer"] / row["ours"], rel=1e-3)

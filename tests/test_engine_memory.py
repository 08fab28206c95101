"""What one analyzer gathered in the pass is gone before the next one measures."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from conftest import SmallSeries

import trace_offline.analyzers.registry as registry_module
from trace_offline import Analyzer, Measurement, MetricSpec, Store, analyze
from trace_offline.analyzers.base import Context, Need

GATHERED: list[weakref.ref[Any]] = []


class Table:
    """Stands for a large table of hidden states."""


class Gathering:
    """Keeps its table, as collectors do, after it has handed it out."""

    needs_hidden = True
    needs_logits = False

    def __init__(self) -> None:
        self.table = Table()
        GATHERED.append(weakref.ref(self.table))

    def update(self, batch: Any) -> None:
        """Nothing."""

    def finish(self) -> Table:
        return self.table


class First(Analyzer):
    name = "first"
    version = "1"
    summary = reference = "a test"
    needs = frozenset({Need.HIDDEN_STATES})
    metrics = (MetricSpec("alive", "tables", "tables of this checkpoint that are still there"),)

    def collectors(self, context: Context) -> Mapping[str, Any]:
        return {"table": Gathering()}

    def measure(self, context: Context) -> Iterator[Measurement]:
        assert isinstance(context.collected["table"], Table)
        gc.collect()
        yield Measurement("alive", float(sum(table() is not None for table in GATHERED)))


class Second(First):
    name = "second"


class Third(First):
    name = "third"


def test_tables_go_one_by_one(small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = tuple(
        EntryPoint(kind.name, f"{__name__}:{kind.__name__}", registry_module.GROUP) for kind in (First, Second, Third)
    )
    found = registry_module.load_registry(entries)
    assert not found.broken
    for module in ("analyze", "worker", "series", "rerun"):
        monkeypatch.setattr(f"trace_offline.engine.{module}.registry", lambda: found, raising=False)
    monkeypatch.setattr(registry_module, "registry", lambda: found)
    GATHERED.clear()
    names = ("first", "second", "third")
    store = tmp_path / "s.duckdb"
    summary = analyze(small_series.run, small_series.evaluation, store, analyzers=names, steps="0-1", jobs=1)
    assert summary.exit_code == 0, summary.problems
    rows = Store.open(store).sql("select step, analyzer, value from history order by step, analyzer").to_pylist()
    assert [row["value"] for row in rows] == [3.0, 2.0, 1.0] * 2

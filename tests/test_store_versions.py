"""Stores of earlier releases: they open, are brought forward by the first write, and lose nothing."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest

from trace_offline.core.errors import UsageError
from trace_offline.query.reader import Store
from trace_offline.store.schema import PUBLIC_VIEWS, SCHEMA_VERSION
from trace_offline.store.writer import Writer

NUMBERS = "select run, step, analyzer, metric, value, stderr, is_latest, analysis_id from history order by step"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.duckdb"
    con = duckdb.connect(str(path))
    con.execute((Path(__file__).parent / "store_version_1.sql").read_text(encoding="utf-8"))
    con.close()
    return path


def test_a_version_1_store_is_read_as_it_is(old: Path) -> None:
    rows = Store.open(old).sql(NUMBERS).to_pylist()
    assert [(row["step"], row["value"], row["is_latest"], row["analysis_id"]) for row in rows] == [
        (0, 6.5, True, "a0"),
        (8, 3.5, True, "a8"),
    ]
    with pytest.raises(UsageError, match="events"):
        Store.open(old).sql("select * from events")


def test_the_first_write_brings_a_version_1_store_forward_and_changes_no_number(old: Path) -> None:
    before = {view: Store.open(old).sql(f"select * from {view}") for view in PUBLIC_VIEWS if view != "events"}
    with Writer.open(old):
        pass
    store = Store.open(old)
    assert store.scalar("select value from meta where key = 'schema_version'") == str(SCHEMA_VERSION)
    for view, table in before.items():
        assert sorted(map(str, store.sql(f"select * from {view}").to_pylist())) == sorted(map(str, table.to_pylist()))
    assert store.sql("select * from events").num_rows == 0
    with Writer.open(old):  # a second time there is nothing to bring forward
        pass
    assert store.sql(NUMBERS).num_rows == 2


def test_old_and_new_stores_have_the_same_tables_and_views(old: Path, tmp_path: Path) -> None:
    columns = "select table_name, column_name, data_type, is_nullable from information_schema.columns order by all"
    new = tmp_path / "new.duckdb"
    for path in (old, new):
        with Writer.open(path):
            pass
    assert Store.open(old).sql(columns).to_pylist() == Store.open(new).sql(columns).to_pylist()


def test_events_has_the_contracted_columns_in_order(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with Writer.open(path):
        pass
    names = Store.open(path).sql("select * from events").column_names
    contract = [
        "run", "analyzer", "task", "label", "layer", "component", "metric", "kind", "step", "step_low", "step_high",
        "detail",
    ]  # fmt: skip
    assert names[: len(contract)] == contract

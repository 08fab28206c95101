"""Joining stores, and rewriting one sorted: nothing is lost, nothing doubled, views say the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_store import EVALUATION, checkpoint, fill, identity, ok

from trace_offline.cli.main import app
from trace_offline.core.errors import StoreError, UsageError
from trace_offline.core.types import AnalysisStatus, Array, Artifact, Measurement, Outcome
from trace_offline.query.reader import Store
from trace_offline.store.compact import compact
from trace_offline.store.merge import merge
from trace_offline.store.writer import Writer

HISTORY = "select * exclude (is_latest) from history order by all"


def store(path: Path, steps: list[int], *, run: str = "r", value: float = 1.0, status: str = "ok") -> Path:
    """A store with one analysis of every step."""
    items = [checkpoint(step, f"{run}{step}") for step in steps]
    with Writer.open(path) as writer:
        fill(writer, items, run)
        for item in items:
            row = identity(item, "loss", run=run)
            writer.plan([row])
            key = str(row["analysis_id"])
            if status != "ok":
                writer.record(Outcome(key, AnalysisStatus(status), "because"), row)
                continue
            writer.record(
                Outcome(
                    key,
                    AnalysisStatus.OK,
                    measurements=(
                        Measurement("loss", value + item.step, 0.1, 3),
                        Measurement("acc", None, reason="no"),
                    ),
                    arrays=(Array("curve", (1.0, float(item.step))),),
                    artifacts=(Artifact("probe", b"weights of %d" % item.step, ".bin"),),
                ),
                row,
            )
    return path


def rows(path: Path, sql: str = HISTORY) -> list[dict[str, object]]:
    return Store.open(path).sql(sql).to_pylist()


def test_two_shards_are_what_one_run_would_have_been(tmp_path: Path) -> None:
    whole = store(tmp_path / "whole.duckdb", [0, 1, 2, 4, 8])
    a, b = store(tmp_path / "a.duckdb", [0, 2, 8]), store(tmp_path / "b.duckdb", [1, 4])
    (tmp_path / "out").mkdir()
    done = merge([a, b], tmp_path / "out" / "m.duckdb")
    assert (done.sources, done.runs, done.checkpoints, done.analyses, done.kept) == (2, 1, 5, 5, 0)
    for sql in (
        HISTORY,
        "select * from arrays order by all",
        "select * exclude (finished_at) from status order by all",
    ):
        assert rows(done.store, sql) == rows(whole, sql)
    assert all(row["is_latest"] for row in rows(done.store, "select is_latest from history"))
    Store.open(done.store).check()
    for (path,) in [tuple(row.values()) for row in rows(done.store, "select path from artifacts")]:
        assert (done.store.parent / str(path)).read_bytes().startswith(b"weights of")


def test_merging_twice_changes_nothing(tmp_path: Path) -> None:
    a, b = store(tmp_path / "a.duckdb", [0, 1]), store(tmp_path / "b.duckdb", [1, 2])
    target = tmp_path / "m.duckdb"
    merge([a, b], target)
    before = rows(target)
    again = merge([b, a], target)
    assert (again.analyses, again.kept, again.runs, again.checkpoints) == (0, 4, 0, 0)
    assert rows(target) == before


def test_a_success_replaces_a_failure_and_never_the_other_way(tmp_path: Path) -> None:
    good, bad = store(tmp_path / "good.duckdb", [0, 1]), store(tmp_path / "bad.duckdb", [0, 1], status="failed")
    for order in ([good, bad], [bad, good]):
        target = tmp_path / f"{order[0].stem}_first.duckdb"
        merge(order, target)
        assert rows(target) == rows(good)
        assert {row["status"] for row in rows(target, "select status from analyses")} == {"ok"}


def test_the_latest_word_is_the_one_that_was_spoken_last(tmp_path: Path) -> None:
    # The same step measured with other parameters in two stores: the later finish wins, in whatever order they merge.
    item = checkpoint(3, "r3")
    paths = []
    for name, params in (("old", '{"k":1}'), ("new", '{"k":2}')):
        with Writer.open(tmp_path / f"{name}.duckdb") as writer:
            fill(writer, [item])
            row = identity(item, "loss", params)
            writer.plan([row])
            writer.record(ok(row, 1.0), row)
        paths.append(writer.path)
    for index, order in enumerate((paths, paths[::-1])):
        merged = merge(order, tmp_path / f"m{index}.duckdb")
        assert rows(merged.store, "select params from history where is_latest") == [{"params": '{"k":2}'}]


def test_one_name_for_two_series_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    a = store(tmp_path / "a.duckdb", [0, 1])
    with Writer.open(tmp_path / "b.duckdb") as writer:
        fill(writer, [checkpoint(1, "other weights")])
    target = tmp_path / "m.duckdb"
    with pytest.raises(UsageError, match=r'has a run "r" whose weights at step 1 are not those of the same run.*--run'):
        merge([a, writer.path], target)
    assert rows(target) == rows(a)


def test_twin_names_of_evaluation_sets_are_told_apart(tmp_path: Path) -> None:
    a, b = store(tmp_path / "a.duckdb", [0]), tmp_path / "b.duckdb"
    item = checkpoint(0, "q0")
    with Writer.open(b) as writer:
        fill(writer, [item], "q")
        writer.register_evaluation_set({**EVALUATION, "hash": "0123456789"})
    merge([a, b], tmp_path / "m.duckdb")
    names = rows(tmp_path / "m.duckdb", "select name from evaluation_sets order by name")
    assert names == [{"name": "eval"}, {"name": "eval-01234567"}]


def test_extracts_of_series_come_along(tmp_path: Path) -> None:
    a, b = store(tmp_path / "a.duckdb", [0]), store(tmp_path / "b.duckdb", [1])
    for path in (a, b):
        folder = path.with_suffix(".extracts") / "weight_change"
        folder.mkdir(parents=True)
        (folder / f"{path.stem}.safetensors").write_bytes(path.stem.encode())
    merge([a, b], tmp_path / "m.duckdb")
    there = sorted(path.name for path in (tmp_path / "m.extracts").rglob("*.safetensors"))
    assert there == ["a.safetensors", "b.safetensors"]


def test_bad_sources_are_named(tmp_path: Path) -> None:
    a = store(tmp_path / "a.duckdb", [0])
    with pytest.raises(StoreError, match=r"No store at .*gone\.duckdb"):
        merge([a, tmp_path / "gone.duckdb"], tmp_path / "m.duckdb")
    assert not (tmp_path / "m.duckdb").exists()
    (tmp_path / "text.duckdb").write_text("not a database, but long enough to be read as one" * 99)
    with pytest.raises(StoreError, match=r"text\.duckdb cannot be opened as a store"):
        merge([tmp_path / "text.duckdb"], tmp_path / "m.duckdb")
    with pytest.raises(UsageError, match="named once"):
        merge([a, a], tmp_path / "m.duckdb")
    with pytest.raises(UsageError, match="none may be the target"):
        merge([a], a)


def test_compacting_keeps_every_row_and_sorts(tmp_path: Path) -> None:
    path = store(tmp_path / "s.duckdb", [8, 0, 4, 2, 1])
    queries = (HISTORY, "select * from arrays order by all", "select * from status order by all")
    before = [rows(path, sql) for sql in queries]
    done = compact(path)
    assert [rows(path, sql) for sql in queries] == before
    assert done.measurements == 10
    assert not [name for name in os.listdir(tmp_path) if "compact" in name or name.endswith((".lock", ".wal"))]
    import duckdb

    with duckdb.connect(str(path), read_only=True) as con:
        (values,) = zip(*con.execute("select value from measurements where metric = 'loss'").fetchall(), strict=True)
    assert values == (1.0, 2.0, 3.0, 5.0, 9.0)  # by step, though they came as 8, 0, 4, 2, 1


def test_compacting_shrinks_what_reruns_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    items = [checkpoint(step, f"f{step}") for step in range(6)]
    with Writer.open(path) as writer:
        fill(writer, items)
        for count in (20_000, 2_000):  # measured again, with fewer numbers
            for item in items:
                row = identity(item, "loss")
                writer.plan([row])
                numbers = tuple(
                    Measurement(f"metric{i % 50}", item.step * (i % 9) / 7, layer=i % 12) for i in range(count)
                )
                writer.record(Outcome(str(row["analysis_id"]), AnalysisStatus.OK, measurements=numbers), row)
    done = compact(path)
    assert done.measurements == 12_000
    assert done.after < 0.8 * done.before


def test_the_store_can_be_written_after_compacting(tmp_path: Path) -> None:
    path = store(tmp_path / "s.duckdb", [0])
    compact(path)
    store(path, [0, 1], value=2.0)
    assert {row["value"] for row in rows(path, "select value from history where metric = 'loss'")} == {2.0, 3.0}


def test_on_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    a, b = store(tmp_path / "a.duckdb", [0]), store(tmp_path / "b.duckdb", [1])
    runner = CliRunner()
    result = runner.invoke(app, ["merge", str(a), str(b), "--store", str(tmp_path / "m.duckdb"), "--json"])
    assert result.exit_code == 0, result.output
    assert '"analyses": 2' in result.stdout
    assert "2 stores merged" in result.stderr
    result = runner.invoke(app, ["compact", str(tmp_path / "m.duckdb")])
    assert result.exit_code == 0, result.output
    assert "4 numbers" in result.stderr

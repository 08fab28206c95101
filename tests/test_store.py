"""The store: what the views promise, idempotence, crash safety, and errors in words."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from trace_offline.core.errors import StoreError, UsageError
from trace_offline.core.types import AnalysisStatus, Array, Artifact, Checkpoint, CheckpointState, Measurement, Outcome
from trace_offline.query.formats import render
from trace_offline.query.reader import Store
from trace_offline.store.connection import connection
from trace_offline.store.rows import checkpoint_id
from trace_offline.store.writer import Writer

EVALUATION = {"hash": "e1", "name": "eval", "path": "eval", "n_examples": 3, "n_tokens": 30}


def checkpoint(step: int, fingerprint: str, **changes: object) -> Checkpoint:
    values = {"location": f"run/step{step}", "layout": "hf_folder", "state": CheckpointState.COMPLETE, "step": step}
    return Checkpoint(**{**values, "fingerprint": fingerprint, **changes})  # type: ignore[arg-type]


def identity(item: Checkpoint, analyzer: str, params: str = "{}", run: str = "r") -> dict[str, object]:
    return {
        "checkpoint_id": checkpoint_id(run, item), "analysis_id": f"{item.fingerprint}-{analyzer}-{params}",
        "fingerprint": item.fingerprint, "analyzer": analyzer, "analyzer_version": "1", "params": params,
        "evaluation_set": "e1", "dtype": "float32", "seed": 0,
    }  # fmt: skip


def fill(writer: Writer, items: list[Checkpoint], run: str = "r") -> None:
    options = {"dtype": "float32", "seed": 0, "model_factory": None, "blocks": None}
    writer.register_run(run, "somewhere", "e1", options)
    writer.register_evaluation_set(EVALUATION)
    writer.register_checkpoints(run, [(f"step{item.step}", item) for item in items])


def ok(row: dict[str, object], value: float | None, **more: object) -> Outcome:
    return Outcome(
        str(row["analysis_id"]), AnalysisStatus.OK, measurements=(Measurement("loss", value, 0.1, 3),), **more
    )  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.duckdb"


def test_history_has_the_contracted_columns_in_order(path: Path) -> None:
    with Writer.open(path):
        pass
    names = Store.open(path).sql("select * from history").column_names
    contract = [
        "run", "step", "tokens_seen", "checkpoint", "evaluation_set", "analyzer", "analyzer_version", "params", "layer",
        "component", "task", "label", "metric", "value", "stderr", "n", "is_latest", "analysis_id",
    ]  # fmt: skip
    assert names[: len(contract)] == contract
    arrays = Store.open(path).sql("select * from arrays").column_names
    assert arrays[:5] == ["analysis_id", "run", "step", "analyzer", "layer"]
    assert arrays[5:10] == ["component", "task", "label", "name", "values"]


def test_a_number_comes_back_as_it_went_in(path: Path) -> None:
    item = checkpoint(8, "f8", tokens_seen=800)
    row = identity(item, "loss", '{"k":1}')
    measured = Measurement("loss", 0.1 + 0.2, 1e-300, 7, layer=3, component="residual", task="pos", label="NOUN")
    array = Array("density", (1.0, 2.5), layer=1, component="all")
    with Writer.open(path) as writer:
        fill(writer, [item])
        writer.plan([row])
        writer.record(
            Outcome(str(row["analysis_id"]), AnalysisStatus.OK, measurements=(measured,), arrays=(array,)), row
        )
    (got,) = Store.open(path).sql("select * from history").to_pylist()
    assert got["value"] == 0.1 + 0.2
    assert got["stderr"] == 1e-300
    assert (got["n"], got["layer"], got["component"], got["task"], got["label"]) == (7, 3, "residual", "pos", "NOUN")
    assert (got["run"], got["step"], got["tokens_seen"], got["checkpoint"]) == ("r", 8, 800, "step8")
    assert (got["evaluation_set"], got["analyzer"], got["params"]) == ("eval", "loss", '{"k":1}')
    assert got["is_latest"]
    (spectrum,) = Store.open(path).sql("select * from arrays").to_pylist()
    assert spectrum["values"] == [1.0, 2.5]
    assert spectrum["step"] == 8


def test_a_value_that_is_not_finite_is_null_with_a_reason(path: Path) -> None:
    item = checkpoint(0, "f0")
    row = identity(item, "loss")
    with Writer.open(path) as writer:
        fill(writer, [item])
        writer.plan([row])
        writer.record(ok(row, float("nan")), row)
    (got,) = Store.open(path).sql("select value, stderr, reason from history").to_pylist()
    assert got == {"value": None, "stderr": None, "reason": "the value is not a finite number"}


def test_recording_twice_replaces_and_leaves_others_alone(path: Path) -> None:
    items = [checkpoint(0, "f0"), checkpoint(1, "f1")]
    rows = [identity(item, "loss") for item in items]
    with Writer.open(path) as writer:
        fill(writer, items)
        writer.plan(rows)
        writer.record(ok(rows[0], 1.0), rows[0])
        writer.record(ok(rows[1], 2.0), rows[1])
        writer.record(ok(rows[0], 3.0), rows[0])
    got = Store.open(path).sql("select step, value from history order by step").to_pylist()
    assert got == [{"step": 0, "value": 3.0}, {"step": 1, "value": 2.0}]


def test_is_latest_moves_to_the_newest_success_and_old_numbers_stay(path: Path) -> None:
    item = checkpoint(4, "f4")
    old, new, failed = identity(item, "loss", "a"), identity(item, "loss", "b"), identity(item, "loss", "c")
    for row, text in ((old, '{"k":1}'), (new, '{"k":2}'), (failed, '{"k":3}')):
        row["params"] = text
    with Writer.open(path) as writer:
        fill(writer, [item])
        writer.plan([old, new, failed])
        writer.record(ok(old, 1.0), old)
        writer.record(ok(new, 2.0), new)
        writer.record(Outcome(str(failed["analysis_id"]), AnalysisStatus.FAILED, "boom"), failed)
    got = Store.open(path).sql("select value, is_latest from history order by value").to_pylist()
    assert got == [{"value": 1.0, "is_latest": False}, {"value": 2.0, "is_latest": True}]
    statuses = Store.open(path).sql("select status, message from status order by params").to_pylist()
    assert statuses[2] == {"status": "failed", "message": "boom"}


def test_duplicate_weights_are_recorded_for_each_step(path: Path) -> None:
    items = [checkpoint(1, "same"), checkpoint(2, "same", state=CheckpointState.DUPLICATE, duplicate_of=1)]
    rows = [identity(item, "loss") for item in items]
    assert rows[0]["analysis_id"] == rows[1]["analysis_id"]
    with Writer.open(path) as writer:
        fill(writer, items)
        writer.plan(rows)
        writer.record(ok(rows[0], 5.0), rows[0])
    got = Store.open(path).sql("select step, value, is_latest from history order by step").to_pylist()
    assert got == [{"step": 1, "value": 5.0, "is_latest": True}, {"step": 2, "value": 5.0, "is_latest": True}]


def test_replaced_weights_are_no_longer_the_latest_word(path: Path) -> None:
    item = checkpoint(4, "old")
    row = identity(item, "loss")
    with Writer.open(path) as writer:
        fill(writer, [item])
        writer.plan([row])
        writer.record(ok(row, 1.0), row)
        fill(writer, [checkpoint(4, "new")])
    assert Store.open(path).sql("select value, is_latest from history").to_pylist() == [
        {"value": 1.0, "is_latest": False}
    ]


def test_planned_shows_before_anything_is_done(path: Path) -> None:
    item = checkpoint(4, "f4")
    with Writer.open(path) as writer:
        fill(writer, [item])
        writer.plan([identity(item, "probe")])
        writer.plan([identity(item, "probe")])
    assert Store.open(path).sql("select step, analyzer, status from status").to_pylist() == [
        {"step": 4, "analyzer": "probe", "status": "planned"}
    ]


def test_artifacts_are_written_and_checked(path: Path) -> None:
    item = checkpoint(4, "f4")
    row = identity(item, "probe")
    with Writer.open(path) as writer:
        fill(writer, [item])
        writer.plan([row])
        writer.record(ok(row, 1.0, artifacts=(Artifact("weights", b"abc", ".safetensors"),)), row)
    store = Store.open(path)
    (kept,) = store.sql("select name, path, sha256 from artifacts").to_pylist()
    assert (path.parent / kept["path"]).read_bytes() == b"abc"
    store.check()
    (path.parent / kept["path"]).unlink()
    with pytest.raises(StoreError, match="which is gone"):
        store.check()


def test_a_second_writer_is_told_who_is_in_the_way(path: Path) -> None:
    with Writer.open(path), pytest.raises(StoreError, match="Another run is writing to"):
        Writer.open(path)
    assert sorted(item.name for item in path.parent.iterdir()) == ["s.duckdb"]


def test_a_reader_in_another_process_gets_in_while_a_run_holds_the_store(path: Path) -> None:
    with Writer.open(path) as writer:
        fill(writer, [checkpoint(0, "f")])
        code = f"from trace_offline.query.reader import Store; print(Store.open({str(path)!r}).scalar('select 42'))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "42"


def test_a_store_from_a_newer_release_is_refused(path: Path) -> None:
    with Writer.open(path) as writer, writer.transaction() as con:
        con.execute("update meta set value = '99' where key = 'schema_version'")
    with pytest.raises(StoreError, match="has schema version 99; this release of trace-offline reads up to"):
        Store.open(path)
    with pytest.raises(StoreError, match="Upgrade with: pip install"):
        Writer.open(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No store at"), (b"not a database", "cannot be opened as a store"), (b"", "not a trace-offline store")],
)
def test_what_is_no_store_is_said_to_be_none(path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        path.write_bytes(content)
    if content == b"":
        path.unlink()
        duckdb.connect(str(path)).close()
    with pytest.raises(StoreError, match=words):
        Store.open(path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist; make it first"):
        Writer.open(tmp_path / "nowhere" / "s.duckdb")
    with pytest.raises(StoreError, match="is a folder; --store expects a file"):
        Writer.open(tmp_path)


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("selec 1", "SQL error: Parser Error"),
        ("select * from histroy", 'Did you mean "history"'),
        ("select valeu from history", "valeu"),
        ("drop table meta", "Expected a SELECT, found DROP"),
        ("select 1; select 2", "Expected one SQL statement, found 2"),
        ("", "Expected one SQL statement, found 0"),
    ],
)
def test_bad_sql_is_answered_in_words(path: Path, sql: str, words: str) -> None:
    with Writer.open(path):
        pass
    with pytest.raises(UsageError) as caught:
        Store.open(path).sql(sql)
    assert words in caught.value.message


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a Unix facility")
def test_a_query_reaches_no_file_but_the_store(path: Path, tmp_path: Path) -> None:
    with Writer.open(path) as writer:
        fill(writer, [checkpoint(0, "f0")])
    store, other = Store.open(path), tmp_path / "evil.csv"
    for sql in (
        f"explain analyze copy (select 1) to '{other}'",
        f"EXPLAIN /* why */ (format json, ANALYZE) copy (select 1) to '{other}'",
        "-- a remark\nexplain analyse select 1",
    ):
        with pytest.raises(UsageError, match="Expected a SELECT, found EXPLAIN ANALYZE"):
            store.sql(sql)
    assert not other.exists()
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for source in (f"read_text('{tmp_path / 'secret.csv'}')", f"'{tmp_path / 'secret.csv'}'", "glob('/*')"):
        with pytest.raises(UsageError, match="disabled"):
            store.sql(f"select * from {source}")
    assert store.sql("explain select 'analyze' as x").num_rows > 0
    assert store.sql("pragma table_info('runs')").num_rows > 0
    frame = duckdb.sql("select 1 as a").arrow()  # noqa: F841
    with pytest.raises(UsageError, match="Table with name frame does not exist"):
        store.sql("select * from frame")


def test_queries_of_two_threads_do_not_lock_each_other_out(path: Path) -> None:
    with Writer.open(path) as writer:
        fill(writer, [checkpoint(0, "f0")])
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda _: Store.open(path).scalar("select count(*) from checkpoints"), range(40)))
    assert counts == [1] * 40


AWKWARD = """
select 123456789012345678901234567890::hugeint as huge, 1e30::decimal(38, 0) as decimal, sum(2) as sum,
  [date '2026-11-21'] as dates, {'a': 'nan'::double, 'b': [1.0, 'inf'::double]} as nested, map {1: 2.5} as mapped,
  [{'x': 'nan'::double}] as deep
"""


def test_awkward_values_in_every_format(path: Path) -> None:
    with Writer.open(path) as writer:
        fill(writer, [checkpoint(0, "f0")])
    table = Store.open(path).sql(AWKWARD)
    (row,) = json.loads(render(table, "json"))
    assert (row["huge"], row["decimal"], row["sum"]) == (pytest.approx(1.2345678901234568e29), 1e30, 2)
    assert isinstance(row["sum"], int)
    assert row["dates"] == ["2026-11-21"]
    assert (row["nested"], row["deep"]) == ({"a": None, "b": [1.0, None]}, [{"x": None}])
    (line,) = csv.DictReader(render(table, "csv").decode().splitlines())
    assert float(line["huge"]) == pytest.approx(1.2345678901234568e29)
    assert json.loads(line["dates"]) == ["2026-11-21"]
    assert json.loads(line["nested"]) == {"a": None, "b": [1.0, None]}
    assert b"2026" in render(table, "table")
    assert pq.read_table(io.BytesIO(render(table, "parquet"))).num_rows == 1


def test_a_full_disk_loses_nothing_that_was_stored(path: Path) -> None:
    item = checkpoint(0, "f0")
    row = identity(item, "loss")
    with Writer.open(path) as writer:
        fill(writer, [item])
        writer.plan([row])
        writer.record(ok(row, 1.0), row)
    size = path.stat().st_size
    code = textwrap.dedent(f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_store import checkpoint, identity
        from trace_offline.core.types import AnalysisStatus, Array, Outcome
        from trace_offline.core.errors import StoreError
        from trace_offline.store.writer import Writer
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size} + 4096, {size} + 4096))
        row = identity(checkpoint(0, "f0"), "big")
        import random
        values = tuple(random.random() for _ in range(900_000))
        try:
            with Writer.open(Path({str(path)!r})) as writer:
                writer.record(Outcome(row["analysis_id"], AnalysisStatus.OK, arrays=(Array("a", values),)), row)
        except StoreError as error:
            print(error.message)
            sys.exit(2)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Could not write to the store" in done.stdout
    assert "everything stored so far is safe" in done.stdout.lower()
    assert Store.open(path).scalar("select value from history") == 1.0
    assert Store.open(path).scalar("select count(*) from arrays") == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_store_one_may_not_write_to(path: Path) -> None:
    with Writer.open(path):
        pass
    path.chmod(0o444)
    path.parent.chmod(0o555)
    code = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        from trace_offline.core.errors import StoreError
        from trace_offline.store.writer import Writer
        os.setuid(65534)
        try:
            Writer.open(Path({str(path)!r}))
        except StoreError as error:
            print(error.message); sys.exit(2)
    """)
    for parent in path.parents:  # temporary folders are private to their owner
        if parent.stat().st_mode & 0o001 == 0:
            parent.chmod(parent.stat().st_mode | 0o011)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "cannot be locked for writing" in done.stdout
    assert "Permission denied" in done.stdout


def test_killed_writers_lose_no_acknowledged_analysis(path: Path) -> None:
    code = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_store import checkpoint, identity, fill, ok
        from trace_offline.store.writer import Writer
        with Writer.open(Path({str(path)!r})) as writer:
            for step in range(1000):
                item = checkpoint(step, f"f{{step}}")
                row = identity(item, "loss")
                fill(writer, [item]); writer.plan([row]); writer.record(ok(row, float(step)), row)
                print(step, flush=True)
    """)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = -1
    for line in process.stdout:
        acknowledged = int(line)
        if acknowledged == 4:
            process.kill()
            break
    process.stdout.close()
    process.wait(timeout=30)
    store = Store.open(path)
    assert store.scalar("select count(*) from history where value <= ?", [acknowledged]) == acknowledged + 1
    with Writer.open(path):  # the lock died with its holder
        pass


def test_ctrl_c_in_a_query_is_ctrl_c(tmp_path: Path) -> None:
    """DuckDB makes a RuntimeError of it, which would be a traceback for a user who only wanted to stop."""
    store = tmp_path / "s.duckdb"
    Writer.open(store).close()
    with pytest.raises(KeyboardInterrupt), connection(store, read_only=True):
        raise RuntimeError("Query interrupted")
    with pytest.raises(RuntimeError, match="something else"), connection(store, read_only=True):
        raise RuntimeError("something else")

"""Several analyses stored in one opening of the file are still one transaction each."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from trace_offline.core.errors import StoreError
from trace_offline.core.types import AnalysisStatus, Checkpoint, CheckpointState, Measurement, Outcome
from trace_offline.query.reader import Store
from trace_offline.store import writer as module
from trace_offline.store.rows import checkpoint_id
from trace_offline.store.writer import Writer

ITEM = Checkpoint("run/step1", "hf_folder", CheckpointState.COMPLETE, 1, fingerprint="f")
OPTIONS = {"dtype": "float32", "seed": 0, "model_factory": None, "blocks": None}


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "checkpoint_id": checkpoint_id("r", ITEM), "analysis_id": f"a{number}", "fingerprint": "f",
            "analyzer": f"analyzer{number}", "analyzer_version": "1", "params": "{}", "evaluation_set": "e",
            "dtype": "float32", "seed": 0,
        }
        for number in range(count)
    ]  # fmt: skip


def outcome(row: dict[str, Any], value: float = 1.0) -> Outcome:
    return Outcome(row["analysis_id"], AnalysisStatus.OK, measurements=(Measurement("m", value),))


def filled(path: Path, count: int) -> list[dict[str, Any]]:
    planned = rows(count)
    with Writer.open(path) as writer:
        writer.register_run("r", "somewhere", "e", OPTIONS)
        writer.register_evaluation_set({"hash": "e", "name": "e", "path": "", "n_examples": 1, "n_tokens": 1})
        writer.register_checkpoints("r", [("step1", ITEM)])
        writer.plan(planned)
    return planned


def record(writer: Writer, *given: dict[str, Any], then: Exception | None = None) -> None:
    with writer.together():
        for row in given:
            writer.record(outcome(row), row)
        if then is not None:
            raise then


def stored(path: Path) -> list[str]:
    return Store.open(path).sql("select analyzer from history order by analyzer").column(0).to_pylist()


def test_the_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.duckdb"
    planned = filled(path, 5)
    opened = []
    real = module.connection

    @contextmanager
    def counted(where: Path, **more: Any) -> Iterator[Any]:
        opened.append(more)
        with real(where, **more) as con:
            yield con

    monkeypatch.setattr(module, "connection", counted)
    with Writer.open(path) as writer:
        opened.clear()
        with writer.together():
            for row in planned:
                writer.record(outcome(row), row)
            assert writer.read("select count(*) from analyses") == [(5,)]
        assert opened == [{"read_only": False, "waiting": None}]
        writer.record(outcome(planned[0], 2.0), planned[0])
        assert writer.read("select count(*) from measurements") == [(5,)]
        assert len(opened) == 3
    assert stored(path) == [row["analyzer"] for row in planned]


def test_what_went_before_a_failure_stays_and_the_rest_is_rolled_back(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    planned = filled(path, 3)
    with Writer.open(path) as writer:
        with pytest.raises(StoreError):
            record(writer, planned[0], {**planned[1], "seed": "no number"})
        assert stored(path) == ["analyzer0"]
        # and the writer goes on as before
        record(writer, planned[1])
        writer.record(outcome(planned[2]), planned[2])
    assert stored(path) == ["analyzer0", "analyzer1", "analyzer2"]


def test_an_error_of_the_caller_passes_unchanged_and_lets_go_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    planned = filled(path, 1)
    with Writer.open(path) as writer:
        with pytest.raises(FileNotFoundError, match="not the store's"):
            record(writer, planned[0], then=FileNotFoundError("not the store's"))
        assert stored(path) == ["analyzer0"]


def test_a_kill_in_between_keeps_what_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    filled(path, 3)
    code = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_store_together import outcome, rows, Writer
        planned = rows(3)
        writer = Writer.open(Path({str(path)!r}))
        with writer.together():
            writer.record(outcome(planned[0]), planned[0])
            writer.record(outcome(planned[1]), planned[1])
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == -9, done.stderr
    assert stored(path) == ["analyzer0", "analyzer1"]

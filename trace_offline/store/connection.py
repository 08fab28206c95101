"""Opening the DuckDB file: patience with other processes, clear words when it cannot be opened.

The file is opened for the length of one transaction or one query and closed again, so that readers get in while a long
run writes. It must never be opened by other means (``open``, ``shutil.copy``) inside the writing process: POSIX locks
belong to the process, and closing any descriptor of the file would silently drop DuckDB's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from trace_offline.core.errors import StoreError
from trace_offline.store.schema import SCHEMA_VERSION

PATIENCE_SECONDS = 30.0
_NOTE_AFTER, _NOTE_EVERY = 3.0, 300.0

Waiting = Callable[[str], None]
"""Told what is waited for, by somebody who waits as long as it takes."""


def is_conflict(error: duckdb.Error) -> bool:
    """Whether DuckDB refused because the file is held: by another process, or by a reader beside a writer in this."""
    text = str(error)
    return any(mark in text for mark in ("Could not set lock", "Conflicting lock", *_IN_THIS_PROCESS))


# The second while the other connection is just being opened or closed.
_IN_THIS_PROCESS = ("different configuration than existing connections", "Unique file handle conflict")


@contextmanager
def connection(
    path: Path, *, read_only: bool, patience: float = PATIENCE_SECONDS, waiting: Waiting | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to the store at ``path``, retried for ``patience`` seconds while somebody else holds it.

    With ``waiting`` it is retried without end, and ``waiting`` is told so now and then.

    Raises StoreError when the file is missing, is no DuckDB file, is held too long, or cannot be read or written.
    """
    if not path.exists():
        raise StoreError(
            f"No store at {path}. Expected a .duckdb file made by `trace-offline analyze … --store {path.name}`."
        )
    opened = _open(path, read_only=read_only, patience=patience, waiting=waiting)
    try:
        yield opened
    except RuntimeError as error:
        if str(error) == "Query interrupted":  # what DuckDB makes of Ctrl-C
            raise KeyboardInterrupt from None
        raise
    finally:
        opened.close()


def _open(path: Path, *, read_only: bool, patience: float, waiting: Waiting | None) -> duckdb.DuckDBPyConnection:
    deadline = time.monotonic() + patience
    told = time.monotonic() + _NOTE_AFTER
    delay = 0.005
    while True:
        try:
            return duckdb.connect(str(path), read_only=read_only)
        except duckdb.Error as error:
            now = time.monotonic()
            if is_conflict(error) and (waiting is not None or now < deadline):
                if waiting is not None and now >= told:
                    waiting(f"waiting for {_holder(error)} to close {path}; what is finished is not lost")
                    told = now + _NOTE_EVERY
                time.sleep(delay)
                delay = min(delay * 2, 0.25)
                continue
            raise StoreError(_explain(path, error, read_only=read_only)) from error


def _holder(error: duckdb.Error) -> str:
    if any(mark in str(error) for mark in _IN_THIS_PROCESS):
        return "a connection in this very program"
    found = re.search(r"\(PID (\d+)\)", str(error))
    return f"another program (PID {found[1]})" if found else "another program"


def _explain(path: Path, error: duckdb.Error, *, read_only: bool) -> str:
    text = str(error).splitlines()[0]
    if any(mark in text for mark in _IN_THIS_PROCESS):
        return f"The store {path} is held by a connection in this very program: {text} Close it, or try again."
    if is_conflict(error):
        return f"The store {path} is held by another program: {text} Close it there, or try again in a moment."
    if "Permission denied" in str(error) or "Read-only file system" in str(error):
        need = "read" if read_only else "write"
        return (
            f"No permission to {need} the store {path}: {text} Copy it to a place you may write to, or ask its owner."
        )
    if "version number" in str(error):
        return f"The store {path} was written by a newer DuckDB: {text} Upgrade with: pip install --upgrade duckdb"
    return f"{path} cannot be opened as a store: {text} Expected a .duckdb file made by trace-offline."


def check_version(con: duckdb.DuckDBPyConnection, path: Path, catalog: str | None = None) -> int:
    """The schema version of an open store, or of one attached as ``catalog``.

    Raises StoreError for no store at all, or one from a newer release.
    """
    # Not named after the table: DuckDB would take the variable for it where there is no such table.
    where = "meta" if catalog is None else f"{catalog}.meta"
    try:
        row = con.execute(f"select value from {where} where key = 'schema_version'").fetchone()
    except duckdb.CatalogException:
        row = None
    if row is None:
        raise StoreError(f"{path} is a DuckDB file but not a trace-offline store (it has no schema version).")
    version = int(row[0])
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"The store {path} has schema version {version}; this release of trace-offline reads up to "
            f"{SCHEMA_VERSION}. Upgrade with: pip install --upgrade trace-offline"
        )
    return version

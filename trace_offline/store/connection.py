"""Opening the DuckDB file: patience with other processes, clear words when it cannot be opened.

The file is opened for the length of one transaction or one query and closed again, so that readers get in while a long
run writes. It must never be opened by other means (``open``, ``shutil.copy``) inside the writing process: POSIX locks
belong to the process, and closing any descriptor of the file would silently drop DuckDB's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from trace_offline.core.errors import StoreError
from trace_offline.store.schema import SCHEMA_VERSION

PATIENCE_SECONDS = 30.0


def is_conflict(error: duckdb.Error) -> bool:
    """Whether DuckDB refused because another process holds the file."""
    text = str(error)
    return "Could not set lock" in text or "Conflicting lock" in text


@contextmanager
def connection(
    path: Path, *, read_only: bool, patience: float = PATIENCE_SECONDS
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to the store at ``path``, retried for ``patience`` seconds while another process holds it.

    Raises StoreError when the file is missing, is no DuckDB file, is held too long, or cannot be read or written.
    """
    if not path.exists():
        raise StoreError(
            f"No store at {path}. Expected a .duckdb file made by `trace-offline analyze … --store {path.name}`."
        )
    opened = _open(path, read_only=read_only, patience=patience)
    try:
        yield opened
    finally:
        opened.close()


def _open(path: Path, *, read_only: bool, patience: float) -> duckdb.DuckDBPyConnection:
    deadline = time.monotonic() + patience
    delay = 0.005
    while True:
        try:
            return duckdb.connect(str(path), read_only=read_only)
        except duckdb.Error as error:
            if is_conflict(error) and time.monotonic() < deadline:
                time.sleep(delay)
                delay = min(delay * 2, 0.25)
                continue
            raise StoreError(_explain(path, error, read_only=read_only)) from error


def _explain(path: Path, error: duckdb.Error, *, read_only: bool) -> str:
    text = str(error).splitlines()[0]
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

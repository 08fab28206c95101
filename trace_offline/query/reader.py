"""``Store``: the read-only door to a history."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from trace_offline.core.errors import StoreError, UsageError, nearest
from trace_offline.store.connection import check_version, connection
from trace_offline.store.schema import PUBLIC_VIEWS

if TYPE_CHECKING:
    import pyarrow


_GAP = r"(?:\s|--[^\n]*\n|/\*.*?\*/)*"
_ANALYZE = re.compile(rf"{_GAP}explain{_GAP}(?:analy[sz]e\b|\([^)]*\banaly[sz]e\b)", re.IGNORECASE | re.DOTALL)
_LOCKS = (
    # Otherwise a table name could be resolved to a variable of the caller.
    "set python_enable_replacements = false",
    # No file but the store is read or written: not by COPY, read_csv, ATTACH, or an extension. DuckDB cannot turn it
    # on again. The configuration is not locked: threads of one process share it, and each sets it.
    "set enable_external_access = false",
)


class Store:
    """A history on disk, opened for reading.

    >>> store = Store.open("history.duckdb")                                        # doctest: +SKIP
    >>> store.sql("select step, value from history where metric = 'loss'").to_pandas()  # doctest: +SKIP

    The file is opened for the length of each query only, so a running analysis can write in between.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """A store at ``path``. Raises StoreError when there is none or it cannot be read by this release."""
        store = cls(Path(path).absolute())
        with connection(store.path, read_only=True) as con:
            check_version(con, store.path)
        return store

    def sql(self, query: str, parameters: list[Any] | dict[str, Any] | None = None) -> pyarrow.Table:
        """The rows of one SELECT as an Arrow table (``.to_pandas()``, ``polars.from_arrow(…)``).

        Raises UsageError for SQL that DuckDB refuses or that is not a single reading statement, with DuckDB's own
        words and the nearest view or column name.
        """
        with connection(self.path, read_only=True) as con:
            check_version(con, self.path)
            try:
                statements = con.extract_statements(query)
                if len(statements) != 1:
                    raise UsageError(f"Expected one SQL statement, found {len(statements)}: {query!r}")
                kind = statements[0].type.name
                # EXPLAIN ANALYZE runs what it explains, also where that writes.
                if kind == "EXPLAIN" and _ANALYZE.match(statements[0].query):
                    kind = "EXPLAIN ANALYZE"
                if kind not in ("SELECT", "EXPLAIN", "PRAGMA"):
                    raise UsageError(
                        f"Expected a SELECT, found {kind}. A history is read-only here; DuckDB itself opens the file "
                        "for anything else."
                    )
                for setting in _LOCKS:
                    con.execute(setting)
                return con.sql(query, params=parameters).to_arrow_table()
            except duckdb.Error as error:
                raise UsageError(_explain(error)) from error

    def scalar(self, query: str, parameters: list[Any] | None = None) -> Any:
        """The first column of the first row of a query; None when there is no row."""
        table = self.sql(query, parameters)
        if table.num_rows == 0:
            return None
        return table.column(0)[0].as_py()

    def check(self) -> None:
        """Raise StoreError when a file named in ``artifacts`` is missing."""
        for (path,) in [tuple(row.values()) for row in self.sql("select path from artifacts").to_pylist()]:
            if not (self.path.parent / path).exists():
                raise StoreError(f"{self.path} names the artifact {path}, which is gone; rerun its analyzer --force.")


def _explain(error: duckdb.Error) -> str:
    text = str(error).strip()
    first = text.splitlines()[0]
    hint = ""
    if "Table with name" in first:
        name = first.split("Table with name", 1)[1].split()[0]
        hint = nearest(name, PUBLIC_VIEWS) + f" There are: {', '.join(PUBLIC_VIEWS)}."
    return f"SQL error: {text}{hint}"

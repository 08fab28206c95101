"""A result table as text or file: aligned columns, CSV, JSON, Parquet."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_offline.core.errors import UsageError, nearest

if TYPE_CHECKING:
    import pyarrow

FORMATS = ("table", "csv", "json", "parquet")


def check_format(name: str) -> None:
    """Raise UsageError for an unknown format, naming the nearest."""
    if name not in FORMATS:
        raise UsageError(f'--format: "{name}" is not known.{nearest(name, FORMATS)} There are: {", ".join(FORMATS)}.')


def render(table: pyarrow.Table, form: str) -> bytes:
    """The table in one of ``FORMATS`` as bytes ending in a newline (except Parquet)."""
    check_format(form)
    table = _plain(table)
    if form == "parquet":
        import pyarrow.parquet

        sink = io.BytesIO()
        pyarrow.parquet.write_table(table, sink, compression="zstd")
        return sink.getvalue()
    if form == "csv":
        import pyarrow.csv

        sink = io.BytesIO()
        pyarrow.csv.write_csv(_without_lists(table), sink)
        return sink.getvalue()
    if form == "json":
        return (_json(table.to_pylist(), indent=1) + "\n").encode()
    return _aligned(table).encode()


def _json(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, default=str, indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null. Keys are text there."""
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(table: pyarrow.Table) -> pyarrow.Table:
    """Types every format can hold: decimals (sums, literals) as numbers, intervals as text; unique names."""
    import pyarrow as pa

    names: list[str] = []
    for index, field in enumerate(table.schema):
        kind, column = field.type, table.column(index)
        if pa.types.is_decimal(kind):
            column = _number(column, whole=kind.scale == 0)
        elif pa.types.is_interval(kind) or pa.types.is_duration(kind):
            column = pa.chunked_array([[None if v is None else str(v) for v in column.to_pylist()]], pa.string())
        name, count = field.name, 1
        while name in names:
            name, count = f"{field.name}_{count}", count + 1
        names.append(name)
        table = table.set_column(index, pa.field(name, column.type), column)
    return table


def _number(column: pyarrow.ChunkedArray, *, whole: bool) -> pyarrow.ChunkedArray:
    """Decimals as integers where they fit into 64 bits, else as floats: the nearest number that every format holds."""
    import pyarrow as pa

    if whole:
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid:
            pass
    return column.cast(pa.float64())


def write(table: pyarrow.Table, form: str, output: Path) -> None:
    """The table into a file. Raises UsageError when the place cannot be written."""
    content = render(table, form)
    try:
        output.write_bytes(content)
    except OSError as error:
        raise UsageError(f"--output: cannot write {output}: {error.strerror or error}.") from error


def _without_lists(table: pyarrow.Table) -> pyarrow.Table:
    """CSV has no lists: they become JSON text."""
    import pyarrow as pa

    for index, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            text = pa.array([None if v is None else _json(v) for v in table.column(index).to_pylist()], pa.string())
            table = table.set_column(index, field.name, text)
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if value and math.isfinite(value) and (abs(value) >= 1e7 or abs(value) < 1e-4):
            return f"{value:.4e}"
        return f"{value:.6g}"
    if isinstance(value, list):
        shown = ", ".join(_cell(item) for item in value[:4])
        return f"[{shown}{', …' if len(value) > 4 else ''}] ({len(value)})"
    return str(value)


def _aligned(table: pyarrow.Table) -> str:
    names = table.column_names
    columns = [[_cell(value) for value in table.column(i).to_pylist()] for i in range(len(names))]
    numeric = [_is_number(table.schema.field(i).type) for i in range(len(names))]
    widths = [max([len(name), *map(len, column)]) for name, column in zip(names, columns, strict=True)]

    def line(cells: list[str]) -> str:
        parts = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True)]
        return "  ".join(parts).rstrip()

    lines = [line(list(names)), line(["-" * width for width in widths])]
    lines += [line([column[i] for column in columns]) for i in range(table.num_rows)]
    count = table.num_rows
    return "\n".join([*lines, f"({count} row{'' if count == 1 else 's'})"]) + "\n"


def _is_number(kind: pyarrow.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))

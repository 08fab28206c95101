"""One DuckDB file per store: schema, migrations, and the single writer."""

from trace_offline.store.writer import Writer

__all__ = ["Writer"]

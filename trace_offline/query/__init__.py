"""Reading a store: SQL in, Arrow tables out."""

from trace_offline.query.reader import Store

__all__ = ["Store"]

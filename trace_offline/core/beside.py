"""The folders and files that belong to a store lie beside it."""

from __future__ import annotations

from pathlib import Path


def beside(store: Path, suffix: str) -> Path:
    """``history.duckdb`` → ``history`` + ``suffix``; with another ending its whole name counts: ``a.db`` → ``a.db`` + …

    Otherwise ``pythia-1.4b`` and ``pythia-1.2b`` would share one. What an earlier release put under the shorter name
    is still found.
    """
    short = store.with_suffix(suffix)
    if store.suffix == ".duckdb":
        return short
    own = store.with_name(store.name + suffix)
    old = not own.exists() and short.exists() and not store.with_suffix(".duckdb").exists()
    return short if old else own

"""Pictures of a history: one self-contained page."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_report"]


def write_report(store_path: Path | str, output: Path | str, *, run: str | None = None) -> Path:
    """Write the history in ``store_path`` as one HTML page that needs nothing but a browser; see ``report.page``."""
    from trace_offline.report.page import write_report as write

    return write(Path(store_path), Path(output), run=run)

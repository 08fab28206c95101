"""What a run may download, and how sizes are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trace_offline.engine.cache import parse_size

_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


@dataclass(frozen=True)
class DownloadRules:
    """What the user allows.

    ``limit``: the most that downloads of this store's runs may take together, as it was written; ``remove``: each goes
    after its analyses are stored; ``ledger``: the file that lists them.
    """

    limit: str | None = None
    remove: bool = False
    ledger: Path | None = None

    @property
    def limit_bytes(self) -> int | None:
        """The limit as a number."""
        return None if self.limit is None else parse_size(self.limit, "--hub-disk-limit")


def unit_of(size: int) -> tuple[int, str]:
    """The unit in which a size has one to three digits before the point: (bytes, name)."""
    return next(((unit, name) for unit, name in _UNITS if size >= unit), (1, "bytes"))


def size_text(size: int) -> str:
    """Bytes for people, rounded up: ``1.23 GB`` is enough for what is said to take it."""
    unit, name = unit_of(size)
    if unit == 1:
        return f"{size} bytes"
    return f"{-(-size * 100 // unit) / 100:g} {name}"

"""Reading the next checkpoint's bytes into memory while the workers compute."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator

from trace_offline.core.types import Checkpoint
from trace_offline.engine.unit import Unit

_BLOCK = 1 << 22
_SHARE_OF_MEMORY = 0.25


def read_ahead(checkpoint: Checkpoint, stop: threading.Event | None = None) -> threading.Thread | None:
    """Read the weight files in a thread, so that the system has them in its page cache when a worker opens them.

    None, and nothing is read, for a checkpoint above a quarter of the memory: its beginning would be gone again when
    its end is read, and everything would be read twice. ``stop``: when set, the thread ends after the block it reads.
    """
    # posix_fadvise(WILLNEED) would be shorter, but Linux cuts one call to the device's largest request (some MB).
    if checkpoint.size_bytes > _SHARE_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        return None
    thread = threading.Thread(
        target=_read, args=(checkpoint.weight_files, stop or threading.Event()), name="read-ahead", daemon=True
    )
    thread.start()
    return thread


def _read(files: tuple[str, ...], stop: threading.Event) -> None:
    buffer = bytearray(_BLOCK)
    for name in files:
        try:
            with open(name, "rb", buffering=0) as stream:
                while not stop.is_set() and stream.readinto(buffer):
                    pass
        except OSError:
            return  # a file that is gone or unreadable is reported by the worker that needs it


def one_ahead(units: Iterable[Unit]) -> Iterator[Unit]:
    """The units as they come, each with the files of the next one on their way into memory."""
    source = iter(units)
    stop = threading.Event()
    current = next(source, None)
    try:
        while current is not None:
            following = next(source, None)
            if following is not None:
                read_ahead(following.checkpoint, stop)
            yield current
            current = following
    finally:
        stop.set()

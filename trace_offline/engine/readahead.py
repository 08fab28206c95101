"""Asking the operating system to read the next checkpoint's bytes while the workers compute."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

from trace_offline.core.types import Checkpoint
from trace_offline.engine.unit import Unit


def read_ahead(checkpoint: Checkpoint) -> None:
    """Start reading the weight files into the page cache; returns at once. Nothing where the system cannot do it."""
    if not hasattr(os, "posix_fadvise"):
        return
    for name in checkpoint.weight_files:
        # A file that is gone is reported by whoever needs it.
        with suppress(OSError):
            descriptor = os.open(name, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def one_ahead(units: Iterable[Unit]) -> Iterator[Unit]:
    """The units as they come, each with the files of the next one on their way into memory."""
    source = iter(units)
    current = next(source, None)
    while current is not None:
        following = next(source, None)
        if following is not None:
            read_ahead(following.checkpoint)
        yield current
        current = following

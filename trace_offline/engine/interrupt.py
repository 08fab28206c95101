"""Ctrl-C once: finish what runs, store it, end. Twice: end now."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StopRequest:
    """Whether the user asked the run to end. ``armed``: units are under way that are worth finishing."""

    requested: bool = False
    armed: bool = False


@contextmanager
def interruptible(stop: StopRequest) -> Iterator[None]:
    """Turn the first SIGINT of a run into a request, the second into KeyboardInterrupt; SIGTERM ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only; whoever runs us there handles them
        return

    def ask(*_: object) -> None:
        if stop.requested or not stop.armed:
            raise KeyboardInterrupt
        stop.requested = True
        print("Finishing the checkpoints under way; press Ctrl-C again to stop at once.", file=sys.stderr, flush=True)

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask), signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])

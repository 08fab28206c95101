"""Ending workers that hang: a thread of the run that reads the board."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import TracebackType

from trace_offline.engine.board import Board, Doing

_LOOK_SECONDS = 0.25
_STARTING_SECONDS = 600.0
"""What a worker may take to import its libraries, on however slow a disk; a limit for analyses is no limit for that."""

STARTING, LOADING, COMPARING = "starting", "loading", "comparing"
"""What a worker says that it does when it is not at an analyzer."""
_WHERE = {LOADING: " while its checkpoint was loaded", COMPARING: " while the series was compared"}


def limit_of(task: str, timeout: float) -> float:
    """Seconds that a worker may be at one task."""
    return max(timeout, _STARTING_SECONDS) if task == STARTING else timeout


class Watchdog:
    """While entered, kills a worker of this machine that is at one task for longer than ``timeout`` seconds.

    ``hung``: analysis → what to say of it, for the analyses that are to blame. In the shared forward pass nobody can
    tell which of several is; none is blamed then, and the executor runs each alone.
    """

    def __init__(self, board: Board | None, timeout: float | None) -> None:
        self.board = board
        self.timeout = timeout
        self.hung: dict[str, str] = {}
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._started = time.time()

    def __enter__(self) -> Watchdog:
        if self.board is not None and self.timeout is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self.board is not None  # else there is no thread
        assert self.timeout is not None
        while not self._over.wait(min(_LOOK_SECONDS, self.timeout / 4)):
            for doing in self.board.read():
                # What a worker of an earlier pool said last is no sign of life.
                if doing.since >= self._started and doing.host == socket.gethostname():
                    self._judge(doing)

    def _judge(self, doing: Doing) -> None:
        assert self.timeout is not None
        taken = time.time() - doing.since
        if taken <= limit_of(doing.task, self.timeout):
            return
        if len(doing.analyses) == 1 or doing.task in _WHERE:
            where = _WHERE.get(doing.task, "")
            for key in doing.analyses:
                self.hung[key] = f"was ended after {taken:.0f} s{where}: longer than --timeout {self.timeout:g} allows."
        try:
            os.kill(doing.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

"""Who holds the lock file of a store, said in it."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import filelock

_SIGNATURE = "process "


def sign(lock: filelock.BaseFileLock) -> None:
    """Say in the lock file who holds it, for whoever finds it held. What a killed run said there is overwritten."""
    with suppress(OSError):  # a full disk
        path = Path(lock.lock_file)
        said = path.read_text(encoding="utf-8", errors="replace")
        # Where the file system knows no locks, filelock leaves a mark of its own there instead.
        if not said.strip() or said.startswith(_SIGNATURE):
            text = f"{_SIGNATURE}{os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
            path.write_text(text, encoding="utf-8")


def holder(lock: filelock.BaseFileLock) -> str | None:
    """``process 17 on HOST since …`` as the holder of a lock signed it, or None."""
    try:
        said = Path(lock.lock_file).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return said if said.startswith(_SIGNATURE) else None

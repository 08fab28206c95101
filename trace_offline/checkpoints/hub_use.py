"""Which hub revisions are in use by any run on this machine: none of them may be removed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows cannot remove a file that is open, which is what this is for)
    fcntl = None  # type: ignore[assignment]


@dataclass
class InUse:
    """The revisions this process uses, each marked by a shared lock that ends with the process however it ends."""

    _held: dict[tuple[Path, str], int] = field(default_factory=dict)

    def take(self, folder: Path, commit: str) -> None:
        """Mark a revision; nothing where the cache may only be read, for nothing can be removed there either."""
        if fcntl is None or (folder, commit) in self._held:
            return
        path = folder.parent / ".locks" / folder.name / f"{commit}.trace-offline.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
        except OSError:  # a file system without locks
            os.close(handle)
            return
        self._held[folder, commit] = handle

    def alone(self, folder: Path, commit: str) -> bool:
        """Whether nobody else uses it. While this process holds its mark then, nobody else can begin to."""
        self.take(folder, commit)
        handle = self._held.get((folder, commit))
        if fcntl is None or handle is None:
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(handle, fcntl.LOCK_SH)  # asking for more may have given up what was held
            return False
        return True

    def give_back(self, folder: Path, commit: str) -> None:
        """Take the mark away."""
        handle = self._held.pop((folder, commit), None)
        if handle is not None:
            os.close(handle)

    def close(self) -> None:
        """Take all marks away."""
        for folder, commit in list(self._held):
            self.give_back(folder, commit)

"""One folder as discovery sees it: names, sizes and times from a single scan, nothing opened."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and modification time of one file; ``broken`` for a link whose target is gone."""

    size: int
    mtime: float
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """The files and sub-folders directly inside ``path``."""

    path: Path
    files: dict[str, FileEntry]
    folders: tuple[str, ...]
    links: frozenset[str] = frozenset()

    @property
    def newest(self) -> float:
        """Time of the last change to any file here (0 when there is none)."""
        return max((entry.mtime for entry in self.files.values()), default=0.0)


def scan(path: Path) -> Listing:
    """List a folder. Raises OSError (PermissionError, NotADirectoryError, …) as the system gives it."""
    files: dict[str, FileEntry] = {}
    folders: list[str] = []
    links: set[str] = set()
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_symlink():
                links.add(entry.name)
            try:
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.is_file():
                    found = entry.stat()
                    files[entry.name] = FileEntry(found.st_size, found.st_mtime)
                elif entry.is_symlink():
                    files[entry.name] = FileEntry(0, 0.0, broken=True)
            except OSError:
                # Gone between the listing and the look at it, or a link in a circle: named, but nothing to read.
                files[entry.name] = FileEntry(0, 0.0, broken=True)
    return Listing(path, files, tuple(sorted(folders)), frozenset(links))

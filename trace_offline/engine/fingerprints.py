"""Fingerprints of local checkpoints before planning, remembered in the store so that files are hashed once."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from trace_offline.checkpoints.fingerprint import fingerprint
from trace_offline.core.types import Checkpoint
from trace_offline.engine.options import cores

if TYPE_CHECKING:
    from trace_offline.engine.progress import Progress
    from trace_offline.store.writer import Writer

Cache = dict[tuple[str, int, int], str]


def with_fingerprints(checkpoints: list[Checkpoint], writer: Writer, progress: Progress) -> list[Checkpoint]:
    """The checkpoints with ``fingerprint`` filled in, except hub revisions that are not on disk.

    Hub revisions whose commit was analyzed before get the fingerprint recorded then, without a download.
    """
    cache: Cache = {
        (str(path), int(size), int(mtime)): str(value)
        for path, size, mtime, value in writer.read("select path, size, mtime_ns, digest from fingerprints")
    }
    before = dict(cache)
    local = [item for item in checkpoints if item.layout != "hub" and item.fingerprint is None]
    # Hashing releases the GIL, so threads read several files at a time.
    with ThreadPoolExecutor(cores()) as pool:
        values = dict(zip((id(i) for i in local), pool.map(lambda item: fingerprint(item, cache), local), strict=True))
    writer.remember_fingerprints({key: value for key, value in cache.items() if before.get(key) != value})
    done = []
    for item in checkpoints:
        if item.layout == "hub":
            known = cache.get(hub_key(item))
            done.append(dataclasses.replace(item, fingerprint=known) if known else item)
        else:
            done.append(dataclasses.replace(item, fingerprint=values.get(id(item), item.fingerprint)))
    return done


def hub_key(checkpoint: Checkpoint) -> tuple[str, int, int]:
    """Key of a hub revision in the fingerprint cache: the repository at one commit never changes."""
    return (f"{checkpoint.location.split('@', 1)[0]}@{checkpoint.revision}", 0, 0)

"""Fingerprints of local checkpoints before planning, remembered in the store so that files are hashed once."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from trace_offline.checkpoints.fingerprint import Cache, FileKey, fingerprint
from trace_offline.core.types import Checkpoint
from trace_offline.engine.options import cores

if TYPE_CHECKING:
    from trace_offline.store.writer import Writer

_WHOLE = "fingerprint"


def known_fingerprints(writer: Writer) -> Cache:
    """What earlier runs learned: (path, size, mtime_ns) → digests of the parts of that file."""
    rows = writer.read("select path, size, mtime_ns, digest from fingerprints")
    return {(str(path), int(size), int(mtime)): json.loads(value) for path, size, mtime, value in rows}


def with_fingerprints(checkpoints: list[Checkpoint], writer: Writer, cache: Cache) -> list[Checkpoint]:
    """The checkpoints with ``fingerprint`` filled in, except hub revisions never analyzed before.

    Hub revisions whose commit was analyzed get the fingerprint recorded then, without a download. Raises
    CheckpointError when a file cannot be read.
    """
    before = set(cache)
    local = [item for item in checkpoints if item.layout != "hub"]
    # Hashing releases the GIL, so threads read several files at a time.
    with ThreadPoolExecutor(cores()) as pool:
        hashed = iter(list(pool.map(lambda item: fingerprint(item, cache), local)))
    remember(writer, {key: cache[key] for key in set(cache) - before})
    return [
        dataclasses.replace(
            item, fingerprint=cache.get(hub_key(item), {}).get(_WHOLE) if item.layout == "hub" else next(hashed)
        )
        for item in checkpoints
    ]


def remember(writer: Writer, digests: Cache) -> None:
    """Keep digests for the next run."""
    writer.remember_fingerprints({key: json.dumps(value, sort_keys=True) for key, value in digests.items()})


def hub_key(checkpoint: Checkpoint) -> FileKey:
    """Key of a hub revision in the cache: a repository at one commit never changes."""
    return (f"{checkpoint.location.split('@', 1)[0]}@{checkpoint.revision}", 0, 0)


def hub_entry(checkpoint: Checkpoint) -> Cache:
    """The cache entry of a hub revision whose files were hashed."""
    return {hub_key(checkpoint): {_WHOLE: str(checkpoint.fingerprint)}}

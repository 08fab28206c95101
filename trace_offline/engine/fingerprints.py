"""Fingerprints of local checkpoints before planning, remembered in the store so that files are hashed once."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from trace_offline.checkpoints.fingerprint import Cache, FileKey, fingerprint
from trace_offline.core.errors import CheckpointError
from trace_offline.core.types import Checkpoint, CheckpointState
from trace_offline.engine.options import cores
from trace_offline.engine.unit import Stamps, file_stamps

if TYPE_CHECKING:
    from trace_offline.store.writer import Writer

_WHOLE = "fingerprint"


def known_fingerprints(writer: Writer) -> Cache:
    """What earlier runs learned: (path, size, mtime_ns) → digests of the parts of that file."""
    rows = writer.read("select path, size, mtime_ns, digest from fingerprints")
    return {(str(path), int(size), int(mtime)): json.loads(value) for path, size, mtime, value in rows}


def with_fingerprints(
    checkpoints: list[Checkpoint], writer: Writer, cache: Cache
) -> tuple[list[Checkpoint], dict[str, Stamps], list[Checkpoint]]:
    """(checkpoints with ``fingerprint``, their stamps by location, those that cannot be read after all).

    Hub revisions whose commit was analyzed before get the fingerprint recorded then, without a download; others of the
    hub keep None. A file that cannot be read costs its own checkpoint only.
    """
    before = set(cache)
    stamps: dict[str, Stamps] = {}

    def taken(item: Checkpoint) -> Checkpoint:
        if item.layout == "hub":
            return dataclasses.replace(item, fingerprint=cache.get(hub_key(item), {}).get(_WHOLE))
        try:
            stamps[item.location] = file_stamps(item)  # before the hash: a later change shows
            return dataclasses.replace(item, fingerprint=fingerprint(item, cache))
        except CheckpointError as error:
            return dataclasses.replace(item, state=CheckpointState.UNREADABLE, reason=error.message)

    # Hashing releases the GIL, so threads read several files at a time.
    with ThreadPoolExecutor(cores()) as pool:
        done = list(pool.map(taken, checkpoints))
    remember(writer, {key: cache[key] for key in set(cache) - before})
    return [item for item in done if item.state.analyzable], stamps, [i for i in done if not i.state.analyzable]


def remember(writer: Writer, digests: Cache) -> None:
    """Keep digests for the next run."""
    writer.remember_fingerprints({key: json.dumps(value, sort_keys=True) for key, value in digests.items()})


def hub_key(checkpoint: Checkpoint) -> FileKey:
    """Key of a hub revision in the cache: a repository at one commit never changes."""
    return (f"{checkpoint.location.split('@', 1)[0]}@{checkpoint.revision}", 0, 0)


def hub_entry(checkpoint: Checkpoint) -> Cache:
    """The cache entry of a hub revision whose files were hashed."""
    return {hub_key(checkpoint): {_WHOLE: str(checkpoint.fingerprint)}}

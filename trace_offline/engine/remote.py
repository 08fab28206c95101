"""Hub revisions during a run: one is downloaded while the one before it is analyzed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from trace_offline.checkpoints.fingerprint import with_fingerprint
from trace_offline.core.errors import CheckpointError
from trace_offline.core.types import Checkpoint


def fetched(remote: list[Checkpoint], lost: Callable[[Checkpoint, str], None]) -> Iterator[Checkpoint]:
    """The revisions on disk, fingerprinted, in order; ``lost`` is told of one that cannot be had, the rest goes on."""
    if not remote:
        return
    from trace_offline.checkpoints.hub import prefetching

    for item, outcome in prefetching(remote):
        if isinstance(outcome, CheckpointError):
            lost(item, outcome.message)
            continue
        try:
            yield with_fingerprint(outcome)
        except CheckpointError as error:
            lost(item, error.message)

"""The weight files of a folder with the standard names, safetensors before pickles, and whether they are all there."""

from __future__ import annotations

from dataclasses import dataclass

from trace_offline.checkpoints.completeness import (
    Clock,
    Verdict,
    check_weight_file,
    missing_shards,
    read_index,
    shard_siblings,
    unfinished,
)
from trace_offline.checkpoints.listing import Listing
from trace_offline.core.errors import CheckpointError
from trace_offline.core.hashing import digest
from trace_offline.core.types import CheckpointState as State

_SINGLE_AND_INDEX = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ("pytorch_model_fsdp.bin", ""),
)


@dataclass(frozen=True, slots=True)
class FolderWeights:
    """Names of the weight files (present ones) and the verdict on them together."""

    names: tuple[str, ...]
    verdict: Verdict


def folder_weights(listing: Listing, clock: Clock) -> FolderWeights | None:
    """Weights under their standard names; None when the folder holds none and no trace of any."""
    for single, index in _SINGLE_AND_INDEX:
        if single in listing.files:
            note = f"Both {single} and {index} are here; {single} is read." if index in listing.files else None
            return FolderWeights((single,), _judge(listing, [single], clock, note))
        if index in listing.files:
            return _indexed(listing, index, clock)
    if siblings := shard_siblings(listing):
        names, count = siblings
        index = "model.safetensors.index.json" if names[0].endswith("safetensors") else "pytorch_model.bin.index.json"
        state, when = _unfinished_state(listing, clock)
        return FolderWeights(
            tuple(names),
            Verdict(
                state, f"{len(names)} of {count} shards are here and {index}, which is written last, is not{when}."
            ),
        )
    pieces = [name for name in unfinished(listing) if ".safetensors" in name or ".bin" in name]
    if pieces:
        state, when = _unfinished_state(listing, clock)
        return FolderWeights((), Verdict(state, f"The weights are only here as {pieces[0]}, unfinished{when}."))
    return None


def _indexed(listing: Listing, index: str, clock: Clock) -> FolderWeights:
    try:
        names = sorted(set(read_index(listing.path / index).values()))
    except CheckpointError as error:
        state, when = _unfinished_state(listing, clock)
        state = State.UNREADABLE if state is State.PARTIAL else state
        return FolderWeights((), Verdict(state, f"{error}{when}."))
    missing = missing_shards(names, listing)
    if missing:
        state, when = _unfinished_state(listing, clock)
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        return FolderWeights(
            tuple(name for name in names if name not in missing),
            Verdict(state, f"{len(missing)} of {len(names)} shards are missing: {shown}{when}."),
        )
    return FolderWeights(tuple(names), _judge(listing, names, clock, None))


def _judge(listing: Listing, names: list[str], clock: Clock, note: str | None) -> Verdict:
    digests: list[str] = []
    for name in names:
        entry = listing.files[name]
        if entry.broken:
            return Verdict(State.PARTIAL, f"{name} is a link to a file that is not there: copy or download it again.")
        verdict = check_weight_file(listing.path / name, entry.mtime, clock)
        if verdict.state is not State.COMPLETE:
            return verdict
        digests.append(verdict.layout_digest or "")
    return Verdict(State.COMPLETE, note, layout_digest=digest(*digests) if all(digests) else None)


def _unfinished_state(listing: Listing, clock: Clock) -> tuple[State, str]:
    if clock.recent(listing.newest):
        ago = max(0, round(clock.now - listing.newest))
        return State.BEING_WRITTEN, f"; files changed {ago} s ago, so it is being written: look again later"
    return State.PARTIAL, "; nothing has changed for a while: the save or download was interrupted"

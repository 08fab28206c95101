"""Is a weight file whole? Decided from its first bytes, its header and its directory; no tensor is read.

A file that is cut short and still changing is being written; cut short and quiet it is damaged. ``reason`` is a
sentence for the user that says what the file is and what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_offline.checkpoints.listing import Listing
from trace_offline.checkpoints.safetensors_header import TruncatedError, read_header
from trace_offline.checkpoints.torch_archive import TorchOutline, is_torch_file, outline
from trace_offline.core.errors import CheckpointError
from trace_offline.core.types import CheckpointState as State

SETTLE_SECONDS = 120.0
"""Files changed within this many seconds may still be written to."""
_PARTIAL_SUFFIXES = (".incomplete", ".tmp", ".part", ".partial", ".crdownload", ".aria2")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.(?P<ext>safetensors|bin)")


@dataclass(frozen=True, slots=True)
class Clock:
    """The time of the search and how long a file must have been quiet to count as written."""

    now: float
    settle_seconds: float = SETTLE_SECONDS

    def recent(self, mtime: float) -> bool:
        """Changed so recently that a writer may still be at work (clocks of file servers may run ahead)."""
        return self.now - mtime < self.settle_seconds


@dataclass(frozen=True, slots=True)
class Verdict:
    """State of a file or folder and the sentence that explains it (None for complete without remark)."""

    state: State
    reason: str | None = None
    layout_digest: str | None = None
    outline: TorchOutline | None = None


def check_weight_file(path: Path, mtime: float, clock: Clock, *, keys: bool = False) -> Verdict:
    """Judge one file by its content. ``keys``: also tell what a torch file holds (its pickle is decoded, not run)."""
    name = path.name
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
        size = path.stat().st_size
    except OSError as error:
        return Verdict(State.UNREADABLE, f"{name} cannot be read: {error.strerror or error}.")
    if size == 0:
        return _cut_short(name, "is empty (0 bytes)", mtime, clock)
    if reason := _foreign(name, head, size):
        return Verdict(State.UNREADABLE, reason)
    try:
        if name.endswith(".safetensors"):
            return _check_safetensors(path)
        if not is_torch_file(head):
            kind = "safetensors under another ending" if head[8:9] == b"{" else "not written by torch.save"
            return Verdict(
                State.UNREADABLE,
                f"{name} is {kind}: expected a torch or safetensors file, found bytes {head[:8].hex(' ')}.",
            )
        found = outline(path, keys=keys)
    except TruncatedError as error:
        return _cut_short(name, f"is truncated: {error}", mtime, clock)
    except CheckpointError as error:
        if name.endswith(".safetensors"):
            return Verdict(State.UNREADABLE, f"{name} cannot be used: {error}.")
        return _cut_short(name, f"cannot be used: {error}", mtime, clock)
    except OSError as error:
        return Verdict(State.UNREADABLE, f"{name} cannot be read: {error.strerror or error}.")
    if found.storage_bytes == 0:
        return Verdict(
            State.UNREADABLE,
            f"{name} holds no tensor data"
            + (
                f" ({found.n_storages} empty tensors; DeepSpeed ZeRO-3 leaves such placeholders)"
                * (found.n_storages > 0)
            )
            + ".",
            outline=found,
        )
    return Verdict(State.COMPLETE, outline=found)


def _check_safetensors(path: Path) -> Verdict:
    header = read_header(path)
    if not header.tensors:
        return Verdict(
            State.UNREADABLE, f"{path.name} is a valid safetensors file with zero tensors: nothing was saved."
        )
    empty = sum(entry.begin == entry.end for entry in header.tensors.values())
    if empty * 2 > len(header.tensors):
        return Verdict(
            State.UNREADABLE,
            f"{path.name}: {empty} of {len(header.tensors)} tensors are empty placeholders, as DeepSpeed ZeRO-3 leaves "
            "them; gather the weights with zero_to_fp32.py.",
        )
    return Verdict(State.COMPLETE, layout_digest=header.layout_digest)


def _foreign(name: str, head: bytes, size: int) -> str | None:
    """What the file is when it is something well known that is not weights."""
    if head.startswith(b"version https://git-lfs.github.com/spec"):
        promised = re.search(rb"^size (\d+)", head, re.MULTILINE)
        real = f" of {int(promised[1])} bytes" if promised else ""
        return (
            f"{name} is a Git LFS pointer ({size} bytes), not the weights{real}: "
            "run `git lfs pull` in its repository, or download the file itself."
        )
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:15].lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return (
            f"{name} is an HTML page ({size} bytes), not weights: a login, licence or error page was saved under "
            "this name; download the file again."
        )
    if not any(head):
        return f"{name} begins with {len(head)} zero bytes: the space was reserved but never filled; copy it again."
    return None


def _cut_short(name: str, what: str, mtime: float, clock: Clock) -> Verdict:
    if clock.recent(mtime):
        ago = max(0, round(clock.now - mtime))
        return Verdict(
            State.BEING_WRITTEN,
            f"{name} {what}; it changed {ago} s ago, so it is probably still being written: look again later.",
        )
    return Verdict(State.UNREADABLE, f"{name} {what}; nothing has changed it for a while: copy or download it again.")


def unfinished(listing: Listing) -> list[str]:
    """Files that a download or a writer left under a provisional name."""
    return sorted(name for name in listing.files if name.endswith(_PARTIAL_SUFFIXES))


def read_index(path: Path) -> Mapping[str, Any]:
    """The ``weight_map`` of a shard index. Raises CheckpointError when it is no such thing."""
    try:
        content = json.loads(path.read_bytes())
        weight_map = content["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path.name} is no valid shard index (a JSON object with a weight_map)") from None
    for shard in weight_map.values():
        # An index must not reach outside its folder.
        if not isinstance(shard, str) or "/" in shard or "\\" in shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{path.name} names a shard outside its folder: {shard!r}")
    return weight_map


def missing_shards(names: Iterable[str], listing: Listing) -> list[str]:
    """Shards that are not there, or are links to nothing."""
    return sorted(name for name in set(names) if name not in listing.files or listing.files[name].broken)


def shard_siblings(listing: Listing) -> tuple[list[str], int] | None:
    """``model-00001-of-00004`` files without an index: those present and the number there should be."""
    found: list[str] = []
    count = 0
    for name in sorted(listing.files):
        if match := _SHARD.fullmatch(name):
            found.append(name)
            count = max(count, int(match["count"]))
    return (found, count) if found else None

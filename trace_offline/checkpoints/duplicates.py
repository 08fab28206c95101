"""Checkpoints that hold the same weights: published series are known to serve one set of weights under many steps.

Cheap first: files of equal size are compared in a few sampled blocks; only those that agree are read whole.
"""

from __future__ import annotations

import os
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from trace_offline.checkpoints.fingerprint import Cache, fingerprint, weights_digest
from trace_offline.core.errors import CheckpointError
from trace_offline.core.hashing import digest
from trace_offline.core.types import Checkpoint, CheckpointState

_SAMPLES = 16
_SAMPLE_BYTES = 4096
_SAME = "The same weights as "


def mark_duplicates(checkpoints: list[Checkpoint], cache: Cache | None = None) -> list[Checkpoint]:
    """Give every checkpoint whose weights an earlier one holds the state ``duplicate`` and the step it repeats.

    The order is kept and counts as the order of training. A shard shared with another step, other shards differing, is
    a warning in ``reason``.
    """
    cache = {} if cache is None else cache
    complete = [i for i, item in enumerate(checkpoints) if item.state is CheckpointState.COMPLETE and item.weight_files]
    result = list(checkpoints)
    samples: dict[int, list[str]] = {}
    for i in complete:
        try:
            samples[i] = [_sample(path) for path in checkpoints[i].weight_files]
        except OSError as error:
            result[i] = _lost(checkpoints[i], error)
    complete = list(samples)
    repeated: set[int] = set()
    for group in _groups(complete, lambda i: digest(*samples[i])):
        prints: dict[str, int] = {}
        same_weights: dict[str, int] = {}
        for i in group:
            item = checkpoints[i]
            try:
                found = fingerprint(item, cache)
                weights = weights_digest(item.weight_files, cache)
            except (CheckpointError, OSError) as error:
                result[i] = _lost(item, error)
                continue
            result[i] = replace(item, fingerprint=found)
            first = prints.setdefault(found, i)
            if first != i:
                repeated.add(i)
                result[i] = _duplicate(result[i], checkpoints[first])
            elif (other := same_weights.setdefault(weights, i)) != i:
                result[i] = _remark(
                    result[i],
                    f"Warning: the same weights as {_called(checkpoints[other])}, with another config.json.",
                )
    _mark_shards(result, complete, samples, repeated, cache)
    return result


def _groups(members: Iterable[int], key: Callable[[int], str]) -> list[list[int]]:
    """Members that share a key, where at least two do."""
    grouped: dict[str, list[int]] = defaultdict(list)
    for member in members:
        grouped[key(member)].append(member)
    return [group for group in grouped.values() if len(group) > 1]


def _sample(path: str) -> str:
    """Digest of the data's size and sampled blocks; blind to the header of safetensors, where metadata may differ."""
    safetensors = path.endswith(".safetensors")
    if not safetensors and (records := _archive_checksums(path)) is not None:
        return records
    parts: list[bytes] = []
    with open(path, "rb", buffering=0) as stream:
        start = 8 + int.from_bytes(stream.read(8), "little") if safetensors else 0
        size = os.fstat(stream.fileno()).st_size - start
        for index in range(_SAMPLES):
            stream.seek(start + (size - _SAMPLE_BYTES) * index // (_SAMPLES - 1) if size > _SAMPLE_BYTES else start)
            parts.append(stream.read(_SAMPLE_BYTES))
            if size <= _SAMPLE_BYTES:
                break
    return digest(str(size), *parts)


def _archive_checksums(path: str) -> str | None:
    """Torch archives carry a checksum of every record in their directory: no data needs to be read to compare them."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = sorted(
                (item.filename.split("/", 1)[-1], item.file_size, item.CRC)
                for item in archive.infolist()
                if "/data/" in item.filename or item.filename.endswith("data.pkl")
            )
    except (zipfile.BadZipFile, OSError):
        return None
    return digest("records", *(f"{name} {size} {crc}" for name, size, crc in records))


def _duplicate(item: Checkpoint, first: Checkpoint) -> Checkpoint:
    return replace(
        item,
        state=CheckpointState.DUPLICATE,
        duplicate_of=first.step,
        reason=_joined(item.reason, f"{_SAME}{_called(first)}: computed once, shown at both."),
    )


def _mark_shards(
    result: list[Checkpoint], complete: list[int], samples: dict[int, list[str]], repeated: set[int], cache: Cache
) -> None:
    owners: dict[str, int] = {}
    for i in complete:
        if i in repeated or len(samples[i]) < 2:
            continue
        for path, sample in zip(result[i].weight_files, samples[i], strict=True):
            first = owners.setdefault(sample, i)
            if first == i:
                continue
            other = result[first].weight_files[samples[first].index(sample)]
            same = _digest_of(result, first, other, cache)
            if same is not None and _digest_of(result, i, path, cache) == same:
                result[i] = _remark(
                    result[i],
                    f"Warning: its shard {Path(path).name} is identical to that of {_called(result[first])}, while "
                    "other shards differ; one of the two was probably published with wrong weights.",
                )


def _digest_of(result: list[Checkpoint], i: int, path: str, cache: Cache) -> str | None:
    """Digest of one shard of checkpoint ``i``; None, and ``i`` marked, when it cannot be read any more."""
    try:
        return weights_digest([path], cache)
    except (CheckpointError, OSError) as error:
        result[i] = _lost(result[i], error)
        return None


def _lost(item: Checkpoint, error: CheckpointError | OSError) -> Checkpoint:
    """Found, but it cannot be read: a training that keeps its newest checkpoints removes the others at any moment."""
    if any(not os.path.exists(path) for path in item.weight_files):
        reason = "It was removed while it was looked at."
    elif isinstance(error, CheckpointError):
        reason = error.message
    else:
        reason = f"It cannot be read: {error.strerror or error}."
    return replace(item, state=CheckpointState.UNREADABLE, reason=reason)


def remark_of(item: Checkpoint) -> str | None:
    """What was remarked on a usable checkpoint, without the sentence that makes it a duplicate."""
    if item.reason is None or item.state is not CheckpointState.DUPLICATE:
        return item.reason
    return item.reason[: item.reason.rfind(_SAME)].rstrip() or None


def _called(item: Checkpoint) -> str:
    return f"step {item.step}" if item.step is not None else Path(item.location).name


def _remark(item: Checkpoint, text: str) -> Checkpoint:
    return replace(item, reason=_joined(item.reason, text))


def _joined(reason: str | None, text: str) -> str:
    return f"{reason} {text}" if reason else text

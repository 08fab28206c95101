"""What identifies a checkpoint: its weights and its configuration, by content.

Weights in safetensors are hashed tensor by tensor in the order of their names, so that neither the metadata, nor the
order in the file, nor the split into shards matters. Torch archives are hashed record by record, without the file name
that ``torch.save`` writes into them.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from trace_offline.checkpoints.safetensors_header import read_header
from trace_offline.core.errors import CheckpointError
from trace_offline.core.hashing import canonical_json, digest, file_digest
from trace_offline.core.types import Checkpoint

FileKey = tuple[str, int, int]
"""(path, size, mtime in ns): when these are unchanged, the content is taken to be."""
Cache = MutableMapping[FileKey, dict[str, str]]

_BLOCK = 1 << 20
# Say how and where a model was saved, not what it computes.
_VOLATILE = frozenset(
    {
        "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash", "use_cache",
        "_attn_implementation_autoset", "_attn_implementation_internal",
    }
)  # fmt: skip


def fingerprint(checkpoint: Checkpoint, cache: Cache | None = None) -> str:
    """32 hex digits for the weights and configuration; reads every weight byte once, unless ``cache`` knows the file.

    Raises CheckpointError when there are no weight files or one cannot be read.
    """
    if not checkpoint.weight_files:
        hint = "fetch it first" if checkpoint.layout == "hub" else "nothing of it can be identified"
        raise CheckpointError(f"{checkpoint.location} has no weight files on this disk: {hint}.")
    weights = weights_digest(checkpoint.weight_files, cache)
    return digest("checkpoint", weights, config_digest(checkpoint.config))


def with_fingerprint(checkpoint: Checkpoint, cache: Cache | None = None) -> Checkpoint:
    """The same checkpoint with ``fingerprint`` filled in."""
    return replace(checkpoint, fingerprint=fingerprint(checkpoint, cache))


def weights_digest(files: Iterable[str], cache: Cache | None = None) -> str:
    """Digest over the contents of weight files: by tensor where tensors can be told apart, else by record or file."""
    parts: dict[str, str] = {}
    listed = sorted(files)
    for path in listed:
        for part, value in _file_parts(path, cache).items():
            # A lone file may be called anything (ckpt_500.pt); shards are told apart by their names.
            apart = len(listed) > 1 and not part.startswith("tensor ")
            name = f"{part} of {Path(path).name}" if apart else part
            if parts.setdefault(name, value) != value:
                raise CheckpointError(f'"{name}" is in more than one weight file with different contents ({path}).')
    return digest(*(part for name in sorted(parts) for part in (name, parts[name])))


def config_digest(path: str | None) -> str:
    """Digest of ``config.json`` without what does not change the numbers (names, versions, the stored type)."""
    if path is None:
        return digest("no configuration")
    try:
        # NaN and Infinity are legal in Python's JSON and occur in real configurations; canonical JSON refuses them.
        content = json.loads(Path(path).read_bytes(), parse_constant=str)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from None
    return digest(canonical_json(_stable(content)))


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in _VOLATILE}
    if isinstance(value, list):
        return [_stable(item) for item in value]
    return value


def _file_parts(path: str, cache: Cache | None) -> dict[str, str]:
    try:
        found = os.stat(path)
        key = (path, found.st_size, found.st_mtime_ns)
        if cache is not None and key in cache:
            return cache[key]
        if path.endswith(".safetensors"):
            parts = _tensor_digests(path)
        elif zipfile.is_zipfile(path):
            parts = _record_digests(path)
        else:
            parts = {"file": file_digest(Path(path))}
        after = os.stat(path)
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read to identify its weights ({error}).") from None
    if (after.st_size, after.st_mtime_ns) != (found.st_size, found.st_mtime_ns):
        raise CheckpointError(f"{path} changed while it was being read: it is still being written; try again later.")
    if cache is not None:
        cache[key] = parts
    return parts


def _tensor_digests(path: str) -> dict[str, str]:
    header = read_header(path)
    parts: dict[str, str] = {}
    with open(path, "rb") as stream:
        # In the order of the file, so that it is read once from front to back.
        for name, entry in sorted(header.tensors.items(), key=lambda item: (item[1].begin, item[0])):
            state = hashlib.blake2b(canonical_json([entry.dtype, list(entry.shape)]).encode(), digest_size=16)
            stream.seek(header.data_start + entry.begin)
            _update(state, stream, entry.end - entry.begin, path)
            parts[f"tensor {name}"] = state.hexdigest()
    return parts


def _update(state: Any, stream: BinaryIO, count: int, path: str) -> None:
    while count:
        block = stream.read(min(_BLOCK, count))
        if not block:
            raise CheckpointError(f"{path} became shorter while it was being read.")
        state.update(block)
        count -= len(block)


def _record_digests(path: str) -> dict[str, str]:
    """Records of a torch archive under their names without the archive's own; its random serial number left out."""
    parts: dict[str, str] = {}
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            name = record.filename.split("/", 1)[-1]
            if name.startswith(".") or name == "version":
                continue
            state = hashlib.blake2b(digest_size=16)
            with archive.open(record) as stream:
                while block := stream.read(_BLOCK):
                    state.update(block)
            parts[f"record {name}"] = state.hexdigest()
    return {"records": digest(*(part for name in sorted(parts) for part in (name, parts[name])))}

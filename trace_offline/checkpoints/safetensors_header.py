"""The header of a safetensors file, read without touching a tensor: 8-byte length, JSON, then the data.

Format: https://huggingface.co/docs/safetensors (u64 little-endian header length; offsets relative to the data).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trace_offline.core.errors import CheckpointError
from trace_offline.core.hashing import canonical_json, digest

MAX_HEADER = 100_000_000
"""The largest header the safetensors library accepts; anything above is not a header."""
_CACHED_HEADER = 4_000_000
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: its type, shape and byte range ``[begin, end)`` relative to the data's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The tensors of one file and where its data begins.

    ``layout_digest``: of names, types and shapes; equal for checkpoints of one architecture, blind to metadata.
    """

    tensors: Mapping[str, TensorEntry]
    data_start: int
    layout_digest: str


class TruncatedError(CheckpointError):
    """The file is shorter than its header says."""


def read_header(path: Path | str) -> SafetensorsHeader:
    """Read and check the header: it parses, its ranges are sane and cover the file exactly.

    Raises TruncatedError when bytes are missing at the end, CheckpointError for everything else that is wrong.
    """
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise TruncatedError(f"a safetensors file begins with an 8-byte header length; this one has {size} bytes")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER:
            raise CheckpointError(
                f"expected a safetensors header of at most {MAX_HEADER} bytes, found a length of {length}: "
                "this is not a safetensors file, or its beginning is damaged"
            )
        if 8 + length > size:
            raise TruncatedError(f"the safetensors header alone needs {8 + length} bytes, the file has {size}")
        text = stream.read(length)
    # The checkpoints of a run have the same header, byte for byte, so it is parsed once.
    tensors, data_size, layout = _parse_cached(text) if length <= _CACHED_HEADER else _parse(text)
    promised = 8 + length + data_size
    if size < promised:
        raise TruncatedError(f"the header promises {promised} bytes, the file has {size}")
    if size > promised:
        raise CheckpointError(f"the header describes {promised} bytes, the file has {size}: extra bytes")
    return SafetensorsHeader(tensors=tensors, data_start=8 + length, layout_digest=layout)


def _parse(text: bytes) -> tuple[Mapping[str, TensorEntry], int, str]:
    """The tensors, the bytes of data they cover without a gap, and the digest of their layout."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the safetensors header is no valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError("the safetensors header is no JSON object")
    tensors = {name: _entry(name, value) for name, value in content.items() if name != "__metadata__"}
    listed = {name: [entry.dtype, list(entry.shape)] for name, entry in tensors.items()}
    return MappingProxyType(tensors), _covered(tensors), digest(canonical_json(listed))


_parse_cached = lru_cache(maxsize=16)(_parse)


def _entry(name: str, value: Any) -> TensorEntry:
    try:
        begin, end = value["data_offsets"]
        dtype, shape = value["dtype"], tuple(value["shape"])
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f'the safetensors header describes tensor "{name}" incompletely') from None
    numbers = (begin, end, *shape)
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in numbers) or end < begin:
        raise CheckpointError(f'the safetensors header gives tensor "{name}" an impossible type, shape or range')
    if dtype in _BITS:
        count = 1
        for dimension in shape:
            count *= dimension
        if count * _BITS[dtype] != (end - begin) * 8:
            raise CheckpointError(
                f'tensor "{name}" ({dtype}, shape {list(shape)}) does not fit its byte range of {end - begin} bytes'
            )
    return TensorEntry(dtype, shape, begin, end)


def _covered(tensors: Mapping[str, TensorEntry]) -> int:
    position = 0
    for entry in sorted(tensors.values(), key=lambda item: (item.begin, item.end)):
        if entry.begin != position:
            raise CheckpointError(f"the tensors leave a gap or overlap at byte {position} of the data")
        position = entry.end
    return position

"""What a ``torch.save`` file holds, told from its pickle without unpickling: nothing in the file is ever executed.

``pickletools.genops`` decodes the opcodes; a small abstract stack keeps only literals, dictionaries and tuples, so the
top-level keys and their plain values (``iter_num``, ``global_step``) can be read. Every call is replaced by a blank.
"""

from __future__ import annotations

import io
import os
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from trace_offline.core.errors import CheckpointError

_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
_MAX_PICKLE = 256_000_000
_LITERALS = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1",
    "LONG4", "BINFLOAT", "FLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip
_KNOWN_KEYS = ("model_args", "iter_num", "state_dict", "pytorch-lightning_version", "loops")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _Blank:
    """Stands for whatever a pickle would construct; made instead of it."""


_MARK = _Blank()


@dataclass(frozen=True)
class TorchOutline:
    """Top-level keys of a torch file and the plain numbers and texts among their values; total bytes of tensor data.

    ``complete_keys`` False: only some well-known keys were looked for, at any depth (much faster).
    """

    keys: tuple[str, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    storage_bytes: int = 0
    n_storages: int = 0
    complete_keys: bool = True

    def integer(self, *names: str) -> int | None:
        """The first of these top-level keys that holds a whole number ≥ 0."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
                return value
        return None


def is_torch_file(head: bytes) -> bool:
    """Do these first bytes (16 or more) look like ``torch.save``, old or new format?"""
    return head.startswith((b"PK\x03\x04", _LEGACY_MAGIC))


def outline(path: Path | str, *, keys: bool = True) -> TorchOutline:
    """Check that the archive is whole and tell what is in it. ``keys=False`` only looks for some well-known keys.

    Raises CheckpointError when the file is no torch file or is cut short.
    """
    with open(path, "rb") as stream:
        head = stream.read(16)
        stream.seek(0)
        if head.startswith(b"PK\x03\x04"):
            return _zip_outline(stream, keys=keys)
        if head.startswith(_LEGACY_MAGIC):
            return _legacy_outline(stream)
    raise CheckpointError("the file does not begin like anything torch.save writes")


def _zip_outline(stream: BinaryIO, *, keys: bool) -> TorchOutline:
    try:
        with zipfile.ZipFile(stream) as archive:
            records = archive.infolist()
            pickles = [record for record in records if record.filename.split("/", 1)[-1] == "data.pkl"]
            if not pickles:
                raise CheckpointError("the file is a zip archive without the data.pkl that torch.save writes")
            storages = [record for record in records if "/data/" in record.filename]
            if pickles[0].file_size > _MAX_PICKLE:
                raise CheckpointError(f"its data.pkl has {pickles[0].file_size} bytes, more than any state dict needs")
            text = archive.read(pickles[0])
            names, values = _top_level(io.BytesIO(text)) if keys else (_known_keys(text), {})
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"the archive is cut short or damaged ({error})") from None
    return TorchOutline(names, values, sum(record.file_size for record in storages), len(storages), keys)


def _known_keys(pickled: bytes) -> tuple[str, ...]:
    """The well-known keys whose pickled text occurs (opcode, length, characters)."""
    found = []
    for name in _KNOWN_KEYS:
        text = name.encode()
        long, short = b"X" + len(text).to_bytes(4, "little") + text, b"\x8c" + bytes([len(text)]) + text
        if long in pickled or short in pickled:
            found.append(name)
    return tuple(found)


def _legacy_outline(stream: BinaryIO) -> TorchOutline:
    # Four pickles (magic, protocol, system, object), the list of storage keys, then the storages themselves.
    size = os.fstat(stream.fileno()).st_size
    for _ in range(3):
        _top_level(stream)
    names, values = _top_level(stream)
    _top_level(stream)
    return TorchOutline(names, values, size - stream.tell(), 1 if size > stream.tell() else 0)


def _top_level(stream: BinaryIO) -> tuple[tuple[str, ...], dict[str, Any]]:
    try:
        root = _abstract(pickletools.genops(stream))
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the pickle inside is cut short or damaged ({error})") from None
    if not isinstance(root, dict):
        return (), {}
    names = tuple(key for key in root if isinstance(key, str))
    return names, {key: root[key] for key in names if isinstance(root[key], (int, float, str))}


def _abstract(operations: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> Any:
    """Run the opcodes on a stack of literals, dicts and blanks; returns what is on top at STOP."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for code, argument, _ in operations:
        name = code.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)])
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _assign(stack[-1], key, value)
        elif name in ("SETITEMS", "DICT"):
            items = _pop_to_mark(stack)
            if name == "DICT":
                stack.append({})
            for key, value in zip(items[::2], items[1::2], strict=True):
                _assign(stack[-1], key, value)
        elif name == "REDUCE":
            arguments, callable_ = stack.pop(), stack.pop()
            # An OrderedDict is how torch writes a bare state dict; it is filled by SETITEMS like a dict.
            stack.append({} if callable_ == ("collections OrderedDict",) and arguments == () else _Blank())
        elif name == "GLOBAL":
            stack.append((str(argument),))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append((f"{module} {attribute}",))
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "STOP":
            return stack[-1]
        else:
            _generic(code, stack)
    raise ValueError("no end of pickle")


def _assign(target: Any, key: Any, value: Any) -> None:
    if isinstance(target, dict) and isinstance(key, str):
        target[key] = value


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _generic(code: pickletools.OpcodeInfo, stack: list[Any]) -> None:
    """Pop and push as the opcode's own description says; whatever it would build becomes a blank."""
    before, after = code.stack_before, code.stack_after
    keeps = code.name in ("APPEND", "APPENDS", "ADDITEMS", "BUILD")
    if pickletools.markobject in before:
        _pop_to_mark(stack)
        extra = before.index(pickletools.markobject)
    else:
        extra = len(before)
    if keeps:
        # These change the object under their arguments and leave it there.
        for _ in range(extra - 1):
            stack.pop()
        return
    for _ in range(extra):
        stack.pop()
    stack.extend(_Blank() for _ in after)

"""Reading torch's pickled files without ever running what they say.

First ``torch.load(weights_only=True)``. What it refuses (a config object beside the weights, say) goes through a reader
that cannot run anything: every name a pickle asks for resolves to a class of this module that only remembers what it
was given. Tensors are rebuilt afterwards, from checked numbers and the raw bytes of the archive.

Why that is safe: the pickle machine can call only what ``find_class`` returns or what such calls return. ``find_class``
returns ``_Inert`` subclasses and nothing else; their construction, state and item methods are defined here and store
values; the other objects on its stack are plain containers, numbers and text. So no function of any other module is
ever reached, whatever the bytes are.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trace_offline.core.errors import CheckpointError

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


_MOST_ITEMS = 5_000_000
_DEEPEST = 60


@dataclass
class Pickled:
    """What a file holds, and the classes of objects in it that were not built (None of them is needed for weights)."""

    content: Any
    refused: tuple[str, ...] = ()


def load_pickle(path: Path) -> Pickled:
    """The content of a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file, tensors on the CPU; nothing in it is executed.

    Raises CheckpointError naming the classes that stand in the way when no tensor can be had.
    """
    try:
        with path.open("rb") as stream:
            zipped = stream.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings():
            # about pickle protocols other than torch's own; whether the content can be had is told below
            warnings.simplefilter("ignore", UserWarning)
            return Pickled(torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None))
    except pickle.UnpicklingError as error:
        if not zipped:
            raise CheckpointError(
                f"{path}: not a checkpoint that torch can read safely: {_first_line(error)}. Expected weights saved by "
                "torch.save; save the state dict alone (torch.save(model.state_dict(), …)) or as safetensors."
            ) from None
    except Exception as error:  # a damaged pickle fails in whatever way its bytes lead to
        raise CheckpointError(
            f"{path}: damaged or incomplete: torch cannot read it ({_first_line(error)}). Copy or save it again."
        ) from None
    refused = _refused_globals(path)
    try:
        content = _salvage(path)
    except Exception as error:
        raise CheckpointError(
            f"{path}: it asks for {_listed(refused)} to be run on loading, which is refused, and its tensors cannot be "
            f"read without ({_first_line(error)}). In the environment that wrote it, save the weights alone: "
            "torch.save(model.state_dict(), …), or safetensors."
        ) from None
    return Pickled(content, refused)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(". ")


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:6]) or "code"
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _refused_globals(path: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))))
    except Exception:  # only the wording of a message depends on it
        return ()


class _Inert:
    """Stands for any object of a pickle: remembers its arguments, does nothing."""

    name = ""
    args: tuple[Any, ...]
    entries: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        self = object.__new__(cls)
        self.args, self.entries = args, {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: pickles may come by way of ``__new__`` alone."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        """Forget an item of a list-like object."""

    def extend(self, values: Any) -> None:
        """Forget items of a list-like object."""

    def add(self, value: Any) -> None:
        """Forget an item of a set-like object."""


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


class _InertUnpickler(pickle._Unpickler):  # the one written in Python, whose every step can be read
    """Resolves every global to an ``_Inert`` class, every persistent id to a description of raw bytes."""

    def find_class(self, module: str, name: str) -> Any:
        """Whatever is asked for: a class that does nothing."""
        return type("_Inert", (_Inert,), {"name": f"{module}.{name}"})

    def get_extension(self, code: int) -> None:
        """Refuse the registry of extension codes, the one other way to a global."""
        raise pickle.UnpicklingError("extension codes are not allowed")

    def persistent_load(self, pid: Any) -> _Storage:
        """Which bytes of the archive a tensor is made of."""
        kind, storage_type, key, _, numel = pid
        dtype = _STORAGES.get(str(getattr(storage_type, "name", "")).rpartition(".")[2])
        if kind != "storage" or dtype is None or not isinstance(key, str) or not isinstance(numel, int):
            raise pickle.UnpicklingError(f"unknown storage {kind!r}")
        return _Storage(key, dtype, numel)


def _salvage(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        index = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = index[: -len("data.pkl")]
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order).strip() != b"little":
            raise ValueError("the tensors are stored big-endian")
        with archive.open(index) as stream:
            tree = _InertUnpickler(stream).load()
        return _Builder(archive, folder).build(tree)


class _Builder:
    """The tree with tensors in place of their descriptions; unknown objects become None."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self._archive, self._folder = archive, folder
        self._read: dict[str, Tensor] = {}
        self._built = 0

    def build(self, item: Any, depth: int = 0) -> Any:
        self._built += 1
        # a few kilobytes of pickle can describe a tree of astronomic size by referring to its own parts
        if self._built > _MOST_ITEMS or depth > _DEEPEST:
            raise ValueError("its objects are nested too deeply")
        if isinstance(item, dict):
            return {key: self.build(value, depth + 1) for key, value in item.items() if _plain(key)}
        if isinstance(item, list | tuple):
            return [self.build(value, depth + 1) for value in item]
        if not isinstance(item, _Inert):
            return item if _plain(item) else None
        if item.name == "collections.OrderedDict":
            return self.build(item.entries, depth + 1)
        if item.name == "torch._utils._rebuild_parameter":
            return self.build(item.args[0], depth + 1)
        if item.name == "torch._utils._rebuild_tensor_v2":
            return self._tensor(*item.args[:4])
        return None

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
        if not isinstance(storage, _Storage) or len(size) != len(stride):
            raise ValueError("a tensor without a storage")
        if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
            raise ValueError("a tensor with an impossible shape")
        if storage.key not in self._read:
            # through bytearray, because torch.frombuffer wants memory it may write to
            data = bytearray(self._archive.read(f"{self._folder}data/{storage.key}"))
            empty = torch.empty(0, dtype=storage.dtype)
            self._read[storage.key] = torch.frombuffer(data, dtype=storage.dtype) if data else empty
        flat = self._read[storage.key]
        last = -1 if 0 in size else offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if last >= flat.numel():
            raise ValueError("a tensor reaches beyond its storage")
        return flat.as_strided(tuple(size), tuple(stride), offset)


def _plain(item: Any) -> bool:
    return item is None or isinstance(item, str | bytes | int | float | bool)

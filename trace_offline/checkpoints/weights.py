"""Tensors out of weight files, whatever the format, and what must be true of them before a network is built."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trace_offline.checkpoints.pickles import load_pickle
from trace_offline.checkpoints.prefixes import strip_wrappers
from trace_offline.checkpoints.safetensors_header import read_header
from trace_offline.core.errors import CheckpointError

_INSIDE = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params", "ema")
_SAVE_AGAIN = "Copy or save the checkpoint again."


@dataclass
class RawWeights:
    """``tensors`` by name, wrapper prefixes taken off; ``extras``: the plain values beside them in the file.

    ``lightning``: the file says that Lightning wrote it. ``notes``: what a reader of the numbers should know.
    """

    tensors: dict[str, Tensor]
    extras: dict[str, Any] = field(default_factory=dict)
    lightning: bool = False
    notes: tuple[str, ...] = ()


def read_weights(files: Sequence[Path]) -> RawWeights:
    """All tensors of the files (shards of one state dict), on the CPU, mapped rather than read where possible.

    Raises CheckpointError for what is no weight file, is damaged, holds no tensors, or holds placeholders of a
    partitioned (ZeRO-3, FSDP) model; and for tensors with NaN.
    """
    tensors: dict[str, Tensor] = {}
    extras: dict[str, Any] = {}
    notes: list[str] = []
    for path in files:
        found, beside, refused = _read_file(path)
        twice = sorted(set(found) & set(tensors))
        if twice:
            raise CheckpointError(
                f'{path}: tensor "{twice[0]}" is also in another file of this checkpoint; expected each tensor once. '
                "Do the files belong to one checkpoint?"
            )
        tensors.update(found)
        extras.update(beside)
        if refused:
            shown = ", ".join(refused[:3]) + (" …" if len(refused) > 3 else "")
            notes.append(f"{path.name}: objects of these classes were not built, only the tensors beside them: {shown}")
    tensors, stripped = strip_wrappers(tensors)
    if stripped:
        notes.append(f"prefixes stripped from the names of tensors: {', '.join(stripped)}")
    _refuse_partitioned(tensors, files[0])
    refuse_not_finite(tensors.items(), files[0], infinite=False)
    return RawWeights(tensors, extras, "pytorch-lightning_version" in extras, tuple(notes))


def check_file(path: Path) -> str:
    """``"safetensors"`` or ``"pickle"`` by the first bytes; CheckpointError for everything that is neither."""
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror or error}).") from None
    if not head:
        raise CheckpointError(f"{path}: is empty (0 bytes); expected weights. {_SAVE_AGAIN}")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights. Fetch them with: git lfs pull")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path}: is a web page saved under the name of a weight file. Download it again.")
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size):
        try:
            header = read_header(path)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error.message.rstrip('.')}. {_SAVE_AGAIN}") from None
        if not header.tensors:
            raise CheckpointError(f"{path}: holds no tensors (an empty safetensors file). {_SAVE_AGAIN}")
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return "pickle"
    raise CheckpointError(
        f"{path}: neither safetensors nor a file of torch.save: it begins with {head[:12]!r}. {_SAVE_AGAIN}"
    )


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    if check_file(path) == "safetensors":
        from safetensors.torch import load_file

        return load_file(path, device="cpu"), {}, ()
    pickled = load_pickle(path)
    if isinstance(pickled.content, nn.Module):  # torch only builds what it is told is safe; a module never is
        raise CheckpointError(f"{path}: holds a whole pickled module. Save its state_dict() instead.")
    found, beside = find_state_dict(pickled.content, path)
    return found, beside, pickled.refused


def find_state_dict(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by name in what a file holds, and the plain values beside them.

    A state dict is a dictionary of nothing but tensors (and plain values); it is looked for at the top, then under the
    usual names (``state_dict``, ``model``, …), then as the only dictionary of tensors there is.
    """
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, found {type(content).__name__}. "
            "Save the state dict alone: torch.save(model.state_dict(), …)."
        )
    tensors = _tensors_of(content)
    if tensors:
        return tensors, {}
    beside = {str(key): value for key, value in content.items() if not _tensors_of(value)}
    for name in _INSIDE:
        if name in content and (tensors := _tensors_of(content[name])):
            return tensors, beside
    found = {key: inner for key, value in content.items() if (inner := _tensors_of(value))}
    if len(found) == 1:
        return next(iter(found.values())), beside
    listed = ", ".join(str(key) for key in list(content)[:10]) or "nothing"
    what = f"several dictionaries of tensors ({', '.join(map(str, found))})" if found else "no tensors"
    raise CheckpointError(
        f"{path}: expected a state dict under one of {', '.join(_INSIDE)}, found {what}; the file holds: {listed}."
    )


def _tensors_of(value: Any) -> dict[str, Tensor]:
    """The tensors when ``value`` is a state dict: text for keys, tensors (and a few plain values) for values."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return {}
    tensors = {key: item for key, item in value.items() if isinstance(item, Tensor)}
    others = [item for item in value.values() if not isinstance(item, Tensor)]
    plain = all(item is None or isinstance(item, int | float | str | bytes) for item in others)
    return tensors if tensors and plain and len(tensors) > len(others) else {}


def _refuse_partitioned(tensors: Mapping[str, Tensor], path: Path) -> None:
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise CheckpointError(
            f"{path}: {len(empty)} of {len(tensors)} tensors have size 0 (first: {empty[0]}): placeholders of weights "
            "that DeepSpeed ZeRO-3 keeps elsewhere. Convert the checkpoint first: python zero_to_fp32.py . output/"
        )
    flat = [name for name in tensors if name.split(".")[-1] in ("_flat_param", "flat_param")]
    if flat:
        raise CheckpointError(
            f"{path}: {flat[0]} is a flattened FSDP parameter, one rank's part of several tensors. Save a full state "
            "dict (StateDictType.FULL_STATE_DICT) or convert with dcp_to_torch_save."
        )


def refuse_not_finite(named: Iterable[tuple[str, Tensor]], path: Path | str, *, infinite: bool = True) -> None:
    """Raise CheckpointError when values are NaN (or infinite): how many of how many, and in which tensors.

    ``infinite=False`` lets infinities pass: masks kept in a state dict hold them rightly; parameters never do.
    """
    bad: list[tuple[int, str]] = []
    total = 0
    for name, tensor in named:
        if not tensor.is_floating_point():
            continue
        total += tensor.numel()
        # a sum is one fast pass, and not finite as soon as one value is not; only then are values looked at singly
        if bool(torch.isfinite(tensor.detach().sum(dtype=torch.float32))):
            continue
        wrong = ~torch.isfinite(tensor) if infinite else torch.isnan(tensor)
        if count := int(wrong.sum()):
            bad.append((count, name))
    if bad:
        bad.sort(reverse=True)
        count = sum(number for number, _ in bad)
        listed = ", ".join(f"{name} ({number:,})" for number, name in bad[:4])
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        kind = "NaN or infinite" if infinite else "NaN"
        raise CheckpointError(
            f"{path}: {count:,} of {total:,} weights are {kind}, in {listed}{more}. The training run has diverged here "
            "or the file is damaged; nothing can be measured on it."
        )


def stamp(files: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file: equal before and after means that nobody wrote to it meanwhile."""
    found = {}
    for path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}). Was it deleted?") from None
        found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


def refuse_changed(before: Mapping[str, tuple[int, int]], files: Iterable[Path]) -> None:
    """Raise CheckpointError when a file is no longer what it was at ``before``."""
    after = stamp(files)
    changed = [name for name, value in before.items() if after.get(name) != value]
    if changed:
        raise CheckpointError(
            f"{changed[0]}: changed while it was being loaded; is training still writing it? Run again when it is done."
        )

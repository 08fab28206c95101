"""Keep the last network and only exchange its weights, when that is proven to give the same network.

transformers may rename, merge or transpose tensors on loading, so names alone prove nothing. The first checkpoint of
an architecture therefore goes through ``from_pretrained`` and is compared bit by bit, tensor by tensor, with its file.
Only if every parameter equals the tensor of the same name are later files with the same names, shapes and types and the
same configuration put into the kept network directly.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trace_offline.checkpoints.model_view import ModelView
from trace_offline.checkpoints.safetensors_header import read_header

Layout = dict[str, tuple[str, tuple[int, ...]]]


@dataclass
class _Kept:
    identity: Hashable
    layout: Layout
    module: nn.Module
    places: dict[str, Tensor]
    buffers: dict[str, Tensor]
    notes: tuple[str, ...]
    view: weakref.ref[ModelView]


class ModelCache:
    """Holds at most one network. A network in use is never touched: while the last ModelView is alive, none is reused.

    ``hits`` counts the loads it shortened.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self.hits = 0

    def reuse(self, identity: Hashable, files: Sequence[Path]) -> tuple[nn.Module, tuple[str, ...]] | None:
        """The kept network with the weights of ``files`` and its notes, or None when it must be built."""
        kept = self._kept
        if kept is None or kept.identity != identity or kept.view() is not None or _layout(files) != kept.layout:
            return None
        with torch.no_grad():
            for name, tensor in _tensors(files):
                place = kept.places[name]
                place.data = tensor.to(dtype=place.dtype, device=place.device)
                place.grad = None
                place.requires_grad_(isinstance(place, nn.Parameter))
            for name, value in kept.buffers.items():
                kept.module.get_buffer(name).copy_(value)
        self.hits += 1
        return kept.module.eval(), kept.notes

    def lend(self, view: ModelView) -> None:
        """Remember who uses the network that ``reuse`` gave out."""
        if self._kept is not None:
            self._kept.view = weakref.ref(view)

    def keep(self, identity: Hashable, files: Sequence[Path], view: ModelView) -> bool:
        """Keep a network just built from ``files``, if the comparison proves that tensors map one to one."""
        self._kept = None
        places = _places(view.module)
        unique = {id(tensor) for tensor in places.values()}
        seen: set[int] = set()
        layout = _layout(files)
        if not layout.keys() <= places.keys():  # renamed: told from the names alone, before any tensor is read
            return False
        for name, tensor in _tensors(files):
            place = places[name]
            if id(place) in seen or not _same_bits(place, tensor):
                return False
            seen.add(id(place))
        if seen != unique:
            return False
        owned = {id(place) for place in places.values()}
        buffers = {name: buffer.clone() for name, buffer in view.module.named_buffers() if id(buffer) not in owned}
        self._kept = _Kept(identity, layout, view.module, places, buffers, view.notes, weakref.ref(view))
        return True


def _places(module: nn.Module) -> dict[str, Tensor]:
    """Every name of every tensor that a state dict holds; tied tensors have several."""
    named: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    persistent = module.state_dict().keys()
    named.update((name, buffer) for name, buffer in module.named_buffers(remove_duplicate=False) if name in persistent)
    return named


def _layout(files: Sequence[Path]) -> Layout:
    return {name: (entry.dtype, entry.shape) for path in files for name, entry in read_header(path).tensors.items()}


def _tensors(files: Sequence[Path]) -> Any:
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt", device="cpu") as stream:
            for name in stream.keys():  # noqa: SIM118 (not a dictionary)
                yield name, stream.get_tensor(name)


def _same_bits(place: Tensor, tensor: Tensor) -> bool:
    if place.shape != tensor.shape:
        return False
    left, right = place.detach().cpu().contiguous(), tensor.to(place.dtype).contiguous()
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))

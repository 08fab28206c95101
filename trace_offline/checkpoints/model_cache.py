"""Keep the last network and only exchange its weights, when that is proven to give the same network.

transformers may rename, merge or transpose tensors on loading, so names alone prove nothing. The first checkpoint of
an architecture therefore goes through ``from_pretrained`` and is compared bit by bit, tensor by tensor, with its file.
Only if every parameter equals the tensor of the same name, or, where the file has a name of its own for it (GPT-NeoX
writes ``embed_out`` for the head), exactly one tensor of the file, are later files with the same names, shapes and
types and the same configuration put into the kept network directly. Constants that old versions of transformers wrote
among the weights and new ones leave out are left out here, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trace_offline.checkpoints.hf_models import is_constant
from trace_offline.checkpoints.model_view import ModelView
from trace_offline.checkpoints.safetensors_header import read_header

Layout = dict[str, tuple[str, tuple[int, ...]]]


@dataclass
class _Kept:
    identity: Hashable
    layout: Layout
    module: nn.Module
    places: dict[str, Tensor]  # by the names of the file
    memory: dict[str, Tensor]
    buffers: dict[str, Tensor]
    notes: tuple[str, ...]
    view: weakref.ref[ModelView]


class ModelCache:
    """Holds at most one network, whose tensors own their memory.

    A network in use is never touched: while the last ModelView is alive, none is reused. ``hits`` counts the
    loads it shortened.
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
            for name, tensor in _tensors(files, kept.places):
                place = kept.places[name]
                # Into the memory that the kept network owns: fresh memory would cost more than the copy.
                place.data = kept.memory[name].copy_(tensor)
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
        layout = _layout(files)
        places = _proven(_places(view.module), layout, files)
        if places is None:
            return False
        owned = {id(place) for place in places.values()}
        buffers = {name: buffer.clone() for name, buffer in view.module.named_buffers() if id(buffer) not in owned}
        memory = {name: place.detach() for name, place in places.items()}
        self._kept = _Kept(identity, layout, view.module, places, memory, buffers, view.notes, weakref.ref(view))
        return True


def _places(module: nn.Module) -> dict[str, Tensor]:
    """Every name of every tensor that a state dict holds; tied tensors have several."""
    named: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    persistent = module.state_dict().keys()
    named.update((name, buffer) for name, buffer in module.named_buffers(remove_duplicate=False) if name in persistent)
    return named


def _proven(named: dict[str, Tensor], layout: Layout, files: Sequence[Path]) -> dict[str, Tensor] | None:
    """The tensor of the network for each one of the file, proven by equal bits; None when they do not map one to one.

    ``named``: the network's tensors by its own names.
    """
    renamed = [name for name in layout if name not in named and not is_constant(name)]
    own = {id(named[name]) for name in layout if name in named}
    unnamed = {id(tensor): tensor for tensor in named.values() if id(tensor) not in own}
    if len(renamed) != len(unnamed):  # merged or split: told from the names alone, before any tensor is read
        return None
    found: dict[str, Tensor] = {}
    for name, tensor in _tensors(files, [name for name in layout if name in named or name in renamed]):
        if name in named:
            equal = [named[name]] if _same_bits(named[name], tensor) else []
        else:
            equal = [place for place in unnamed.values() if _same_bits(place, tensor)]
        if len(equal) != 1:
            return None
        found[name] = equal[0]
    return found if len({id(place) for place in found.values()}) == len(found) else None


def _layout(files: Sequence[Path]) -> Layout:
    return {name: (entry.dtype, entry.shape) for path in files for name, entry in read_header(path).tensors.items()}


def _tensors(files: Sequence[Path], wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt", device="cpu") as stream:
            for name in stream.keys():  # noqa: SIM118 (not a dictionary)
                if name in wanted:
                    yield name, stream.get_tensor(name)


def _same_bits(place: Tensor, tensor: Tensor) -> bool:
    if place.shape != tensor.shape:
        return False
    left, right = place.detach().cpu().contiguous(), tensor.to(place.dtype).contiguous()
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))

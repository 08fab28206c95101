"""Where a parameter belongs in a transformer: which layer, and attention, MLP, norm, embedding or head.

The layer is a fact: the block that owns the tensor (``ModelView.blocks``). What it does inside is read from the names
of the modules on the way to it, which the families of transformers write in few ways; a tensor whose names say nothing
is ``other``, never guessed. Every floating-point parameter is in exactly one place; tied tensors count once, where
``ModelView.parameters_by_name`` lists them (a tied output head is part of the embedding).
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import nn

    from trace_offline.activations.model import ModelView


class Component(StrEnum):
    """Kinds of parameters. ``FINAL_NORM``: norms after the last block. ``OTHER``: the names do not tell."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"
    NORM = "norm"
    FINAL_NORM = "final_norm"
    HEAD = "head"
    OTHER = "other"


ALL = "all"
"""Component of numbers over all parameters of a layer, or of the network."""


class Place(NamedTuple):
    """Layer 0: everything that makes the embedding output; i: block i, from 1; None: after the blocks, or unknown."""

    layer: int | None
    component: str


_NORM = re.compile(r"(layer|rms|batch|group|(^|_))_?norm(\d*$|_)|norm\d*$|(^|_)ln(_|\d|$)", re.IGNORECASE)
_ATTENTION = re.compile(
    r"att(n|ention)|^(q|k|v|o|qkv|query|key|value|out)_?proj$|^w?(q|k|v|qkv)$|^(query|key|value)(_key_value)?$|^w_?o$",
    re.IGNORECASE,
)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|(^|_)ff(_|$)|^fc_?\d?$|^c_fc$|^lin(ear)?[12]$|intermediate|h_to_4h|^(gate|up|down)(_up)?_proj$"
    r"|^w[123]$|experts?$|moe|dense_?relu_?dense|^gate$|^router$",
    re.IGNORECASE,
)
_HEAD = re.compile(r"head|unembed|embed_out|^cls$|classifier|^score$|project_out|^output_projection$", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|^w[tp]e$|project_in|^emb$|^tok(en)?s?$|^pos(ition)?s?(_.*)?$", re.IGNORECASE)


def parameter_places(model: ModelView) -> dict[str, Place]:
    """The place of every floating-point parameter, in the order of ``parameters_by_name``; empty ones are left out.

    A network whose blocks are not known has layer None throughout, except for its embedding (0).
    """
    inside = _block_parameters(model)
    head, embedding = _declared(model.module, "get_output_embeddings"), _declared(model.module, "get_input_embeddings")
    places = {}
    for name, parameter in model.parameters_by_name().items():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        if id(parameter) in inside:
            layer, local = inside[id(parameter)]
            places[name] = Place(layer, inside_block(local).value)
        elif id(parameter) in embedding:
            places[name] = Place(0, Component.EMBEDDING.value)
        elif id(parameter) in head:
            places[name] = Place(None, Component.HEAD.value)
        else:
            places[name] = outside_blocks(name, blocks_known=model.blocks is not None)
    return places


def parameter_groups(model: ModelView) -> dict[Place, tuple[str, ...]]:
    """Place → names of its parameters, each parameter in one place; layers ascending, those without a layer last."""
    groups: dict[Place, list[str]] = {}
    for name, place in parameter_places(model).items():
        groups.setdefault(place, []).append(name)
    order = list(Component)
    return {
        place: tuple(groups[place])
        for place in sorted(groups, key=lambda p: (p.layer is None, p.layer or 0, order.index(Component(p.component))))
    }


def inside_block(local: str) -> Component:
    """Component of a parameter by its name inside a block (``attention.output.dense.weight``)."""
    parts = local.split(".")[:-1] or [local]
    # from the innermost module outwards a norm is a norm, wherever it sits; attention outranks the names inside it
    if _NORM.search(parts[-1]):
        return Component.NORM
    if any(_ATTENTION.search(part) for part in parts):
        return Component.ATTENTION
    # BERT calls the second half of its MLP "output"; that of the attention was found above
    if any(_MLP.search(part) for part in parts) or parts[0] == "output":
        return Component.MLP
    return Component.OTHER


def outside_blocks(name: str, *, blocks_known: bool = True) -> Place:
    """Place of a parameter that no block owns, by its full name.

    With ``blocks_known=False`` it may belong to a block nobody named: its component is then read as inside one.
    """
    parts = name.split(".")[:-1] or [name]
    embedding = any(_EMBEDDING.search(part) and not _HEAD.search(part) for part in parts)
    if _NORM.search(parts[-1]):
        if embedding:
            return Place(0, Component.NORM.value)
        return Place(None, (Component.FINAL_NORM if blocks_known else Component.NORM).value)
    if any(_HEAD.search(part) for part in parts):
        return Place(None, Component.HEAD.value)
    if embedding:
        return Place(0, Component.EMBEDDING.value)
    return Place(None, (Component.OTHER if blocks_known else inside_block(name)).value)


def _block_parameters(model: ModelView) -> dict[int, tuple[int, str]]:
    """Identity of a parameter → its block from 1 and its name there; one shared by blocks belongs to the first."""
    found: dict[int, tuple[int, str]] = {}
    for index, block in enumerate(model.blocks or (), start=1):
        for local, parameter in block.named_parameters():
            found.setdefault(id(parameter), (index, local))
    return found


def _declared(module: nn.Module, method: str) -> set[int]:
    """Identities of the parameters of the embedding or head that a network of transformers declares, if it does."""
    declared = getattr(module, method, None)
    if not callable(declared):
        return set()
    try:
        found = declared()
    except (NotImplementedError, AttributeError):
        return set()
    return {id(parameter) for parameter in found.parameters()} if hasattr(found, "parameters") else set()

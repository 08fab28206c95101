"""Names of tensors as wrappers of the training script left them, and as the network itself calls them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

from trace_offline.core.errors import CheckpointError

V = TypeVar("V")

# put by torch.compile, FSDP and activation checkpointing at any depth of a name, and never by a user
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# put by (Distributed)DataParallel before every name; inside a name it may be the user's own
_IN_FRONT = "module."


def strip_wrappers(tensors: Mapping[str, V]) -> tuple[dict[str, V], tuple[str, ...]]:
    """Names without what data-parallel, compile, FSDP and checkpoint wrappers put into them, and what was stripped.

    ``module.`` goes only from the front and only when every name carries it; all are stripped as often as they occur.
    Raises CheckpointError when two names become one.
    """
    stripped: list[str] = []
    renamed = {name: name for name in tensors}
    for part in _ANYWHERE:
        if any(part in name.split(".")[:-1] for name in tensors):
            stripped.append(f"{part}.")
            renamed = {old: _without(new, part) for old, new in renamed.items()}
    while renamed and all(new.startswith(_IN_FRONT) and new != _IN_FRONT for new in renamed.values()):
        stripped.append(_IN_FRONT)
        renamed = {old: new.removeprefix(_IN_FRONT) for old, new in renamed.items()}
    return _apply(tensors, renamed), tuple(stripped)


def strip_to_fit(tensors: Mapping[str, V], expected: Collection[str]) -> tuple[dict[str, V], str | None]:
    """Take off the leading parts that all names share (``model.``, ``net.``) if more names then fit ``expected``.

    Returns the renamed tensors and the prefix, or None when leaving the names alone fits as well or better.
    """
    wanted = set(expected)
    best, prefix = sum(name in wanted for name in tensors), None
    shared = ""
    while tensors and (part := _shared_part([name[len(shared) :] for name in tensors])):
        shared += part
        fitting = sum(name[len(shared) :] in wanted for name in tensors)
        if fitting > best:
            best, prefix = fitting, shared
    if prefix is None:
        return dict(tensors), None
    return _apply(tensors, {name: name[len(prefix) :] for name in tensors}), prefix


def strip_attribute(tensors: Mapping[str, V]) -> tuple[dict[str, V], str | None]:
    """Take off the one leading part that all names share, as Lightning's ``self.net = …`` puts it before a network."""
    part = _shared_part(list(tensors))
    if not part:
        return dict(tensors), None
    return _apply(tensors, {name: name[len(part) :] for name in tensors}), part


def _without(name: str, part: str) -> str:
    return ".".join(piece for piece in name.split(".") if piece != part)


def _shared_part(names: list[str]) -> str | None:
    """``"net."`` when every name starts so and goes on after it."""
    first = names[0].split(".")[0] + "." if names else ""
    return first if first != "." and all(name.startswith(first) for name in names) else None


def _apply(tensors: Mapping[str, V], renamed: Mapping[str, str]) -> dict[str, V]:
    result: dict[str, V] = {}
    for old, new in renamed.items():
        if new in result:
            raise CheckpointError(
                f'two tensors of the checkpoint are both called "{new}" once wrapper prefixes are taken off (one of '
                f'them is "{old}"); expected each name once. Save the unwrapped model, or use --model-factory.'
            )
        result[new] = tensors[old]
    return result

"""Where the residual blocks of a network are: named by the user, declared by transformers, or found by shape."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from trace_offline.core.errors import UsageError


def find_blocks(module: nn.Module, pattern: str | None = None) -> tuple[nn.Module, ...] | None:
    """The residual blocks of ``module`` in order, or None when they cannot be told.

    ``pattern``: names of modules with one ``*`` that stands for one part of the name (``layers.*``); it is then the
    only source. Without it: the block class that transformers declares for recording hidden states, else the longest
    outermost ``nn.ModuleList`` (then ``nn.Sequential``) whose items share one class. Encoder-decoder networks have two
    stacks and no single answer: None.

    Raises UsageError when the pattern has not exactly one ``*`` or fits nothing.
    """
    if pattern is not None:
        return _matching(module, pattern)
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return None
    return _declared(module) or _longest(module, nn.ModuleList) or _longest(module, nn.Sequential)


def _matching(module: nn.Module, pattern: str) -> tuple[nn.Module, ...]:
    if pattern.count("*") != 1:
        raise UsageError(
            f'--blocks: expected module names with exactly one "*", such as "layers.*", found "{pattern}".'
        )
    before, after = (re.escape(part) for part in pattern.split("*"))
    named = re.compile(f"{before}([^.]+){after}")
    found = [(match[1], item) for name, item in module.named_modules() if (match := named.fullmatch(name))]
    if not found:
        known = sorted({f"{name}.*" for name, _ in _lists(module, (nn.ModuleList, nn.Sequential)) if name})
        listed = ", ".join(known[:8]) or "none"
        raise UsageError(
            f'--blocks: no module of {type(module).__name__} is named "{pattern}". Lists of modules it has: {listed}.'
        )
    # named_modules walks in the order of definition, which is the order of the numbers except in hand-made networks
    if all(index.isdecimal() for index, _ in found):
        found.sort(key=lambda pair: int(pair[0]))
    return tuple(item for _, item in found)


def _declared(module: nn.Module) -> tuple[nn.Module, ...] | None:
    """The stack made of the class that transformers records as ``hidden_states``; a private attribute, so any surprise
    means "not declared".
    """
    for owner in (module, getattr(module, "base_model", None)):
        declared: Any = getattr(owner, "_can_record_outputs", None)
        if not isinstance(declared, dict) or "hidden_states" not in declared:
            continue
        specification = declared["hidden_states"]
        candidates = specification if isinstance(specification, list) else [specification]
        classes = tuple(kind for item in candidates if isinstance(kind := getattr(item, "target_class", item), type))
        if not classes:
            continue
        stacks = [
            tuple(items)
            for _, items in _lists(module, (nn.ModuleList,))
            if len(items) and all(isinstance(item, classes) for item in items)
        ]
        if len(stacks) == 1:
            return stacks[0]
    return None


def _longest(module: nn.Module, kind: type[nn.Module]) -> tuple[nn.Module, ...] | None:
    """The longest list whose items share a class; a tie, or a list of plain layers (a lone Linear), is no answer."""
    stacks: list[tuple[str, tuple[nn.Module, ...]]] = []
    for name, listed in _lists(module, (kind,)):
        items = tuple(listed)
        if not items or len({type(item) for item in items}) > 1 or not any(True for _ in items[0].children()):
            continue
        # named_modules gives outer lists first; the experts inside a block are not blocks, however many they are
        if not any(outer == "" or name.startswith(f"{outer}.") for outer, _ in stacks):
            stacks.append((name, items))
    found = sorted((items for _, items in stacks), key=len, reverse=True)
    if not found or (len(found) > 1 and len(found[0]) == len(found[1])):
        return None
    return found[0]


def _lists(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, Any]]:
    for name, item in module.named_modules():
        if isinstance(item, kinds):
            yield name, item

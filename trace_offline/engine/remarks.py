"""What discovery and the store know about checkpoints that will be analyzed and their reader has to know as well."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from trace_offline.checkpoints.duplicates import remark_of
from trace_offline.core.types import Checkpoint

_SHOWN = 8


def remark_warnings(checkpoints: Iterable[Checkpoint]) -> list[str]:
    """What discovery remarked on usable checkpoints; remarks that differ in numbers only are shown once.

    That other steps repeat the weights is left to ``duplicate_warnings``.
    """
    found: dict[str, list[tuple[Checkpoint, str]]] = {}
    for item in checkpoints:
        text = remark_of(item)
        if text:
            text = text.removeprefix("Warning: ")
            found.setdefault(re.sub(r"\d+", "0", text), []).append((item, text))
    warnings = []
    for (item, text), *others in found.values():
        where = item.location if item.step is None else f"step {item.step}"
        more = " The same of other steps: trace-offline discover lists them." if others else ""
        warnings.append(f"{where}: {text}{more}")
    return warnings


def replaced_steps(checkpoints: Iterable[Checkpoint], stored: Mapping[int | None, str | None]) -> list[int]:
    """Steps whose weights are not those that the store knows (``stored``: step → fingerprint)."""
    return [
        item.step
        for item in checkpoints
        if item.step is not None
        and item.fingerprint is not None
        and stored.get(item.step) not in (None, item.fingerprint)
    ]


def replaced_text(run: str, steps: list[int]) -> str:
    """The sentence about weights that were replaced since they were analyzed."""
    shown = ", ".join(map(str, steps[:_SHOWN])) + (f" and {len(steps) - _SHOWN} more" if len(steps) > _SHOWN else "")
    return f'run "{run}" was analyzed with other weights at step {shown}'

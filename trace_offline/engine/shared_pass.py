"""The pass that all collectors share, and once more with half as much where a GPU ran out of memory.

Nothing of a first attempt is kept: collectors that had seen part of the rows would count them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trace_offline.core.errors import DeviceMemoryError

T = TypeVar("T")

OWN_PASSES = (
    "Lower its max_tokens or max_sequences, or use a GPU with more memory, fewer workers on it (--jobs), or --device "
    "cpu."
)


@dataclass
class Collected:
    """``collectors`` after the pass, those that broke with their errors, and what the user should know of it."""

    collectors: dict[str, Any]
    broken: Mapping[str, BaseException] = field(default_factory=dict)
    remark: str | None = None


def collect(
    prepare: Callable[[], dict[str, Any]], run: Callable[[Mapping[str, Any], int | None], Mapping[str, BaseException]]
) -> Collected:
    """``run(prepare(), None)``; when a GPU has no room, new collectors and half the rows at once.

    ``prepare`` makes collectors that have seen nothing; ``run`` takes the most rows at once (None: as many as fit) and
    returns what broke. When half is too much as well, every collector broke.
    """
    from trace_offline.activations.batch_size import PassOutOfMemory
    from trace_offline.activations.memory import release

    collectors = prepare()
    if not collectors:
        return Collected(collectors)
    try:
        return Collected(collectors, run(collectors, None))
    except PassOutOfMemory as full:
        rows = full.rows
    except DeviceMemoryError as error:
        return Collected(collectors, dict.fromkeys(collectors, error))
    collectors.clear()
    release()
    collectors = prepare()
    remark = f"the GPU ran out of memory with {rows} sequences at once; measured anew with {rows // 2}"
    try:
        return Collected(collectors, run(collectors, rows // 2), remark)
    except DeviceMemoryError as error:
        return Collected(collectors, dict.fromkeys(collectors, error))


def once_more(work: Callable[[], T], name: str, remarks: list[str], *, repeatable: bool) -> T:
    """``work()``, and when a GPU has no room once more inside ``halved``, which goes into ``remarks``.

    ``repeatable`` False: the work uses up what it was given and cannot be repeated. Raises DeviceMemoryError.
    """
    from trace_offline.activations.batch_size import ADVICE, too_small
    from trace_offline.activations.memory import halved, ran_out, release

    try:
        return work()
    except RuntimeError as error:
        if not ran_out(error):
            raise
        if not repeatable:
            raise too_small(name, error, ADVICE) from None
    release()
    with halved() as mark:
        try:
            result = work()
        except RuntimeError as error:
            if not ran_out(error):
                raise
            tried = "with half as much at once" if mark.asked else "with all other memory given back"
            raise too_small(f"{name}, also {tried}", error, OWN_PASSES if mark.asked else ADVICE) from None
    how = "half as much at once" if mark.asked else "all other memory given back"
    remarks.append(f"the GPU ran out of memory in {name}; measured anew with {how}")
    return result

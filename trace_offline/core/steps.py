"""Selections of training steps as users write them: ``0,512,1000-5000``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trace_offline.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class StepSelection:
    """A set of inclusive step ranges; ``step in selection`` tells membership."""

    ranges: tuple[tuple[int, int], ...]

    def __contains__(self, step: int) -> bool:
        return any(low <= step <= high for low, high in self.ranges)


def parse_steps(text: str) -> StepSelection:
    """``"0,512,1000-5000"`` → ranges (inclusive). Raises UsageError for anything else."""
    ranges: list[tuple[int, int]] = []
    for part in text.replace(" ", "").split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not found:
            raise UsageError(
                f'--steps: expected steps and ranges such as "0,512,1000-5000", found "{part}" in "{text}".'
            )
        low = int(found[1])
        high = int(found[2]) if found[2] else low
        if high < low:
            raise UsageError(f'--steps: the range "{part}" ends before it begins.')
        ranges.append((low, high))
    return StepSelection(tuple(ranges))

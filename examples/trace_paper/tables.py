"""How numbers, events and tables are written on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def step_of(event: Any) -> str:
    """``512 (448-640)``, or a dash where there is no event."""
    return f"{event['step']:,} ({event['low']:,}-{event['high']:,})" if isinstance(event, Mapping) else "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits that count."""
    return "–" if value is None else f"{value:.{digits}g}"


def lowest(curve: Mapping[str, Any]) -> str:
    """The smallest value and its step."""
    value, step = min(zip(curve["values"], curve["steps"], strict=True))
    return f"{number(value)} at {step:,}"

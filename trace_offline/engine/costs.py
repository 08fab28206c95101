"""How long what is left will take, from what the same analyses cost so far."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median


@dataclass
class Costs:
    """Seconds of each analyzer and how many analyses of it are left.

    ``known``: analyzer → seconds of one analysis in earlier runs, used until this run has measured its own.
    """

    jobs: int
    left: Counter[str]
    known: Mapping[str, float] = field(default_factory=dict)
    measured: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def observe(self, analyzer: str, seconds: float) -> None:
        """One analysis is finished."""
        self.left[analyzer] -= 1
        self.measured[analyzer].append(seconds)

    def seconds_left(self) -> float | None:
        """Σ left(analyzer) · median seconds / workers; None while an analyzer that is left has no known cost."""
        total = 0.0
        for analyzer, count in self.left.items():
            if count <= 0:
                continue
            own = self.measured.get(analyzer)
            each = median(own) if own else self.known.get(analyzer)
            if each is None:
                return None
            total += count * each
        return total / self.jobs


def earlier(rows: Iterable[tuple[str, float]]) -> dict[str, float]:
    """(analyzer, median seconds) rows of a store → ``known``."""
    return {str(name): float(seconds) for name, seconds in rows if seconds is not None}

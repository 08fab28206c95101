"""Which hidden states a collector reads: single tokens and whole rows of the evaluation set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int64]

_SHIFT = 32
_LOW = (1 << _SHIFT) - 1


def _none() -> Codes:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class Places:
    """``tokens [M]``: row · 2³² + position; ``rows [R]``: rows read from the first to the last position of their batch,
    padding included. Both ascending, each once.
    """

    tokens: Codes = field(default_factory=_none)
    rows: Codes = field(default_factory=_none)

    @classmethod
    def at(cls, rows: Any, positions: Any) -> Places:
        """Single tokens, given as two arrays of one length in any order."""
        codes = (np.asarray(rows, dtype=np.int64) << _SHIFT) | np.asarray(positions, dtype=np.int64)
        return cls(tokens=np.unique(codes))

    @classmethod
    def whole(cls, rows: Any) -> Places:
        """Whole rows."""
        return cls(rows=np.unique(np.asarray(rows, dtype=np.int64)))

    @classmethod
    def read_by(cls, collectors: Iterable[Any], n_rows: int) -> Places:
        """What these collectors read together; one that does not say so (``reads``) may read everything."""
        found = cls()
        for item in collectors:
            if item.needs_hidden:
                says = getattr(item, "reads", None)
                found = found | (cls.whole(np.arange(n_rows)) if says is None else says())
        return found

    def __or__(self, other: Places) -> Places:
        rows = np.union1d(self.rows, other.rows)
        tokens = np.union1d(self.tokens, other.tokens)
        return Places(tokens[~np.isin(tokens >> _SHIFT, rows)], rows)

    def __len__(self) -> int:
        return len(self.tokens) + len(self.rows)

    def covers(self, other: Places) -> bool:
        """Is everything of ``other`` in here?"""
        there = np.isin(other.tokens, self.tokens) | np.isin(other.tokens >> _SHIFT, self.rows)
        return bool(there.all()) and bool(np.isin(other.rows, self.rows).all())

    def within(self, first: int, n_rows: int, length: int) -> tuple[Codes, Codes]:
        """Places in a batch of ``n_rows`` rows from row ``first`` on, ``length`` positions: row in the batch, position.

        In reading order; positions beyond the batch are left out.
        """
        low, high = np.searchsorted(self.tokens, [first << _SHIFT, (first + n_rows) << _SHIFT])
        codes = self.tokens[low:high]
        low, high = np.searchsorted(self.rows, [first, first + n_rows])
        rows = self.rows[low:high]
        spread = (np.repeat(rows, length) << _SHIFT) | np.tile(np.arange(length), len(rows))
        codes = np.union1d(codes, spread)
        codes = codes[(codes & _LOW) < length]
        return (codes >> _SHIFT) - first, codes & _LOW

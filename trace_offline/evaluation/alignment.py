"""Words (stretches of characters) → sub-words (stretches of tokens), by the tokenizer's character offsets.

A stretch is aligned when every sub-word that touches it lies inside it. One that shares a sub-word with its neighbour
(``."`` is a single token of GPT-2), has none (the normalizer removed it) or was cut off is not aligned: it gets no
label and is counted, since a label on a sub-word that also belongs to another word would be half wrong.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

_MARKERS = "▁Ġ \t\n\r"
"""How tokenizers write a space: SentencePiece, byte-level BPE, plain."""


class Outcome(StrEnum):
    """What became of one word."""

    ALIGNED = "aligned"
    SHARED = "shared"
    NO_SUBWORD = "no_subword"
    TRUNCATED = "truncated"
    MASKED = "masked"
    UNPLACED = "unplaced"


@dataclass(frozen=True, slots=True)
class SubwordMap:
    """The sub-words of one text that stand for characters: token position and characters, both ascending.

    Whitespace is not counted as part of a sub-word; sub-words of nothing but whitespace, and special tokens, are left
    out.
    """

    position: tuple[int, ...]
    start: tuple[int, ...]
    end: tuple[int, ...]
    special: tuple[tuple[int, int], ...] = ()

    @classmethod
    def build(
        cls,
        text: str,
        tokens: Sequence[str],
        offsets: Sequence[tuple[int, int]],
        special: Sequence[bool],
    ) -> SubwordMap:
        """``tokens``: as the vocabulary writes them; ``offsets``: their characters in ``text``; ``special``: flags."""
        kept: list[tuple[int, int, int]] = []
        specials: list[tuple[int, int]] = []
        for position, (token, (start, end), is_special) in enumerate(zip(tokens, offsets, special, strict=True)):
            if is_special:
                specials.append((start, end))
                continue
            # The marker of a space at the start of a text carries the offsets of the first character.
            if not token.strip(_MARKERS):
                continue
            while start < end and text[start].isspace():
                start += 1
            while start < end and text[end - 1].isspace():
                end -= 1
            if start < end:
                kept.append((position, start, end))
        position_, start_, end_ = zip(*kept, strict=True) if kept else ((), (), ())
        return cls(tuple(position_), tuple(start_), tuple(end_), tuple(specials))

    def align(self, start: int, end: int, limit: int | None = None) -> tuple[Outcome, int, int]:
        """Characters ``start`` to ``end`` → token positions (end exclusive; 0, 0 unless aligned).

        ``limit``: token positions from here on were cut off.
        """
        first = bisect_right(self.end, start)
        stop = bisect_left(self.start, end)
        if any(low < end and high > start for low, high in self.special):
            return Outcome.SHARED, 0, 0
        if first >= stop:
            return Outcome.NO_SUBWORD, 0, 0
        if limit is not None and self.position[stop - 1] >= limit:
            return Outcome.TRUNCATED, 0, 0
        if self.start[first] < start or self.end[stop - 1] > end:
            return Outcome.SHARED, 0, 0
        return Outcome.ALIGNED, self.position[first], self.position[stop - 1] + 1

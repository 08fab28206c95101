"""How many rows the shared pass sends through a GPU at once: what fits into the memory that is free.

On the host the batch follows from the network and the evaluation set alone (``forward.Anatomy``); on a GPU it follows
from its free memory too, in powers of two, so that small changes of what is free change nothing. Either way the batch
changes numbers by rounding only.

Letters: B rows of a batch, T positions, D width, L blocks, V output classes, H attention heads, s bytes of the number
type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trace_offline.core.errors import DeviceMemoryError

SHARE = 0.6
"""Of the free memory; the rest is left to the allocator's gaps, the kernels' workspaces and what collectors take."""

MOST_POSITIONS = 1 << 16
"""Beyond so many positions a GPU is no faster."""

_BLOCK_WIDTHS = 24
_WIDTH_OF_A_HEAD = 64

ADVICE = (
    "Use a GPU with more memory, fewer workers on it (--jobs), --dtype bfloat16, an evaluation set of shorter "
    "sequences, or --device cpu."
)


class PassOutOfMemory(Exception):
    """A GPU ran out of memory in the shared pass with ``rows`` rows at once; what collectors hold is worth nothing."""

    def __init__(self, rows: int) -> None:
        super().__init__(f"out of memory with {rows} rows at once")
        self.rows = rows


@dataclass(frozen=True)
class PassShape:
    """What decides the memory of a pass. ``length``: T of the longest row; ``itemsize``: s."""

    layers: int
    width: int
    classes: int
    heads: int
    itemsize: int
    length: int

    @property
    def bytes_per_position(self) -> int:
        """``(L+1)·D·s`` kept + ``24·D·s`` inside a block + ``H·T·(2s+4)`` attention + ``V·(2s+12)`` output.

        Kept: the copies of all layers. Inside a block at once: norm, queries, keys, values, the wide layer and its
        gate, sums. Attention: scores, their softmax in float32, and both in the number type, as if no fused kernel
        were used. Output: logits, log-probabilities in float32, and what collectors derive from them. Reckoned for all
        of it, whoever listens, so that the batch does not depend on the choice of analyzers.
        """
        kept = (self.layers + 1) * self.width * self.itemsize
        inside = _BLOCK_WIDTHS * self.width * self.itemsize
        attention = self.heads * self.length * (2 * self.itemsize + 4)
        return kept + inside + attention + self.classes * (2 * self.itemsize + 12)


def rows_that_fit(shape: PassShape, free: int) -> int:
    """The largest power of two B with ``B·T ≤ 65536`` and ``B·T·bytes_per_position ≤ 0.6·free``; at least 1."""
    positions = min(MOST_POSITIONS, int(SHARE * free) // shape.bytes_per_position)
    rows = positions // max(1, shape.length)
    return 1 << (rows.bit_length() - 1) if rows else 1


def attention_heads(config: Any, width: int) -> int:
    """H as the configuration of the network says, else one for every 64 of its width."""
    for section in (config, getattr(config, "text_config", None)):
        for name in ("num_attention_heads", "n_head", "num_heads"):
            value = getattr(section, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return max(1, -(-width // _WIDTH_OF_A_HEAD))


def too_small(what: str, error: BaseException, advice: str = ADVICE) -> DeviceMemoryError:
    """The error for the user when there is nothing left to halve."""
    first = (str(error).strip().splitlines() or ["no detail"])[0]
    return DeviceMemoryError(f"The GPU has too little memory for {what} ({first}). {advice}")

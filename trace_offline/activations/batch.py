"""What one batch of the shared forward pass offers, and what listens to it.

An analyzer never runs the model for hidden states or logits itself: it hands the engine *collectors*, the engine runs
one pass, every collector sees every batch and keeps only what it needs. Memory is therefore bounded by what the
collectors keep, never by the size of the evaluation set.

Shape letters: B sequences of a batch, T positions, D width of the hidden states, V classes of the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100


@dataclass
class ForwardBatch:
    """One batch after the model has seen it; all tensors on the model's device.

    ``examples [B]``: row of each sequence in the evaluation set. ``input_ids [B, T]``, ``attention_mask [B, T]``
    (bool). ``targets [B, T]``: the label the prediction *at* (b, t) is compared with, −100 where nothing counts
    (padding, special tokens, unlabelled). ``hidden``: layers 0…L as ``[B, T, D]`` (0 = embedding output, i = raw
    output of block i), or None when no collector asked. ``logits [B, T, V]``, or None when no collector asked.
    """

    examples: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    hidden: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None

    @cached_property
    def log_probabilities(self) -> Tensor:
        """``log softmax(logits)``, ``[B, T, V]``, in float32 (float64 where the network computes in float64); computed
        once for all collectors.
        """
        if self.logits is None:
            raise RuntimeError("no collector of this pass asked for logits (needs_logits)")
        wide = self.logits if self.logits.dtype.itemsize > 4 else self.logits.float()
        return wide.log_softmax(-1)


@runtime_checkable
class Collector(Protocol):
    """Listens to the shared pass. ``update`` sees each batch once, in order; ``finish`` returns what was gathered.

    A collector of hidden states may say which it reads with a method ``reads() -> Places`` (``activations.places``),
    asked before the pass: the activation cache then keeps those, and not those of all tokens.
    """

    needs_hidden: bool
    needs_logits: bool

    def update(self, batch: ForwardBatch) -> None:
        """See one batch."""

    def finish(self) -> Any:
        """What was gathered."""

"""A loaded network as the analyzers see it: where its blocks are, how wide, how its loss is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class ModelView:
    """``module`` in eval mode, dropout off, caches off. ``blocks``: the residual blocks in order, or None if unknown.

    ``embedding_output``: called ``layer 0`` — recorded as the first input of block 1. ``device`` and ``dtype`` as
    strings ("cpu", "float32"). ``vocabulary``: number of output classes that can be predicted.
    """

    module: nn.Module
    blocks: tuple[nn.Module, ...] | None
    device: str
    dtype: str

    @property
    def n_layers(self) -> int | None:
        """Number of blocks L; hidden states then exist for layers 0…L."""
        return None if self.blocks is None else len(self.blocks)

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``[B, T] → [B, T, V]``; accepts models that return a tensor or an object with ``.logits``."""
        output = self.module(input_ids=input_ids, attention_mask=attention_mask)
        return output if not hasattr(output, "logits") else output.logits

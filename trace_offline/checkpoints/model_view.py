"""A loaded network as the analyzers see it: where its blocks are, how its logits are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trace_offline.core.errors import NotApplicable

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class ModelView:
    """``module`` in eval mode, dropout off, caches off. ``blocks``: the residual blocks in order, or None if unknown.

    ``embedding_output``: called ``layer 0`` — recorded as the first input of block 1. ``device`` and ``dtype`` as
    strings ("cpu", "float32"). ``notes``: what loading did that a reader of the numbers should know (prefixes
    stripped, tensors left unused, objects of a pickle not built).
    """

    module: nn.Module
    blocks: tuple[nn.Module, ...] | None
    device: str
    dtype: str
    notes: tuple[str, ...] = ()

    @property
    def n_layers(self) -> int | None:
        """Number of blocks L; hidden states then exist for layers 0…L."""
        return None if self.blocks is None else len(self.blocks)

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``[B, T] → [B, T, V]``; accepts models that return a tensor or an object with ``.logits``.

        Raises NotApplicable when the network has no output head (a bare encoder, say).
        """
        output = self.module(input_ids=input_ids, attention_mask=attention_mask)
        found = logits_of(output)
        if found is None:
            raise NotApplicable(
                f"not applicable because {type(self.module).__name__} returns no logits: expected a tensor "
                f"[batch, position, class] or an object with .logits, found {type(output).__name__}"
            )
        return found

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by name; tied ones once, under the name that comes first."""
        return dict(self.module.named_parameters())


def logits_of(output: object) -> Tensor | None:
    """The logits in what a model returned, or None: a floating tensor itself, or the ``.logits`` of an object."""
    import torch

    found = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, torch.Tensor) else None

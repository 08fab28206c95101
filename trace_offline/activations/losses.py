"""The loss of a batch as a differentiable number, and attention that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trace_offline.activations.batch import IGNORED
from trace_offline.activations.forward import Tokens, trimmed
from trace_offline.activations.model import ModelView
from trace_offline.core.errors import NotApplicable
from trace_offline.estimators.cross_entropy import summed_cross_entropy


def summed_loss(model: ModelView, tokens: Tokens) -> tuple[Tensor, int]:
    """``(Σ −log p(target), number of targets)`` over positions whose target is not −100; nats, a scalar with a graph.

    ``targets[b, t]`` is compared with the prediction *at* (b, t), so causal, masked and other objectives are one case.
    Computed in float32, or float64 for a float64 network. Raises NotApplicable for a network without an output head.
    """
    input_ids, attention_mask, targets = (part.to(model.device) for part in trimmed(tokens))
    logits = model.logits(input_ids, attention_mask)
    counted = targets != IGNORED
    if logits.dtype in (torch.float16, torch.bfloat16):
        # choosing the rows first keeps what is widened to positions that count
        logits, targets = logits[counted].float(), targets[counted]
    return summed_cross_entropy(logits, targets, IGNORED), int(counted.sum())


def mean_loss(model: ModelView, tokens: Tokens) -> Tensor:
    """Mean cross-entropy over the targets that are not −100, in nats: a scalar that can be differentiated.

    Twice, too, inside ``double_backward_attention``. Raises NotApplicable when nothing counts.
    """
    total, count = summed_loss(model, tokens)
    if count == 0:
        raise NotApplicable("not applicable because none of these positions has a target: there is no loss to average")
    return total / count


@contextmanager
def double_backward_attention() -> Iterator[None]:
    """Attention by plain matrix products; the fast kernels have no second derivative and raise."""
    with sdpa_kernel(SDPBackend.MATH):
        yield

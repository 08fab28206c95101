"""Cross-entropy of a softmax that can be differentiated twice at the price of its arithmetic.

With a vocabulary of some thousands most of the memory traffic of a Hessian-vector product is here: the general
autograd rules write the probabilities, their products and their differences out one after the other, each a matrix
of targets by classes. Here the probabilities are computed once and kept, and each derivative is one sweep over them in
blocks that stay in the processor's cache:

    ``ℓ = Σ_t (log Σ_c e^{z_tc} − z_{t y_t})``,  ``∂ℓ/∂z_t = p_t − e_{y_t}``,  ``(∂²ℓ/∂z_t²) u = p_t ∘ (u − p_t·u)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_CACHE_BYTES = 1 << 20


def summed_cross_entropy(logits: Tensor, targets: Tensor, ignored: int = -100) -> Tensor:
    """``Σ −log softmax(z)_y`` in nats over the targets that are not ``ignored``: a scalar, twice differentiable.

    Equals ``torch.nn.functional.cross_entropy(..., ignore_index=ignored, reduction="sum")`` to rounding, and 0 where
    nothing counts. A third derivative raises RuntimeError.

    Args:
        logits: ``[…, C]``, float32 or float64.
        targets: ``[…]`` int64 in 0…C−1, or ``ignored``.
        ignored: the target of a row that does not count.

    Raises:
        ValueError: shapes that do not belong together, or logits of half precision.

    """
    if logits.shape[:-1] != targets.shape or not logits.dim():
        raise ValueError(
            f"expected logits [..., classes] for targets [...], found {list(logits.shape)} and {list(targets.shape)}"
        )
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected logits in float32 or float64, found {logits.dtype}")
    flat = targets.reshape(-1)
    rows = (flat != ignored).nonzero().squeeze(1)
    loss: Tensor = _Loss.apply(logits, rows, flat[rows])[0]
    return loss


class _Loss(Function):
    """Logits → the loss and, for its own second derivative, the probabilities ``[M, C]`` of the rows that count.

    The probabilities are an output so that they can be kept *with* their place in the graph; nothing but ``_Gradient``
    ever sees them.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        table = logits.reshape(-1, logits.shape[-1])
        logs = torch.log_softmax(table if len(rows) == len(table) else table[rows], dim=1)
        loss = -logs.gather(1, targets[:, None]).sum()
        probabilities = logs.exp_()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(probabilities, rows, targets)
        ctx.shape = logits.shape
        return loss, probabilities

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor | None, of_probabilities: Tensor | None) -> tuple[Tensor | None, None, None]:
        probabilities, rows, targets = ctx.saved_tensors
        first: Tensor | None = None
        second: Tensor | None = None
        if of_loss is not None:
            first = _Gradient.apply(probabilities, of_loss, rows, targets, ctx.shape)
        if of_probabilities is not None:
            second = _Softmax.apply(probabilities, of_probabilities, rows, ctx.shape)
        return first if second is None else second if first is None else first + second, None, None


class _Gradient(Function):
    """``w (p_t − e_{y_t})`` in the rows that count of a tensor like the logits, 0 in the others."""

    @staticmethod
    def forward(
        ctx: Any, probabilities: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, shape: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(probabilities, weight, rows, targets)
        result = _empty_elsewhere(probabilities, rows, shape)
        for part in _blocks(probabilities):
            result[rows[part]] = probabilities[part] * weight
        result[rows, targets] -= weight
        return result.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        probabilities, weight, rows, targets = ctx.saved_tensors
        along = direction.reshape(-1, direction.shape[-1])[rows]
        of_weight: Tensor | None = None
        if ctx.needs_input_grad[1]:
            chosen = along.gather(1, targets[:, None]).sum()
            of_weight = -chosen
            for part in _blocks(along):
                of_weight = of_weight + (probabilities[part] * along[part]).sum()
        return along.mul_(weight), of_weight, None, None, None


class _Softmax(Function):
    """``p_t ∘ (u_t − p_t·u_t)`` in the rows that count of a tensor like the logits, 0 in the others."""

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, direction: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
        result = _empty_elsewhere(probabilities, rows, shape)
        for part in _blocks(probabilities):
            p = probabilities[part]
            product = p * direction[part]
            result[rows[part]] = product.addcmul_(p, product.sum(1, keepdim=True), value=-1)
        return result.view(shape)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("this cross-entropy has no third derivative")


def _empty_elsewhere(like: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """A table ``[all rows, C]``: 0 in the rows that are not among ``rows``, not yet written in those that are."""
    result = like.new_empty(shape[:-1].numel(), shape[-1])
    if len(rows) < len(result):
        others = torch.ones(len(result), dtype=torch.bool, device=like.device)
        others[rows] = False
        result[others] = 0
    return result


def _blocks(table: Tensor) -> Iterator[slice]:
    """Rows a cache-full at a time on a CPU, all of them on a device that computes them at once."""
    step = len(table)
    if table.device.type == "cpu":
        step = max(1, _CACHE_BYTES // max(1, table.shape[1] * table.element_size()))
    for start in range(0, len(table), max(step, 1)):
        yield slice(start, start + step)

"""Classifiers with one hidden layer, many at once: every feature matrix × label set trains in the same steps.

p(y | x) = softmax(W₂ relu(W₁ x + b₁) + b₂), trained by Adam on mini-batches (the same rows for all problems); after
each pass over the data every problem keeps its parameters if its held-out NLL is the best so far, and ends when it has
not improved for ``patience`` passes. The result of a problem depends on the seed and its own data only, not on its
neighbours: gradients of a sum of losses do not mix.

References: D. Kingma and J. Ba (2015), Adam, ICLR, arXiv:1412.6980; J. Hewitt and P. Liang (2019), arXiv:1909.03368, on
what a probe with a hidden layer can memorise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_RATE = 1e-3
_BATCH = 256
_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class MlpFit:
    """``w1 [L, S, H, D]``, ``b1 [L, S, H]``, ``w2 [L, S, K, H]``, ``b2 [L, S, K]``, all float32.

    ``nll [L, S]`` of the held-out rows at the pass that was kept; ``passes [L, S]`` that pass, from 1;
    ``converged [L, S]``: held-out NLL had stopped improving before the last pass allowed.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    nll: Tensor
    passes: Tensor
    converged: Tensor

    def log_probabilities(self, features: Tensor, layer: int) -> Tensor:
        """``features [m, D]`` of one layer → ``log p [S, m, K]`` for every label set."""
        parts = (part[layer] for part in (self.w1, self.b1, self.w2, self.b2))
        return _forward(features.float(), *parts).log_softmax(-1)


def _forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """``x [m, D]`` or ``[P, m, D]`` through P networks → ``[P, m, K]``."""
    hidden = (x @ w1.transpose(1, 2) + b1[:, None]).relu()
    return hidden @ w2.transpose(1, 2) + b2[:, None]


def fit_mlp(
    features: Tensor,
    labels: Tensor,
    heldout: Tensor,
    heldout_labels: Tensor,
    n_classes: int,
    *,
    width: int = 64,
    max_passes: int = 100,
    patience: int = 5,
    seed: int = 0,
) -> MlpFit:
    """Fit ``features [L, n, D]`` to ``labels [S, n]``, stopping each problem by ``heldout [L, m, D]``, ``[S, m]``.

    Features should be standardised. Deterministic for one seed.
    """
    n_layers, n, dim = features.shape
    sets = labels.shape[0]
    problems = n_layers * sets
    device = features.device
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, fan_in: int) -> Tensor:
        # one draw for all problems: they differ in data only, so layers are compared from the same start
        values = torch.rand(*shape, generator=generator) * 2.0 - 1.0
        return (values / math.sqrt(fan_in)).expand(problems, *shape).clone().to(device)

    parameters = [
        draw(width, dim, fan_in=dim),
        draw(width, fan_in=dim),
        draw(n_classes, width, fan_in=width),
        draw(n_classes, fan_in=width),
    ]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=_RATE, betas=_BETAS)
    best = [parameter.detach().clone() for parameter in parameters]
    nll = torch.full((problems,), math.inf, dtype=torch.float64, device=device)
    kept = torch.zeros(problems, dtype=torch.int64, device=device)
    active = torch.ones(problems, dtype=torch.bool, device=device)
    x, held = features.float(), heldout.float()
    for current in range(1, max_passes + 1):
        order = torch.randperm(n, generator=generator).to(device)
        for rows in order.split(_BATCH):
            logits = _forward(x[:, rows].repeat_interleave(sets, 0), *parameters)
            target = labels[:, rows].repeat(n_layers, 1)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
            optimizer.zero_grad()
            (loss / len(rows)).backward()
            optimizer.step()
        with torch.no_grad():
            score = _heldout(held, heldout_labels, parameters, sets)
            better = active & (score < nll)
            nll = torch.where(better, score, nll)
            kept = torch.where(better, current, kept)
            for slot, parameter in zip(best, parameters, strict=True):
                slot[better] = parameter.detach()[better]
            active &= current - kept < patience
        if not bool(active.any()):
            break
    shape = (n_layers, sets)
    w1, b1, w2, b2 = (slot.view(*shape, *slot.shape[1:]) for slot in best)
    return MlpFit(w1, b1, w2, b2, nll.view(shape), kept.view(shape), ~active.view(shape))


def _heldout(features: Tensor, labels: Tensor, parameters: list[Tensor], sets: int) -> Tensor:
    """Mean NLL ``[L·S]``, one feature matrix after the other."""
    out = []
    for layer in range(features.shape[0]):
        here = slice(layer * sets, (layer + 1) * sets)
        log_p = _forward(features[layer], *(parameter[here] for parameter in parameters)).log_softmax(-1)
        out.append(-log_p.gather(2, labels[:, :, None]).mean((1, 2), dtype=torch.float64))
    return torch.cat(out)

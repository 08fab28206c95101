"""Classifiers with one hidden layer, many at once: every problem of a list trains in the same steps.

p(y | x) = softmax(W₂ relu(W₁ x + b₁) + b₂), trained by Adam on mini-batches; after each pass over its data every
problem keeps its parameters if its held-out NLL is the best so far, and leaves the batch when it has not improved for
``patience`` passes. Problems may differ in rows and classes: a step takes one mini-batch of each, padded with rows of
weight 0 and classes of probability 0. Problems with equal seed, rows and classes see the same rows in the same steps
from the same start. The result of a problem depends on its seed and its own data only, not on its neighbours: gradients
of a sum of losses do not mix.

References: D. Kingma and J. Ba (2015), Adam, ICLR, arXiv:1412.6980; J. Hewitt and P. Liang (2019), arXiv:1909.03368, on
what a probe with a hidden layer can memorise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trace_offline.estimators.softmax_block import Problem

_RATE = 1e-3
_BATCH = 256
_BETAS = (0.9, 0.999)
_IMPOSSIBLE = -1e4


@dataclass(frozen=True)
class MlpFit:
    """P probes: ``w1 [H, D]``, ``b1 [H]``, ``w2 [K, H]``, ``b2 [K]`` of each, all float32.

    ``nll [P]`` of the held-out rows at the pass that was kept; ``passes [P]`` that pass, from 1;
    ``converged [P]``: held-out NLL had stopped improving before the last pass allowed.
    """

    w1: tuple[Tensor, ...]
    b1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    b2: tuple[Tensor, ...]
    nll: Tensor
    passes: Tensor
    converged: Tensor

    def log_probabilities(self, features: Tensor, problem: int) -> Tensor:
        """``features [m, D]`` → ``log p [m, K]`` of one problem."""
        parts = (part[problem][None] for part in (self.w1, self.b1, self.w2, self.b2))
        return _forward(features.float(), *parts)[0].log_softmax(-1)


def _forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """``x [m, D]`` or ``[P, m, D]`` through P networks → ``[P, m, K]``."""
    hidden = (x @ w1.transpose(1, 2) + b1[:, None]).relu()
    return hidden @ w2.transpose(1, 2) + b2[:, None]


@dataclass
class _Stream:
    """Problems that see the same rows in the same steps. ``rest``: mini-batches of this pass still to come."""

    generator: torch.Generator
    n: int
    current: int = 0
    rest: list[Tensor] = field(default_factory=list)

    def next(self) -> Tensor:
        if not self.rest:
            self.current += 1
            self.rest = list(torch.randperm(self.n, generator=self.generator).split(_BATCH))
        return self.rest.pop(0)


class _Networks:
    """Parameters ``[A, …]`` of the problems still at work and the optimizer's memory of them."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._take(parameters)

    def _take(self, parameters: list[Tensor]) -> None:
        self.parameters = [parameter.requires_grad_(True) for parameter in parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr=_RATE, betas=_BETAS)

    def step(self, x: Tensor, target: Tensor, weight: Tensor) -> None:
        """One step on ``x [A, m, D]``, ``target [A, m]``; ``weight [A, m]`` of the rows."""
        logits = _forward(x, *self.parameters)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        self.optimizer.zero_grad()
        (loss * weight.flatten()).sum().backward()
        self.optimizer.step()

    def keep(self, places: Tensor) -> None:
        """Go on with the problems at ``places`` only."""
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        self._take([parameter.detach()[places] for parameter in self.parameters])
        for parameter, state in zip(self.parameters, states, strict=True):
            self.optimizer.state[parameter] = {
                name: value if name == "step" else value[places] for name, value in state.items()
            }


def fit_mlp(
    features: Sequence[Tensor],
    problems: Sequence[Problem],
    heldout: Sequence[Tensor],
    heldout_labels: Sequence[Tensor],
    *,
    width: int = 64,
    max_passes: int = 100,
    patience: int = 5,
    seeds: Sequence[int] | int = 0,
) -> MlpFit:
    """Fit ``problems`` on ``features`` (``[n, D]`` each), stopping each problem by held-out rows.

    ``heldout``: ``[m, D]`` for each feature matrix, ``heldout_labels``: ``[m]`` for each problem; ``seeds``: one, or
    one for each problem. Features should be standardised. Deterministic.
    """
    device, dim, count = features[0].device, features[0].shape[1], len(problems)
    every = [seeds] * count if isinstance(seeds, int) else list(seeds)
    wide = max(problem.n_classes for problem in problems)
    streams: dict[tuple[int, int, int], _Stream] = {}
    starts: dict[tuple[int, int, int], list[Tensor]] = {}
    keys = []
    for problem, seed in zip(problems, every, strict=True):
        key = (seed, len(problem.labels), problem.n_classes)
        keys.append(key)
        if key not in streams:
            streams[key] = _Stream(torch.Generator().manual_seed(seed), len(problem.labels))
            starts[key] = _draw(width, dim, problem.n_classes, wide, streams[key].generator)
    order = sorted(range(count), key=lambda p: (keys[p], problems[p].design))
    networks = _Networks([torch.stack([starts[keys[p]][i] for p in order]).to(device) for i in range(4)])
    best = [[part.to(device) for part in starts[key]] for key in keys]
    nll, kept, converged = [math.inf] * count, [0] * count, [False] * count
    data, held = [matrix.float() for matrix in features], [matrix.float() for matrix in heldout]
    while order:
        here = dict.fromkeys(keys[p] for p in order)
        rows = {key: streams[key].next().to(device) for key in here}
        networks.step(*_batch(order, keys, problems, data, rows))
        ended = {key for key in here if not streams[key].rest}
        if not ended:
            continue
        stay = []
        for place, p in enumerate(order):
            stay.append(True)
            if keys[p] not in ended:
                continue
            parts = [parameter.detach()[place] for parameter in networks.parameters]
            score = _heldout(held[problems[p].design], heldout_labels[p], parts)
            current = streams[keys[p]].current
            if score < nll[p]:
                nll[p], kept[p], best[p] = score, current, [part.clone() for part in parts]
            converged[p] = current - kept[p] >= patience
            stay[-1] = not converged[p] and current < max_passes
        if not all(stay):
            order = [p for p, staying in zip(order, stay, strict=True) if staying]
            networks.keep(torch.tensor(stay, device=device).nonzero().flatten())
    classes = [problem.n_classes for problem in problems]
    return MlpFit(
        tuple(parts[0] for parts in best),
        tuple(parts[1] for parts in best),
        tuple(parts[2][:k] for parts, k in zip(best, classes, strict=True)),
        tuple(parts[3][:k] for parts, k in zip(best, classes, strict=True)),
        torch.tensor(nll, dtype=torch.float64),
        torch.tensor(kept),
        torch.tensor(converged),
    )


def _draw(width: int, dim: int, classes: int, wide: int, generator: torch.Generator) -> list[Tensor]:
    """Initial parameters; problems of one stream differ in data only, so layers are compared from the same start."""

    def draw(*shape: int, fan_in: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) * 2.0 - 1.0) / math.sqrt(fan_in)

    w1, b1 = draw(width, dim, fan_in=dim), draw(width, fan_in=dim)
    w2, b2 = torch.zeros(wide, width), torch.full((wide,), _IMPOSSIBLE)
    w2[:classes], b2[:classes] = draw(classes, width, fan_in=width), draw(classes, fan_in=width)
    return [w1, b1, w2, b2]


def _batch(
    order: Sequence[int],
    keys: Sequence[tuple[int, int, int]],
    problems: Sequence[Problem],
    data: Sequence[Tensor],
    rows: dict[tuple[int, int, int], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """One mini-batch of every problem: ``[A, m, D]``, labels ``[A, m]``, weights ``[A, m]`` (1/rows, 0 for padding)."""
    size = max(len(found) for found in rows.values())
    first = data[problems[order[0]].design]
    x = first.new_zeros(len(order), size, first.shape[1])
    target = torch.zeros(len(order), size, dtype=torch.int64, device=first.device)
    weight = first.new_zeros(len(order), size)
    taken: dict[tuple[int, tuple[int, int, int]], Tensor] = {}
    for place, p in enumerate(order):
        chosen, design = rows[keys[p]], problems[p].design
        if (design, keys[p]) not in taken:
            taken[design, keys[p]] = data[design][chosen]
        x[place, : len(chosen)] = taken[design, keys[p]]
        target[place, : len(chosen)] = problems[p].labels[chosen]
        weight[place, : len(chosen)] = 1.0 / len(chosen)
    return x, target, weight


def _heldout(features: Tensor, labels: Tensor, parts: list[Tensor]) -> float:
    """Mean NLL of one problem."""
    log_p = _forward(features, *(part[None] for part in parts))[0].log_softmax(-1)
    return float(-log_p.gather(1, labels[:, None]).mean(dtype=torch.float64))

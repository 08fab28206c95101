"""Small problems whose curvature is known exactly, shared by the curvature tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Loss = Callable[[], Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix_with(eigenvalues: Sequence[float], seed: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with exactly this spectrum in a random orthonormal basis."""
    values = torch.tensor(list(eigenvalues), dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator(seed), dtype=torch.float64))
    matrix = (basis * values) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


@dataclass
class Case:
    """A loss, its parameters, and the dense Hessian of the loss in float64."""

    loss: Loss
    parameters: list[Tensor]

    def dense(self) -> Tensor:
        """``[n, n]`` by torch's own second derivative of a function of one flat vector."""
        sizes = [p.numel() for p in self.parameters]
        shapes = [p.shape for p in self.parameters]
        start = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        names = self.names

        def flat(vector: Tensor) -> Tensor:
            parts = [part.reshape(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
            return self.functional(dict(zip(names, parts, strict=True)))

        return torch.autograd.functional.hessian(flat, start)

    names: list[str]
    functional: Callable[[dict[str, Tensor]], Tensor]


class TiedNet(nn.Module):
    """An embedding used again as output head, attention written out, one parameter that reaches no output."""

    def __init__(self, vocabulary: int = 7, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embedding(input_ids)
        scores = hidden @ hidden.transpose(-1, -2) / hidden.shape[-1] ** 0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        hidden = hidden + scores.masked_fill(future, -1e9).softmax(-1) @ hidden
        return self.head(hidden + torch.tanh(self.mix(self.norm(hidden))))


def tied_case(dtype: torch.dtype = torch.float64, sequences: int = 6, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    net = TiedNet().to(dtype)
    ids = torch.randint(0, 7, (sequences, 5), generator=generator(seed + 1))

    def cross_entropy(logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits[:, :-1].reshape(-1, 7), ids[:, 1:].reshape(-1))

    named = dict(net.named_parameters())
    return Case(
        loss=lambda: cross_entropy(net(ids)),
        parameters=list(named.values()),
        names=list(named),
        functional=lambda given: cross_entropy(torch.func.functional_call(net, given, (ids,), tie_weights=True)),
    )


def exact_negative_share(values: np.ndarray) -> float:
    return float(-values[values < 0].sum() / np.abs(values).sum())


def exact_effective_rank(values: np.ndarray) -> float:
    shares = np.abs(values)[values != 0] / np.abs(values).sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))

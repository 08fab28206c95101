"""Curvature beside curvlinops, an independent implementation: spectra, traces and blocks of one small network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from curvature_cases import generator
from torch import Tensor, nn

from trace_offline.estimators.block_quadrature import block_quadratures
from trace_offline.estimators.fisher import EmpiricalFisherOperator
from trace_offline.estimators.ggn import GaussNewtonOperator
from trace_offline.estimators.hutchpp import complement_moments, mean_of
from trace_offline.estimators.hvp import HessianOperator
from trace_offline.estimators.lanczos import extreme_eigenpairs
from trace_offline.estimators.slq import spectral_quadrature
from trace_offline.estimators.xtrace import xtrace

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


class Case:
    """Two layers with softmax cross-entropy on forty points."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        self.x = torch.randn(40, 6, dtype=torch.float64)
        self.y = torch.randint(0, 4, (40,), generator=generator())
        self.parameters = list(self.net.parameters())

    def theirs(self, name: str, parameters: dict[str, Tensor] | None = None) -> np.ndarray:
        """curvlinops' matrix of some parameters, column by column."""
        peer = pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch, an independent implementation")
        kind: Callable[..., Any] = getattr(peer, name)
        chosen = dict(self.net.named_parameters()) if parameters is None else parameters
        try:
            operator = kind(self.net, nn.CrossEntropyLoss(), chosen, [(self.x, self.y)])
        except (TypeError, ValueError, AttributeError):
            operator = kind(self.net, nn.CrossEntropyLoss(), list(chosen.values()), [(self.x, self.y)])
        size = sum(parameter.numel() for parameter in chosen.values())
        return np.stack([(operator @ row).numpy() for row in torch.eye(size, dtype=torch.float64)], axis=1)

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.x), self.y)

    def ours(self, name: str) -> Any:
        if name == "HessianLinearOperator":
            return HessianOperator([self.loss], self.parameters)
        kind = GaussNewtonOperator if name == "GGNLinearOperator" else EmpiricalFisherOperator
        return kind([lambda: (self.net(self.x), self.y)], self.parameters)


@pytest.mark.parametrize("name", ["HessianLinearOperator", "GGNLinearOperator", "EFLinearOperator"])
def test_spectra_and_traces(name: str) -> None:
    case = Case()
    matrix = case.theirs(name)
    exact = np.linalg.eigvalsh(matrix)[::-1]
    operator = case.ours(name)
    pairs = extreme_eigenpairs(operator, largest=5, smallest=2, tolerance=1e-8, generator=generator(1)).pairs
    np.testing.assert_allclose(pairs.values[:5], exact[:5], rtol=1e-7)
    np.testing.assert_allclose(pairs.values[5:], exact[-2:], rtol=1e-6, atol=1e-7 * exact[0])
    moments = complement_moments(operator, 30, generator(2), pairs.vectors)
    trace = mean_of(moments.first, float(pairs.values.sum()))
    assert abs(trace.value - np.trace(matrix)) < 3 * trace.stderr < 0.2 * np.abs(exact).sum()
    again = xtrace(operator, probes=15, generator=generator(3))
    assert abs(again.value - np.trace(matrix)) < 3 * again.stderr + 1e-6


def test_blocks() -> None:
    case = Case()
    named = dict(case.net.named_parameters())
    groups = [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    operator = case.ours("HessianLinearOperator")
    blocks = [operator.block([list(named).index(name) for name in group]) for group in groups]
    found = block_quadratures(
        blocks,
        lambda chosen, vectors: operator.block_products([blocks[i] for i in chosen], vectors),
        probes=400,
        steps=[12, 12],
        generators=[generator(0), generator(1)],
        exact=[(np.zeros(0), torch.zeros(0, block.n, dtype=torch.float64)) for block in blocks],
        room=0,
    )
    for block, group, quadrature in zip(blocks, groups, found, strict=True):
        exact = np.linalg.eigvalsh(case.theirs("HessianLinearOperator", {name: named[name] for name in group}))[::-1]
        pairs = extreme_eigenpairs(block, largest=3, smallest=1, tolerance=1e-8, generator=generator(4)).pairs
        np.testing.assert_allclose(pairs.values[:3], exact[:3], rtol=1e-7)
        trace = quadrature.trace()
        assert abs(trace.value - exact.sum()) < 3 * trace.stderr < 0.1 * np.abs(exact).sum()
        share, truth = quadrature.negative_share(), -exact[exact < 0].sum() / np.abs(exact).sum()
        assert abs(share.value - truth) < 3 * (share.stderr or 0) + 1e-3
        assert abs(float(np.mean(exact > 0.1)) - (1 - quadrature.mass_below(0.1).value)) < 0.05


def test_density() -> None:
    """The broadened density of all eigenvalues of curvlinops' matrix, against quadrature with many probes."""
    case = Case()
    exact = np.linalg.eigvalsh(case.theirs("HessianLinearOperator"))
    found = spectral_quadrature(case.ours("HessianLinearOperator"), probes=300, steps=20, generator=generator())
    grid, density, sigma = found.density(600, 0.05)
    kernel = np.exp(-0.5 * ((grid[:, None] - exact[None]) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    assert np.trapezoid(np.abs(density - kernel.mean(1)), grid) < 0.1

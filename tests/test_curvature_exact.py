"""Spectrum, trace, blocks and density of a quadratic and of a small network come out exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from analyzer_fakes import one
from curvature_cases import exact_effective_rank, exact_negative_share, generator, matrix_with, tied_case
from test_analyzer_hessian import analyze, array, dense_reference, evaluation, numbers, tied_net, value

from trace_offline.estimators.block_moments import block_moments
from trace_offline.estimators.hvp import HessianOperator
from trace_offline.estimators.lanczos import extreme_eigenpairs
from trace_offline.estimators.slq import spectral_quadrature
from trace_offline.estimators.xtrace import xtrace

SPECTRUM = [7.0, 3.0, 3.0, 0.5, 0.0, 0.0, -1.0, -4.0, *np.linspace(-0.2, 0.4, 12).tolist()]


@contextmanager
def quadratic() -> Iterator[tuple[HessianOperator, torch.Tensor]]:
    """``½ θᵀAθ + bᵀθ`` over two parameters of 8 and 12 numbers: the Hessian is A wherever θ is."""
    matrix = matrix_with(SPECTRUM)
    parts = [torch.randn(n, dtype=torch.float64, generator=generator(n)).requires_grad_() for n in (8, 12)]

    def loss() -> torch.Tensor:
        theta = torch.cat(parts)
        return theta @ matrix @ theta / 2 + theta.sum()

    with HessianOperator([loss], parts) as hessian:
        yield hessian, matrix


@contextmanager
def network() -> Iterator[tuple[HessianOperator, torch.Tensor]]:
    case = tied_case()
    with HessianOperator([case.loss], case.parameters) as hessian:
        yield hessian, case.dense()


@pytest.mark.parametrize("case", [quadratic, network])
def test_everything_is_exact(case: Callable[..., contextmanager]) -> None:  # type: ignore[type-arg]
    with case() as (hessian, dense):
        exact = np.linalg.eigvalsh(dense.numpy())[::-1]
        scale = np.abs(exact).max()
        found = extreme_eigenpairs(
            hessian, largest=hessian.n, tolerance=1e-10, max_steps=10 * hessian.n, generator=generator()
        ).pairs
        np.testing.assert_allclose(found.values, exact, atol=1e-10 * scale)
        quadrature = spectral_quadrature(
            hessian, probes=2, steps=2, generator=generator(1), exact_values=found.values, exact_vectors=found.vectors
        )
        assert quadrature.trace().value == pytest.approx(np.trace(dense), abs=1e-9 * scale)
        assert quadrature.trace().stderr == 0
        assert quadrature.effective_rank().value == pytest.approx(exact_effective_rank(exact), rel=1e-6)
        assert quadrature.negative_share().value == pytest.approx(exact_negative_share(exact), rel=1e-6)
        grid, density, sigma = quadrature.density(1024, 0.02)
        kernel = np.exp(-0.5 * ((grid[:, None] - exact[None]) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
        np.testing.assert_allclose(density, kernel.mean(1), rtol=1e-6, atol=1e-9 * density.max())
        assert xtrace(hessian, probes=hessian.n, generator=generator()).value == pytest.approx(np.trace(dense))

        blocks = [hessian.block([0]), hessian.block([1])]
        bases = []
        for block in blocks:
            start, stop = block.ranges[0]
            own = dense[start:stop, start:stop]
            pairs = extreme_eigenpairs(
                block, largest=block.n, tolerance=1e-10, max_steps=10 * block.n, generator=generator(2)
            ).pairs
            np.testing.assert_allclose(pairs.values, np.linalg.eigvalsh(own.numpy())[::-1], atol=1e-10 * scale)
            bases.append(pairs)
        moments = block_moments(
            hessian, [b.ranges for b in blocks], probes=2, generator=generator(), bases=[p.vectors for p in bases]
        )
        for index, (block, pairs) in enumerate(zip(blocks, bases, strict=True)):
            start, stop = block.ranges[0]
            trace = moments.trace(index, float(pairs.values.sum()))
            assert trace.stderr == 0
            assert trace.value == pytest.approx(float(dense[start:stop, start:stop].trace()), abs=1e-9 * scale)


def test_the_analyzer_with_all_eigenvalues_is_exact() -> None:
    data = evaluation()
    exact = np.linalg.eigvalsh(dense_reference(tied_net(), data)[0])[::-1]
    found = analyze(tied_net(), data, k=59, max_sequences=100, dtype="float64", tolerance=1e-10)
    got = [value(found, "eigenvalue", str(rank)) for rank in range(1, 60)]
    np.testing.assert_allclose(got, exact, atol=1e-10 * exact[0])
    for metric, truth in (
        ("trace", exact.sum()),
        ("trace_square", (exact**2).sum()),
        ("participation_ratio", exact.sum() ** 2 / (exact**2).sum()),
        ("effective_rank", exact_effective_rank(exact)),
        ("negative_mass", exact_negative_share(exact)),
        ("gradient_top_overlap", 1.0),
    ):
        assert value(found, metric) == pytest.approx(truth, rel=1e-6), metric
    for metric in ("trace", "trace_square", "participation_ratio", "effective_rank", "negative_mass"):
        assert one(numbers(found), metric).stderr == 0
    grid, density = array(found, "density_grid"), array(found, "density")
    sigma = array(found, "density_sigma")[0]
    kernel = np.exp(-0.5 * ((grid[:, None] - exact[None]) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(density, kernel.mean(1), rtol=1e-6, atol=1e-9 * density.max())

"""Preconditioners of logistic regressions against dense Hessians, and the compact L-BFGS form against its recursion."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trace_offline.estimators.class_blocks import (
    MAX_DENSE,
    class_blocks,
    coupled,
    couples,
    dense_width,
    kronecker,
    rows_for,
)
from trace_offline.estimators.quasi_newton import MEMORY, Memory

K, R, M = 3, 5, 400


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities ``[2, K, M]``, columns ``[2, R, M]`` (constant last), spectrum and ridge ``[2, R]``."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(2, R, M, generator=generator)
    columns[:, -1] = 1.0
    p = (2.0 * torch.randn(2, K, M, generator=generator)).softmax(1)
    ridge = torch.full((2, R), 0.1, dtype=torch.float64)
    return p, columns, columns.double().square().mean(2), ridge


def dense_hessian(p: Tensor, x: Tensor, ridge: Tensor) -> Tensor:
    """``[K·R, K·R]`` of one problem by autograd's definition: Σ_i (diag p − p pᵀ) ⊗ x xᵀ / M."""
    p, x = p.double(), x.double()
    curvature = torch.diag_embed(p.T) - p.T[:, :, None] * p.T[:, None, :]
    hessian = torch.einsum("ikl,ai,bi->kalb", curvature, x, x) / p.shape[1]
    return hessian.reshape(K * R, K * R) + torch.diag(ridge.repeat(K))


@pytest.mark.parametrize("seed", range(3))
def test_coupled_is_the_inverse_of_the_whole_hessian(seed: int) -> None:
    p, x, spectrum, ridge = problem(seed)
    inverse = coupled(p, x, spectrum, ridge)
    vectors = torch.randn(2, 4, K, R, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    found = inverse.apply(vectors)
    for a in range(2):
        expected = torch.linalg.solve(dense_hessian(p[a], x[a], ridge[a]), vectors[a].flatten(1).T).T
        torch.testing.assert_close(found[a].flatten(1), expected, rtol=0.02, atol=0.02)
    kept = inverse.keep(torch.tensor([False, True]))
    torch.testing.assert_close(kept.apply(vectors[1:]), found[1:], rtol=1e-4, atol=1e-5)


def test_class_blocks_are_the_diagonal_blocks() -> None:
    p, x, spectrum, ridge = problem()
    whole = class_blocks(p, x, spectrum, ridge)
    for a in range(2):
        hessian = dense_hessian(p[a], x[a], ridge[a]).view(K, R, K, R)
        for k in range(K):
            basis = torch.zeros(2, R, K, R, dtype=torch.float64)
            basis[a, torch.arange(R), k, torch.arange(R)] = 1.0
            inverse = whole.apply(basis)[a, :, k]
            torch.testing.assert_close(inverse, torch.linalg.inv(hessian[k, :, k]), rtol=0.05, atol=0.05)


def test_directions_outside_the_block_keep_a_diagonal() -> None:
    p, x, spectrum, ridge = problem()
    part = class_blocks(p, torch.cat([x[:, :2], x[:, -1:]], 1), spectrum, ridge)
    one = torch.zeros(2, 1, K, R, dtype=torch.float64)
    one[..., 3] = 1.0
    found = part.apply(one)[:, 0]
    weight = (p * (1 - p)).double().mean(2)
    torch.testing.assert_close(found[..., 3], 1.0 / (weight * spectrum[:, None, 3] + 0.1))
    found[..., 3] = 0.0
    assert not bool(found.any())


def test_kronecker_is_exact_where_predictions_do_not_depend_on_the_features() -> None:
    """Up to the direction that moves all classes alike, in which a loss has no curvature."""
    _, x, _, ridge = problem()
    x = torch.linalg.qr(x.transpose(1, 2).double())[0].transpose(1, 2) * torch.arange(1, R + 1)[:, None] * M**0.5
    p = torch.tensor([0.5, 0.3, 0.2]).double().view(1, K, 1).expand(2, K, M)
    spectrum = x.square().mean(2)
    # padded rows have probability 0 and do not count
    padded = torch.cat([p, torch.zeros(2, K, 100).double()], 2)
    inverse = kronecker(padded, torch.full((2,), float(M)), spectrum, ridge)
    vectors = torch.randn(2, 4, K, R, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    vectors -= vectors.mean(2, keepdim=True)
    found = inverse.apply(vectors)
    for a in range(2):
        expected = torch.linalg.solve(dense_hessian(p[a], x[a], ridge[a]), vectors[a].flatten(1).T).T
        torch.testing.assert_close(found[a].flatten(1), expected)
    torch.testing.assert_close(inverse.keep(torch.tensor([False, True])).apply(vectors[1:]), found[1:])
    everywhere = inverse.apply(torch.eye(K * R, dtype=torch.float64).view(1, -1, K, R).expand(2, -1, -1, -1))
    matrix = everywhere[0].flatten(1)
    torch.testing.assert_close(matrix, matrix.T)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0


def test_singular_curvature_is_lifted_not_refused() -> None:
    """Certain predictions have no curvature at all; equal columns make the products singular."""
    p = torch.zeros(1, K, M)
    p[:, 0] = 1.0
    x = torch.ones(1, R, M)
    ridge = torch.zeros(1, R, dtype=torch.float64)
    for build in (coupled, class_blocks):
        out = build(p, x, torch.ones(1, R, dtype=torch.float64), ridge).apply(torch.ones(1, 1, K, R).double())
        assert bool(out.isfinite().all())
        assert bool((out > 0).any())
    # certain predictions and directions without variance; an intercept has no penalty
    out = kronecker(p, torch.tensor([float(M)]), torch.ones(1, R).double(), ridge).apply(
        torch.ones(1, 1, K, R).double()
    )
    assert bool(out.isfinite().all())
    assert bool((out > 0).any())


def test_sizes_stay_within_bounds() -> None:
    assert couples(49, 10, 10)
    assert not couples(769, 2, 50)
    assert dense_width(4096, 66, 50) <= MAX_DENSE
    assert dense_width(8, 10, 3) == 8
    assert rows_for(50, 1000).tolist() == list(range(50))
    rows = rows_for(10_000, 10)
    assert len(rows) == len(rows.unique()) == 1024
    assert int(rows.max()) < 10_000


@pytest.mark.parametrize("pairs", [0, 1, 4, MEMORY, MEMORY + 3])
def test_compact_form_equals_the_two_loop_recursion(pairs: int) -> None:
    generator = torch.Generator().manual_seed(pairs)
    size = 12
    root = torch.randn(2, size, size, dtype=torch.float64, generator=generator)
    matrix = root @ root.transpose(1, 2) + torch.eye(size, dtype=torch.float64)
    h0 = torch.rand(2, size, dtype=torch.float64, generator=generator) + 0.5
    memory = Memory.empty(2, size, torch.float64, torch.device("cpu"))
    kept: list[tuple[Tensor, Tensor]] = []
    for _ in range(pairs):
        step = torch.randn(2, size, dtype=torch.float64, generator=generator)
        change = (matrix @ step[..., None])[..., 0]
        memory.add(step, change, h0 * change)
        kept = [*kept, (step, change)][-MEMORY:]
    gradient = torch.randn(2, size, dtype=torch.float64, generator=generator)
    found = memory.multiply(gradient, h0 * gradient)
    for a in range(2):
        q, alphas = gradient[a].clone(), []
        for step, change in reversed(kept):
            alphas.append(step[a] @ q / (step[a] @ change[a]))
            q = q - alphas[-1] * change[a]
        r = memory.gamma[a] * h0[a] * q
        for (step, change), alpha in zip(kept, reversed(alphas), strict=True):
            r = r + (alpha - change[a] @ r / (step[a] @ change[a])) * step[a]
        torch.testing.assert_close(found[a], r)


def test_pairs_without_curvature_are_refused() -> None:
    memory = Memory.empty(1, 4, torch.float64, torch.device("cpu"))
    ones = torch.ones(1, 4, dtype=torch.float64)
    memory.add(ones, -ones, -ones)
    torch.testing.assert_close(memory.multiply(ones, 2.0 * ones), 2.0 * ones)

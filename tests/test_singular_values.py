"""Singular values and what is made of them, against numpy's decomposition and planted spectra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy, ortho_group

from trace_offline.estimators.singular_values import effective_rank, numerical_rank, singular_values, stable_rank


@pytest.mark.parametrize("shape", [(30, 30), (200, 12), (12, 200), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_those_of_the_decomposition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    found = singular_values(matrix)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-8 * expected[0])
    assert float(found[0]) == pytest.approx(expected[0], rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_planted_spectrum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    planted = np.geomspace(100, 0.1, 8)
    left, right = ortho_group.rvs(20, random_state=rng)[:, :8], ortho_group.rvs(8, random_state=rng)
    values = singular_values(torch.from_numpy((left * planted) @ right.T).float())
    np.testing.assert_allclose(values.numpy(), planted, rtol=1e-4)
    assert stable_rank(values) == pytest.approx((planted**2).sum() / planted[0] ** 2, rel=1e-5)
    assert effective_rank(values) == pytest.approx(math.exp(entropy(planted)), rel=1e-5)
    assert numerical_rank(values, (20, 8)) == 8


def test_large_matrices_are_added_up_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    whole = singular_values(matrix)
    monkeypatch.setattr("trace_offline.estimators.singular_values._CHUNK", 60)
    np.testing.assert_allclose(singular_values(matrix).numpy(), whole.numpy(), rtol=1e-13)


def test_ranks_of_simple_spectra() -> None:
    three = torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    assert stable_rank(three) == 3.0
    assert effective_rank(three) == pytest.approx(3.0, rel=1e-15)
    assert numerical_rank(three, (5, 5)) == 3
    one = torch.tensor([1e-30])
    assert stable_rank(one) == effective_rank(one) == 1.0


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_rank_deficient_matrices(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    matrix = torch.randn(60, rank, generator=generator) @ torch.randn(rank, 30, generator=generator)
    assert numerical_rank(singular_values(matrix), (60, 30)) == rank == np.linalg.matrix_rank(matrix.numpy())


def test_what_is_no_matrix_or_not_finite_is_an_error() -> None:
    for bad in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="expected a floating-point matrix"):
            singular_values(bad)
    with pytest.raises(ValueError, match="found NaN or infinity"):
        singular_values(torch.full((2, 2), math.inf))
    for function in (stable_rank, effective_rank):
        with pytest.raises(ValueError, match="all singular values are 0"):
            function(torch.zeros(3))
        with pytest.raises(ValueError, match="expected finite singular values"):
            function(torch.tensor([1.0, -1.0]))

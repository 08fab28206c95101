"""Gini index and Hoyer's measure against closed forms and the definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trace_offline.estimators.sparsity import gini, hoyer


def gini_of_pairs(values: np.ndarray) -> float:
    """Half the relative mean absolute difference: the definition, over all pairs."""
    magnitudes = np.abs(values.astype(np.float64))
    return float(np.abs(magnitudes[:, None] - magnitudes[None, :]).mean() / (2 * magnitudes.mean()))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 2, 7, 300])
def test_gini_is_the_mean_difference_of_pairs(seed: int, n: int) -> None:
    values = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    assert float(gini(torch.from_numpy(values))) == pytest.approx(gini_of_pairs(values), abs=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_hoyer_is_its_formula_and_neither_depends_on_scale_sign_or_order(seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(50)
    expected = (math.sqrt(50) - np.abs(values).sum() / np.linalg.norm(values)) / (math.sqrt(50) - 1)
    assert float(hoyer(torch.from_numpy(values))) == pytest.approx(expected, abs=1e-14)
    for function in (gini, hoyer):
        other = torch.from_numpy(-1e-200 * values[::-1].copy())
        assert float(function(other)) == pytest.approx(float(function(torch.from_numpy(values))), abs=1e-12)


def test_closed_forms() -> None:
    n = 40
    equal, single = torch.full((n,), -0.3), torch.zeros(n)
    single[7] = 5.0
    assert float(gini(equal)) == pytest.approx(0, abs=1e-15)
    assert float(hoyer(equal)) == pytest.approx(0, abs=1e-15)
    assert float(gini(single)) == pytest.approx(1 - 1 / n, abs=1e-15)
    assert float(hoyer(single)) == 1.0
    assert float(gini(torch.arange(1.0, n + 1))) == pytest.approx((n - 1) / (3 * n), abs=1e-14)
    # Expectations for large n: exponential magnitudes 1/2; normal ones √2 − 1 and √(2/π).
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert float(gini(normal)) == pytest.approx(math.sqrt(2) - 1, abs=0.003)
    root = math.sqrt(200_000)
    assert float(hoyer(normal)) == pytest.approx(root * (1 - math.sqrt(2 / math.pi)) / (root - 1), abs=0.003)


def test_rows_are_independent() -> None:
    table = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    for function in (gini, hoyer):
        assert function(table).tolist() == [float(function(row)) for row in table]


@pytest.mark.parametrize("function", [gini, hoyer])
def test_what_has_no_sparsity_is_an_error(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="expected finite numbers, found NaN"):
        function(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="all numbers are 0"):
        function(torch.zeros(3))
    with pytest.raises(ValueError, match="expected at least one number"):
        function(torch.zeros(0))


def test_hoyer_of_one_number_is_undefined() -> None:
    with pytest.raises(ValueError, match="at least 2 numbers, found 1"):
        hoyer(torch.ones(1))

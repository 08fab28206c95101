"""Thick-restart Lanczos: the same eigenpairs from a basis far smaller than the steps need."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from curvature_cases import generator, matrix_with, tied_case

from trace_offline.estimators.hvp import HessianOperator, NonFiniteError
from trace_offline.estimators.lanczos import extreme_eigenpairs
from trace_offline.estimators.operators import MatrixOperator
from trace_offline.estimators.thick_restart import bounded_eigenpairs, restarted_eigenpairs

SPECTRA = {
    "bulk and outliers": [30.0, 20.0, 12.0, -8.0, *np.linspace(-1, 1, 120).tolist()],
    "power law": [50.0 / (i + 1) ** 1.5 for i in range(120)],
    "both ends": [*np.linspace(1, 5, 60).tolist(), *np.linspace(-6, -1, 60).tolist()],
    "zero": [0.0] * 40,
    "identity": [2.0] * 40,
    "rank two": [3.0, 3.0] + [0.0] * 60,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("largest", "smallest", "capacity"), [(1, 0, 8), (4, 2, 14), (6, 1, 14), (0, 2, 10)])
@pytest.mark.parametrize("name", SPECTRA)
def test_planted_spectra_from_a_small_basis(
    name: str, largest: int, smallest: int, capacity: int, dtype: torch.dtype
) -> None:
    exact = np.sort(SPECTRA[name])[::-1]
    operator = MatrixOperator(matrix_with(SPECTRA[name], dtype=dtype))
    found = restarted_eigenpairs(
        operator, largest=largest, smallest=smallest, capacity=capacity, max_products=900, generator=generator(1)
    )
    assert found.pairs.converged.all()
    assert found.products == operator.products <= 900
    scale = max(np.abs(exact).max(), 1e-300)
    for wanted, got, share in ((exact, found.largest, 0.01), (exact[::-1], found.smallest, 0.1)):
        target = 1e-3 * np.maximum(np.abs(wanted[: len(got)]), share * scale)
        error = np.abs(got.values - wanted[: len(got)])
        # the lower edge of a dense bulk is known to the residual only, as with a full basis
        assert np.all(error <= (np.maximum(target, 10 * got.residuals) if name == "power law" else target))
    gram = found.pairs.vectors.double() @ found.pairs.vectors.double().T
    assert float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max()) < 1e4 * torch.finfo(dtype).eps


def test_residuals_are_true_residuals_after_restarts() -> None:
    matrix = matrix_with(SPECTRA["power law"])
    found = restarted_eigenpairs(
        MatrixOperator(matrix), largest=5, smallest=1, tolerance=1e-6, capacity=13, max_products=60,
        generator=generator(2),
    )  # fmt: skip
    assert found.restarts >= 2
    vectors, values = found.pairs.vectors, torch.as_tensor(found.pairs.values)
    true = (vectors @ matrix - values[:, None] * vectors).norm(dim=1).numpy()
    np.testing.assert_allclose(found.pairs.residuals, true, rtol=1e-4, atol=1e-11)


def test_the_same_answer_as_the_full_basis_on_a_network() -> None:
    case = tied_case()
    with HessianOperator([case.loss], case.parameters) as hessian:
        full = extreme_eigenpairs(hessian, largest=5, smallest=1, tolerance=1e-8, max_steps=59, generator=generator())
        bounded = bounded_eigenpairs(
            hessian, largest=5, smallest=1, tolerance=1e-8, max_steps=400, max_basis=14, generator=generator()
        )
        roomy = bounded_eigenpairs(
            hessian, largest=5, smallest=1, tolerance=1e-8, max_steps=59, max_basis=59, generator=generator()
        )
    assert bounded.restarts > 0
    assert full.restarts == roomy.restarts == 0
    np.testing.assert_array_equal(roomy.pairs.values, full.pairs.values)
    np.testing.assert_allclose(bounded.pairs.values, full.pairs.values, rtol=1e-7)
    cosines = (bounded.pairs.vectors * full.pairs.vectors).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-6, rtol=0)


def test_a_missed_copy_is_found_in_the_complement_of_locked_pairs() -> None:
    operator = MatrixOperator(matrix_with([9.0, 9.0, 7.0, *np.linspace(-1, 1, 150).tolist()]))
    first = restarted_eigenpairs(operator, largest=2, capacity=12, generator=generator())
    np.testing.assert_allclose(first.largest.values, [9, 7], rtol=1e-3)
    again = restarted_eigenpairs(operator, largest=2, capacity=12, generator=generator(1), locked=first.pairs)
    np.testing.assert_allclose(again.largest.values, [9, 9], rtol=1e-3)
    gram = again.pairs.vectors @ again.pairs.vectors.T
    torch.testing.assert_close(gram, torch.eye(2, dtype=torch.float64), atol=1e-8, rtol=0)


def test_too_few_products_are_admitted() -> None:
    operator = MatrixOperator(matrix_with(SPECTRA["power law"]))
    found = restarted_eigenpairs(
        operator, largest=5, smallest=1, tolerance=1e-6, capacity=12, max_products=15, generator=generator()
    )
    assert found.products == 15
    assert not found.pairs.converged.any()


def test_bad_input_and_bad_products() -> None:
    operator = MatrixOperator(torch.eye(30))
    with pytest.raises(ValueError, match=r"at least 11 vectors for 4 \+ 1 eigenvalues, found 9"):
        restarted_eigenpairs(operator, largest=4, smallest=1, capacity=9, generator=generator())
    with pytest.raises(ValueError, match=r"expected largest \+ smallest >= 1"):
        restarted_eigenpairs(operator, largest=0, capacity=9, generator=generator())
    broken = torch.eye(30)
    operator = MatrixOperator(broken)
    broken[1, 1] = float("inf")
    with pytest.raises(NonFiniteError, match="product is not finite"):
        restarted_eigenpairs(operator, largest=1, capacity=9, generator=generator())

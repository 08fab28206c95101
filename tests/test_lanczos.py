"""Extreme eigenpairs against planted spectra, dense Hessians and ARPACK."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from curvature_cases import generator, matrix_with, tied_case
from scipy.sparse.linalg import LinearOperator, eigsh

from trace_offline.estimators.hvp import HessianOperator, NonFiniteError
from trace_offline.estimators.krylov import Krylov
from trace_offline.estimators.lanczos import extreme_eigenpairs
from trace_offline.estimators.operators import MatrixOperator

SPECTRA = {
    "one number": [-2.0],
    "two numbers": [1.0, -1.0],
    "zero": [0.0] * 30,
    "identity": [1.0] * 50,
    "rank one": [3.0] + [0.0] * 40,
    "negative rank one": [0.0] * 40 + [-3.0],
    "repeated top": [5.0] * 3 + [1.0] * 97,
    "repeated at both ends": [4.0, 4.0, -3.0, -3.0] + [0.0] * 50,
    "all negative": [-float(i) for i in range(1, 60)],
    "bulk and outliers": [30.0, 20.0, 12.0, -8.0, *np.linspace(-1, 1, 120).tolist()],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("largest", "smallest"), [(1, 0), (0, 2), (4, 2), (10, 1)])
@pytest.mark.parametrize("name", SPECTRA)
def test_planted_spectra_come_back(name: str, largest: int, smallest: int, dtype: torch.dtype) -> None:
    exact = np.sort(SPECTRA[name])[::-1]
    operator = MatrixOperator(matrix_with(SPECTRA[name], dtype=dtype))
    found = extreme_eigenpairs(
        operator, largest=largest, smallest=smallest, tolerance=1e-3, max_steps=140, generator=generator(1)
    )
    scale = max(np.abs(exact).max(), 1e-300)
    assert found.pairs.converged.all()
    assert found.products == operator.products <= operator.n
    assert len(found.largest) == min(largest, operator.n)
    assert len(found.smallest) == min(smallest, operator.n)
    assert np.all(np.diff(found.pairs.values) <= 0)
    for wanted, got, share in ((exact, found.largest, 0.01), (exact[::-1], found.smallest, 0.1)):
        target = 1e-3 * np.maximum(np.abs(wanted[: len(got)]), share * scale)
        assert np.all(np.abs(got.values - wanted[: len(got)]) <= target)
    gram = found.pairs.vectors.double() @ found.pairs.vectors.double().T
    assert float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max()) < 1e4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("dtype", "tolerance", "rtol"), [(torch.float64, 1e-8, 1e-6), (torch.float32, 1e-3, 1e-3)])
@pytest.mark.parametrize("seed", range(3))
def test_a_network_against_its_dense_hessian(seed: int, dtype: torch.dtype, tolerance: float, rtol: float) -> None:
    exact = np.linalg.eigvalsh(tied_case(seed=seed).dense().numpy())
    case = tied_case(dtype, seed=seed)
    with HessianOperator([case.loss], case.parameters) as hessian:
        found = extreme_eigenpairs(
            hessian, largest=10, smallest=3, tolerance=tolerance, max_steps=59, generator=generator(seed)
        )
    assert found.pairs.converged.all()
    np.testing.assert_allclose(found.largest.values, exact[::-1][:10], rtol=rtol)
    np.testing.assert_allclose(found.smallest.values, exact[:3], rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residuals_are_true_residuals_and_bound_the_error(dtype: torch.dtype) -> None:
    exact = np.sort(SPECTRA["bulk and outliers"])[::-1]
    matrix = matrix_with(SPECTRA["bulk and outliers"], dtype=dtype)
    found = extreme_eigenpairs(
        MatrixOperator(matrix), largest=10, smallest=1, tolerance=1e-3, max_steps=140, generator=generator(5)
    )
    vectors, values = found.pairs.vectors.double(), torch.as_tensor(found.pairs.values)
    true = (vectors @ matrix.double() - values[:, None] * vectors).norm(dim=1).numpy()
    assert np.all(true <= 2 * found.pairs.residuals + 1e-13 * exact[0])
    large = true > 1e-4 * exact[0]
    assert large.any()
    np.testing.assert_allclose(found.pairs.residuals[large], true[large], rtol=0.1)
    nearest = np.abs(found.pairs.values[:, None] - exact[None, :]).min(1)
    assert np.all(nearest <= found.pairs.residuals + 1e-13 * exact[0])


def test_no_ghosts_after_many_steps_beyond_convergence() -> None:
    """Without re-orthogonalisation the first outlier comes back as copies of itself long before 100 steps."""
    spectrum = [1000.0, 10.0, *np.linspace(-1, 1, 400).tolist()]
    krylov = Krylov(MatrixOperator(matrix_with(spectrum, dtype=torch.float32)), 120, breakdown=1e-5)
    krylov.begin(generator())
    while not krylov.full:
        assert krylov.step()
    values, _, _ = krylov.ritz()
    assert (values > 500).sum() == 1
    assert ((values > 5) & (values < 500)).sum() == 1
    gram = (krylov.basis @ krylov.basis.T).numpy()
    assert np.abs(gram - np.eye(120)).max() < 1e-5


def test_a_copy_missed_by_one_vector_is_found_in_the_complement() -> None:
    spectrum = [9.0, 9.0, 7.0, *np.linspace(-1, 1, 200).tolist()]
    operator = MatrixOperator(matrix_with(spectrum))
    first = extreme_eigenpairs(operator, largest=2, tolerance=1e-3, max_steps=100, generator=generator())
    np.testing.assert_allclose(first.largest.values, [9, 7], rtol=1e-3)
    again = extreme_eigenpairs(
        operator, largest=2, smallest=1, tolerance=1e-6, max_steps=100, generator=generator(1), locked=first.pairs
    )
    np.testing.assert_allclose(again.largest.values, [9, 9], rtol=1e-6)
    np.testing.assert_allclose(again.smallest.values, [-1], rtol=1e-3)
    assert again.pairs.converged.all()
    gram = again.pairs.vectors @ again.pairs.vectors.T
    torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64), atol=1e-10, rtol=0)
    nothing_new = extreme_eigenpairs(
        operator, largest=2, smallest=1, tolerance=1e-6, max_steps=100, generator=generator(2), locked=again.pairs
    )
    np.testing.assert_allclose(nothing_new.pairs.values, again.pairs.values, rtol=1e-6)
    assert nothing_new.products < again.products


def test_too_few_steps_are_admitted() -> None:
    operator = MatrixOperator(matrix_with(SPECTRA["bulk and outliers"]))
    found = extreme_eigenpairs(operator, largest=10, smallest=1, tolerance=1e-6, max_steps=12, generator=generator())
    assert found.products == 12
    assert not found.pairs.converged.all()
    exact = np.sort(SPECTRA["bulk and outliers"])[::-1]
    assert np.all(found.largest.values <= exact[:10] + 1e-9), "Ritz values never exceed the eigenvalues they approach"
    closed = extreme_eigenpairs(
        MatrixOperator(matrix_with([5.0] * 3 + [1.0] * 97)), largest=2, max_steps=2, generator=generator()
    )
    assert not closed.pairs.converged.any(), "two steps close the space, but the second 5 was never looked for"


def test_all_steps_give_the_whole_spectrum() -> None:
    exact = np.linalg.eigvalsh(tied_case().dense().numpy())[::-1]
    case = tied_case()
    with HessianOperator([case.loss], case.parameters) as hessian:
        found = extreme_eigenpairs(
            hessian, largest=hessian.n, smallest=1, tolerance=1e-10, max_steps=1000, generator=generator()
        )
    assert found.complete
    np.testing.assert_allclose(found.ritz, exact, atol=1e-12 * exact[0])


def test_the_seed_decides_and_nothing_else() -> None:
    operator = MatrixOperator(matrix_with(SPECTRA["bulk and outliers"], dtype=torch.float32))
    runs = [extreme_eigenpairs(operator, largest=5, generator=generator(s)).pairs.values for s in (3, 3, 4)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    np.testing.assert_allclose(runs[0], runs[2], rtol=2e-3)


def test_bad_input_and_bad_products() -> None:
    operator = MatrixOperator(torch.eye(3))
    for wrong in ({"largest": 0}, {"largest": 1, "max_steps": 0}, {"largest": 1, "tolerance": 0.0}):
        with pytest.raises(ValueError, match=r"expected largest \+ smallest >= 1"):
            extreme_eigenpairs(operator, generator=generator(), **wrong)
    broken = torch.eye(3)
    operator = MatrixOperator(broken)
    broken[1, 1] = float("inf")
    with pytest.raises(NonFiniteError, match="product is not finite"):
        extreme_eigenpairs(operator, largest=1, generator=generator())


@pytest.mark.slow
def test_against_arpack_on_a_quarter_million_parameters() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=400,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=32,
        use_cache=False,
        attn_implementation="eager",
    )
    net = GPTNeoXForCausalLM(config).eval()
    ids = torch.randint(0, 20, (6, 12), generator=generator()) ** 2 % 400
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    parameters = list(net.parameters())
    with HessianOperator([lambda: net(input_ids=ids, labels=ids).loss], parameters) as hessian:
        assert 240_000 <= hessian.n <= 260_000
        ours = extreme_eigenpairs(hessian, largest=10, tolerance=1e-3, generator=generator())
        both = extreme_eigenpairs(hessian, largest=10, smallest=1, tolerance=1e-3, generator=generator())
        linear = LinearOperator(
            (hessian.n, hessian.n),
            dtype=np.float32,
            matvec=lambda v: hessian.product(torch.from_numpy(np.ascontiguousarray(v).reshape(-1))).numpy(),
        )
        start = hessian.products
        peer = eigsh(linear, k=10, which="LA", tol=1e-4, return_eigenvectors=False)
        peer_products = hessian.products - start
        lowest = eigsh(linear, k=1, which="SA", tol=1e-2, return_eigenvectors=False)
    assert ours.pairs.converged.all()
    assert both.pairs.converged.all()
    np.testing.assert_allclose(ours.largest.values, np.sort(peer)[::-1], rtol=1e-3)
    np.testing.assert_allclose(both.largest.values, ours.largest.values, rtol=1e-3)
    # A bulk edge at 0.3 % of the largest: both know it to a small share of the largest only.
    np.testing.assert_allclose(both.smallest.values, lowest, atol=1e-4 * ours.largest.values[0])
    assert ours.products < peer_products

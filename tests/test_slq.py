"""Stochastic Lanczos quadrature against planted spectra and dense Hessians."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from curvature_cases import exact_negative_share, generator, matrix_with, tied_case

from trace_offline.estimators.hvp import HessianOperator, NonFiniteError
from trace_offline.estimators.lanczos import extreme_eigenpairs
from trace_offline.estimators.operators import MatrixOperator
from trace_offline.estimators.slq import Quadrature, spectral_quadrature

BULK = [30.0, 20.0, 12.0, -8.0, *np.linspace(-2, 3, 120).tolist()]


def quadrature_of(spectrum: list[float], *, deflate: int = 0, seed: int = 0, **options: int) -> Quadrature:
    """The quadrature, with ``deflate`` eigenpairs of the largest size given exactly."""
    matrix = matrix_with(spectrum)
    values, vectors = np.linalg.eigh(matrix.numpy())
    order = np.argsort(-np.abs(values))[:deflate]
    known = {"exact_values": values[order], "exact_vectors": torch.as_tensor(vectors[:, order].T.copy())}
    settings = {"probes": 8, "steps": 12, **options}
    return spectral_quadrature(
        MatrixOperator(matrix), generator=generator(seed), **settings, **(known if deflate else {})
    )


@pytest.mark.parametrize("deflate", [0, 4])
def test_trace_is_unbiased_and_its_standard_error_is_calibrated(deflate: int) -> None:
    """z = (estimate - truth) / stderr follows Student's t with probes - 1 = 15 degrees: sd sqrt(15/13) = 1.074.

    Four outliers in 124 dimensions make the samples skewed, which a t interval feels a little; deflation removes it.
    """
    exact = sum(BULK)
    runs = [quadrature_of(BULK, deflate=deflate, seed=s, probes=16, steps=1).trace() for s in range(400)]
    values = np.array([run.value for run in runs])
    z = (values - exact) / np.array([run.stderr for run in runs])
    assert abs(values.mean() - exact) < 4 * values.std() / 20
    assert abs(z.mean()) < (0.2 if deflate else 0.5)
    assert 0.93 < z.std() < (1.25 if deflate else 1.6)
    assert np.mean(np.abs(z) < 2.131) == pytest.approx(0.95, abs=0.035 if deflate else 0.07)


def test_deflation_takes_the_outliers_out_of_the_variance() -> None:
    plain = [quadrature_of(BULK, seed=s, steps=1).trace().value for s in range(60)]
    deflated = [quadrature_of(BULK, deflate=4, seed=s, steps=1).trace().value for s in range(60)]
    assert np.std(deflated) < 0.6 * np.std(plain)


@pytest.mark.parametrize("deflate", [0, 4])
def test_first_moment_is_the_quadratic_form_whatever_the_steps(deflate: int) -> None:
    one, many = (quadrature_of(BULK, deflate=deflate, seed=3, steps=s).trace() for s in (1, 25))
    assert one.value == pytest.approx(many.value, rel=1e-10)
    assert one.stderr == pytest.approx(many.stderr, rel=1e-8)
    matrix = matrix_with(BULK)
    if deflate == 0:
        from trace_offline.estimators.operators import standard_normal

        operator, draw, forms = MatrixOperator(matrix), generator(3), []
        for _ in range(8):
            v = standard_normal(operator, draw)
            forms.append(float(v @ matrix @ v / (v @ v)))
        assert one.value == pytest.approx(len(BULK) * np.mean(forms), rel=1e-10)


def test_moments_of_the_quadrature_are_exact_up_to_degree_2m_minus_1() -> None:
    matrix = matrix_with(BULK) / 10
    found = spectral_quadrature(MatrixOperator(matrix), probes=1, steps=4, generator=generator(9))
    probe = torch.randn(len(BULK), generator=generator(9), dtype=torch.float32).double()
    probe /= probe.norm()
    power = probe
    for degree in range(8):
        assert found.integral(lambda x, d=degree: x**d).value == pytest.approx(float(probe @ power), rel=1e-9)
        power = matrix @ power
    assert found.integral(lambda x: x**8).value != pytest.approx(float(probe @ power), rel=1e-9)


@pytest.mark.parametrize("deflate", [0, 4, 124])
@pytest.mark.parametrize("broadening", [0.005, 0.01, 0.1])
def test_density_integrates_to_one_and_its_mean_is_the_trace(deflate: int, broadening: float) -> None:
    found = quadrature_of(BULK, deflate=deflate)
    grid, density, sigma = found.density(1024, broadening)
    assert len(grid) == len(density) == 1024
    assert np.all(density >= 0)
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-6)
    assert len(BULK) * np.trapezoid(grid * density, grid) == pytest.approx(found.trace().value, rel=1e-6)
    low, high = found.span
    assert sigma == pytest.approx(broadening * (high - low))


def test_density_is_the_broadened_spectrum() -> None:
    """Many probes with enough steps: compare with the exact spectrum under the same kernel."""
    matrix_values = np.array(BULK)
    found = quadrature_of(BULK, deflate=4, probes=60, steps=30)
    grid, density, sigma = found.density(2048, 0.02)
    kernel = np.exp(-0.5 * ((grid[:, None] - matrix_values[None]) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    exact = kernel.mean(1)
    assert np.trapezoid(np.abs(density - exact), grid) < 0.05
    blind = quadrature_of(BULK, probes=60, steps=1).density(2048, 0.02)
    assert np.trapezoid(np.abs(np.interp(grid, *blind[:2]) - exact), grid) > 0.5, "the comparison must be able to fail"


def test_fully_deflated_is_exact() -> None:
    found = quadrature_of(BULK, deflate=124)
    assert found.probes == found.products == 0
    assert found.trace().value == pytest.approx(sum(BULK), rel=1e-12)
    assert found.trace().stderr == 0
    assert found.mass_below(0).value == pytest.approx(np.mean(np.array(BULK) < 0))
    assert found.negative_share().value == pytest.approx(exact_negative_share(np.array(BULK)), rel=1e-12)
    assert found.mass_below_bounds(0) == (found.mass_below(0).value,) * 2


@pytest.mark.parametrize("steps", [6, 8, 12, 20])
def test_negative_share_with_its_error(steps: int) -> None:
    spectrum = [30.0, 20.0, *(np.random.default_rng(0).normal(0.05, 0.3, 300) ** 3).tolist()]
    exact = exact_negative_share(np.array(spectrum))
    runs = [quadrature_of(spectrum, deflate=2, seed=s, steps=steps).negative_share() for s in range(30)]
    z = np.array([(run.value - exact) / run.stderr for run in runs])
    assert np.abs(z).max() < 4
    assert np.abs(z).mean() < 1.5
    assert all(0 < run.stderr < 0.25 for run in runs)


def test_bounds_on_the_negative_fraction_hold_for_every_probe() -> None:
    spectrum = (np.random.default_rng(1).normal(0.1, 0.5, 200) ** 3).tolist()
    matrix = matrix_with(spectrum)
    values, vectors = np.linalg.eigh(matrix.numpy())
    for seed in range(10):
        probe = torch.randn(200, generator=generator(seed), dtype=torch.float32).double().numpy()
        weights = (vectors.T @ (probe / np.linalg.norm(probe))) ** 2
        for steps in (3, 10, 40):
            found = spectral_quadrature(MatrixOperator(matrix), probes=1, steps=steps, generator=generator(seed))
            for bound in (0.0, 0.3, -0.2):
                low, high = found.mass_below_bounds(bound)
                truth = weights[values < bound].sum()
                assert low - 1e-12 <= truth <= high + 1e-12
                assert low - 1e-12 <= found.mass_below(bound).value <= high + 1e-12
    wide, narrow = (quadrature_of(spectrum, steps=s).mass_below_bounds(0.3) for s in (3, 60))
    assert narrow[1] - narrow[0] < 0.5 * (wide[1] - wide[0])


def test_a_closed_krylov_space_is_exact() -> None:
    found = quadrature_of([4.0] * 30 + [-1.0] * 70, probes=400, steps=10)
    assert found.closed == (True,) * 400
    assert all(len(nodes) == 2 for nodes in found.nodes)
    share = found.mass_below(0)
    assert found.mass_below_bounds(0) == pytest.approx((share.value,) * 2)
    assert abs(share.value - 0.7) < 4 * share.stderr < 0.02
    mass = found.negative_share()
    assert abs(mass.value - 70 / 190) < 4 * mass.stderr < 0.03


@pytest.mark.parametrize("value", [0.0, -2.0, 3.0])
def test_one_number_and_constant_spectra(value: float) -> None:
    for size in (1, 40):
        found = quadrature_of([value] * size, probes=3, steps=5)
        assert found.trace().value == pytest.approx(value * size, abs=1e-12)
        assert found.trace().stderr == pytest.approx(0, abs=1e-12)
        assert found.mass_below(-1e-9).value == pytest.approx(float(value < 0))
        grid, density, sigma = found.density(512, 0.02)
        assert sigma == pytest.approx(0.02 * (abs(value) or 1.0))
        assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-6)
        assert np.trapezoid(grid * density, grid) == pytest.approx(value, abs=1e-6)
        if value == 0:
            with pytest.raises(ZeroDivisionError, match="no curvature to share out"):
                found.negative_share()
        else:
            assert found.negative_share().value == float(value < 0)


def test_truncation_equals_a_shorter_run() -> None:
    long, short = (quadrature_of(BULK, deflate=2, steps=s) for s in (12, 7))
    cut = long.truncated(7)
    for a, b in zip((*cut.nodes, *cut.weights), (*short.nodes, *short.weights), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_against_its_dense_hessian(dtype: torch.dtype) -> None:
    exact = np.linalg.eigvalsh(tied_case().dense().numpy())
    case = tied_case(dtype)
    with HessianOperator([case.loss], case.parameters) as hessian:
        pairs = extreme_eigenpairs(hessian, largest=5, smallest=1, max_steps=59, generator=generator()).pairs
        found = spectral_quadrature(
            hessian, probes=10, steps=15, generator=generator(2), exact_values=pairs.values, exact_vectors=pairs.vectors
        )
        assert found.products == 150
    trace = found.trace()
    assert abs(trace.value - exact.sum()) < 3 * trace.stderr
    share = found.negative_share()
    assert abs(share.value - exact_negative_share(exact)) < 3 * share.stderr
    low, high = found.mass_below_bounds(-1e-5 * exact[-1])
    fraction = found.mass_below(-1e-5 * exact[-1])
    assert low - 3 * fraction.stderr <= np.mean(exact < -1e-5 * exact[-1]) <= high + 3 * fraction.stderr


def test_a_single_probe_has_no_standard_error() -> None:
    found = quadrature_of(BULK, probes=1)
    assert found.trace().stderr is None
    assert found.negative_share().stderr is None


def test_bad_input_is_explained() -> None:
    with pytest.raises(ValueError, match="expected probes, steps and n >= 1, found 0, 3 and 4"):
        spectral_quadrature(MatrixOperator(torch.eye(4)), probes=0, steps=3, generator=generator())
    with pytest.raises(ValueError, match="one vector for each known eigenvalue, found 1 and 0"):
        spectral_quadrature(
            MatrixOperator(torch.eye(4)), probes=2, steps=3, generator=generator(), exact_values=np.ones(1)
        )
    with pytest.raises(ValueError, match="needs at least 1013 grid points, found 100"):
        quadrature_of(BULK).density(100, 0.001)
    broken = torch.eye(3)
    operator = MatrixOperator(broken)
    broken[1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="product is not finite"):
        spectral_quadrature(operator, probes=2, steps=2, generator=generator())

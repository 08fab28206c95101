"""Trace estimators against planted spectra: unbiased, exact where they must be, intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from curvature_cases import exact_effective_rank, generator, matrix_with, tied_case
from scipy import stats

from trace_offline.estimators.hutchpp import (
    complement_moments,
    hutchpp,
    mean_of,
    participation_ratio,
    range_of,
    sphere_probe,
)
from trace_offline.estimators.hvp import HessianOperator, NonFiniteError
from trace_offline.estimators.lanczos import extreme_eigenpairs
from trace_offline.estimators.operators import MatrixOperator, standard_normal
from trace_offline.estimators.slq import Estimate, spectral_quadrature
from trace_offline.estimators.xtrace import xtrace

MIXED = [30.0, 20.0, 12.0, -8.0, *np.linspace(-2, 3, 40).tolist()]
SPECTRA = {
    "mixed": MIXED,
    "power law": [50.0 / (i + 1) for i in range(50)],
    "flat": np.linspace(-1, 2, 50).tolist(),
}
REPEATS = 200


def deflated(values: list[float], matrix: torch.Tensor, seed: int, probes: int = 24, k: int = 4) -> Estimate:
    """As the hessian analyzer does it: eigenpairs from Lanczos exactly, the complement by probes of their own."""
    operator = MatrixOperator(matrix)
    pairs = extreme_eigenpairs(operator, largest=k, smallest=1, tolerance=1e-2, generator=generator(seed)).pairs
    moments = complement_moments(operator, probes, generator(10_000 + seed), pairs.vectors)
    return mean_of(moments.first, float(pairs.values.sum()))


def hutchinson(matrix: torch.Tensor, seed: int, probes: int = 24) -> Estimate:
    return mean_of(complement_moments(MatrixOperator(matrix), probes, generator(seed)).first)


@pytest.mark.parametrize("name", SPECTRA)
def test_nominal_95_percent_intervals_of_the_trace_cover(name: str) -> None:
    """Both with Student's factor and with a plain 1.96: 24 probes are enough that the difference is small."""
    exact, matrix = sum(SPECTRA[name]), matrix_with(SPECTRA[name])
    found = [deflated(SPECTRA[name], matrix, seed) for seed in range(REPEATS)]
    z = np.array([(estimate.value - exact) / estimate.stderr for estimate in found])
    assert 0.90 <= np.mean(np.abs(z) < stats.t.ppf(0.975, 23)) <= 0.98
    assert 0.90 <= np.mean(np.abs(z) < 1.96) <= 0.98
    assert abs(z.mean()) < 4 / np.sqrt(REPEATS)
    halved = np.mean(np.abs(z) < 0.98)
    assert halved < 0.85, "an interval half as wide must not cover"


def test_intervals_of_the_quadratures_trace_cover_with_few_probes() -> None:
    exact, matrix = sum(MIXED), matrix_with(MIXED)
    z = []
    for seed in range(REPEATS):
        estimate = spectral_quadrature(MatrixOperator(matrix), probes=8, steps=1, generator=generator(seed)).trace()
        z.append((estimate.value - exact) / estimate.stderr)
    assert 0.90 <= np.mean(np.abs(z) < stats.t.ppf(0.975, 7)) <= 0.98


@pytest.mark.parametrize("name", SPECTRA)
def test_xtrace_is_unbiased_and_its_interval_is_not_too_short(name: str) -> None:
    exact, matrix = sum(SPECTRA[name]), matrix_with(SPECTRA[name])
    found = [xtrace(MatrixOperator(matrix), probes=8, generator=generator(seed)) for seed in range(REPEATS)]
    values, errors = (np.array([getattr(e, field) for e in found]) for field in ("value", "stderr"))
    assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(REPEATS)
    cover = np.mean(np.abs(values - exact) < stats.t.ppf(0.975, 7) * errors)
    assert cover >= 0.93
    assert errors.mean() < 2.5 * values.std(), "not too small, but of the size of the error"


def test_xtrace_equals_its_definition_with_subspaces_built_one_by_one() -> None:
    matrix, probes = matrix_with(MIXED), 6
    operator, n = MatrixOperator(matrix), len(MIXED)
    draw = generator(3)
    omega = torch.stack([standard_normal(operator, draw) for _ in range(probes)])

    def samples(used: list[int]) -> list[float]:
        found = []
        for i in used:
            others = [j for j in used if j != i]
            basis, _ = torch.linalg.qr(matrix @ omega[others].T)
            x = omega[i] - basis @ (basis.T @ omega[i])
            inside = torch.trace(basis.T @ matrix @ basis)
            found.append(float(inside + (n - len(others)) * (x @ matrix @ x) / (x @ x)))
        return found

    found = xtrace(operator, probes=probes, generator=generator(3))
    assert operator.products == 2 * probes
    assert found.value == pytest.approx(np.mean(samples(list(range(probes)))), rel=1e-10)
    means = np.array([np.mean(samples([j for j in range(probes) if j != i])) for i in range(probes)])
    jackknife = np.sqrt((probes - 1) / probes * ((means - means.mean()) ** 2).sum())
    assert found.stderr == pytest.approx(jackknife, rel=1e-8)


def test_hutchpp_is_a_subspace_exactly_and_the_rest_by_probes() -> None:
    matrix = matrix_with(MIXED)
    operator, draw = MatrixOperator(matrix), generator(5)
    found = hutchpp(operator, products=25, generator=generator(5))
    assert operator.products == 24
    sketch = torch.stack([standard_normal(operator, draw) for _ in range(8)]) @ matrix
    basis = range_of(sketch)
    forms = []
    for _ in range(8):
        v = sphere_probe(operator, draw, basis)
        assert float((basis @ v).abs().max()) < 1e-12
        forms.append((len(MIXED) - 8) * float(v @ matrix @ v))
    assert found.value == pytest.approx(float(torch.trace(basis @ matrix @ basis.T)) + np.mean(forms), rel=1e-10)
    assert found.stderr == pytest.approx(np.std(forms, ddof=1) / np.sqrt(8), rel=1e-10)


def test_deflation_by_eigenpairs_beats_hutchpp_and_xtrace_at_equal_products() -> None:
    """The pairs are there anyway; the 24 further products then give less error than 24 products of the others."""
    for name in ("mixed", "power law"):
        exact, matrix = sum(SPECTRA[name]), matrix_with(SPECTRA[name])

        def rmse(estimates: list[Estimate], exact: float = exact) -> float:
            return float(np.sqrt(np.mean([(e.value - exact) ** 2 for e in estimates])))

        ours = rmse([deflated(SPECTRA[name], matrix, seed, k=10) for seed in range(25)])
        plain = rmse([hutchinson(matrix, seed) for seed in range(25)])
        sketched = rmse([hutchpp(MatrixOperator(matrix), products=24, generator=generator(seed)) for seed in range(25)])
        crossed = rmse([xtrace(MatrixOperator(matrix), probes=12, generator=generator(seed)) for seed in range(25)])
        assert ours < 0.9 * min(sketched, crossed), name
        assert max(sketched, crossed) < plain, name


def test_more_products_help_xtrace_and_hutchpp_faster_than_hutchinson() -> None:
    spectrum = [100 * 0.8**i for i in range(80)]
    matrix, exact = matrix_with(spectrum), sum(spectrum)

    def rmse(kind: str, products: int) -> float:
        run = {
            "xtrace": lambda s: xtrace(MatrixOperator(matrix), probes=products // 2, generator=generator(s)),
            "hutchpp": lambda s: hutchpp(MatrixOperator(matrix), products=products, generator=generator(s)),
            "plain": lambda s: hutchinson(matrix, s, products),
        }[kind]
        return float(np.sqrt(np.mean([(run(seed).value - exact) ** 2 for seed in range(25)])))

    gains = {kind: rmse(kind, 12) / rmse(kind, 48) for kind in ("xtrace", "hutchpp", "plain")}
    assert gains["plain"] < 3.5
    assert gains["hutchpp"] > 5
    assert gains["xtrace"] > gains["hutchpp"]


@pytest.mark.parametrize(
    ("spectrum", "probes"),
    [([5.0, -2.0, 1.0] + [0.0] * 40, 4), ([3.0] * 9, 9), ([1.0, 2.0, 3.0], 8), ([0.0] * 6, 4), ([-2.0], 3)],
    ids=["rank below probes", "as many probes as order", "more probes than order", "zero", "one number"],
)
def test_exact_cases(spectrum: list[float], probes: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        operator = MatrixOperator(matrix_with(spectrum, dtype=dtype))
        found = xtrace(operator, probes=probes, generator=generator(1))
        assert found.value == pytest.approx(sum(spectrum), abs=tolerance * 40)
        assert found.stderr == 0
    other = hutchpp(MatrixOperator(matrix_with(spectrum)), products=max(6, 3 * probes), generator=generator(1))
    assert other.value == pytest.approx(sum(spectrum), abs=1e-10)
    assert other.stderr == pytest.approx(0, abs=1e-10)


def test_second_moments_give_the_trace_of_the_square_and_the_participation_ratio() -> None:
    values = np.array(MIXED)
    matrix = matrix_with(MIXED)
    moments = complement_moments(MatrixOperator(matrix), 400, generator(2))
    square = mean_of(moments.second)
    assert abs(square.value - (values**2).sum()) < 4 * square.stderr < 0.2 * (values**2).sum()
    ratio = participation_ratio(moments.first, moments.second)
    assert abs(ratio.value - values.sum() ** 2 / (values**2).sum()) < 4 * ratio.stderr < 0.5 * ratio.value
    one = MatrixOperator(matrix_with([2.0] * 30))
    same = complement_moments(one, 5, generator())
    assert participation_ratio(same.first, same.second).value == pytest.approx(30)
    with pytest.raises(ZeroDivisionError, match="no curvature to share out"):
        participation_ratio(np.zeros(3), np.zeros(3))
    z = []
    for seed in range(REPEATS):
        few = complement_moments(MatrixOperator(matrix), 24, generator(seed))
        estimate = participation_ratio(few.first, few.second)
        z.append((estimate.value - values.sum() ** 2 / (values**2).sum()) / estimate.stderr)
    assert 0.85 <= np.mean(np.abs(z) < stats.t.ppf(0.975, 23)) <= 0.98


@pytest.mark.parametrize("steps", [6, 12, 30])
def test_effective_rank_with_its_error(steps: int) -> None:
    spectrum = [30.0, 20.0, *(np.random.default_rng(0).normal(0.05, 0.3, 200) ** 3).tolist()]
    exact = exact_effective_rank(np.array(spectrum))
    matrix = matrix_with(spectrum)
    z, errors = [], []
    for seed in range(20):
        found = spectral_quadrature(MatrixOperator(matrix), probes=8, steps=steps, generator=generator(seed))
        estimate = found.effective_rank()
        z.append((estimate.value - exact) / estimate.stderr)
        errors.append(estimate.stderr)
    assert np.abs(z).mean() < 1.5
    assert np.abs(z).max() < 4
    assert np.mean(errors) < 0.8 * exact


def test_effective_rank_is_exact_where_nothing_is_random() -> None:
    values, vectors = np.linalg.eigh(matrix_with(MIXED).numpy())
    full = spectral_quadrature(
        MatrixOperator(matrix_with(MIXED)),
        probes=3,
        steps=2,
        generator=generator(),
        exact_values=values,
        exact_vectors=torch.as_tensor(vectors.T.copy()),
    )
    assert full.effective_rank() == Estimate(pytest.approx(exact_effective_rank(values)), 0.0, 0)
    flat = spectral_quadrature(MatrixOperator(torch.eye(40) * -3), probes=3, steps=4, generator=generator())
    assert flat.effective_rank().value == pytest.approx(40, rel=1e-5)
    single = spectral_quadrature(MatrixOperator(matrix_with(MIXED)), probes=1, steps=6, generator=generator())
    assert single.effective_rank().stderr is None
    nothing = spectral_quadrature(MatrixOperator(torch.zeros(5, 5)), probes=2, steps=2, generator=generator())
    with pytest.raises(ZeroDivisionError, match="no curvature to share out"):
        nothing.effective_rank()


def test_a_networks_trace() -> None:
    exact = float(tied_case().dense().trace())
    case = tied_case()
    with HessianOperator([case.loss], case.parameters) as hessian:
        for found in (
            xtrace(hessian, probes=20, generator=generator(1)),
            hutchpp(hessian, products=60, generator=generator(1)),
        ):
            assert abs(found.value - exact) < 3 * found.stderr < 0.3 * exact


def test_bad_input_is_explained() -> None:
    operator = MatrixOperator(torch.eye(9))
    with pytest.raises(ValueError, match=r"at least 3 probes .* found 2"):
        xtrace(operator, probes=2, generator=generator())
    with pytest.raises(ValueError, match=r"at least 6 products .* found 5"):
        hutchpp(operator, products=5, generator=generator())
    broken = torch.eye(9)
    operator = MatrixOperator(broken)
    broken[1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        complement_moments(operator, 2, generator())
    assert mean_of(np.zeros(0), 4.0) == Estimate(4.0, 0.0, 0)
    assert mean_of(np.ones(1), 4.0) == Estimate(5.0, None, 1)

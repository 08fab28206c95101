"""Feature matrices as regressions see them: turned into their eigenbasis, or left as they are."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from trace_offline.estimators import rotation
from trace_offline.estimators.logistic import LogisticProblems, Problem
from trace_offline.estimators.rotation import as_they_are, design_of, rotate

WIDTH, CLASSES = 140, 6
ROWS = CLASSES * rotation.ROWS_PER_CLASS + 50


def cloud(seed: int = 0, rows: int = ROWS, spread: float = 1.0) -> Tensor:
    """Correlated columns with means of their own; standard deviations from 1 down to ``spread``⁻¹."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -torch.log10(torch.tensor(spread)).item(), WIDTH)
    basis, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))
    return (torch.randn(rows, WIDTH, generator=generator) * scales) @ basis.T + 2.0


def labels(x: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = (x - x.mean(0)) @ torch.randn(WIDTH, CLASSES, generator=generator) / 4
    return (logits - torch.log(-torch.log(torch.rand(logits.shape, generator=generator)))).argmax(1)


def test_many_rows_for_few_classes_are_left_as_they_are() -> None:
    x = cloud()
    assert not design_of(x, torch.float32, CLASSES).turned
    assert design_of(x, torch.float64, CLASSES).turned
    assert design_of(x, torch.float32, 2 * CLASSES).turned
    assert design_of(x[:, : rotation.LEAST_WIDTH - 1], torch.float32, CLASSES).turned


def test_variances_too_far_apart_are_turned() -> None:
    assert as_they_are(cloud(spread=1e2)) is not None
    assert as_they_are(cloud(spread=1e5)) is None
    assert as_they_are(torch.ones(ROWS, WIDTH)) is None
    assert as_they_are(cloud(rows=WIDTH - 1)) is None


@pytest.mark.parametrize("seed", range(2))
def test_products_are_those_of_the_turned_rows(seed: int) -> None:
    x = cloud(seed)
    plain = as_they_are(x)
    assert plain is not None
    assert plain.n == ROWS
    assert plain.size == WIDTH + 1
    torch.testing.assert_close(plain.basis.T @ plain.basis, torch.eye(WIDTH, dtype=torch.float64))
    exact = torch.cat([(x.double() - plain.mean) @ plain.basis, torch.ones(ROWS, 1, dtype=torch.float64)], 1).T
    generator = torch.Generator().manual_seed(seed)
    parameters = torch.randn(4, WIDTH + 1, dtype=torch.float64, generator=generator)
    values = torch.randn(4, ROWS, generator=generator)
    torch.testing.assert_close(plain.forward(parameters).double(), parameters @ exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain.backward(values), values.double() @ exact.T, rtol=1e-4, atol=1e-3)
    rows = torch.arange(0, ROWS, 7)
    torch.testing.assert_close(plain.leading(5, rows).double(), exact[:5, rows], rtol=1e-4, atol=1e-4)
    turned = rotate(x, torch.float32)
    # all rows were sampled: one basis up to signs, one spectrum
    torch.testing.assert_close(plain.spectrum, turned.spectrum, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("penalty", [1e-1, 1e-3, 1e-5])
def test_the_optimum_does_not_depend_on_it(penalty: float) -> None:
    """Against float64 on turned rows, and scikit-learn's Newton method; several label sets on the same rows."""
    x = cloud(rows=2 * ROWS, spread=10.0)
    sets = [labels(x, seed) for seed in range(2)]
    problems = [Problem(0, y, CLASSES) for y in sets]
    ready = LogisticProblems([x], problems)
    assert not ready.designs[0].turned
    fit = ready.solve(penalty, tolerance=1e-5)
    exact = LogisticProblems([x], problems, torch.float64).solve(penalty, tolerance=1e-8)
    for place, y in enumerate(sets):
        assert bool(fit.converged[place])
        assert float(fit.objective[place]) == pytest.approx(float(exact.objective[place]), rel=2e-5)
        p = fit.log_probabilities(x, place).exp()
        torch.testing.assert_close(p.double(), exact.log_probabilities(x, place).exp(), atol=2e-2, rtol=0)
        if penalty == 1e-3:
            strength = 1.0 / (len(y) * penalty)
            model = LogisticRegression(C=strength, solver="newton-cg", tol=1e-8, max_iter=1000).fit(x.double(), y)
            assert abs(p.double() - torch.from_numpy(model.predict_proba(x.double()))).max() < 1e-2
    warm = ready.solve(penalty, fit, tolerance=1e-5)
    assert int(warm.iterations.max()) < int(fit.iterations.max())


@pytest.mark.parametrize("classes", [CLASSES, 2 * CLASSES])
def test_directions_of_other_rows_serve_again_and_change_no_optimum(classes: int) -> None:
    """Rows as they are, and turned: between two halves that differ the fit is that of the half itself."""
    x = cloud(rows=2 * ROWS, spread=10.0)
    known = design_of(x[:ROWS] * 1.3, torch.float32, classes).directions
    here = x[ROWS:]
    again = design_of(here, torch.float32, classes, known)
    assert again.basis is known.basis
    assert again.turned == (classes > CLASSES)
    y = labels(here)
    problems = [Problem(0, y, CLASSES)] * (classes // CLASSES)
    fit = LogisticProblems([here], problems, like=[known]).solve(1e-3, tolerance=1e-5)
    exact = LogisticProblems([here], problems, torch.float64).solve(1e-3, tolerance=1e-8)
    assert bool(fit.converged.all())
    assert float(fit.objective[0]) == pytest.approx(float(exact.objective[0]), rel=2e-5)
    torch.testing.assert_close(fit.weights[0].double(), exact.weights[0], atol=2e-2, rtol=0)


def test_directions_that_leave_something_out_are_found_again() -> None:
    x = cloud(rows=2 * WIDTH)
    known = design_of(x[: WIDTH - 20], torch.float32, CLASSES).directions
    assert known.basis.shape[1] < WIDTH
    assert design_of(x, torch.float32, CLASSES, known).basis.shape == (WIDTH, WIDTH)
    narrow = design_of(x[:, :20], torch.float32, CLASSES).directions
    assert design_of(x[:, :20], torch.float32, CLASSES, narrow).basis is not narrow.basis


@pytest.mark.parametrize("spread", [10.0, 90.0, 110.0, 1e4])
def test_rows_are_turned_in_float32_where_variances_are_even(spread: float) -> None:
    """The limit is a ratio of variances of 1e4: standard deviations a hundred apart."""
    x = cloud(rows=20 * WIDTH, spread=spread) - 2.0
    gram = (x.T @ x).double() / len(x)
    values = torch.linalg.eigvalsh(gram)
    ratio = float(values[-1] / values[0])
    for condition in (0.5 * ratio, 0.9 * ratio, 1.2 * ratio, 2.0 * ratio):
        assert rotation._within(gram, condition) == (condition > ratio)
    assert not rotation._within(torch.zeros(4, 4, dtype=torch.float64), 1e9)
    assert not rotation._within(torch.diag(torch.tensor([1.0, 1.0, -1e-3], dtype=torch.float64)), 1e9)
    found = design_of(x, torch.float32, 100)
    assert found.turned
    exact = (x.double() - found.mean) @ found.basis
    error = (found.data[:-1].double() - exact.T).square().mean(1).sqrt() / found.spectrum[:-1].sqrt()
    assert float(error.max()) < 1e-4
    torch.testing.assert_close(found.spectrum[:-1], exact.square().mean(0), rtol=1e-4, atol=0)

"""Batched logistic regression against scikit-learn, closed forms and itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor

from trace_offline.core.errors import UsageError
from trace_offline.estimators.logistic import LogisticFit, LogisticProblems, Problem, fit_logistic, fit_path


def grid(features: Tensor, labels: Tensor, classes: int) -> tuple[list[Tensor], list[Problem]]:
    """Every feature matrix ``[L, n, D]`` with every label set ``[S, n]``."""
    sets = list(labels)
    return list(features), [Problem(layer, y, classes) for layer in range(len(features)) for y in sets]


def solve_grid(features: Tensor, labels: Tensor, classes: int, penalty: Any, **options: Any) -> SimpleNamespace:
    """All fits of ``grid``, each field as ``[L, S, …]``."""
    if isinstance(penalty, Tensor):
        penalty = penalty.flatten()
    return as_grid(fit_logistic(*grid(features, labels, classes), penalty, **options), len(features))


def as_grid(fit: LogisticFit, layers: int) -> SimpleNamespace:
    fields = {name: getattr(fit, name) for name in LogisticFit.__dataclass_fields__ if name != "learned"}
    stacked = {name: torch.stack(v) if isinstance(v, tuple) else v for name, v in fields.items()}
    return SimpleNamespace(**{name: v.view(layers, -1, *v.shape[1:]) for name, v in stacked.items()})


def log_probabilities(fit: SimpleNamespace, x: Tensor) -> Tensor:
    """``log p [n, K]`` of the only problem."""
    return (x.to(fit.weights.dtype) @ fit.weights[0, 0].T + fit.intercepts[0, 0]).log_softmax(-1)


def draw(n: int, width: int, classes: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Standard normal features; labels from a true multinomial model whose logits have this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator)
    logits = x @ torch.randn(width, classes, generator=generator) * scale / width**0.5
    gumbel = -torch.log(-torch.log(torch.rand(n, classes, generator=generator)))
    y = (logits + gumbel).argmax(1)
    y[:classes] = torch.arange(classes)
    return x, y


def imbalanced() -> tuple[Tensor, Tensor]:
    x, _ = draw(1500, 16, 5, 1.0)
    generator = torch.Generator().manual_seed(1)
    logits = 1.5 * x[:, :5] + torch.tensor([5.0, 3.0, 1.0, 0.0, -1.0])
    y = (logits - torch.log(-torch.log(torch.rand(1500, 5, generator=generator)))).argmax(1)
    y[:5] = torch.arange(5)
    return x, y


def collinear() -> tuple[Tensor, Tensor]:
    x, y = draw(800, 12, 4, 3.0)
    return torch.cat([x, 2.0 * x[:, :4] - x[:, 4:8], x[:, :1]], 1), y


def with_constant() -> tuple[Tensor, Tensor]:
    x, y = draw(600, 8, 3, 2.0)
    return torch.cat([x, torch.full((600, 1), 3.0), torch.zeros(600, 1)], 1), y


def unscaled() -> tuple[Tensor, Tensor]:
    x, y = draw(800, 10, 4, 2.0)
    return x * torch.logspace(-1, 1, 10) + torch.linspace(-5, 5, 10), y


CASES = {
    "easy": lambda: draw(1500, 24, 5, 10.0),
    "hard": lambda: draw(1500, 24, 8, 0.1),
    "middling": lambda: draw(1500, 32, 8, 2.0),
    "imbalanced": imbalanced,
    "collinear": collinear,
    "constant feature": with_constant,
    "two classes": lambda: draw(900, 12, 2, 3.0),
    "unscaled": unscaled,
    "few rows": lambda: draw(12, 30, 3, 1.0),
    "separable": lambda: draw(100, 150, 4, 3.0),
}


def objective(x: Tensor, y: Tensor, weights: Tensor, intercept: Tensor, penalty: float) -> float:
    log_p = (x.double() @ weights.double().T + intercept.double()).log_softmax(-1)
    return float(-log_p.gather(1, y[:, None]).mean() + 0.5 * penalty * weights.double().square().sum())


def by_sklearn(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[float, LogisticRegression]:
    strength = (2.0 if classes == 2 else 1.0) / (len(x) * penalty)
    model = LogisticRegression(C=strength, solver="newton-cg", tol=1e-9, max_iter=2000).fit(
        x.double().numpy(), y.numpy()
    )
    weights, intercept = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if classes == 2:
        weights, intercept = torch.cat([-weights, weights]) / 2, torch.cat([-intercept, intercept]) / 2
    return objective(x, y, weights, intercept, penalty), model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
@pytest.mark.parametrize("case", list(CASES))
def test_same_objective_as_sklearn(case: str, penalty: float, dtype: torch.dtype) -> None:
    x, y = CASES[case]()
    classes = int(y.max()) + 1
    reference, model = by_sklearn(x, y, classes, penalty)
    fit = solve_grid(x[None], y[None], classes, penalty, dtype=dtype)
    found = objective(x, y, fit.weights[0, 0], fit.intercepts[0, 0], penalty)
    assert found == pytest.approx(reference, rel=1e-4)
    assert float(fit.objective) == pytest.approx(found, rel=1e-5)
    assert bool(fit.converged)
    ours = log_probabilities(fit, x).exp().numpy()
    np.testing.assert_allclose(ours, model.predict_proba(x.double().numpy()), atol=0.02)


def test_weak_penalty_on_separable_data_is_finite_and_right() -> None:
    x, y = CASES["separable"]()
    fit = solve_grid(x[None], y[None], 4, 1e-6, dtype=torch.float64)
    assert bool(fit.weights.isfinite().all() and fit.intercepts.isfinite().all())
    assert float(fit.objective) == pytest.approx(by_sklearn(x, y, 4, 1e-6)[0], rel=1e-4)
    assert bool((log_probabilities(fit, x).argmax(1) == y).all())


def test_gradient_vanishes_at_the_solution() -> None:
    x, y = CASES["middling"]()
    fit = solve_grid(x[None], y[None], 8, 1e-3, dtype=torch.float64, tolerance=1e-8)
    weights, intercept = fit.weights[0, 0].clone().requires_grad_(), fit.intercepts[0, 0].clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x.double() @ weights.T + intercept, y)
    (loss + 0.5e-3 * weights.square().sum()).backward()
    assert float(weights.grad.abs().max()) < 1e-8
    assert float(intercept.grad.abs().max()) < 1e-8


def test_batch_of_layers_and_label_sets_equals_one_by_one() -> None:
    layers = [draw(500, 16, 4, scale, seed)[0] for seed, scale in enumerate((1.0, 3.0, 5.0))]
    sets = torch.stack([draw(500, 16, 4, 3.0, seed)[1] for seed in (1, 2)])
    penalty = torch.tensor([[1e-3, 1e-2], [1e-1, 1e-3], [1.0, 1e-4]])
    together = solve_grid(torch.stack(layers), sets, 4, penalty, dtype=torch.float64)
    for layer in range(3):
        for s in range(2):
            alone = solve_grid(layers[layer][None], sets[s][None], 4, float(penalty[layer, s]), dtype=torch.float64)
            assert float(together.objective[layer, s]) == pytest.approx(float(alone.objective), rel=1e-6)
            torch.testing.assert_close(together.weights[layer, s], alone.weights[0, 0], atol=5e-3, rtol=0)
    assert together.penalty.tolist() == penalty.double().tolist()


def test_deterministic() -> None:
    x, y = CASES["imbalanced"]()
    first, second = (solve_grid(x[None], y[None], 5, 1e-4) for _ in range(2))
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.intercepts, second.intercepts)


def test_intercept_is_not_penalised() -> None:
    x, y = CASES["imbalanced"]()
    plain = solve_grid(x[None], y[None], 5, 1e-2, dtype=torch.float64)
    shifted = solve_grid((x.double() + 100.0)[None], y[None], 5, 1e-2, dtype=torch.float64)
    assert float(shifted.objective) == pytest.approx(float(plain.objective), rel=1e-9)
    huge = solve_grid(x[None], y[None], 5, 1e6, dtype=torch.float64)
    shares = torch.bincount(y).double() / len(y)
    torch.testing.assert_close(log_probabilities(huge, x).exp()[0], shares, atol=1e-4, rtol=0)
    assert float(huge.intercepts.sum()) == pytest.approx(0.0, abs=1e-9)


def test_features_without_variance_give_the_class_shares() -> None:
    y = torch.tensor([0] * 6 + [1] * 3 + [2])
    fit = solve_grid(torch.full((1, 10, 4), 7.0), y[None], 3, 1e-3)
    assert float(fit.nll) == pytest.approx(-float(torch.tensor([0.6, 0.3, 0.1]).log() @ torch.tensor([0.6, 0.3, 0.1])))
    assert bool((fit.weights == 0).all())


def test_class_without_training_rows_gets_no_probability() -> None:
    x, y = draw(600, 10, 3, 2.0)
    gap = torch.where(y == 2, 3, y)
    fit = solve_grid(x[None], gap[None], 4, 1e-2, dtype=torch.float64)
    p = log_probabilities(fit, x).exp()
    assert float(p[:, 2].max()) < 1e-12
    reference, model = by_sklearn(x, y, 3, 1e-2)
    assert float(fit.objective) == pytest.approx(reference, rel=1e-4)
    np.testing.assert_allclose(p[:, [0, 1, 3]].numpy(), model.predict_proba(x.double().numpy()), atol=0.01)


def test_class_that_appears_only_after_a_warm_start() -> None:
    x, y = draw(600, 10, 4, 2.0)
    known = y < 3
    start = fit_logistic([x[known]], [Problem(0, y[known], 4)], 1e-2, dtype=torch.float64)
    warm = LogisticProblems([x], [Problem(0, y, 4)], torch.float64).solve(1e-2, start)
    assert float(warm.objective) == pytest.approx(by_sklearn(x, y, 4, 1e-2)[0], rel=1e-4)


def test_path_chooses_as_sklearn_does() -> None:
    x, y = draw(400, 40, 4, 2.0, seed=3)
    held_x = x[250:]
    noise = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(5))
    sets = torch.stack([y, noise])
    penalties = (1e-4, 1.0, 1e-2, 1e-1, 1e-3)
    problems = LogisticProblems([x[:250]], [Problem(0, row[:250], 4) for row in sets], torch.float64)
    chosen, history = fit_path(problems, [held_x], list(sets[:, 250:]), penalties, tolerance=1e-6)
    for s in range(2):
        scores = {}
        for penalty in penalties:
            model = by_sklearn(x[:250], sets[s, :250], 4, penalty)[1]
            scores[penalty] = log_loss(sets[s, 250:].numpy(), model.predict_proba(held_x.double().numpy()))
        best = min(scores, key=scores.__getitem__)
        assert float(chosen.penalty[s]) == pytest.approx(best)
        for row, penalty in zip(history[:, s].tolist(), sorted(penalties, reverse=True), strict=False):
            assert row == float("inf") or row == pytest.approx(scores[penalty], rel=1e-3)
    assert float(chosen.penalty[0]) < float(chosen.penalty[1])
    cold = solve_grid(x[None, :250], sets[:, :250], 4, chosen.penalty, dtype=torch.float64, tolerance=1e-6)
    torch.testing.assert_close(chosen.objective, cold.objective[0], rtol=1e-6, atol=0)


def test_path_ends_after_two_rises() -> None:
    x, y = draw(60, 40, 3, 0.0, seed=1)
    problems = LogisticProblems([x[:40]], [Problem(0, y[:40], 3)])
    _, history = fit_path(problems, [x[40:]], [y[40:]], (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4))
    assert 3 <= len(history) < 6


def test_iteration_limit_is_reported() -> None:
    x, y = CASES["easy"]()
    fit = solve_grid(x[None], y[None], 5, 1e-4, max_iterations=2)
    assert not bool(fit.converged)
    assert int(fit.iterations) == 2
    assert float(fit.gradient_norm) > 1e-4


@pytest.mark.parametrize(
    ("features", "labels", "classes", "penalty", "text"),
    [
        (torch.zeros(1, 4, 2), torch.zeros(1, 4).long(), 1, 1.0, "expected two or more classes, found 1"),
        (torch.zeros(1, 0, 2), torch.zeros(1, 0).long(), 2, 1.0, "at least one row"),
        (torch.zeros(1, 4, 2), torch.zeros(1, 3).long(), 2, 1.0, "the same n"),
        (torch.zeros(1, 4, 2), torch.full((1, 4), 2), 2, 1.0, "expected labels 0…1, found 2…2"),
        (torch.full((1, 4, 2), torch.nan), torch.zeros(1, 4).long(), 2, 1.0, "must be finite"),
        (torch.zeros(1, 4, 2), torch.zeros(1, 4).long(), 2, 0.0, "must be a positive number, found 0.0"),
    ],
)
def test_refusals(features: Tensor, labels: Tensor, classes: int, penalty: float, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        solve_grid(features, labels, classes, penalty)


def test_empty_grid_is_refused() -> None:
    x, y = draw(50, 4, 3, 1.0)
    with pytest.raises(UsageError, match="at least one penalty"):
        fit_path(LogisticProblems([x], [Problem(0, y, 3)]), [x], [y], ())

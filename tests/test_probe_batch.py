"""Problems of every kind in one list: the same optima as each alone, whatever is padded; nobody waits for anybody."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one, run
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from trace_offline.analyzers import _probe_fit
from trace_offline.analyzers.probe import ProbeAnalyzer
from trace_offline.estimators import lbfgs
from trace_offline.estimators.lbfgs import Minimisation
from trace_offline.estimators.logistic import LogisticProblems, Problem, fit_logistic
from trace_offline.estimators.quasi_newton import MEMORY
from trace_offline.estimators.softmax_block import blocks_of

WIDTH = 12


def ragged() -> tuple[list[Tensor], list[Problem], Tensor]:
    """Matrices of 9 to 700 rows (the first with fewer rows than features), 2 to 6 classes, one of them absent."""
    generator = torch.Generator().manual_seed(0)
    features, problems = [], []
    for design, (n, kinds) in enumerate([(9, (2,)), (700, (6, 3)), (300, (2, 4)), (650, (5,)), (310, (3,))]):
        features.append(torch.randn(n, WIDTH, generator=generator) * (1 + design) + design)
        for classes in kinds:
            logits = features[-1] @ torch.randn(WIDTH, classes, generator=generator)
            gumbel = -torch.log(-torch.log(torch.rand(n, classes, generator=generator)))
            labels = (logits + 3 * gumbel).argmax(1)
            labels[:classes] = torch.arange(classes)
            problems.append(Problem(design, labels, classes))
    problems[1] = Problem(1, torch.where(problems[1].labels == 4, 5, problems[1].labels), 6)
    penalty = torch.tensor([0.3, 1e-3, 1e-2, 1e-1, 1e-4, 1e-2, 1.0], dtype=torch.float64)
    return features, problems, penalty


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("waste", [0.0, 0.1, 1e9])
def test_a_list_of_unlike_problems_has_the_optima_of_each_alone(waste: float, dtype: torch.dtype) -> None:
    features, problems, penalty = ragged()
    ready = LogisticProblems(features, problems, dtype, waste)
    assert len(ready.blocks) == (1 if waste > 1 else 7 if waste == 0.0 else len(ready.blocks))
    fit = ready.solve(penalty, tolerance=1e-6)
    for place, problem in enumerate(problems):
        x, y = features[problem.design], problem.labels
        alone = fit_logistic(
            [x], [Problem(0, y, problem.n_classes)], float(penalty[place]), dtype=dtype, tolerance=1e-6
        )
        assert float(fit.objective[place]) == pytest.approx(float(alone.objective), rel=1e-5)
        assert fit.weights[place].shape == (problem.n_classes, WIDTH)
        torch.testing.assert_close(
            fit.log_probabilities(x, place).exp(), alone.log_probabilities(x, 0).exp(), atol=5e-3, rtol=0
        )
        assert bool(fit.converged[place])
        found = len(y.unique())
        strength = (2.0 if found == 2 else 1.0) / (len(y) * float(penalty[place]))
        model = LogisticRegression(C=strength, solver="newton-cg", tol=1e-9, max_iter=2000).fit(x.double().numpy(), y)
        p = fit.log_probabilities(x, place).exp()[:, y.unique()]
        np.testing.assert_allclose(p.numpy(), model.predict_proba(x.double().numpy()), atol=6e-3)


@pytest.mark.parametrize("waste", [0.0, 1e9])
def test_what_was_learned_at_one_penalty_serves_at_the_next(waste: float) -> None:
    """The same optima, whatever is padded; nothing from elsewhere is taken for it."""
    features, problems, penalty = ragged()
    ready = LogisticProblems(features, problems, torch.float64, waste)
    first = ready.solve(penalty * 30, tolerance=1e-4, exact=False, learn=True)
    exact = ready.solve(penalty, tolerance=1e-8)
    anew = ready.solve(penalty, replace(first, learned=()), 1e-4, exact=False)
    after = ready.solve(penalty, first, 1e-4, exact=False)
    for place in range(len(problems)):
        assert float(after.objective[place]) == pytest.approx(float(exact.objective[place]), rel=1e-5)
    assert not torch.equal(after.iterations, anew.iterations)
    elsewhere = LogisticProblems([x * 1.0 for x in features], problems, torch.float64, waste)
    assert torch.equal(elsewhere.solve(penalty, first, 1e-4, exact=False).iterations, anew.iterations)


def test_a_path_takes_fewer_iterations_with_what_it_learned() -> None:
    """Where the preconditioner is coarse: many features, hard labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 200, generator=generator) * torch.linspace(2, 0.2, 200)
    y = (x @ torch.randn(200, 8, generator=generator)).argmax(1)
    ready = LogisticProblems([x], [Problem(0, y, 8)])
    first = ready.solve(1e-2, tolerance=1e-2, exact=False, learn=True)
    anew = ready.solve(1e-3, replace(first, learned=()), 1e-2, exact=False)
    after = ready.solve(1e-3, first, 1e-2, exact=False)
    assert int(after.iterations[0]) <= 0.75 * int(anew.iterations[0])
    assert float(after.objective[0]) == pytest.approx(float(anew.objective[0]), rel=1e-3)


def test_pairs_are_steps_and_changes_of_the_gradient() -> None:
    """Their sums lead from the start to the end; at another penalty λ the gradient of its term changes by Δλ s."""
    x, y = ragged()[0][1].double(), ragged()[1][1].labels
    ready = LogisticProblems([x], [Problem(0, y, 6)], torch.float64)
    fit = ready.solve(0.1, tolerance=1e-3, exact=False, learn=True)
    assert 2 < int(fit.iterations[0]) <= MEMORY
    learned, design = fit.learned[0], ready.designs[0]
    assert learned is not None
    end = torch.cat([fit.weights[0] @ design.basis, (fit.intercepts[0] + fit.weights[0] @ design.mean)[:, None]], 1)
    start = torch.zeros_like(end)
    start[:, -1] = torch.bincount(y, minlength=6).double().div(len(y)).log().clamp_min(-40)

    def gradient(theta: Tensor) -> Tensor:
        theta = theta.clone().requires_grad_()
        nll = torch.nn.functional.cross_entropy((theta @ design.data).T, y)
        found: Tensor = torch.autograd.grad(nll + 0.05 * theta[:, :-1].square().sum(), theta)[0]
        return found

    moved = (end - start)[:, :-1]
    torch.testing.assert_close(learned.steps.sum(0)[:, :-1].double(), moved, rtol=1e-4, atol=1e-6)
    changed = (gradient(end) - gradient(start))[:, :-1]
    torch.testing.assert_close(learned.changes.sum(0)[:, :-1].double(), changed, rtol=1e-4, atol=1e-6)
    block = ready.blocks[0]
    block.penalty = torch.tensor([0.03], dtype=torch.float64)
    there = ready._recalled(block, torch.tensor([0]), fit)
    assert there is not None
    torch.testing.assert_close(there.changes[0, ..., :-1], learned.changes[..., :-1] - 0.07 * learned.steps[..., :-1])
    assert torch.equal(there.changes[0, ..., -1], learned.changes[..., -1])


def test_leaving_out_and_starting_warm_in_a_padded_block() -> None:
    features, problems, penalty = ragged()
    ready = LogisticProblems(features, problems, torch.float64, waste=1e9)
    start = ready.solve(penalty * 5, tolerance=1e-6)
    active = torch.tensor([True, False, True, True, False, False, True])
    warm = ready.solve(penalty, start, 1e-6, active=active)
    cold = ready.solve(penalty, tolerance=1e-6)
    for place, moved in enumerate(active.tolist()):
        other = cold if moved else start
        assert float(warm.objective[place]) == pytest.approx(float(other.objective[place]), rel=1e-6)
        assert float(warm.penalty[place]) == float(other.penalty[place])
    assert torch.equal(warm.weights[1], start.weights[1])


def test_blocks_hold_like_problems_and_waste_little() -> None:
    shapes = [(1000, 10, 48), (980, 10, 48), (300, 9, 48), (1010, 9, 47), (290, 9, 48), (40, 2, 30)]
    blocks = blocks_of(shapes, 0.1)
    assert sorted(sorted(block) for block in blocks) == [[0, 1, 3], [2, 4], [5]]
    for block in blocks:
        n, k, r = (max(shapes[place][i] for place in block) for i in range(3))
        assert len(block) * n * k <= 1.1 * sum(shapes[place][0] * shapes[place][1] for place in block)
        assert len(block) * k * r <= 1.1 * sum(shapes[place][1] * shapes[place][2] for place in block)
    assert len(blocks_of(shapes, 1e9)) == 1
    assert len(blocks_of([(100, 15, 50)] * 200, 1e9)) == -(-200 // ((1 << 25) // 750**2))  # memory of preconditioners


def test_blocks_advance_in_turn_and_what_is_done_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    features, problems, penalty = ragged()
    turns: list[tuple[int, int]] = []
    advance = Minimisation.advance

    def watched(self: Minimisation) -> bool:
        turns.append((id(self), len(self._work.which)))
        return advance(self)

    monkeypatch.setattr(lbfgs.Minimisation, "advance", watched)
    ready = LogisticProblems(features, problems, waste=0.1)
    fit = ready.solve(penalty)
    blocks = len(ready.blocks)
    assert blocks > 2
    assert len({who for who, _ in turns[:blocks]}) == blocks  # every block has had its turn before any has its second
    assert [who for who, _ in turns[:blocks]] == [who for who, _ in turns[blocks : 2 * blocks]]
    turns.clear()
    LogisticProblems(features, problems, waste=1e9).solve(penalty)
    at_work = [count for _, count in turns]
    assert at_work[0] == 7
    assert at_work == sorted(at_work, reverse=True)
    assert sum(at_work) < 0.8 * 7 * len(at_work)
    assert int(fit.iterations.max()) > int(fit.iterations.min())


def annotated() -> tuple[FakeEvaluation, tuple[Tensor, ...]]:
    """Two tasks on other words, one with three classes and one with two, and a third whose words carry two labels."""
    rng = np.random.default_rng(0)
    rows, length = 100, 6
    ids = torch.from_numpy(rng.integers(0, 400, (rows, length)))
    tag = rng.integers(0, 3, (rows, length))
    words = [(r, t, t + 1, "abc"[tag[r, t]]) for r in range(rows) for t in range(length)]
    some = [(r, t, t + 1, "xy"[int(tag[r, t] > 0)]) for r in range(rows) for t in range(0, length, 2)]
    several = [(r, 0, 1, label) for r in range(rows) for label, k in (("p", 1), ("q", 2)) if tag[r, 0] in (0, k)]
    evaluation = FakeEvaluation(ids, {"half": some, "several": several, "tag": words})
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(rows, length, 8, generator=generator) for _ in range(2)]
    hidden[1][..., :3] += 2.0 * torch.nn.functional.one_hot(torch.from_numpy(tag), 3)
    return evaluation, tuple(hidden)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_all_layers_tasks_and_repetitions_are_one_list(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation, hidden = annotated()
    calls: list[int] = []
    name, place = ("fit_path", 0) if kind == "linear" else ("fit_mlp", 1)
    real = getattr(_probe_fit, name)

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(len(given[0].problems if place == 0 else given[1]))
        return real(*given, **options)

    monkeypatch.setattr(_probe_fit, name, counted)
    options = {"kind": kind, "repeats": 2, "random_baseline": True, "hidden_width": 4, "max_passes": 3}
    run(ProbeAnalyzer(), evaluation, hidden=hidden, penalties=[0.1], **options)
    # 2 layers × (real, control) of two tasks with one label, of 2 labels of the third; random vectors: real only
    assert calls == [2 * (2 * (2 + 2 + 4) + 1 + 1 + 2)]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_tasks_together_have_the_numbers_of_each_alone(kind: str) -> None:
    evaluation, hidden = annotated()
    options = {"kind": kind, "repeats": 2 if kind == "linear" else 1, "codelength": True, "random_baseline": True}
    options |= {
        "hidden_width": 8,
        "max_passes": 10,
        "tolerance": 1e-6,
        "penalties": [0.1, 0.01],
        "block_fractions": [0.1, 0.3],
    }
    together, arrays = run(ProbeAnalyzer(), evaluation, hidden=hidden, **options)
    count = 0
    for task in evaluation.tasks:
        alone, own = run(ProbeAnalyzer(), evaluation, hidden=hidden, tasks=[task], **options)
        count += len(alone)
        for item in alone:
            where = {"layer": item.layer, "task": task, "label": item.label}
            same = one(together, item.metric, **where)
            assert same.reason == item.reason
            assert same.n == item.n
            expected = item.value if item.value is None else pytest.approx(item.value, rel=2e-3, abs=1e-6)
            assert same.value == expected, item
        assert [a for a in arrays if a.task == task] == own
    assert count == len(together)


def test_layers_on_the_same_words_share_their_products() -> None:
    """Two tasks that label the same words are problems on one feature matrix."""
    evaluation, hidden = annotated()
    evaluation.annotations["copy"] = [(*word[:3], word[3].upper()) for word in evaluation.annotations["tag"]]
    evaluation.tasks = ("copy", "tag")
    designs: list[int] = []
    real = _probe_fit.LogisticProblems

    def counted(features: Any, *given: Any, **options: Any) -> Any:
        designs.append(len(features))
        return real(features, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_probe_fit, "LogisticProblems", counted)
        found, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden)
    assert designs == [2, 2]
    for layer in (0, 1):
        first, second = (one(found, "accuracy", layer=layer, task=task).value for task in ("copy", "tag"))
        assert first == second

"""Ratios of weighted means with intervals that cover, and the analyzer against dense Hessians of both splits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one
from test_analyzer_hessian import Broken, dense_reference, evaluation, tied_net
from torch import nn

from trace_offline.activations.model import ModelView
from trace_offline.analyzers.base import Context
from trace_offline.analyzers.train_heldout_curvature import TrainHeldoutCurvatureAnalyzer
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import parse_params
from trace_offline.core.types import Measurement
from trace_offline.estimators.hvp import HessianOperator
from trace_offline.estimators.log_ratio import Contributions, jackknife_variance, log_ratio


def sample(rng: np.random.Generator, mean: float, groups: int, rows: np.ndarray | None = None) -> Contributions:
    """Groups of two observations that share half of their scatter; ``rows``: noise of random vectors."""
    group = np.repeat(np.arange(groups), 2)
    weights = rng.integers(5, 30, 2 * groups).astype(float)
    x = mean * (1 + 0.3 * rng.normal(size=groups)[group] + 0.3 * rng.normal(size=2 * groups))
    added = weights * x / weights.sum()
    if rows is not None:
        added = added * (1 + rows[:, None])
    return Contributions(added, weights, group)


@pytest.mark.parametrize("noise", [False, True])
def test_nominal_95_percent_intervals_cover(noise: bool) -> None:
    hits = []
    rng = np.random.default_rng(0)
    for _ in range(400):
        rows = 0.1 * rng.normal(size=10) if noise else None
        own = None if rows is None else rows + 0.05 * rng.normal(size=10)
        found = log_ratio(sample(rng, 3.0, 16, own), sample(rng, 2.0, 16, rows))
        hits.append(found.lower < 1.5 < found.upper)
    assert 0.90 <= np.mean(hits) <= 0.98


def test_closed_forms() -> None:
    equal = Contributions(np.array([1.0, 2.0, 3.0]) / 3, np.ones(3), np.arange(3))
    assert equal.value == pytest.approx(2)
    np.testing.assert_allclose(equal.without_group(), [2.5, 2.0, 1.5])
    assert equal.stderr == pytest.approx(np.std([1, 2, 3], ddof=1) / np.sqrt(3))
    assert jackknife_variance(np.array([2.5, 2.0, 1.5])) == pytest.approx(1 / 3)
    weighted = Contributions(np.array([1 * 4.0, 3 * 2.0]) / 4, np.array([1.0, 3.0]), np.array([7, 9]))
    np.testing.assert_allclose(weighted.without_group(), [2.0, 4.0])
    same = log_ratio(equal, equal)
    assert same.value == 1.0
    constant = Contributions(np.full(4, 0.5), np.ones(4), np.arange(4))
    assert (log_ratio(constant, constant).lower, log_ratio(constant, constant).stderr) == (1.0, 0.0)
    paired = np.array([1.0, 2.0, 4.0])[:, None] * np.ones((1, 4)) / 4
    noise = log_ratio(
        Contributions(3 * paired, np.ones(4), np.arange(4)), Contributions(paired, np.ones(4), np.arange(4))
    )
    assert (noise.value, noise.stderr) == (pytest.approx(3.0), pytest.approx(0.0, abs=1e-12))


def test_bad_input_is_explained() -> None:
    good = Contributions(np.ones(3) / 3, np.ones(3), np.arange(3))
    single = Contributions(np.ones(3) / 3, np.ones(3), np.zeros(3))
    assert single.stderr is None
    with pytest.raises(ValueError, match="at least two groups"):
        log_ratio(good, single)
    with pytest.raises(ValueError, match="as many random vectors on either side, found 2 and 3"):
        log_ratio(*(Contributions(np.ones((p, 3)) / 3, np.ones(3), np.arange(3)) for p in (2, 3)))
    with pytest.raises(ZeroDivisionError, match="not positive beyond its error"):
        log_ratio(good, Contributions(-np.ones(3), np.ones(3), np.arange(3)))


def test_forms_are_the_quadratic_forms_of_each_loss() -> None:
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    losses = [lambda: weight[0] ** 2, lambda: weight[0] * weight[1] ** 2]
    vector = torch.tensor([1.0, 3.0], dtype=torch.float64)
    for keep in (True, False):
        with HessianOperator(losses, [weight], keep_graphs=keep) as hessian:
            torch.testing.assert_close(hessian.forms(vector), torch.tensor([2.0, 2 * 12 + 18.0], dtype=torch.float64))
            assert hessian.products == 1
            assert hessian.losses == (1.0, 4.0)


def analyze(
    module: nn.Module, data: FakeEvaluation, heldout: FakeEvaluation | None = None, **params: Any
) -> list[Measurement]:
    chosen = parse_params(TrainHeldoutCurvatureAnalyzer.Params, "train_heldout_curvature", params)
    view = ModelView(module, None, "cpu", "float32")
    context = Context(view, data, chosen, 0, heldout=heldout)  # type: ignore[arg-type]
    assert TrainHeldoutCurvatureAnalyzer().collectors(context) == {}
    found = list(TrainHeldoutCurvatureAnalyzer().measure(context))
    for item in found:
        assert isinstance(item, Measurement)
        assert item.metric in {spec.name for spec in TrainHeldoutCurvatureAnalyzer.metrics}
        assert (item.value is None) == (item.reason is not None)
        assert item.value is None or np.isfinite(item.value)
    return found


def halves(rows: int = 20) -> FakeEvaluation:
    data = evaluation(rows=rows)
    data.split = np.arange(rows) % 2
    return data


def test_both_sides_against_dense_hessians() -> None:
    data = halves()
    found = analyze(tied_net(), data, dtype="float64", max_sequences=10, trace_probes=40, tolerance=1e-8)
    traces, tops = [], []
    for number, label in enumerate(("train", "heldout")):
        own = np.flatnonzero(data.split == number)
        part = FakeEvaluation(data.input_ids[own], attention_mask=data.attention_mask[own])
        dense, _, loss = dense_reference(tied_net(), part)
        traces.append(np.trace(dense))
        tops.append(np.linalg.eigvalsh(dense)[-1])
        assert one(found, "batch_loss", label=label).value == pytest.approx(loss, rel=1e-6)
        trace = one(found, "trace", label=label)
        assert trace.n == 10
        assert abs(trace.value - traces[-1]) < 3 * trace.stderr < 0.8 * traces[-1]
        assert one(found, "top_eigenvalue", label=label).value == pytest.approx(tops[-1], rel=1e-6)
        assert one(found, "sequences", label=label).value == 10
    for name, truth, slack in (("trace", traces, 0.1), ("top_eigenvalue", tops, 1e-6)):
        ratio, low, high = (one(found, f"{name}_ratio{end}").value for end in ("", "_lower", "_upper"))
        assert ratio == pytest.approx(truth[1] / truth[0], rel=slack)
        assert low < ratio < high
        assert one(found, f"{name}_ratio").stderr > 0


def test_two_evaluation_sets_give_what_their_rows_give_as_splits_of_one() -> None:
    data = halves()
    first, second = (
        FakeEvaluation(data.input_ids[own], attention_mask=data.attention_mask[own], group=100 * own)
        for own in (np.flatnonzero(data.split == number) for number in (0, 1))
    )
    # a split of the first set means nothing where there is a second one
    first.split = np.zeros(10, dtype=int)
    apart = analyze(tied_net(), first, second, dtype="float64", max_sequences=10)
    together = analyze(tied_net(), data, dtype="float64", max_sequences=10)
    for item in together:
        assert one(apart, item.metric, label=item.label).value == pytest.approx(item.value, rel=1e-6), item.metric
        if item.stderr is not None:
            assert one(apart, item.metric, label=item.label).stderr == pytest.approx(item.stderr, rel=1e-6), item.metric
    losses = [one(apart, "batch_loss", label=label).value for label in ("train", "heldout")]
    ratio, low, high = (one(apart, f"batch_loss_ratio{end}").value for end in ("", "_lower", "_upper"))
    assert ratio == pytest.approx(losses[1] / losses[0])
    assert low < ratio < high
    swapped = analyze(tied_net(), second, first, dtype="float64", max_sequences=10)
    assert one(swapped, "trace_ratio").value == pytest.approx(1 / one(apart, "trace_ratio").value, rel=1e-3)


def test_sequences_on_both_sides_are_counted() -> None:
    data = evaluation(rows=6)
    other = FakeEvaluation(
        torch.cat([data.input_ids[:2], data.input_ids[2:].flip(1)]), attention_mask=data.attention_mask
    )
    shared = one(analyze(tied_net(), data, other), "shared_sequences")
    assert (shared.value, shared.n) == (2, 6)


def test_first_order_error_of_the_top_eigenvalue_is_that_of_the_jackknife_done_in_full() -> None:
    data = halves(rows=60)
    found = one(analyze(tied_net(), data, max_sequences=30), "top_eigenvalue", label="train")
    own = np.flatnonzero(data.split == 0)
    values = []
    for left in range(len(own)):
        index = np.delete(own, left)
        part = FakeEvaluation(data.input_ids[index], attention_mask=data.attention_mask[index])
        values.append(np.linalg.eigvalsh(dense_reference(tied_net(), part)[0])[-1])
    assert found.stderr == pytest.approx(np.sqrt(jackknife_variance(np.array(values))), rel=0.15)


def test_equal_sides_have_ratio_one_and_fewer_rows_decide() -> None:
    data = evaluation(rows=5)
    twice = FakeEvaluation(
        torch.cat([data.input_ids] * 2), attention_mask=torch.cat([data.attention_mask] * 2),
        split=np.repeat([0, 1], 5),
    )  # fmt: skip
    found = analyze(tied_net(), twice, max_sequences=5)
    assert one(found, "trace_ratio").value == pytest.approx(1, abs=1e-4)
    assert one(found, "top_eigenvalue_ratio").value == pytest.approx(1, abs=1e-4)
    uneven = halves()
    uneven.split = np.array([0] * 4 + [1] * 16)
    counts = analyze(tied_net(), uneven)
    assert one(counts, "sequences", label="train").value == one(counts, "sequences", label="heldout").value == 4


def test_what_has_no_meaning_has_a_reason() -> None:
    with pytest.raises(
        NotApplicable, match=r"nothing to compare: .* \(--heldout-set\), or save_evaluation_set a split"
    ):
        analyze(tied_net(), evaluation())
    data = halves()
    data.split = np.zeros(20, dtype=int)
    with pytest.raises(NotApplicable, match=r"no row of split 1 \(heldout\)"):
        analyze(tied_net(), data)
    data = halves()
    data.group = np.zeros(20, dtype=int)
    with pytest.raises(NotApplicable, match="the train rows come from one group"):
        analyze(tied_net(), data)
    assert "not finite" in one(analyze(Broken("nan"), halves()), "trace_ratio").reason
    flat = analyze(Broken("flat"), halves())
    assert one(flat, "trace_ratio").reason == "the trace is not positive beyond its error: a ratio has no meaning"
    short = analyze(tied_net(), halves(), max_steps=1)
    assert "did not converge" in one(short, "top_eigenvalue_ratio").reason

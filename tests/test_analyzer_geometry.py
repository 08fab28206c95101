"""The analyzer of geometry: its numbers on planted clouds, on real networks, and where there are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one, run
from series_fakes import view_of
from tiny_models import ARCHITECTURES, VOCABULARY

from trace_offline.activations.forward import run_pass
from trace_offline.analyzers.base import Context
from trace_offline.analyzers.geometry import GeometryAnalyzer
from trace_offline.core.errors import NotApplicable
from trace_offline.estimators.anisotropy import mean_cosine, top_dimension_share
from trace_offline.estimators.sparsity import gini, hoyer

METRICS = {spec.name for spec in GeometryAnalyzer.metrics}
SPECTRAL = {"effective_rank", "proportional_effective_rank", "stable_rank", "condition_number"}


def evaluation(n: int = 60, length: int = 8) -> FakeEvaluation:
    ids = torch.randint(3, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    mask = torch.arange(length) < torch.randint(3, length + 1, (n, 1), generator=torch.Generator().manual_seed(1))
    fake = FakeEvaluation(ids, attention_mask=mask)
    fake.special_token_ids = (1,)  # type: ignore[attr-defined]
    return fake


def states(fake: FakeEvaluation, width: int = 6, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states with values that would ruin every number at padding and at special tokens; and which count."""
    hidden = torch.randn(*fake.input_ids.shape, width, generator=torch.Generator().manual_seed(seed)) + 0.5
    keep = fake.attention_mask & (fake.input_ids != 1)
    hidden[~keep] = torch.nan
    return hidden, keep


def test_numbers_are_those_of_the_definitions_on_all_tokens_that_count() -> None:
    fake = evaluation()
    hidden, keep = states(fake)
    results, arrays = run(GeometryAnalyzer(), fake, hidden=(hidden, 2 * hidden), top_dimensions=2)
    assert arrays == []
    assert len(results) == 2 * len(METRICS)
    points, clusters = hidden[keep], keep.nonzero()[:, 0].numpy()
    centred = points.double().numpy() - points.double().numpy().mean(0)
    singular = np.linalg.svd(centred, compute_uv=False)
    share = singular / singular.sum()
    rank = np.exp(-(share * np.log(share)).sum())
    expected = {
        "anisotropy": mean_cosine(points, clusters).value,
        "norm": np.linalg.norm(points.double().numpy(), axis=1).mean(),
        "norm_max_to_median": np.linalg.norm(points.numpy(), axis=1).max()
        / np.median(np.linalg.norm(points.numpy(), axis=1)),
        "top_dimension_share": top_dimension_share(points, 2).value,
        "effective_rank": rank,
        "proportional_effective_rank": rank / 6,
        "stable_rank": (singular**2).sum() / singular[0] ** 2,
        "condition_number": singular[0] / singular[-1],
        "gini": float(gini(points).mean()),
        "hoyer": float(hoyer(points).mean()),
    }
    assert set(expected) == METRICS
    for metric, value in expected.items():
        for layer in (0, 1):
            item = one(results, metric, layer=layer)
            scale = 2 if metric == "norm" and layer == 1 else 1
            assert item.value == pytest.approx(scale * value, rel=1e-5), metric
            assert item.component == "residual"
            assert item.n == int(keep.sum())
            if metric != "norm_max_to_median":
                assert item.stderr is not None
                assert 0 < item.stderr < abs(item.value or 0)


def test_jackknife_of_ranks_follows_new_samples() -> None:
    fake = evaluation(n=40)
    values: dict[str, list[float]] = {metric: [] for metric in SPECTRAL}
    errors: dict[str, list[float]] = {metric: [] for metric in SPECTRAL}
    for seed in range(60):
        hidden, _ = states(fake, seed=seed)
        results, _ = run(GeometryAnalyzer(), fake, hidden=(hidden * torch.tensor([9.0, 7, 5, 3, 2, 1]),))
        for metric in SPECTRAL:
            item = one(results, metric, layer=0)
            values[metric].append(item.value or 0)
            errors[metric].append(item.stderr or 0)
    for metric in SPECTRAL:
        assert np.sqrt(np.mean(np.square(errors[metric]))) == pytest.approx(np.std(values[metric]), rel=0.35), metric


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture(kind: str) -> None:
    fake, analyzer, view = evaluation(), GeometryAnalyzer(), view_of(ARCHITECTURES[kind]())
    context = Context(view, fake, analyzer.Params(), 0)  # type: ignore[arg-type]
    collectors = dict(analyzer.collectors(context))
    assert run_pass(view, fake, collectors) == {}
    context.collected = {name: collector.finish() for name, collector in collectors.items()}
    results: list[Any] = list(analyzer.measure(context))
    assert {(m.metric, m.layer) for m in results} == {(metric, layer) for metric in METRICS for layer in range(4)}
    assert all(m.value is not None for m in results if m.metric != "condition_number")
    assert all(0 <= m.value <= 1 for m in results if m.metric in ("gini", "hoyer", "proportional_effective_rank"))


def test_what_has_no_meaning_has_a_reason() -> None:
    fake = evaluation()
    hidden, keep = states(fake)
    constant = torch.where(keep[..., None], torch.ones_like(hidden), torch.nan)
    zero = torch.zeros_like(hidden)
    some_zero = hidden.clone()
    some_zero[keep.nonzero()[:5, 0], keep.nonzero()[:5, 1]] = 0
    flat = hidden.clone()
    flat[..., 0] = flat[..., 1]
    broken = hidden.clone()
    broken[keep.nonzero()[3, 0], keep.nonzero()[3, 1], 2] = torch.inf
    results, _ = run(GeometryAnalyzer(), fake, hidden=(constant, zero, some_zero, flat, broken))
    n = int(keep.sum())
    assert one(results, "anisotropy", layer=0).value == pytest.approx(1.0)
    assert one(results, "gini", layer=0).value == pytest.approx(0.0, abs=1e-12)
    for metric in SPECTRAL:
        assert "all points coincide" in str(one(results, metric, layer=0).reason)
        assert one(results, metric, layer=1).value is None
    assert one(results, "anisotropy", layer=1).reason == "all hidden states are 0"
    assert one(results, "norm", layer=1).value == 0.0
    assert one(results, "norm_max_to_median", layer=1).reason == "at least half of the points are 0"
    assert one(results, "anisotropy", layer=2).n == n - 5
    assert one(results, "norm", layer=2).n == n
    assert "not of full rank" in str(one(results, "condition_number", layer=3).reason)
    assert one(results, "effective_rank", layer=3).value is not None
    for metric in METRICS:
        assert one(results, metric, layer=4).reason == f"the hidden states of 1 of {n} tokens are not finite"
    wide = torch.randn(*fake.input_ids.shape, 2 * n, generator=torch.Generator().manual_seed(0))
    results, _ = run(GeometryAnalyzer(), fake, hidden=(wide,), top_dimensions=5 * n)
    assert one(results, "condition_number", layer=0).reason == f"{n} tokens do not fill {2 * n} dimensions"
    assert one(results, "top_dimension_share", layer=0).value == pytest.approx(1.0)


def test_not_applicable_without_layers_or_tokens() -> None:
    fake = evaluation()
    hidden, _ = states(fake)
    with pytest.raises(NotApplicable, match="name its blocks with --blocks"):
        run(GeometryAnalyzer(), fake, hidden=(hidden,), n_layers=None)
    with pytest.raises(NotApplicable, match="at least 4"):
        run(GeometryAnalyzer(), evaluation(n=1, length=3), hidden=(hidden[:1, :3],))

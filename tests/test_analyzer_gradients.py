"""The analyzer of gradients: against gradients of the whole loss, by class, and where there is nothing to measure."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation
from scipy.linalg import block_diag
from series_fakes import view_of
from tiny_models import ARCHITECTURES, VOCABULARY, unknown_net
from torch import Tensor, nn

from trace_offline.analyzers import _gradient_parts as parts_of
from trace_offline.analyzers.base import Context
from trace_offline.analyzers.gradients import GradientsAnalyzer
from trace_offline.core.errors import NotApplicable, UsageError
from trace_offline.core.params import parse_params
from trace_offline.core.types import Measurement

N, T = 30, 9
GIB = 1 << 30


def evaluation(kind: str = "gpt2", **more: Any) -> FakeEvaluation:
    """Texts of different length with two tasks: every token's parity, and some tokens' thirds (spans of two)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (N, T), generator=generator)
    lengths = torch.randint(4, T + 1, (N,), generator=generator)
    mask = torch.arange(T) < lengths[:, None]
    parity = [
        (row, t, t + 1, "odd" if ids[row, t] % 2 else "even") for row in range(N) for t in range(int(lengths[row]))
    ]
    thirds = [(row, 1, 3, "abc"[int(ids[row, 1]) % 3]) for row in range(N) if row % 2]
    if kind == "bert":
        hidden = (torch.rand(ids.shape, generator=generator) < 0.4) & mask
        more |= {"labels": ids.masked_fill(~hidden, -100), "labels_shifted": False, "objective": "masked_lm"}
        ids = ids.masked_fill(hidden, 3)
    return FakeEvaluation(ids, {"parity": parity, "thirds": thirds}, attention_mask=mask, **more)


def measure(module: nn.Module, fake: Any, **params: Any) -> list[Measurement]:
    analyzer = GradientsAnalyzer()
    chosen = parse_params(analyzer.Params, analyzer.name, {"min_class_targets": 3} | params)
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    context = Context(view_of(module, dtype), fake, chosen, 0)  # type: ignore[arg-type]
    assert analyzer.collectors(context) == {}
    results: list[Any] = list(analyzer.measure(context))
    known = {spec.name for spec in analyzer.metrics}
    keys = [(m.metric, m.layer, m.component, m.task, m.label) for m in results]
    assert len(keys) == len(set(keys))
    for item in results:
        assert item.metric in known
        assert (item.value is None) == (item.reason is not None), item
        assert item.value is None or math.isfinite(item.value)
        assert item.stderr is None or math.isfinite(item.stderr)
    return results


def pick(results: list[Measurement], metric: str, component: str = "all", **where: Any) -> Measurement:
    fields = {"layer": None, "task": None, "component": component} | where
    found = [m for m in results if m.metric == metric and all(getattr(m, k) == v for k, v in fields.items())]
    assert len(found) == 1, found
    return found[0]


def gradient(
    module: nn.Module, fake: Any, keep: Tensor | None = None, rows: slice | list[int] = slice(None)
) -> dict[str, Tensor]:
    """Gradient of the mean loss over the kept targets, by the plainest route, in float64."""
    wide = copy.deepcopy(module).double()
    tokens = fake.tokens(0, N)
    ids, mask, targets = tokens.input_ids[rows], tokens.attention_mask[rows], tokens.targets[rows]
    output = wide(input_ids=ids, attention_mask=mask.long()).logits
    counted = targets != -100
    if keep is not None:
        counted = counted & keep[rows]
    nn.functional.cross_entropy(output[counted], targets[counted]).backward()
    return {name: p.grad for name, p in wide.named_parameters() if p.grad is not None}


def flat(gradients: dict[str, Tensor], part: str = "") -> Tensor:
    return torch.cat([g.reshape(-1) for name, g in gradients.items() if part in name])


def class_mask(fake: Any, task: str, label: str | None) -> Tensor:
    """Which targets belong to a class: written out span by span."""
    mask = torch.zeros(N, T, dtype=torch.bool)
    for row, start, end, name in fake.annotations[task]:
        for t in range(start, end):
            place = t - 1 if fake.labels_shifted else t
            if place >= 0 and name == (label or name):
                mask[row, place] = True
    return mask


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_numbers_are_those_of_the_gradient_of_the_mean_loss(kind: str) -> None:
    module, fake = ARCHITECTURES[kind](), evaluation(kind)
    results = measure(module, fake)
    whole = gradient(module, fake)
    norm = pick(results, "gradient_norm")
    assert norm.value == pytest.approx(float(flat(whole).norm()), rel=1e-4)
    assert norm.n == N
    assert norm.stderr is not None
    assert 0 < norm.stderr < (norm.value or 0)
    names = {"gpt2": "h.1.mlp", "gpt_neox": "layers.1.mlp", "llama_gqa": "layers.1.mlp", "opt": "layers.1.fc"}
    if kind in names:
        part = pick(results, "gradient_norm", "mlp", layer=2)
        assert part.value == pytest.approx(float(flat(whole, names[kind]).norm()), rel=1e-4)
    squares = [m.value or 0 for m in results if m.metric == "gradient_norm" and m.component != "all"]
    assert math.hypot(*squares) == pytest.approx(norm.value, rel=1e-6)
    for task, label in (("parity", "odd"), ("thirds", "b")):
        item = pick(results, "class_gradient_norm", task=task, label=label)
        mask = class_mask(fake, task, label)
        assert item.value == pytest.approx(float(flat(gradient(module, fake, mask)).norm()), rel=1e-4)
        assert item.n == int((mask & (fake.tokens(0, N).targets != -100)).sum())


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_cosines_are_those_of_the_gradients(kind: str) -> None:
    module, fake = ARCHITECTURES[kind](), evaluation(kind)
    results = measure(module, fake, min_class_targets=1)

    def of(task: str, label: str | None) -> Tensor:
        return flat(gradient(module, fake, class_mask(fake, task, label)))

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / a.norm() / b.norm())

    pairs = [("parity", "even", "parity", "odd"), ("thirds", "a", "thirds", "c"), ("parity", None, "thirds", None)]
    for task, label, other_task, other in pairs:
        name = f"{label}|{other}" if label else f"{task}|{other_task}"
        item = pick(results, "gradient_cosine", task=task if label else None, label=name)
        assert item.value == pytest.approx(cosine(of(task, label), of(other_task, other)), abs=1e-5)
        assert item.stderr is not None
        assert item.stderr > 0
    count = len([m for m in results if m.metric == "gradient_cosine"])
    assert count == 1 + 3 + 1


def test_matrix_numbers_are_those_of_the_gradient() -> None:
    module, fake = ARCHITECTURES["gpt_neox"](), evaluation()
    results = measure(module, fake)
    whole = gradient(module, fake)
    mlp = [g.numpy() for name, g in whole.items() if "layers.1.mlp" in name]
    vector = np.abs(np.concatenate([g.ravel() for g in mlp]))
    singular = np.linalg.svd(block_diag(*[g for g in mlp if g.ndim == 2]), compute_uv=False)
    singular = singular[singular > 1e-9 * singular[0]]
    share = singular / singular.sum()
    rank = math.exp(-(share * np.log(share)).sum())
    expected = {
        "gradient_gini": np.abs(vector[:, None] - vector[None]).mean() / (2 * vector.mean()),
        "gradient_hoyer": (len(vector) ** 0.5 - vector.sum() / np.linalg.norm(vector)) / (len(vector) ** 0.5 - 1),
        "gradient_spectral_norm": singular[0],
        "gradient_stable_rank": (singular**2).sum() / singular[0] ** 2,
        "gradient_effective_rank": rank,
        "gradient_proportional_effective_rank": rank / 64,
    }
    for metric, value in expected.items():
        assert pick(results, metric, "mlp", layer=2).value == pytest.approx(value, rel=1e-3), metric
    assert "gradient_condition_number" in {m.metric for m in results}
    assert not [m for m in results if m.metric == "gradient_stable_rank" and m.component == "norm"]
    quiet = measure(module, fake, matrix_numbers=False)
    assert {m.metric for m in quiet} == {m.metric for m in results} - set(expected) - {"gradient_condition_number"}


def test_halves_follow_the_split_of_the_evaluation_set() -> None:
    split = (np.arange(N) % 3 == 0).astype(np.int8)
    module, fake = ARCHITECTURES["gpt2"](), evaluation(split=split)
    item = pick(measure(module, fake), "gradient_cosine_halves", label="train|test")
    sums = []
    for half in (0, 1):
        rows = np.flatnonzero(split == half).tolist()
        sums.append(flat(gradient(module, fake, rows=rows)))
    assert item.value == pytest.approx(float(sums[0] @ sums[1] / sums[0].norm() / sums[1].norm()), abs=1e-5)
    assert item.stderr is not None
    assert pick(measure(module, evaluation()), "gradient_cosine_halves").label == "half|half"


def test_parts_are_whole_documents_in_one_half() -> None:
    group = np.arange(N) // 3
    fake = evaluation(group=group, split=(group % 2).astype(np.int8))
    parts = parts_of.choose_parts(parts_of.Rows(fake), 200, 6, 0)  # type: ignore[arg-type]
    rows = [row for part in parts for row in part.rows]
    assert sorted(rows) == list(range(N))
    home: dict[int, int] = {}
    for index, part in enumerate(parts):
        assert {int(group[row]) % 2 for row in part.rows} == {part.half}
        for row in part.rows:
            assert home.setdefault(int(group[row]), index) == index
    assert len(parts) == 6
    few = parts_of.choose_parts(parts_of.Rows(fake), 7, 6, 0)  # type: ignore[arg-type]
    assert sum(len(part.rows) for part in few) == 7
    alone = parts_of.choose_parts(parts_of.Rows(evaluation(group=np.zeros(N, np.int64))), 200, 6, 0)  # type: ignore[arg-type]
    assert len(alone) == 6


def test_signal_to_noise_does_not_depend_on_how_much_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio of one sequence, from few and from many: within their errors."""
    module, fake = ARCHITECTURES["gpt_neox"](), evaluation()
    many, few = (
        pick(measure(module, fake, max_sequences=n, parts=p), "signal_to_noise") for n, p in ((30, 30), (30, 6))
    )
    assert many.value is not None
    assert few.value is not None
    assert many.value == pytest.approx(few.value, abs=3 * math.hypot(many.stderr or 0, few.stderr or 0))


def test_gradients_computed_twice_are_the_same_as_kept_ones() -> None:
    module, fake = ARCHITECTURES["gpt2"](), evaluation()
    size = sum(p.numel() for p in module.parameters())
    kept = measure(module, fake)
    again = measure(module, fake, max_memory_gb=4 * size * 30 / GIB)
    assert len(kept) == len(again)
    for one, other in zip(kept, again, strict=True):
        assert (one.metric, one.layer, one.component, one.label) == (
            other.metric,
            other.layer,
            other.component,
            other.label,
        )
        if one.metric != "gradient_condition_number":  # rounding decides the smallest singular values
            assert one.value == (None if other.value is None else pytest.approx(other.value, rel=1e-5, abs=1e-7))


def test_classes_that_do_not_fit_in_memory_are_left_out_with_a_reason() -> None:
    module, fake = ARCHITECTURES["gpt2"](), evaluation()
    size = sum(p.numel() for p in module.parameters())
    results = measure(module, fake, max_memory_gb=4 * size * 5 / GIB)
    assert "raise it, or lower max_classes" in str(
        pick(results, "class_gradient_norm", task="parity", label="odd").reason
    )
    assert pick(results, "gradient_norm").value == pytest.approx(pick(measure(module, fake), "gradient_norm").value)
    with pytest.raises(NotApplicable, match="set max_memory_gb to at least"):
        measure(module, fake, max_memory_gb=4 * size * 2 / GIB)


def test_the_network_is_left_as_it_was() -> None:
    module, fake = ARCHITECTURES["gpt2"](), evaluation()
    module.requires_grad_(False)
    frozen = measure(module, fake)
    assert not any(p.requires_grad for p in module.parameters())
    assert all(p.grad is None for p in module.parameters())
    module.requires_grad_(True)
    assert measure(module, fake) == frozen
    assert all(p.grad is None for p in module.parameters())


def test_half_precision_is_widened_and_layers_are_known() -> None:
    module, fake = ARCHITECTURES["gpt2"]().bfloat16(), evaluation()
    results = measure(module, fake, max_classes=0)
    expected = float(flat(gradient(module, fake)).norm())
    assert pick(results, "gradient_norm").value == pytest.approx(expected, rel=1e-4)
    assert {m.layer for m in results} == {None, 0, 1, 2, 3}
    assert not [m for m in results if m.task is not None]


def test_rare_classes_have_a_reason_and_only_the_most_frequent_are_measured() -> None:
    fake = evaluation()
    rare = measure(unknown_net(), fake, min_class_targets=40)
    assert "fewer than 40" in str(pick(rare, "class_gradient_norm", task="thirds", label="a").reason)
    assert not [m for m in rare if m.metric == "gradient_cosine" and m.task == "thirds"]
    one = measure(unknown_net(), fake, max_classes=1, tasks="parity")
    assert len([m for m in one if m.metric == "class_gradient_norm"]) == 1
    assert not [m for m in one if m.metric == "gradient_cosine"]


def test_numbers_that_do_not_exist_have_reasons() -> None:
    module, fake = unknown_net(), evaluation()
    with torch.no_grad():
        module.unembed.weight[0, 0] = math.nan
    broken = measure(module, fake)
    assert pick(broken, "gradient_norm").reason == "the gradient is not finite"
    assert pick(broken, "gradient_cosine", task="parity", label="even|odd").reason == "the gradient is not finite"
    few = measure(unknown_net(), fake, max_sequences=2)
    assert "independent parts in the two halves" in str(pick(few, "gradient_cosine_halves", label="half|half").reason)
    unused = unknown_net()
    unused.register_parameter("spare", nn.Parameter(torch.ones(3)))
    results = measure(unused, fake)
    spare = pick(results, "gradient_norm", "other")
    assert spare.value == 0.0
    assert "agree" in str(pick(results, "signal_to_noise", "other").reason)
    assert "one of the two gradients is 0" in str(pick(results, "gradient_cosine_halves", "other").reason)


def test_not_applicable_and_wrong_tasks() -> None:
    silent = evaluation(labels=torch.full((N, T), -100))
    with pytest.raises(NotApplicable, match="no position of the evaluation set has a target"):
        measure(unknown_net(), silent)
    with pytest.raises(UsageError, match=r'no task "party"\. Did you mean "parity"'):
        measure(unknown_net(), evaluation(), tasks="party")

"""The ``hessian`` analyzer: numbers against the dense Hessian, every architecture, what it leaves untouched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one
from curvature_cases import TiedNet, exact_effective_rank, exact_negative_share, generator
from tiny_models import ARCHITECTURES, VOCABULARY, unknown_net
from torch import nn
from torch.nn import functional

from trace_offline.activations.model import ModelView
from trace_offline.analyzers.base import Context
from trace_offline.analyzers.hessian import HessianAnalyzer
from trace_offline.core.errors import EvaluationSetError, NotApplicable
from trace_offline.core.params import parse_params
from trace_offline.core.types import Array, Measurement, Result

FEW = {"k": 3, "slq_probes": 3, "slq_steps": 4, "trace_probes": 5, "max_sequences": 4}


def evaluation(vocabulary: int = 7, rows: int = 12, length: int = 6, seed: int = 1, **options: Any) -> FakeEvaluation:
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator(seed))
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row in range(0, rows, 3):
        mask[row, length - 1 - row % 2 :] = False
    return FakeEvaluation(ids, attention_mask=mask, **options)


def tied_net(seed: int = 0) -> TiedNet:
    torch.manual_seed(seed)
    return TiedNet().eval()


def analyze(module: nn.Module, data: FakeEvaluation, *, seed: int = 0, **params: Any) -> list[Result]:
    analyzer = HessianAnalyzer()
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    view = ModelView(module, None, "cpu", dtype)
    chosen = parse_params(HessianAnalyzer.Params, "hessian", params)
    context = Context(view, data, chosen, seed)  # type: ignore[arg-type]
    assert analyzer.collectors(context) == {}
    return list(analyzer.measure(context))


def numbers(results: Iterable[Result]) -> list[Measurement]:
    found = [item for item in results if isinstance(item, Measurement)]
    for item in found:
        assert item.metric in {spec.name for spec in HessianAnalyzer.metrics}, item
        assert item.component == "all"
        assert (item.value is None) == (item.reason is not None), item
        assert item.value is None or np.isfinite(item.value), item
        assert item.stderr is None or np.isfinite(item.stderr), item
        assert item.n is not None
    return found


def value(results: Iterable[Result], metric: str, label: str | None = None) -> float:
    found = one(numbers(results), metric, label=label).value
    assert found is not None
    return found


def array(results: Iterable[Result], name: str, label: str | None = None) -> np.ndarray:
    found = [item for item in results if isinstance(item, Array) and item.name == name and item.label == label]
    assert len(found) == 1
    assert np.isfinite(found[0].values).all()
    return np.array(found[0].values)


def dense_reference(module: nn.Module, data: FakeEvaluation) -> tuple[np.ndarray, np.ndarray, float]:
    """Hessian, gradient and loss over all rows, in float64, by a code path of its own."""
    net = module.double()
    tokens = data.tokens(0, data.n_examples)
    named = {name: p.detach() for name, p in net.named_parameters()}

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([p.numel() for p in named.values()])
        given = {name: part.reshape(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}
        logits = torch.func.functional_call(net, given, (tokens.input_ids, tokens.attention_mask), tie_weights=True)
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens.targets.reshape(-1))

    flat = torch.cat([p.reshape(-1) for p in named.values()]).requires_grad_()
    value = loss(flat)
    gradient = torch.autograd.grad(value, flat)[0].numpy()
    return torch.autograd.functional.hessian(loss, flat.detach()).numpy(), gradient, float(value.detach())


@pytest.mark.parametrize(
    ("options", "rtol"),
    [
        ({"dtype": "float64", "tolerance": 1e-8}, 1e-6),
        ({}, 1e-3),
        ({"micro_batch": 5}, 1e-3),
        ({"micro_batch": 5, "max_graph_gb": 2e-5}, 1e-3),
    ],
    ids=["float64", "float32", "micro-batches", "rebuilt graphs"],
)
def test_numbers_against_the_dense_hessian(options: dict[str, Any], rtol: float) -> None:
    data = evaluation()
    dense, gradient, loss = dense_reference(tied_net(), data)
    exact = np.linalg.eigvalsh(dense)[::-1]
    found = analyze(tied_net(), data, max_sequences=100, slq_probes=12, slq_steps=15, **options)
    assert value(found, "parameters") == len(exact)
    assert value(found, "batch_loss") == pytest.approx(loss, rel=1e-5)
    assert value(found, "gradient_norm") == pytest.approx(np.linalg.norm(gradient), rel=1e-4)
    assert value(found, "gradient_curvature") == pytest.approx(
        gradient @ dense @ gradient / (gradient @ gradient), rel=1e-4
    )
    top = [value(found, "eigenvalue", str(rank)) for rank in range(1, 11)]
    np.testing.assert_allclose(top, exact[:10], rtol=rtol)
    np.testing.assert_allclose(value(found, "smallest_eigenvalue"), exact[-1], rtol=rtol)
    for label, number in [*((str(r + 1), top[r]) for r in range(10)), ("smallest", exact[-1])]:
        assert np.abs(exact - number).min() <= value(found, "residual", label) + 1e-5 * exact[0]
    trace = one(numbers(found), "trace")
    assert trace.n == 24
    assert abs(trace.value - exact.sum()) < 3 * trace.stderr
    square = one(numbers(found), "trace_square")
    assert abs(square.value - (exact**2).sum()) < 3 * square.stderr + 3e-3 * (exact**2).sum()
    ratio = one(numbers(found), "participation_ratio")
    assert abs(ratio.value - exact.sum() ** 2 / (exact**2).sum()) < 3 * ratio.stderr
    rank = one(numbers(found), "effective_rank")
    assert abs(rank.value - exact_effective_rank(exact)) < 3 * rank.stderr
    assert value(found, "hessian_gradient_norm") == pytest.approx(np.linalg.norm(dense @ gradient), rel=1e-4)
    top_vectors = np.linalg.eigh(dense)[1][:, ::-1][:, :10]
    share = ((top_vectors.T @ gradient) ** 2).sum() / (gradient @ gradient)
    assert value(found, "gradient_top_overlap") == pytest.approx(share, rel=2e-3)
    assert value(found, "gradient_top_overlap_chance") == 10 / len(exact)
    mass = one(numbers(found), "negative_mass")
    assert abs(mass.value - exact_negative_share(exact)) < 3 * mass.stderr
    grid, density = array(found, "density_grid"), array(found, "density")
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-5)
    assert len(exact) * np.trapezoid(grid * density, grid) == pytest.approx(exact.sum(), rel=0.15)
    fraction = float(np.mean(exact < -1e-5 * exact[0]))
    assert value(found, "negative_fraction_lower") - 0.1 <= fraction <= value(found, "negative_fraction_upper") + 0.1
    means = []
    for probe in range(1, 13):
        weights = array(found, "slq_weights", str(probe))
        assert weights.sum() == pytest.approx(1)
        means.append(weights @ array(found, "slq_nodes", str(probe)))
    assert len(exact) * np.trapezoid(grid * density, grid) == pytest.approx(len(exact) * np.mean(means), rel=1e-5)
    ritz = array(found, "ritz")
    assert len(ritz) == len(array(found, "ritz_residual"))
    assert value(found, "products") == len(ritz) + 12 * 15 + 12 + 1


def causal_reference(module: nn.Module, data: FakeEvaluation) -> float:
    """Mean loss of all rows by transformers-style full logits, no trimming, no batching."""
    tokens = data.tokens(0, data.n_examples)
    with torch.no_grad():
        output = module(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    return float(functional.cross_entropy(output.logits.transpose(1, 2), tokens.targets))


@pytest.mark.parametrize("name", [*ARCHITECTURES, "unknown"])
def test_every_architecture(name: str) -> None:
    module = unknown_net() if name == "unknown" else ARCHITECTURES[name]()
    data = evaluation(VOCABULARY, rows=4, length=9, labels_shifted=name != "bert")
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    for number, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    found = analyze(module, data, **FEW)
    assert all(item.value is not None for item in numbers(found))
    assert value(found, "batch_loss") == pytest.approx(causal_reference(module, data), rel=1e-5)
    assert value(found, "parameters") == sum(p.numel() for p in module.parameters())
    assert value(found, "eigenvalue", "1") >= value(found, "eigenvalue", "2") >= value(found, "eigenvalue", "3")
    assert value(found, "smallest_eigenvalue") <= value(found, "gradient_curvature") <= value(found, "eigenvalue", "1")
    assert value(found, "eigenvalue", "1") > 0
    # Nothing is left behind: weights, flags, gradients, mode.
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert [p.requires_grad for p in module.parameters()] == [i % 2 == 0 for i in range(len(list(module.parameters())))]
    assert all(p.grad is None for p in module.parameters())
    assert not module.training
    if name == "llama_gqa":
        module.set_attn_implementation("eager")
        eager = analyze(module, data, **FEW)
        for label in ("1", "2", "3"):
            assert value(eager, "eigenvalue", label) == pytest.approx(value(found, "eigenvalue", label), rel=1e-3)


def test_same_seed_same_numbers_and_same_rows_for_every_checkpoint() -> None:
    data = evaluation(rows=40)
    first, again, other = (analyze(tied_net(), data, seed=s, **FEW) for s in (5, 5, 6))
    assert first == again
    assert value(first, "batch_loss") != value(other, "batch_loss")
    assert one(numbers(first), "batch_loss").n == 4
    # Rows depend on the seed only: other weights see the same part.
    chosen = [rows_seen(tied_net(seed), data) for seed in (0, 1)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 4


def rows_seen(module: nn.Module, data: FakeEvaluation) -> list[tuple[int, ...]]:
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    analyze(module, data, seed=5, **FEW)
    handle.remove()
    return sorted(tuple(row.tolist()) for row in max(seen, key=len))


def test_max_tokens_bounds_the_part_and_rows_without_targets_are_passed_over() -> None:
    data = evaluation(rows=30)
    few = one(numbers(analyze(tied_net(), data, **FEW | {"max_sequences": 30, "max_tokens": 14})), "batch_loss")
    assert few.n == 2
    labels = torch.full_like(data.input_ids, -100)
    labels[7] = data.input_ids[7]
    single = FakeEvaluation(data.input_ids, labels=labels)
    assert one(numbers(analyze(tied_net(), single, **FEW)), "batch_loss").n == 1


def test_half_precision_is_widened_in_a_copy() -> None:
    module = tied_net().bfloat16()
    data = evaluation()
    found = analyze(module, data, **FEW)
    wide = analyze(tied_net().bfloat16().float(), data, **FEW)
    assert found == wide
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())


class Broken(nn.Module):
    """Logits by a function of one weight."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(7))
        self.kind = kind

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        shape = (*input_ids.shape, 7)
        if self.kind == "nan":
            return (self.weight * float("nan")).expand(shape)
        if self.kind == "infinite gradient":
            return ((self.weight - 1).abs().sqrt() + torch.arange(7.0)).expand(shape)
        if self.kind == "infinite curvature":
            # x^1.5 has slope 0 and curvature infinite at x = 0
            return ((self.weight - 1).abs() ** 1.5 + torch.arange(7.0)).expand(shape)
        if self.kind == "flat":
            return (self.weight * 0.0).expand(shape)
        return self.weight.expand(shape)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("nan", "the loss is not finite"), ("infinite gradient", "gradient is not finite")],
)
def test_non_finite_loss_or_gradient_has_a_reason_instead_of_a_number(kind: str, reason: str) -> None:
    found = numbers(analyze(Broken(kind), evaluation(), **FEW))
    for metric in ("batch_loss", "gradient_norm", "trace", "negative_mass", "gradient_curvature"):
        assert reason in one(found, metric).reason
    assert reason in one(found, "eigenvalue", label="3").reason


def test_non_finite_curvature_keeps_the_loss() -> None:
    found = numbers(analyze(Broken("infinite curvature"), evaluation(), **FEW))
    assert one(found, "batch_loss").value is not None
    assert one(found, "gradient_norm").value is not None
    for metric in ("trace", "smallest_eigenvalue", "gradient_curvature", "gradient_top_overlap", "effective_rank"):
        assert "not finite" in one(found, metric).reason


def test_a_zero_hessian_and_fewer_parameters_than_k() -> None:
    found = numbers(analyze(Broken("flat"), evaluation(), k=9, slq_probes=2, slq_steps=2))
    assert one(found, "gradient_curvature").reason == "the gradient is zero: it has no direction"
    assert one(found, "negative_mass").reason == "the operator is zero: there is no curvature to share out"
    assert one(found, "trace").value == one(found, "trace_square").value == 0
    for metric in ("participation_ratio", "effective_rank"):
        assert one(found, metric).reason == "the operator is zero: there is no curvature to share out"
    assert one(found, "hessian_gradient_norm").value == 0
    assert one(found, "gradient_top_overlap").reason == "the gradient is zero: it has no direction"
    assert [one(found, "eigenvalue", label=str(r)).value for r in range(1, 8)] == [0.0] * 7
    assert one(found, "eigenvalue", label="8").reason == "the network has only 7 parameters"


def test_softmax_of_one_bias_has_its_closed_form() -> None:
    """Logits = w for every position: H = diag(p) - p pᵀ with p = softmax(w); at w = 1 that is (I - 11ᵀ/7)/7."""
    found = analyze(Broken("bias"), evaluation(), k=7, slq_probes=2, slq_steps=2)
    assert [value(found, "eigenvalue", str(r)) for r in range(1, 8)] == pytest.approx([1 / 7] * 6 + [0], abs=1e-6)
    assert value(found, "trace") == pytest.approx(6 / 7, abs=1e-6)
    assert one(numbers(found), "trace").stderr == one(numbers(found), "trace_square").stderr == 0
    assert value(found, "trace_square") == pytest.approx(6 / 49, abs=1e-6)
    assert value(found, "participation_ratio") == pytest.approx(6, abs=1e-4)
    assert value(found, "effective_rank") == pytest.approx(6, abs=1e-3)
    assert value(found, "gradient_top_overlap") == pytest.approx(1, abs=1e-6)
    assert value(found, "smallest_eigenvalue") == pytest.approx(0, abs=1e-6)


def test_a_copy_that_one_vector_misses_is_counted() -> None:
    """Two unconnected equal networks: every eigenvalue of the sum of their losses is there twice."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = tied_net(), tied_net()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            half = input_ids.shape[0] // 2
            return torch.cat([self.one(input_ids[:half]), self.two(input_ids[half:])])

    ids = torch.randint(0, 7, (6, 6), generator=generator(1))
    data = FakeEvaluation(torch.cat([ids, ids]))
    exact = np.linalg.eigvalsh(dense_reference(Twins(), data)[0])[::-1]
    assert exact[0] == pytest.approx(exact[1], rel=1e-9)
    found = analyze(Twins(), data, k=4, max_sequences=12, slq_steps=20)
    np.testing.assert_allclose([value(found, "eigenvalue", str(r)) for r in (1, 2, 3, 4)], exact[:4], rtol=1e-3)


def test_too_few_steps_give_a_reason_not_a_number() -> None:
    found = numbers(analyze(tied_net(), evaluation(), k=5, max_steps=6, slq_steps=2))
    last = one(found, "eigenvalue", label="5")
    assert last.value is None
    assert "not converged after 6 products" in last.reason
    assert "raise max_steps" in last.reason
    assert "not all k eigenvectors were found" in one(found, "gradient_top_overlap").reason
    assert one(found, "residual", label="5").value > 0
    fewer = numbers(analyze(tied_net(), evaluation(), k=5, max_steps=3, slq_steps=2))
    assert one(fewer, "eigenvalue", label="4").reason.startswith("not reached in 3 products; raise max_steps")


def test_memory_bounds_name_the_parameter_to_change() -> None:
    with pytest.raises(
        NotApplicable, match=r"one eigenvalue of 59 parameters needs at least 16 vectors, .* raise max_basis_gb"
    ):
        analyze(tied_net(), evaluation(), max_basis_gb=1e-6, **FEW)
    with pytest.raises(NotApplicable, match=r"gradient graph of 1 of 4 sequences .* set max_graph_gb to at least"):
        analyze(tied_net(), evaluation(), max_graph_gb=1e-7, **FEW)
    with pytest.raises(NotApplicable, match=r"gradient graph of 4 of 4 sequences .* or micro_batch below 4"):
        analyze(tied_net(), evaluation(), max_graph_gb=3e-6, micro_batch=4, **FEW)


def test_little_memory_means_restarts_then_fewer_eigenvalues() -> None:
    data = evaluation()
    vector = 59 * 4 / 2**30
    full = analyze(tied_net(), data, k=5, slq_steps=4)
    small = analyze(tied_net(), data, k=5, slq_steps=4, max_basis_gb=25 * vector)
    assert value(full, "restarts") == 0 < value(small, "restarts")
    assert value(full, "basis_vectors") == 59 > value(small, "basis_vectors") == 13
    for rank in "12345":
        assert value(small, "eigenvalue", rank) == pytest.approx(value(full, "eigenvalue", rank), rel=1e-3)
    assert value(small, "smallest_eigenvalue") == pytest.approx(value(full, "smallest_eigenvalue"), rel=1e-2)
    tiny = analyze(tied_net(), data, k=5, slq_steps=20, max_basis_gb=18 * vector)
    assert value(tiny, "eigenvalue", "2") == pytest.approx(value(full, "eigenvalue", "2"), rel=1e-3)
    reason = one(numbers(tiny), "eigenvalue", label="3").reason
    assert reason == "max_basis_gb has room for the vectors of 2 eigenvalues only; raise it"
    assert "were found" in one(numbers(tiny), "gradient_top_overlap").reason
    assert len(array(tiny, "slq_nodes", "1")) == value(tiny, "basis_vectors") + 3 == 12


def test_what_has_no_meaning_is_not_applicable() -> None:
    ids = torch.zeros(3, 4, dtype=torch.long)
    with pytest.raises(NotApplicable, match="no position of the evaluation set has a target"):
        analyze(tied_net(), FakeEvaluation(ids, labels=torch.full_like(ids, -100)), **FEW)
    with pytest.raises(EvaluationSetError, match="has the label 50, but the network predicts the classes 0 to 6"):
        analyze(tied_net(), FakeEvaluation(ids, labels=torch.full_like(ids, 50)), **FEW)
    view = ModelView(nn.Identity(), None, "cpu", "float32")
    context = Context(view, evaluation(), HessianAnalyzer.Params(), 0)  # type: ignore[arg-type]
    with pytest.raises(NotApplicable, match="no floating-point parameters"):
        list(HessianAnalyzer().measure(context))

"""Gauss-Newton and empirical Fisher products against explicit Jacobians and dense matrices, and their analyzers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one
from curvature_cases import TiedNet, generator
from test_analyzer_hessian import Broken, dense_reference, evaluation, tied_net
from tiny_models import ARCHITECTURES, VOCABULARY
from torch import nn
from torch.nn import functional

from trace_offline.activations.model import ModelView
from trace_offline.analyzers.base import Context
from trace_offline.analyzers.gauss_newton import EmpiricalFisherAnalyzer, GaussNewtonAnalyzer
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import parse_params
from trace_offline.core.types import Measurement, Result
from trace_offline.estimators.fisher import EmpiricalFisherOperator
from trace_offline.estimators.ggn import GaussNewtonOperator, OutputCurvature
from trace_offline.estimators.hvp import HessianOperator, NonFiniteError
from trace_offline.estimators.operators import SymmetricOperator

KINDS: dict[str, type[OutputCurvature]] = {"ggn": GaussNewtonOperator, "fisher": EmpiricalFisherOperator}
ANALYZERS = {"ggn": GaussNewtonAnalyzer, "fisher": EmpiricalFisherAnalyzer}


def tied(dtype: torch.dtype = torch.float64) -> tuple[TiedNet, torch.Tensor]:
    torch.manual_seed(0)
    return TiedNet().to(dtype), torch.randint(0, 7, (6, 5), generator=generator(1))


def outputs_of(net: nn.Module, ids: torch.Tensor) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    return lambda: (net(ids)[:, :-1].reshape(-1, 7), ids[:, 1:].reshape(-1))


def dense(kind: str, net: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """From the Jacobian, row by row; for the Fisher from the gradient of each target's loss by itself."""
    parameters = list(net.parameters())
    logits, targets = outputs_of(net, ids)()
    size = sum(p.numel() for p in parameters)
    found = torch.zeros(size, size, dtype=torch.float64)

    def gradient(scalar: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    for row, target in zip(logits, targets, strict=True):
        if kind == "fisher":
            one_gradient = gradient(functional.cross_entropy(row[None], target[None]))
            found += torch.outer(one_gradient, one_gradient)
        else:
            jacobian = torch.stack([gradient(logit) for logit in row])
            p = row.detach().softmax(-1)
            found += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return found / len(logits)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_products_rebuild_the_dense_matrix(kind: str, dtype: torch.dtype, tolerance: float, keep: bool) -> None:
    exact = dense(kind, *tied())
    net, ids = tied(dtype)
    with KINDS[kind]([outputs_of(net, ids)], net.parameters(), keep_graphs=keep) as operator:
        assert isinstance(operator, SymmetricOperator)
        rows = torch.stack([operator.product(unit) for unit in torch.eye(operator.n, dtype=dtype)])
        assert operator.products == operator.n == len(exact)
    assert float((rows.double() - exact).abs().max()) <= tolerance * float(exact.abs().max())
    assert float(torch.linalg.eigvalsh(exact).min()) > -1e-12
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_sum_to_the_whole(kind: str) -> None:
    net, ids = tied()
    with KINDS[kind]([outputs_of(net, ids)], net.parameters()) as whole:
        vector = torch.randn(whole.n, dtype=torch.float64, generator=generator())
        expected = whole.product(vector)
    parts = [outputs_of(net, ids[:1]), outputs_of(net, ids[1:4]), outputs_of(net, ids[4:])]
    for keep in (True, False):
        with KINDS[kind](parts, net.parameters(), keep_graphs=keep) as pieces, torch.no_grad():
            torch.testing.assert_close(pieces.product(vector), expected)


def test_gauss_newton_is_the_hessian_of_a_linear_network() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 7).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 7, (9,), generator=generator())
    vector = torch.randn(35, dtype=torch.float64, generator=generator(1))
    with (
        HessianOperator([lambda: functional.cross_entropy(net(x), y)], net.parameters()) as hessian,
        GaussNewtonOperator([lambda: (net(x), y)], net.parameters()) as ggn,
    ):
        torch.testing.assert_close(ggn.product(vector), hessian.product(vector))


def test_the_fishers_trace_is_the_mean_squared_norm_of_single_gradients_and_gauss_newton_ignores_labels() -> None:
    net, ids = tied()
    logits, targets = outputs_of(net, ids)()
    squares = []
    for row, target in zip(logits, targets, strict=True):
        grads = torch.autograd.grad(
            functional.cross_entropy(row[None], target[None]), list(net.parameters()), retain_graph=True,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        squares.append(sum(float(g.square().sum()) for g in grads))
    assert float(dense("fisher", net, ids).trace()) == pytest.approx(np.mean(squares))
    other = lambda: (net(ids)[:, :-1].reshape(-1, 7), torch.zeros(24, dtype=torch.long))  # noqa: E731
    vector = torch.ones(59, dtype=torch.float64)
    for kind, same in (("ggn", True), ("fisher", False)):
        with KINDS[kind]([outputs_of(net, ids)], net.parameters()) as one_, KINDS[kind]([other], net.parameters()) as b:
            assert torch.allclose(one_.product(vector), b.product(vector)) == same


def test_bad_input_is_explained() -> None:
    weight = torch.ones(3, 2, requires_grad=True)
    labels = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="at least one batch of outputs, found none"):
        GaussNewtonOperator([], [weight])
    with pytest.raises(
        ValueError, match=r"logits \[M, C\] and targets \[M\] with M >= 1, found shapes \(3, 2\) and \(2,\)"
    ):
        GaussNewtonOperator([lambda: (weight * 2, labels[:2])], [weight])
    with pytest.raises(ValueError, match="do not depend on any of the parameters"):
        GaussNewtonOperator([lambda: (torch.ones(3, 2), labels)], [weight])
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        GaussNewtonOperator([lambda: (weight * float("nan"), labels)], [weight])
    operator = GaussNewtonOperator([lambda: (weight * 2, labels)], [weight])
    with pytest.raises(ValueError, match=r"expected a vector \[6\], found shape \(5,\)"):
        operator.product(torch.ones(5))
    operator.close()
    with pytest.raises(RuntimeError, match="was closed"):
        operator.product(torch.ones(6))


def analyze(kind: str, module: nn.Module, data: FakeEvaluation, **params: Any) -> list[Result]:
    analyzer = ANALYZERS[kind]()
    chosen = parse_params(type(analyzer).Params, analyzer.name, params)
    view = ModelView(module, None, "cpu", "float32")
    context = Context(view, data, chosen, 0)  # type: ignore[arg-type]
    assert analyzer.collectors(context) == {}
    return list(analyzer.measure(context))


def numbers(kind: str, results: Iterable[Result]) -> list[Measurement]:
    found = [item for item in results if isinstance(item, Measurement)]
    for item in found:
        assert item.metric in {spec.name for spec in ANALYZERS[kind].metrics}, item
        assert item.component == "all"
        assert (item.value is None) == (item.reason is not None), item
        assert item.value is None or np.isfinite(item.value), item
    return found


@pytest.mark.parametrize(
    "options", [{"dtype": "float64"}, {"micro_batch": 5, "max_graph_gb": 2e-5}, {"max_basis_gb": 5e-6}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_analyzers_against_dense_matrices(kind: str, options: dict[str, Any]) -> None:
    data = evaluation()
    hessian, gradient, loss = dense_reference(tied_net(), data)
    net = tied_net().double()
    tokens = data.tokens(0, data.n_examples)
    counted = tokens.targets != -100
    size = sum(p.numel() for p in net.parameters())
    whole = lambda: (net(tokens.input_ids, tokens.attention_mask)[counted], tokens.targets[counted])  # noqa: E731
    with KINDS[kind]([whole], net.parameters()) as operator:
        exact = torch.stack([operator.product(unit) for unit in torch.eye(size, dtype=torch.float64)]).numpy()
    found = numbers(kind, analyze(kind, tied_net(), data, max_sequences=100, k=4, **options))
    values = np.linalg.eigvalsh(exact)[::-1]
    for rank in range(1, 5):
        assert one(found, "eigenvalue", label=str(rank)).value == pytest.approx(values[rank - 1], rel=1e-3)
    for metric, truth in (
        ("trace", values.sum()),
        ("trace_square", (values**2).sum()),
        ("participation_ratio", values.sum() ** 2 / (values**2).sum()),
        ("hessian_trace", np.trace(hessian)),
        ("trace_ratio", values.sum() / np.trace(hessian)),
    ):
        estimate = one(found, metric)
        assert estimate.n == 24
        assert abs(estimate.value - truth) < 3.5 * estimate.stderr + 3e-3 * abs(truth), metric
    assert one(found, "batch_loss").value == pytest.approx(loss, rel=1e-5)
    along = gradient @ exact @ gradient / (gradient @ gradient)
    assert one(found, "gradient_curvature").value == pytest.approx(along, rel=1e-3)
    assert one(found, "hessian_products").value == 28


@pytest.mark.parametrize("name", ["gpt_neox", "bert"])
def test_architectures(name: str) -> None:
    module = ARCHITECTURES[name]()
    data = evaluation(VOCABULARY, rows=3, length=8, labels_shifted=name != "bert")
    for kind in KINDS:
        found = numbers(kind, analyze(kind, module, data, k=2, trace_probes=3, tolerance=0.01))
        assert one(found, "eigenvalue", label="1").value > 0
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_meaning_has_a_reason(kind: str) -> None:
    data = evaluation()
    assert "the loss is not finite" in one(numbers(kind, analyze(kind, Broken("nan"), data)), "trace").reason
    flat = numbers(kind, analyze(kind, Broken("flat"), data, k=8))
    assert one(flat, "trace").value == 0
    assert "no curvature" in one(flat, "participation_ratio").reason
    assert "zero within two standard errors" in one(flat, "trace_ratio").reason
    assert one(flat, "gradient_curvature").reason == "the gradient is zero: it has no direction"
    assert one(flat, "eigenvalue", label="8").reason == "the network has only 7 parameters"
    curved = numbers(kind, analyze(kind, Broken("infinite curvature"), data))
    assert "not finite" in one(curved, "trace_ratio").reason
    with pytest.raises(NotApplicable, match="max_basis_gb"):
        analyze(kind, tied_net(), data, max_basis_gb=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_against_curvlinops() -> None:
    peer = pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch, an independent implementation")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(0, 4, (20,), generator=generator())
    parameters = dict(net.named_parameters())
    vector = torch.randn(sum(p.numel() for p in parameters.values()), dtype=torch.float64, generator=generator(1))
    loss = nn.CrossEntropyLoss()
    cases: list[tuple[Any, Any]] = [
        ("HessianLinearOperator", HessianOperator([lambda: loss(net(x), y)], net.parameters())),
        ("GGNLinearOperator", GaussNewtonOperator([lambda: (net(x), y)], net.parameters())),
        ("EFLinearOperator", EmpiricalFisherOperator([lambda: (net(x), y)], net.parameters())),
    ]
    for name, ours in cases:
        kind = getattr(peer, name)
        try:
            theirs = kind(net, loss, parameters, [(x, y)])
        except (TypeError, ValueError, AttributeError):
            theirs = kind(net, loss, list(parameters.values()), [(x, y)])
        torch.testing.assert_close(ours.product(vector), theirs @ vector, rtol=1e-9, atol=1e-12)

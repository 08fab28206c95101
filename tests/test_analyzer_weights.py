"""The analyzer of weights: which tensors belong together, what is said of them, and when nothing can be said."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag
from tiny_models import ARCHITECTURES, unknown_net
from torch import nn

from trace_offline.activations.model import ModelView
from trace_offline.analyzers.base import Context
from trace_offline.analyzers.weights import WeightsAnalyzer
from trace_offline.checkpoints.blocks import find_blocks
from trace_offline.core.errors import NotApplicable
from trace_offline.core.types import Array, Measurement

SPECTRAL = {"spectral_norm", "stable_rank", "effective_rank", "proportional_effective_rank", "condition_number"}


def measure(module: nn.Module, **params: Any) -> tuple[list[Measurement], list[Array]]:
    analyzer = WeightsAnalyzer()
    view = ModelView(module, find_blocks(module), "cpu", "float32")
    results = list(analyzer.measure(Context(view, None, analyzer.Params(**params), 0)))  # type: ignore[arg-type]
    measured = [item for item in results if isinstance(item, Measurement)]
    known = {spec.name for spec in analyzer.metrics}
    for item in measured:
        assert item.metric in known
        assert (item.value is None) == (item.reason is not None), item
        assert item.value is None or math.isfinite(item.value)
    keys = [(m.metric, m.layer, m.component, m.label) for m in measured]
    assert len(keys) == len(set(keys))
    return measured, [item for item in results if isinstance(item, Array)]


def value(results: list[Measurement], metric: str, layer: int | None, component: str, label: str | None = None) -> Any:
    found = [
        m for m in results if (m.metric, m.layer, m.component, m.label) == (metric, layer, component, label)
    ]  # fmt: skip
    assert len(found) == 1, found
    return found[0].value


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_parts_are_vectors_and_block_diagonal_matrices(kind: str) -> None:
    module = ARCHITECTURES[kind]()
    results, _ = measure(module)
    block = [
        p.detach().double().numpy() for n, p in find_blocks(module)[1].named_parameters() if "mlp" in n or "fc" in n
    ]  # type: ignore[index]
    if kind == "bert":
        tensors = dict(find_blocks(module)[1].named_parameters())  # type: ignore[index]
        chosen = ("intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight", "output.dense.bias")
        block = [tensors[name].detach().double().numpy() for name in chosen]
    vector = np.concatenate([tensor.ravel() for tensor in block])
    assert value(results, "norm", 2, "mlp") == pytest.approx(np.linalg.norm(vector), rel=1e-12)
    assert value(results, "rms", 2, "mlp") == pytest.approx(np.sqrt(np.mean(vector**2)), rel=1e-12)
    dense = block_diag(*[tensor for tensor in block if tensor.ndim == 2])
    singular = np.linalg.svd(dense, compute_uv=False)
    singular = singular[singular > 1e-9 * singular[0]]
    share = singular / singular.sum()
    rank = math.exp(-(share * np.log(share)).sum())
    assert value(results, "spectral_norm", 2, "mlp") == pytest.approx(np.linalg.norm(dense, 2), rel=1e-10)
    assert value(results, "stable_rank", 2, "mlp") == pytest.approx((singular**2).sum() / singular[0] ** 2, rel=1e-10)
    assert value(results, "effective_rank", 2, "mlp") == pytest.approx(rank, rel=1e-6)
    assert value(results, "proportional_effective_rank", 2, "mlp") == pytest.approx(rank / len(singular), rel=1e-6)
    assert value(results, "condition_number", 2, "mlp") == pytest.approx(singular[0] / singular[-1], rel=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_totals_hold_every_parameter_once(kind: str) -> None:
    module = ARCHITECTURES[kind]()
    results, _ = measure(module)
    expected = torch.cat([p.detach().double().reshape(-1) for p in module.parameters()])
    assert value(results, "norm", None, "all") == pytest.approx(float(expected.norm()), rel=1e-12)
    total = [m for m in results if m.metric == "norm" and m.component == "all" and m.layer is None]
    assert total[0].n == len(expected)
    parts = [m.value for m in results if m.metric == "norm" and m.component != "all" and m.label is None]
    assert math.hypot(*parts) == pytest.approx(float(expected.norm()), rel=1e-12)  # type: ignore[arg-type]


def test_every_matrix_by_itself_and_its_spectrum() -> None:
    module = unknown_net()
    results, arrays = measure(module, spectra=True)
    name = "layers.1.mlp.0.weight"
    matrix = dict(module.named_parameters())[name].detach()
    assert value(results, "spectral_norm", 2, "mlp", name) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)))
    (spectrum,) = [a for a in arrays if a.label == name]
    np.testing.assert_allclose(spectrum.values, np.linalg.svd(matrix.numpy(), compute_uv=False), rtol=1e-5)
    quiet, nothing = measure(module, per_matrix=False)
    assert nothing == []
    assert {m.label for m in quiet} == {None}
    assert [m for m in results if m.label is None] == quiet


def test_experts_are_many_matrices_and_kernels_one() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)))
            self.mlp = nn.Conv1d(6, 4, 3, bias=False)

    module = Expert()
    results, _ = measure(module)
    dense = block_diag(*module.experts.detach().numpy())
    assert value(results, "spectral_norm", None, "mlp", "experts") == pytest.approx(np.linalg.norm(dense, 2), rel=1e-6)
    kernel = module.mlp.weight.detach().reshape(4, 18).numpy()
    assert value(results, "spectral_norm", None, "mlp", "mlp.weight") == pytest.approx(
        np.linalg.norm(kernel, 2), rel=1e-6
    )


def test_numbers_that_do_not_exist_have_reasons() -> None:
    module = nn.ModuleDict({"mlp": nn.Linear(4, 4), "attn": nn.Linear(4, 4), "head": nn.Linear(4, 4, bias=False)})
    with torch.no_grad():
        module["mlp"].weight[0, 0] = math.nan
        module["attn"].weight.copy_(torch.ones(4, 4))
        module["head"].weight.zero_()
    results, _ = measure(module)
    by = {(m.metric, m.component, m.label): m for m in results}
    assert by["norm", "mlp", None].reason == "some weights are not finite numbers"
    assert by["norm", "all", None].value is None
    assert by["gini", "mlp", None].reason == "expected finite numbers, found NaN or infinity"
    assert "mlp.weight: expected finite entries" in str(by["spectral_norm", "mlp", None].reason)
    assert "not of full rank within rounding" in str(by["condition_number", "attention", None].reason)
    assert by["stable_rank", "attention", None].value == pytest.approx(1.0)
    assert by["stable_rank", "head", None].reason == "all entries are 0"
    assert by["norm", "head", None].value == 0.0


def test_norms_and_biases_have_no_singular_values() -> None:
    results, _ = measure(ARCHITECTURES["gpt_neox"]())
    assert not [m for m in results if m.metric in SPECTRAL and m.component in ("norm", "final_norm", "all")]
    assert value(results, "norm", 1, "norm") > 0


def test_weights_stay_as_they_are_and_numbers_repeat() -> None:
    module = ARCHITECTURES["gpt2"]()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert measure(module) == measure(module)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_a_network_without_weights() -> None:
    with pytest.raises(NotApplicable, match="no floating-point parameters"):
        measure(nn.Identity())

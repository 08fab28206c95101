"""The ``hessian_blocks`` analyzer against the blocks of the dense Hessian, and on every architecture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one
from curvature_cases import exact_effective_rank, exact_negative_share
from test_analyzer_hessian import Broken, dense_reference, evaluation, tied_net
from tiny_models import ARCHITECTURES, VOCABULARY
from torch import nn

from trace_offline.activations.model import ModelView
from trace_offline.analyzers.base import Context
from trace_offline.analyzers.hessian_blocks import HessianBlocksAnalyzer
from trace_offline.checkpoints.blocks import find_blocks
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import parse_params
from trace_offline.core.types import Array, Measurement, Result


class Layered(nn.Module):
    """Two blocks with attention, MLP and norm, small enough for a dense Hessian."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln = nn.LayerNorm(3)
            self.attention = nn.Linear(3, 3)
            self.mlp = nn.Linear(3, 3)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            seen = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[None, :, None]
            hidden = hidden + torch.tanh(self.attention(seen))
            return hidden + torch.tanh(self.mlp(self.ln(hidden)))

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.layers = nn.ModuleList(self.Block() for _ in range(2))
        self.head = nn.Linear(3, 7)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def layered() -> Layered:
    torch.manual_seed(3)
    return Layered().eval()


PLACES = [
    (0, "embedding"), (1, "attention"), (1, "mlp"), (1, "norm"), (2, "attention"), (2, "mlp"), (2, "norm"),
    (None, "head"),
]  # fmt: skip


def index_of(module: nn.Module, layer: int | None, component: str) -> torch.Tensor:
    part = {"norm": "ln"}.get(component, component)
    name = {"embedding": "embed", "head": "head"}.get(component, f"layers.{(layer or 0) - 1}.{part}")
    offset, found = 0, []
    for key, parameter in module.named_parameters():
        if key.startswith(name + "."):
            found.append(torch.arange(offset, offset + parameter.numel()))
        offset += parameter.numel()
    return torch.cat(found)


def analyze(module: nn.Module, data: FakeEvaluation, *, seed: int = 0, **params: Any) -> list[Result]:
    view = ModelView(module, find_blocks(module), "cpu", "float32")
    chosen = parse_params(HessianBlocksAnalyzer.Params, "hessian_blocks", params)
    context = Context(view, data, chosen, seed)  # type: ignore[arg-type]
    assert HessianBlocksAnalyzer().collectors(context) == {}
    return list(HessianBlocksAnalyzer().measure(context))


def array(results: Iterable[Result], name: str, where: dict[str, Any], label: str | None = None) -> np.ndarray:
    (found,) = [
        item
        for item in results
        if isinstance(item, Array)
        and (item.name, item.layer, item.component, item.label) == (name, where["layer"], where["component"], label)
    ]
    return np.asarray(found.values)


def numbers(results: Iterable[Result]) -> list[Measurement]:
    found = [item for item in results if isinstance(item, Measurement)]
    for item in found:
        assert item.metric in {spec.name for spec in HessianBlocksAnalyzer.metrics}, item
        assert (item.value is None) == (item.reason is not None), item
        assert item.value is None or np.isfinite(item.value), item
        assert type(item.component) is str
    assert len({(m.metric, m.layer, m.component, m.label) for m in found}) == len(found)
    return found


@pytest.mark.parametrize("own", [0, 12])
@pytest.mark.parametrize(
    "options",
    [{"dtype": "float64", "tolerance": 1e-8}, {"micro_batch": 5, "max_graph_gb": 3e-5}],
    ids=["f64", "rebuilt"],
)
def test_every_block_against_the_dense_hessian(options: dict[str, Any], own: int) -> None:
    data = evaluation()
    dense, gradient, loss = dense_reference(layered(), data)
    results = analyze(layered(), data, k=2, max_sequences=100, own_probes=own, slq_probes=12, **options)
    found = numbers(results)
    rtol = 1e-6 if "dtype" in options else 2e-3
    assert one(found, "batch_loss", component="all").value == pytest.approx(loss, rel=1e-5)
    total = one(found, "trace", component="all")
    assert abs(total.value - np.trace(dense)) < 3.5 * total.stderr
    sizes = 0
    for layer, component in PLACES:
        index = index_of(layered(), layer, component).numpy()
        block, part = dense[np.ix_(index, index)], gradient[index]
        exact = np.linalg.eigvalsh(block)
        where = {"layer": layer, "component": component}
        for rank in (1, 2):
            value = one(found, "eigenvalue", label=str(rank), **where).value
            assert value == pytest.approx(exact[-rank], rel=rtol, abs=rtol * 0.01 * abs(exact).max())
        smallest = one(found, "smallest_eigenvalue", **where).value
        # the edge of a bulk at 0 is known to a share of the largest only
        assert smallest == pytest.approx(exact[0], abs=rtol * abs(exact).max())
        for metric, truth in (("trace", exact.sum()), ("trace_square", (exact**2).sum())):
            estimate = one(found, metric, **where)
            assert estimate.n in (0, own or 24)
            assert abs(estimate.value - truth) <= 4 * estimate.stderr + 5e-3 * abs(truth), (where, metric)
        for metric, truth in (
            ("effective_rank", exact_effective_rank(exact)),
            ("negative_mass", exact_negative_share(exact)),
        ):
            estimate = one(found, metric, **where)
            assert estimate.n in (0, 12)
            assert abs(estimate.value - truth) <= 4 * estimate.stderr + 1e-2 * abs(truth) + 1e-4, (where, metric)
        low, high = (one(found, f"negative_fraction_{end}", **where).value for end in ("lower", "upper"))
        assert low - 0.15 <= np.mean(exact < -1e-5 * abs(exact).max()) <= high + 0.15
        grid, density, sigma = (array(results, name, where) for name in ("density_grid", "density", "density_sigma"))
        assert len(grid) == len(density) == 256
        assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-5)
        assert sigma[0] == pytest.approx(0.01 * (grid[-1] - grid[0]) / 1.12, rel=1e-6)
        nodes, weights = (array(results, name, where, "1") for name in ("slq_nodes", "slq_weights"))
        assert weights.sum() == pytest.approx(1)
        assert exact[0] - 1e-3 <= nodes.min() <= nodes.max() <= exact[-1] + 1e-3
        assert one(found, "gradient_norm", **where).value == pytest.approx(np.linalg.norm(part), rel=1e-4)
        along = part @ block @ part / (part @ part)
        assert one(found, "gradient_curvature", **where).value == pytest.approx(along, rel=2e-3, abs=1e-6)
        assert one(found, "parameters", **where).value == len(index)
        sizes += len(index)
    assert sizes == len(dense)
    assert one(found, "products", component="all").value == 24


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_architectures(name: str) -> None:
    module = ARCHITECTURES[name]()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    data = evaluation(VOCABULARY, rows=3, length=7)
    few = {"trace_probes": 3, "slq_probes": 2, "slq_steps": 3, "tolerance": 0.05, "max_sequences": 3}
    found = numbers(analyze(module, data, **few))
    assert sum(m.value for m in found if m.metric == "parameters") == sum(p.numel() for p in module.parameters())
    for layer in (1, 2, 3):
        for component in ("attention", "mlp", "norm"):
            assert one(found, "eigenvalue", layer=layer, component=component, label="1").value > 0
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert all(p.grad is None for p in module.parameters())
    assert found == numbers(analyze(module, data, **few))


def test_what_is_not_finite_has_a_reason() -> None:
    found = numbers(analyze(Broken("nan"), evaluation()))
    assert "the loss is not finite" in one(found, "batch_loss", component="all").reason
    assert "not finite" in one(found, "trace", component="other").reason
    curved = numbers(analyze(Broken("infinite curvature"), evaluation()))
    assert one(curved, "batch_loss", component="all").value is not None
    assert "not finite" in one(curved, "eigenvalue", component="other", label="1").reason
    flat = numbers(analyze(Broken("flat"), evaluation(), k=9))
    assert one(flat, "gradient_curvature", component="other").reason == "the gradient is zero: it has no direction"
    assert one(flat, "eigenvalue", component="other", label="9").reason == "the block has only 7 parameters"


def test_memory_bounds() -> None:
    data = evaluation()
    size = sum(p.numel() for p in tied_net().parameters()) * 4 / 2**30
    with pytest.raises(
        NotApplicable, match=r"not even the smallest block fits: .* max_basis_gb is .*: raise max_basis_gb"
    ):
        analyze(tied_net(), data, max_basis_gb=size / 10)
    roomy = numbers(analyze(layered(), data, max_sequences=3))
    size = sum(p.numel() for p in layered().parameters()) * 4 / 2**30
    tight = numbers(analyze(layered(), data, max_sequences=3, max_basis_gb=12 * size))
    for layer, component in PLACES:
        for metric, label in (("eigenvalue", "1"), ("trace", None)):
            a, b = (one(f, metric, layer=layer, component=component, label=label) for f in (roomy, tight))
            assert abs(a.value - b.value) <= 1e-2 * abs(a.value) + 5 * np.hypot(a.stderr or 0, b.stderr or 0)


def exact_numbers(module: nn.Module, data: FakeEvaluation, found: list[Measurement], skipped: set[Any]) -> None:
    """Each block's numbers against its dense Hessian, as far as vectors of it fitted."""
    dense, gradient, _ = dense_reference(module, data)
    for layer, component in PLACES:
        where = {"layer": layer, "component": component}
        index = index_of(module, layer, component).numpy()
        block = dense[np.ix_(index, index)]
        assert one(found, "gradient_norm", **where).value == pytest.approx(np.linalg.norm(gradient[index]), rel=1e-4)
        if (layer, component) in skipped:
            for metric in ("trace", "effective_rank", "negative_mass", "smallest_eigenvalue"):
                assert "raise max_basis_gb" in one(found, metric, **where).reason
            continue
        assert one(found, "eigenvalue", label="1", **where).value == pytest.approx(
            np.linalg.eigvalsh(block)[-1], rel=1e-3
        )
        trace = one(found, "trace", **where)
        assert abs(trace.value - np.trace(block)) <= 4 * trace.stderr + 1e-3 * abs(np.trace(block))
        rank = one(found, "effective_rank", **where)
        truth = exact_effective_rank(np.linalg.eigvalsh(block))
        assert abs(rank.value - truth) <= 4 * rank.stderr + 1e-2 * truth


def test_blocks_only_when_no_vector_of_the_whole_fits() -> None:
    """Nothing longer than a block is held: each is finished by itself, with as many probes of its own."""
    data = evaluation()
    embedding, total = 21 * 4 / 2**30, sum(p.numel() for p in layered().parameters())
    bound = 20 * 28 * 4 / 2**30
    assert bound < 8 * total * 4 / 2**30
    found = numbers(analyze(layered(), data, max_sequences=100, max_basis_gb=bound))
    exact_numbers(layered(), data, found, set())
    assert one(found, "products", component="all").value == 0
    whole = one(found, "trace", component="all")
    assert whole.n == 24
    assert abs(whole.value - np.trace(dense_reference(layered(), data)[0])) < 3.5 * whole.stderr
    # less still: the largest blocks have no vectors, the others are measured
    fewer = numbers(analyze(layered(), data, max_sequences=100, max_basis_gb=15 * embedding))
    exact_numbers(layered(), data, fewer, {(0, "embedding"), (None, "head")})
    assert one(fewer, "trace", component="all").reason.startswith("a block has no trace, so that there is no sum")


def test_all_eigenvalues_make_every_block_exact() -> None:
    data = evaluation()
    results = analyze(layered(), data, k=40, max_sequences=100, dtype="float64", tolerance=1e-10, max_steps=400)
    found = numbers(results)
    dense, _, _ = dense_reference(layered(), data)
    for layer, component in PLACES:
        where = {"layer": layer, "component": component}
        index = index_of(layered(), layer, component).numpy()
        exact = np.linalg.eigvalsh(dense[np.ix_(index, index)])[::-1]
        for metric, truth in (
            ("trace", exact.sum()),
            ("trace_square", (exact**2).sum()),
            ("effective_rank", exact_effective_rank(exact)),
            ("negative_mass", exact_negative_share(exact)),
        ):
            estimate = one(found, metric, **where)
            assert estimate.value == pytest.approx(truth, rel=1e-6, abs=1e-9), (where, metric)
            assert (estimate.stderr, estimate.n) == (0, 0)
        grid, density, sigma = (array(results, name, where) for name in ("density_grid", "density", "density_sigma"))
        kernel = np.exp(-0.5 * ((grid[:, None] - exact[None]) / sigma[0]) ** 2) / (sigma[0] * np.sqrt(2 * np.pi))
        np.testing.assert_allclose(density, kernel.mean(1), rtol=1e-6, atol=1e-9 * density.max())


def test_densities_change_no_other_number_and_can_be_left_out() -> None:
    data = evaluation()
    with_them = numbers(analyze(layered(), data))
    without = analyze(layered(), data, slq_probes=0)
    assert not any(isinstance(item, Array) and item.name != "ritz" for item in without)
    for item in numbers(without):
        other = one(with_them, item.metric, layer=item.layer, component=item.component, label=item.label)
        if item.metric == "products" and item.component != "all":
            assert other.value == item.value + 40 or other.value > item.value
        else:
            assert other == item

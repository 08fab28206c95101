"""CKA and PWCCA of weight matrices between checkpoints: dense references, which side is the sample, what is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from series_fakes import pick
from test_analyzer_weight_change import moved, series
from test_cka import dense_cka, unbiased_hsic
from tiny_models import ARCHITECTURES
from torch import nn

from trace_offline.analyzers._matrix_similarity import SIMILARITY, keep_matrices
from trace_offline.core.types import Measurement

SAMPLED = {"max_exact_parameters": 0, "projection_size": 16}
MLP = ("gpt_neox.layers.1.mlp.dense_4h_to_h.weight", "gpt_neox.layers.1.mlp.dense_h_to_4h.weight")


def table(module: nn.Module, name: str) -> np.ndarray:
    """Samples × features in float64: the longer side first."""
    matrix = module.get_parameter(name).detach().double().numpy()
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def debiased(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return unbiased_hsic(x, y) / float(np.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y)))


def dense_pwcca(x: np.ndarray, y: np.ndarray) -> float:
    """Morcos et al. 2018 by QR (their equations 1 to 4), weights from x."""
    x, y = x - x.mean(0), y - y.mean(0)
    qx, qy = np.linalg.qr(x)[0], np.linalg.qr(y)[0]
    left, rho, _ = np.linalg.svd(qx.T @ qy)
    weights = np.abs((qx @ left).T @ x).sum(1)[: len(rho)]
    return float(weights @ rho / weights.sum())


def wide_mlp(seed: int = 0) -> nn.Module:
    """A network whose MLP has more than twice as many units as features."""
    torch.manual_seed(seed)
    module = ARCHITECTURES["gpt_neox"]()
    for layer in module.gpt_neox.layers:
        layer.mlp.dense_h_to_4h = nn.Linear(32, 96)
        layer.mlp.dense_4h_to_h = nn.Linear(96, 32)
    return module


@pytest.mark.parametrize("amount", [0.01, 0.2])
def test_numbers_are_the_dense_ones_of_every_matrix(amount: float, tmp_path: Path) -> None:
    start = wide_mlp()
    modules = [start, moved(start, amount, 1), moved(start, 2 * amount, 2)]
    found = series(modules, tmp_path)
    for position, label, other in ((1, "previous", 0), (2, "previous", 1), (2, "first", 0), (1, "final", 2)):
        means = dict.fromkeys(("cka", "cka_debiased", "pwcca"), 0.0)
        for name in MLP:
            x, y = table(modules[position], name), table(modules[other], name)
            assert x.shape == (96, 32)
            expected = {"cka": dense_cka(x, y), "cka_debiased": debiased(x, y), "pwcca": dense_pwcca(x, y)}
            for metric, value in expected.items():
                item = pick(found, position, f"weight_{metric}", label=f"{label}|{name}")
                assert (item.layer, item.component, item.n, item.stderr) == (2, "mlp", 96, None)
                assert item.value == pytest.approx(value, abs=1e-9)
                assert item.value != 1
                means[metric] += value / 2  # both have as many entries
        for metric, value in means.items():
            item = pick(found, position, f"weight_{metric}", layer=2, component="mlp", label=label)
            assert item.value == pytest.approx(value, abs=1e-9)
            assert item.n == 192


def test_layers_without_matrices_have_no_number_and_switches_are_obeyed(tmp_path: Path) -> None:
    modules = [start := wide_mlp(), moved(start, 0.1, 1)]
    found = series(modules, tmp_path)
    assert not [m for _, m in found if m.metric.startswith("weight_") and m.component in ("norm", "final_norm", "all")]
    short = series(modules, tmp_path, per_matrix=False)
    assert short == [(p, m) for p, m in found if "|" not in str(m.label)]
    none = series(modules, tmp_path, matrices=False)
    assert none == [(p, m) for p, m in found if not m.metric.startswith("weight_")]


def test_square_matrices_have_no_pwcca_and_the_mean_is_of_the_others(tmp_path: Path) -> None:
    start = wide_mlp()
    found = series([start, moved(start, 0.1, 1)], tmp_path)
    names = [f"gpt_neox.layers.0.attention.{name}.weight" for name in ("dense", "query_key_value")]
    square, tall = (pick(found, 1, "weight_pwcca", label=f"first|{name}") for name in names)
    assert "no more points than dimensions" in str(square.reason)
    assert tall.value is not None
    assert pick(found, 1, "weight_pwcca", layer=1, component="attention", label="first").value == tall.value
    parts = [pick(found, 1, "weight_cka", label=f"first|{name}").value or 0 for name in names]
    both = pick(found, 1, "weight_cka", layer=1, component="attention", label="first").value
    assert both == pytest.approx((32 * 32 * parts[0] + 96 * 32 * parts[1]) / (128 * 32))


def test_rotations_and_maps_are_seen_as_equal_and_unrelated_matrices_as_chance(tmp_path: Path) -> None:
    start, turned, mapped, fresh = wide_mlp(), wide_mlp(), wide_mlp(), wide_mlp(1)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(32, 32, generator=generator)
    with torch.no_grad():
        turned.get_parameter(MLP[1]).copy_(start.get_parameter(MLP[1]) @ torch.linalg.qr(random)[0])
        mapped.get_parameter(MLP[1]).copy_(start.get_parameter(MLP[1]) @ random)
    found = series([start, turned, mapped, fresh], tmp_path)

    def value(position: int, metric: str) -> float:
        return pick(found, position, f"weight_{metric}", label=f"first|{MLP[1]}").value or 0.0

    assert value(1, "cka") == pytest.approx(1, abs=1e-6)
    assert value(1, "pwcca") == pytest.approx(1, abs=1e-5)
    assert value(2, "cka") < 0.9
    assert value(2, "pwcca") == pytest.approx(1, abs=1e-4)
    assert abs(value(3, "cka_debiased")) < 0.05
    assert value(3, "cka") > 0.15
    chance = [value(position, "pwcca_chance") for position in range(4)]
    assert value(3, "pwcca") == pytest.approx(np.mean(chance), abs=0.05)
    assert np.ptp(chance) < 0.1


class OneMatrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(32, 96)


def test_a_part_of_the_rows_estimates_the_debiased_number(tmp_path: Path) -> None:
    modules = [start := OneMatrix(), moved(start, 0.15, 1)]
    asked: dict[str, Any] = {"label": "first|up.weight"}
    exact = pick(series(modules, tmp_path), 1, "weight_cka_debiased", **asked).value or 0.0
    found = [
        pick(series(modules, tmp_path, seed=seed, matrix_rows=48, **SAMPLED), 1, "weight_cka_debiased", **asked)
        for seed in range(40)
    ]
    values = np.array([item.value for item in found])
    assert {item.n for item in found} == {48}
    assert abs(values.mean() - exact) < 4 * values.std(ddof=1) / np.sqrt(40)
    # Half of all rows without replacement scatter less than independent ones, by √½.
    stderr = np.sqrt(np.mean([(item.stderr or 0) ** 2 for item in found]))
    assert 0.4 < values.std(ddof=1) / stderr < 1.1
    kept = series(modules, tmp_path, matrix_rows=48, **SAMPLED)
    for metric in ("weight_cka", "weight_pwcca", "weight_pwcca_chance"):
        item = pick(kept, 1, metric, **asked)
        assert "only 48 of 96 rows were kept" in str(item.reason)
    assert not [m for _, m in series(modules, tmp_path, matrix_rows=0, **SAMPLED) if m.metric.startswith("weight_")]


def test_all_rows_of_a_large_network_give_the_exact_numbers(tmp_path: Path) -> None:
    start = wide_mlp()
    modules = [start, moved(start, 0.1, 1), copy.deepcopy(start)]

    def numbers(**params: Any) -> list[tuple[int, Measurement]]:
        return [(p, m) for p, m in series(modules, tmp_path, **params) if m.metric.startswith("weight_")]

    for (p, a), (q, b) in zip(numbers(), numbers(matrix_rows=96, **SAMPLED), strict=True):
        assert (p, a.metric, a.layer, a.component, a.label, a.n) == (q, b.metric, b.layer, b.component, b.label, b.n)
        assert b.value == (None if a.value is None else pytest.approx(a.value, abs=1e-12))
        assert (b.reason, b.stderr) == (a.reason, None)


def test_convolutions_are_one_matrix_and_experts_several(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.conv = nn.Conv1d(3, 40, 4)
            self.experts = nn.Parameter(torch.randn(2, 5, 30))

    one, other = Net(0), Net(1)
    found = series([one, other], tmp_path)
    x, y = (module.conv.weight.detach().double().flatten(1).numpy() for module in (one, other))
    assert pick(found, 1, "weight_cka", label="first|conv.weight").value == pytest.approx(dense_cka(x, y), abs=1e-9)
    for index in range(2):
        x, y = (module.experts[index].detach().double().numpy().T for module in (one, other))
        item = pick(found, 1, "weight_cka", label=f"first|experts[{index}]")
        assert item.value == pytest.approx(dense_cka(x, y), abs=1e-9)
        assert item.n == 30


def test_what_cannot_be_compared_says_why(tmp_path: Path) -> None:
    start, zero, other = wide_mlp(), wide_mlp(), wide_mlp()
    with torch.no_grad():
        zero.get_parameter(MLP[0]).zero_()
    other.gpt_neox.layers[1].mlp.dense_h_to_4h = nn.Linear(32, 80)
    found = series([start, zero, other], tmp_path)
    for metric in SIMILARITY:
        item = pick(found, 1, f"weight_{metric}", label=f"first|{MLP[0]}")
        assert "all points coincide" in str(item.reason)
        whole = pick(found, 1, f"weight_{metric}", layer=2, component="mlp", label="first")
        assert str(whole.reason) == f"{MLP[0]}: {item.reason}"
        item = pick(found, 2, f"weight_{metric}", label=f"first|{MLP[1]}")
        assert "changed its shape: 80 × 32 and 96 × 32" in str(item.reason)


def test_the_same_rows_are_kept_at_every_checkpoint() -> None:
    tensors = {"w": torch.arange(200.0).reshape(50, 4)}
    first, again = (
        keep_matrices("1.mlp", tensors, frozenset(), whole=False, most_rows=7, seed=3)["rows/1.mlp/w"] for _ in range(2)
    )
    assert torch.equal(first, again)
    other = keep_matrices("1.mlp", tensors, frozenset(), whole=False, most_rows=7, seed=4)["rows/1.mlp/w"]
    assert not torch.equal(first, other)
    assert first.shape == (1, 7, 4)

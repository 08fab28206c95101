"""The analyzer of gradient change: dense gradients, jackknife, projections, neutral values, what has no number."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from series_fakes import compare, extract_of, pick, view_of
from test_analyzer_gradients import N, evaluation, flat, gradient
from test_analyzer_weight_change import moved
from test_cka import dense_cka
from test_matrix_similarity import debiased, dense_pwcca
from tiny_models import ARCHITECTURES, unknown_net
from torch import nn

from trace_offline.analyzers import _gradient_parts as data
from trace_offline.analyzers.gradient_change import GradientChangeAnalyzer
from trace_offline.core.errors import NotApplicable, UsageError
from trace_offline.core.params import parse_params
from trace_offline.core.types import Measurement

PROJECTED = {"max_exact_parameters": 0, "projection_size": 1024}
COSINE = "gradient_cosine_checkpoints"


def series(modules: list[nn.Module], folder: Path, kind: str = "gpt2", **params: Any) -> list[tuple[int, Measurement]]:
    analyzer, fake, seed = GradientChangeAnalyzer(), evaluation(kind), params.pop("seed", 0)
    extracts = [extract_of(analyzer, view_of(module), fake, seed, **params) for module in modules]
    return compare(analyzer, extracts, fake, folder, seed, **params)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "bert"])
def test_numbers_are_those_of_the_dense_gradients(kind: str, tmp_path: Path) -> None:
    start = ARCHITECTURES[kind]()
    modules = [start, moved(start, 0.05, 1), moved(start, 0.2, 2)]
    found = series(modules, tmp_path, kind)
    dense = [gradient(module, evaluation(kind)) for module in modules]
    for position, label, other in ((1, "previous", 0), (2, "previous", 1), (2, "first", 0), (1, "final", 2)):
        for part, where in (("", {"layer": None, "component": "all"}), ("mlp", {"layer": 2, "component": "mlp"})):
            if part and kind != "gpt_neox":
                continue
            a, b = (flat(dense[at], "layers.1.mlp" if part else "") for at in (position, other))
            distance, cosine = float((a - b).norm()), float(a @ b / a.norm() / b.norm())
            item = pick(found, position, "gradient_distance", label=label, **where)
            assert item.value == pytest.approx(distance, rel=1e-4)
            assert item.n == N
            item = pick(found, position, COSINE, label=label, **where)
            assert item.value == pytest.approx(cosine, abs=1e-4)
            assert 0 < (item.stderr or 0) < 1
            item = pick(found, position, "gradient_relative_distance", label=label, **where)
            assert item.value == pytest.approx(distance / float(b.norm()), rel=1e-4)


def test_matrices_are_those_of_the_dense_gradients(tmp_path: Path) -> None:
    start = ARCHITECTURES["gpt2"]()
    modules = [start, moved(start, 0.1, 1)]
    found = series(modules, tmp_path)
    name = "transformer.h.1.mlp.c_fc.weight"
    x, y = (gradient(module, evaluation())[name].T.numpy() for module in (modules[1], modules[0]))
    assert x.shape == (128, 32)
    expected = {"cka": dense_cka(x, y), "cka_debiased": debiased(x, y), "pwcca": dense_pwcca(x, y)}
    for metric, value in expected.items():
        item = pick(found, 1, f"gradient_{metric}", label=f"first|{name}")
        assert item.value == pytest.approx(value, abs=2e-3 if metric == "pwcca" else 1e-4)
        assert (item.layer, item.component, item.n) == (2, "mlp", 128)
        assert pick(found, 1, f"gradient_{metric}", layer=2, component="mlp", label="first").value != 1


def test_standard_errors_are_the_jackknife_over_parts_of_the_texts(tmp_path: Path) -> None:
    start = ARCHITECTURES["gpt_neox"]()
    modules = [start, moved(start, 0.1, 1)]
    fake = evaluation()
    parts = data.choose_parts(data.Rows(fake), 128, 12, 0)  # type: ignore[arg-type]
    left_out = []
    for part in parts:
        rest = [row for row in range(N) if row not in part.rows]
        a, b = (flat(gradient(module, fake, rows=rest)) for module in modules)
        left_out.append([float((a - b).norm()), float(a @ b / a.norm() / b.norm())])
    table = np.array(left_out)
    expected = np.sqrt((len(parts) - 1) / len(parts) * np.square(table - table.mean(0)).sum(0))
    for size, tolerance in ((1 << 16, 1e-2), (4096, 0.25)):
        found = series(modules, tmp_path, projection_size=size)
        for metric, stderr in zip(("gradient_distance", COSINE), expected, strict=True):
            item = pick(found, 1, metric, layer=None, component="all", label="first")
            assert item.stderr == pytest.approx(stderr, rel=tolerance)


def test_projected_numbers_are_right_within_their_error(tmp_path: Path) -> None:
    start = ARCHITECTURES["gpt2"]()
    modules = [start, moved(start, 0.1, 1)]
    exact = series(modules, tmp_path, matrices=False)
    found = series(modules, tmp_path, matrices=False, **PROJECTED)
    compared = 0
    for (p, a), (q, b) in zip(exact, found, strict=True):
        assert (p, a.metric, a.layer, a.component, a.label) == (q, b.metric, b.layer, b.component, b.label)
        if a.value is None or b.value is None:
            assert a.reason == b.reason
            continue
        if b.stderr:
            assert abs(a.value - b.value) < 5 * b.stderr
            compared += a.value != b.value
    assert compared > 20


@pytest.mark.parametrize("params", [{}, PROJECTED])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_checkpoint_is_exactly_neutral_to_itself(kind: str, params: dict[str, int], tmp_path: Path) -> None:
    start = ARCHITECTURES[kind]()
    found = series([start, moved(start, 0.1, 1), copy.deepcopy(start)], tmp_path, kind, **params)
    seen = set()
    for position, item in found:
        if position == 1 or item.value is None or str(item.label).split("|")[0] not in ("first", "final"):
            continue
        if item.metric != "gradient_pwcca_chance":
            assert item.value == (0 if item.metric.endswith("distance") else 1), item
            assert item.stderr in (None, 0.0)
            seen.add(item.metric)
    # No matrix here has more than the 256 rows that are kept.
    whole = {"gradient_cka", "gradient_cka_debiased", "gradient_pwcca"}
    assert seen == {"gradient_distance", "gradient_relative_distance", COSINE} | whole
    assert pick(found, 1, COSINE, layer=None, component="all", label="first").value != 1


def test_numbers_that_do_not_exist_have_reasons(tmp_path: Path) -> None:
    start = unknown_net()
    dead, broken = copy.deepcopy(start), copy.deepcopy(start)
    with torch.no_grad():
        for parameter in dead.unembed.parameters():
            parameter.zero_()  # nothing below the head has a gradient
        broken.embed.weight.fill_(math.nan)
    found = series([dead, start, broken], tmp_path)
    where = {"layer": 1, "component": "mlp"}
    assert "there is no angle" in str(pick(found, 1, COSINE, label="first", **where).reason)
    item = pick(found, 1, "gradient_relative_distance", label="first", **where)
    assert item.reason == "the gradient is 0 in the first checkpoint"
    assert (pick(found, 1, "gradient_distance", label="first", **where).value or 0) > 0
    assert "all points coincide" in str(pick(found, 1, "gradient_cka", label="first", **where).reason)
    item = pick(found, 2, "gradient_distance", layer=None, component="all", label="previous")
    assert item.reason == "some gradients are not finite numbers"


def test_what_is_kept_depends_on_few_parameters_and_bad_ones_are_refused() -> None:
    analyzer = GradientChangeAnalyzer()

    def kept(**given: Any) -> dict[str, Any]:
        return dict(analyzer.extract_params(parse_params(analyzer.Params, analyzer.name, given)))

    assert kept() == kept(matrices=False, per_matrix=False)
    assert kept() != kept(max_sequences=8)
    with pytest.raises(UsageError, match="must be a power of 2"):
        parse_params(analyzer.Params, analyzer.name, {"projection_size": 1000})
    with pytest.raises(NotApplicable, match="no floating-point parameters"):
        extract_of(analyzer, view_of(nn.Identity()), evaluation())

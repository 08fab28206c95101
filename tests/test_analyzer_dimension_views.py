"""The views and the extras of the analyzer of intrinsic dimension."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one, run
from dimension_clouds import benchmark

from trace_offline.analyzers.intrinsic_dimension import IntrinsicDimensionAnalyzer
from trace_offline.core.errors import NotApplicable, UsageError
from trace_offline.core.params import parse_params
from trace_offline.estimators.extrapolation import curve_levels, extrapolated_dimension, sample_size_curve
from trace_offline.estimators.gride import gride, gride_scales
from trace_offline.estimators.local_pca import local_pca_dimensions
from trace_offline.estimators.neighbors import nearest_neighbors
from trace_offline.estimators.twonn import neighbor_log_ratios, twonn_fit

PAD, BOS = 0, 1
DEFAULT = ("twonn", "twonn_ml", "mle", "gride", "pca_participation_ratio", "pca_90", "pca_99")


def evaluation(n: int = 100, length: int = 12, **more: Any) -> FakeEvaluation:
    """BOS first, padding after a random length (the last row has none), random tokens between."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 60, (n, length), generator=generator)
    lengths = torch.randint(2, length + 1, (n,), generator=generator)
    lengths[-1] = length
    mask = torch.arange(length) < lengths[:, None]
    ids[~mask] = PAD
    ids[:, 0] = BOS
    fake = FakeEvaluation(ids, attention_mask=mask, **more)
    fake.special_token_ids = (PAD, BOS)  # type: ignore[attr-defined]
    return fake


def states(fake: FakeEvaluation, dimensions: tuple[int, ...], width: int = 24) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    layers = []
    for dimension in dimensions:
        inner = torch.randn(*fake.input_ids.shape, dimension, generator=generator)
        layers.append(inner @ torch.randn(dimension, width, generator=generator))
    return tuple(layers)


def twonn(points: torch.Tensor) -> float:
    return twonn_fit(neighbor_log_ratios(nearest_neighbors(points, 2).squared_distances.numpy()))


# --- last tokens


def test_last_tokens_are_the_last_ordinary_token_of_each_row() -> None:
    fake = evaluation(n=120)
    fake.input_ids[::3] = torch.where(  # some rows end in a special token, as an end-of-text would
        torch.arange(12) == fake.attention_mask[::3].sum(1, keepdim=True) - 1, BOS, fake.input_ids[::3]
    )
    hidden = states(fake, (3, 6))
    results, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, views="last_tokens, tokens")
    rows, last = [], []
    for row in range(120):
        ordinary = [t for t in range(12) if fake.attention_mask[row, t] and fake.input_ids[row, t] > 1]
        if ordinary:
            rows.append(row)
            last.append(ordinary[-1])
    assert len(rows) < 120
    mine = [m for m in results if m.component == "residual_last_token"]
    for layer in (0, 1):
        points = hidden[layer][rows, last]
        assert one(mine, "n_points", layer=layer).value == len(rows)
        assert one(mine, "twonn", layer=layer).value == pytest.approx(twonn(points), rel=1e-9)
    alone, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden)
    assert [m for m in results if m.component == "residual"] == alone


def test_last_tokens_of_a_masked_set_have_no_meaning() -> None:
    fake = evaluation(objective="masked_lm", labels_shifted=False)
    results, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=states(fake, (3,)), views="tokens,last_tokens")
    refused = [m for m in results if m.component == "residual_last_token"]
    assert {m.metric for m in refused} == set(DEFAULT)
    assert all("in a masked set every token has; look at sentence_means" in str(m.reason) for m in refused)
    assert one([m for m in results if m not in refused], "twonn", layer=0).value is not None
    with pytest.raises(NotApplicable, match="views asked for: last_tokens"):
        run(IntrinsicDimensionAnalyzer(), fake, hidden=states(fake, (3,)), views="last_tokens")


# --- classes


def annotated(alignment: str = "last") -> FakeEvaluation:
    """Nouns fill two dimensions, verbs five; particles are rare."""
    fake = evaluation(n=100, alignment=alignment)
    rows = []
    for row in range(100):
        length = int(fake.attention_mask[row].sum())
        rows += [(row, t, t + 2, "noun" if t % 4 == 1 else "verb") for t in range(1, length - 1, 2)]
    rows += [(row, 1, 2, "particle") for row in range(7)]
    fake.annotations = {"pos": rows}
    fake.tasks = ("pos",)
    return fake


@pytest.mark.parametrize("alignment", ["last", "first", "mean"])
def test_every_class_has_its_own_numbers(alignment: str) -> None:
    fake = annotated(alignment)
    (hidden,) = states(fake, (8,))
    results, arrays = run(IntrinsicDimensionAnalyzer(), fake, hidden=(hidden,), classes_of="pos")
    spans = [item for item in fake.annotations["pos"] if item[3] == "noun"]
    pool = {
        "last": lambda row, start, end: hidden[row, end - 1],
        "first": lambda row, start, end: hidden[row, start],
        "mean": lambda row, start, end: hidden[row, start:end].double().mean(0).float(),
    }[alignment]
    points = torch.stack([pool(*item[:3]) for item in spans])
    noun = one(results, "twonn", layer=0, task="pos", label="noun")
    assert noun.component == "residual"
    assert noun.n == len(spans)
    assert noun.value == pytest.approx(twonn(points), rel=1e-6)
    assert noun.stderr is not None
    assert one(results, "n_distinct", layer=0, task="pos", label="verb").value > 50  # type: ignore[operator]
    rare = one(results, "twonn", layer=0, task="pos", label="particle")
    assert rare.value is None
    assert rare.reason == 'fewer than 50 annotations "particle" of pos in the evaluation set'
    assert {(array.task, array.label) for array in arrays} == {(None, None), ("pos", "noun"), ("pos", "verb")}
    alone, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=(hidden,))
    assert [m for m in results if m.task is None] == alone


def test_a_class_is_cut_to_max_samples_and_follows_the_seed() -> None:
    fake = annotated()
    hidden = states(fake, (8,))
    found = [
        run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, classes_of="pos", max_samples=60, seed=seed)[0]
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1]
    assert one(found[0], "n_points", layer=0, task="pos", label="noun").value == 60
    values = [one(item, "twonn", layer=0, task="pos", label="noun").value for item in found]
    assert values[0] != values[2]


def test_a_task_that_is_not_there_is_named() -> None:
    fake = annotated()
    with pytest.raises(UsageError, match=r'classes_of: .* no task "poss"\. Did you mean "pos"\? Its tasks: pos\.'):
        run(IntrinsicDimensionAnalyzer(), fake, hidden=states(fake, (3,)), classes_of="poss")


# --- extras on the same cloud


def test_gride_over_scales() -> None:
    fake = evaluation(n=150)
    hidden = states(fake, (4,))
    results, arrays = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, gride_to=64)
    values = {array.name: np.array(array.values) for array in arrays}
    keep = fake.attention_mask.clone()
    keep[:, 0] = False
    squared = nearest_neighbors(hidden[0][keep], 64).squared_distances.numpy()
    expected = [gride(squared, first, second) for first, second in gride_scales(64)]
    np.testing.assert_allclose(values["gride"], expected, rtol=1e-9)
    np.testing.assert_array_equal(values["gride_scales"], [2, 4, 8, 16, 32, 64])
    distance = np.sqrt(squared)
    np.testing.assert_allclose(values["gride_distances"][2], (distance[:, 3] + distance[:, 7]).mean() / 2)
    assert (np.diff(values["gride_stderr"]) < 0).sum() >= 3
    largest = one(results, "gride", layer=0)
    assert (largest.value, largest.stderr) == (values["gride"][-1], values["gride_stderr"][-1])
    off, arrays = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, gride_to=0)
    assert not arrays
    assert not [m for m in off if m.metric == "gride"]


def test_gride_reaches_as_far_as_there_are_points() -> None:
    fake = evaluation(n=20)
    hidden = states(fake, (3,))
    results, arrays = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, gride_to=1024, k=2)
    n = int(one(results, "n_distinct", layer=0).value)  # type: ignore[arg-type]
    scales = next(array.values for array in arrays if array.name == "gride_scales")
    assert scales[-1] < n <= 2 * scales[-1]
    assert one(results, "gride", layer=0).value == next(a.values for a in arrays if a.name == "gride")[-1]


def test_the_sample_size_curve_and_its_continuation() -> None:
    fake = evaluation(n=200)
    hidden = states(fake, (4,))
    results, arrays = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, curve=True)
    keep = fake.attention_mask.clone()
    keep[:, 0] = False
    points = hidden[0][keep]
    levels = curve_levels(len(points))
    assert levels >= 3
    expected = sample_size_curve(points, levels, generator=np.random.default_rng(0))
    values = {array.name: np.array(array.values) for array in arrays}
    np.testing.assert_array_equal(values["curve_n"], expected.n)
    np.testing.assert_allclose(values["curve_twonn"], expected.twonn, rtol=1e-9)
    np.testing.assert_allclose(values["curve_twonn_sd"], expected.twonn_sd, rtol=1e-6)
    np.testing.assert_allclose(values["curve_twonn_ml"], expected.twonn_ml, rtol=1e-9)
    np.testing.assert_allclose(values["curve_mle"], expected.mle, rtol=1e-9)
    np.testing.assert_allclose(values["curve_squared_distance"], expected.squared_distance, rtol=1e-9)
    assert len(values["curve_twonn_stderr"]) == len(values["curve_twonn_ml_stderr"]) == levels
    assert values["curve_twonn"][0] == pytest.approx(one(results, "twonn", layer=0).value)
    found = one(results, "twonn_extrapolated", layer=0)
    assert found.value == pytest.approx(extrapolated_dimension(expected.twonn_ml, expected.squared_distance))
    # The continuation is less certain than what it starts from.
    assert found.stderr is not None
    assert values["curve_twonn_ml_stderr"][0] < found.stderr < 2


def test_too_few_points_for_a_curve() -> None:
    fake = evaluation(n=40)
    results, arrays = run(IntrinsicDimensionAnalyzer(), fake, hidden=states(fake, (4,)), curve=True)
    n = int(one(results, "n_distinct", layer=0).value)  # type: ignore[arg-type]
    found = one(results, "twonn_extrapolated", layer=0)
    assert found.reason == f"{n} distinct points are too few to halve twice; at least 400 are needed"
    assert not [array for array in arrays if array.name.startswith("curve")]


def test_dimensions_that_differ_between_scales_are_not_continued() -> None:
    """A line with wide noise in many dimensions: the farther the neighbours, the fewer the directions."""
    fake = evaluation(n=200)
    generator = torch.Generator().manual_seed(0)
    line = torch.zeros(200, 12, 24)
    line[..., 0] = 400 * torch.rand(200, 12, generator=generator)
    noisy = line + 0.35 * torch.randn(200, 12, 24, generator=generator)
    results, arrays = run(IntrinsicDimensionAnalyzer(), fake, hidden=(noisy,), curve=True)
    found, start = one(results, "twonn_extrapolated", layer=0), one(results, "twonn", layer=0)
    curve = next(array.values for array in arrays if array.name == "curve_twonn")
    assert curve[0] > 1.5 * curve[-1]  # the curve itself says that there is no plateau
    assert found.value is None or found.value > start.value  # type: ignore[operator]


def test_local_pca_of_the_shared_search() -> None:
    fake = evaluation(n=150)
    hidden = states(fake, (3, 6))
    results, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, local_pca_k=30, local_pca_points=10_000)
    keep = fake.attention_mask.clone()
    keep[:, 0] = False
    for layer in (0, 1):
        points = hidden[layer][keep]
        counts = local_pca_dimensions(points, nearest_neighbors(points, 30).indices)
        found = one(results, "local_pca", layer=layer)
        assert found.value == pytest.approx(counts.mean())
        assert found.stderr is not None
    few, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, local_pca_k=30, local_pca_points=20)
    assert one(few, "local_pca", layer=1).value * 20 == pytest.approx(  # type: ignore[operator]
        round(one(few, "local_pca", layer=1).value * 20)  # type: ignore[operator]
    )
    too_far, _ = run(
        IntrinsicDimensionAnalyzer(), evaluation(n=20), hidden=states(evaluation(n=20), (3,)), local_pca_k=999
    )
    assert "have fewer than k = 999 neighbours each" in str(one(too_far, "local_pca", layer=0).reason)


def test_extras_do_not_move_the_other_numbers() -> None:
    """One search serves all; how far it reaches must not be seen in what reads its beginning."""
    fake = evaluation(n=150)
    hidden = states(fake, (5,))
    plain, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden)
    rich, _ = run(
        IntrinsicDimensionAnalyzer(), fake, hidden=hidden, curve=True, local_pca_k=60, gride_to=32, trace_flattened=True
    )
    for metric in ("twonn", "twonn_ml", "mle", "pca_participation_ratio", "pca_90", "pca_99", "n_distinct"):
        here, there = one(plain, metric, layer=0), one([m for m in rich if m.component == "residual"], metric, layer=0)
        assert here.value == there.value


# --- TRACE's flattened rows


def test_flattened_rows_are_whole_padded_rows() -> None:
    fake = evaluation(n=90)
    hidden = states(fake, (3, 6))
    results, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, trace_flattened=True, trace_flattened_rows=500)
    for layer in (0, 1):
        found = one(results, "trace_flattened_twonn", layer=layer)
        assert found.component == "trace_flattened"
        assert found.n == 90
        assert found.value == pytest.approx(twonn(hidden[layer].reshape(90, -1)), rel=1e-9)
        assert found.stderr is not None
        share = 1 - float(fake.attention_mask.float().mean())
        assert one(results, "trace_flattened_padding", layer=layer).value == pytest.approx(share)
    few, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, trace_flattened=True, trace_flattened_rows=30)
    assert one(few, "trace_flattened_twonn", layer=0).n == 30
    plain, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden)
    assert not [m for m in plain if m.metric.startswith("trace_flattened")]


def test_flattened_rows_measure_the_number_of_rows() -> None:
    """The same tokens of a three-dimensional cloud: more rows, other number, and never three."""
    fake = evaluation(n=1000)
    hidden = states(fake, (3,))
    values = [
        one(
            run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, trace_flattened=True, trace_flattened_rows=rows)[0],
            "trace_flattened_twonn",
            layer=0,
        ).value
        for rows in (60, 1000)
    ]
    tokens = one(run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden)[0], "twonn", layer=0).value
    assert tokens == pytest.approx(3, rel=0.1)
    assert min(values) > 10  # type: ignore[type-var, operator]


def test_flattened_rows_that_say_nothing() -> None:
    fake = evaluation(n=100)
    hidden = states(fake, (3, 3, 3))
    hidden[0][:] = hidden[0][:1]  # one and the same row
    hidden[1][4, 2, 0] = torch.nan
    results, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, trace_flattened=True)
    reasons = [one(results, "trace_flattened_twonn", layer=layer).reason for layer in (0, 1, 2)]
    assert reasons[0] == "only 1 distinct rows among 100; at least 10 are needed"
    assert reasons[1] == "the hidden states of 1 of 100 rows are not finite"
    assert reasons[2] is None


# --- parameters and page


def test_a_neighbourhood_of_one_is_refused() -> None:
    with pytest.raises(UsageError, match=r"local_pca_k: .*no directions"):
        parse_params(IntrinsicDimensionAnalyzer.Params, "intrinsic_dimension", {"local_pca_k": 1})


def test_the_page_names_every_parameter_metric_and_array() -> None:
    page = (Path(__file__).parents[1] / "docs" / "analyzers" / "intrinsic_dimension.md").read_text()
    headings = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert headings == [
        "What it measures",
        "Formula",
        "Parameters",
        "Metrics",
        "Cost",
        "How to read it",
        "When not to trust it",
        "References",
    ]
    fake = evaluation(n=200)
    _, arrays = run(IntrinsicDimensionAnalyzer(), fake, hidden=states(fake, (4,)), curve=True)
    names = [
        *IntrinsicDimensionAnalyzer.Params.model_fields,
        *(spec.name for spec in IntrinsicDimensionAnalyzer.metrics),
    ]
    for name in [*names, *{array.name for array in arrays}]:
        assert f"`{name}`" in page, name


def test_the_tables_of_the_page_are_the_committed_results() -> None:
    page = (Path(__file__).parents[1] / "docs" / "analyzers" / "intrinsic_dimension.md").read_text()
    for name in ("bench_dimension_bias", "bench_flattened_dimension"):
        assert benchmark(name).table() in page, f"python benchmarks/{name}.py --table"

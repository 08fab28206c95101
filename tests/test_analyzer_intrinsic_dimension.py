"""The analyzer of intrinsic dimension: which points it takes, what it says of them, what it refuses."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one, run

from trace_offline.analyzers._dimension_points import eligible, sample
from trace_offline.analyzers.base import Context
from trace_offline.analyzers.intrinsic_dimension import IntrinsicDimensionAnalyzer
from trace_offline.core.errors import NotApplicable, UsageError
from trace_offline.core.params import parse_params
from trace_offline.core.types import Measurement
from trace_offline.estimators.gride import gride
from trace_offline.estimators.mle_dimension import mle_dimension
from trace_offline.estimators.neighbors import nearest_neighbors
from trace_offline.estimators.pca_dimension import covariance_spectrum, participation_ratio
from trace_offline.estimators.twonn import neighbor_log_ratios, twonn_fit, twonn_maximum_likelihood

PAD, BOS = 0, 1
VALUES = ("twonn", "twonn_ml", "mle", "gride", "pca_participation_ratio", "pca_90", "pca_99")


def evaluation(n: int = 100, length: int = 12, seed: int = 0, **more: Any) -> FakeEvaluation:
    """BOS first, padding after a random length, random tokens between."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 60, (n, length), generator=generator)
    lengths = torch.randint(2, length + 1, (n,), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    ids[~mask] = PAD
    ids[:, 0] = BOS
    fake = FakeEvaluation(ids, attention_mask=mask, **more)
    fake.special_token_ids = (PAD, BOS)  # type: ignore[attr-defined]
    return fake


def states(fake: FakeEvaluation, dimensions: tuple[int, ...], width: int = 24, seed: int = 0) -> tuple[Any, ...]:
    """One layer of hidden states for each dimension; padding and BOS hold values that would ruin every estimate."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for dimension in dimensions:
        inner = torch.randn(*fake.input_ids.shape, dimension, generator=generator)
        hidden = inner @ torch.randn(dimension, width, generator=generator)
        hidden[~fake.attention_mask] = torch.nan
        hidden[:, 0] = 1e9
        layers.append(hidden)
    return tuple(layers)


def test_numbers_are_those_of_the_estimators_on_all_tokens() -> None:
    fake = evaluation()
    hidden = states(fake, (2, 5))
    results, arrays = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, k=10)
    assert {array.name for array in arrays} == {"gride", "gride_scales", "gride_distances", "gride_stderr"}
    keep = fake.attention_mask.clone()
    keep[:, 0] = False
    for layer, dimension in enumerate((2, 5)):
        points = hidden[layer][keep]
        squared = nearest_neighbors(points, 10).squared_distances.numpy()
        spectrum = covariance_spectrum(points.numpy())
        expected = {
            "twonn": twonn_fit(neighbor_log_ratios(squared)),
            "twonn_ml": twonn_maximum_likelihood(neighbor_log_ratios(squared)),
            "mle": mle_dimension(squared),
            "gride": gride(nearest_neighbors(points, 16).squared_distances.numpy(), 8, 16),
            "pca_participation_ratio": participation_ratio(spectrum),
            "n_points": len(points),
            "n_distinct": len(points),
        }
        for metric, value in expected.items():
            found = one(results, metric, layer=layer)
            assert found.component == "residual"
            assert found.value == pytest.approx(value, rel=1e-12)
            assert found.n == len(points)
        assert expected["twonn"] == pytest.approx(dimension, rel=0.25)
        assert one(results, "pca_99", layer=layer).value == dimension
        for metric in VALUES:
            stderr = one(results, metric, layer=layer).stderr
            assert stderr is not None
            assert 0 <= stderr < 0.2 * dimension
    assert len(results) == 2 * 9


def test_the_sample_is_the_same_at_every_checkpoint_and_follows_the_seed() -> None:
    fake = evaluation(n=200)
    hidden = states(fake, (4,))
    first, again, other = (
        run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, seed=seed, max_samples=300)[0] for seed in (1, 1, 2)
    )
    assert first == again
    assert one(first, "twonn", layer=0).value != one(other, "twonn", layer=0).value
    assert one(first, "n_points", layer=0).value == 300
    # Batches of the shared pass cut the rows elsewhere; nothing may depend on it.
    cut_elsewhere = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, seed=1, max_samples=300, batch=64)[0]
    assert cut_elsewhere == first


def test_every_eligible_token_is_as_likely_as_any_other() -> None:
    fake = evaluation(n=30)
    rows, positions = eligible(fake)  # type: ignore[arg-type]
    assert (positions > 0).all()
    assert fake.attention_mask.numpy()[rows, positions].all()
    assert len(rows) == int(fake.attention_mask.sum()) - 30
    drawn = np.zeros(len(rows))
    for seed in range(400):
        keep = sample(len(rows), 60, np.random.default_rng(seed))
        assert len(np.unique(keep)) == 60
        drawn[keep] += 1
    share = 60 / len(rows)
    assert np.abs(drawn / 400 - share).max() < 5 * math.sqrt(share * (1 - share) / 400)


def test_only_distinct_points_count() -> None:
    """Layer 0 holds one vector per token type, in layer 1 equal contexts agree up to rounding, layer 2 is dull."""
    fake = evaluation(n=100)
    generator = torch.Generator().manual_seed(5)
    types = torch.randn(60, 24, generator=generator)
    layer_0 = types[fake.input_ids]
    ids = fake.input_ids.clone()
    ids[50:] = ids[:50]  # the same texts again
    fake.input_ids, fake.attention_mask[50:] = ids, fake.attention_mask[:50].clone()
    layer_0 = types[ids]
    distinct = torch.randn(50, 12, 24, generator=generator)
    noise = 1 + 5e-7 * torch.randn(100, 12, 24, generator=generator)
    layer_1 = torch.cat([distinct, distinct]) * noise
    layer_2 = torch.where(ids[..., None] < 12, types[0], types[1]) + 0
    results, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=(layer_0, layer_1, layer_2))
    keep = fake.attention_mask.clone()
    keep[:, 0] = False
    n_types = len(ids[keep].unique())
    assert one(results, "n_points", layer=0).value == int(keep.sum())
    assert one(results, "n_distinct", layer=0).value == n_types
    assert one(results, "twonn", layer=0).n == n_types
    expected = twonn_fit(neighbor_log_ratios(nearest_neighbors(types[ids[keep].unique()], 2).squared_distances.numpy()))
    assert one(results, "twonn", layer=0).value == pytest.approx(expected)
    assert one(results, "n_distinct", layer=1).value == int(keep.sum()) / 2
    for metric in VALUES:
        found = one(results, metric, layer=2)
        assert found.value is None
        assert found.reason == f"only 2 distinct points among {int(keep.sum())} tokens; at least 50 are needed"


@pytest.mark.parametrize(
    ("rounding", "merged"), [(5e-6, {"float32", "torch.float16", "bfloat16"}), (3e-3, {"torch.float16", "bfloat16"})]
)
def test_precision_of_the_network_sets_what_counts_as_one_point(rounding: float, merged: set[str]) -> None:
    fake = evaluation(n=100)
    hidden = states(fake, (4,), width=12)
    ids = fake.input_ids
    ids[50:], fake.attention_mask[50:] = ids[:50].clone(), fake.attention_mask[:50].clone()
    hidden[0][50:] = hidden[0][:50] * (1 + rounding)
    counts = {}
    for dtype in ("float32", "torch.float16", "bfloat16"):
        context = Context(
            SimpleNamespace(n_layers=0, device="cpu", dtype=dtype),  # type: ignore[arg-type]
            fake,  # type: ignore[arg-type]
            parse_params(IntrinsicDimensionAnalyzer.Params, "intrinsic_dimension", {}),
            0,
        )
        analyzer = IntrinsicDimensionAnalyzer()
        collector = analyzer.collectors(context)["tokens"]
        tokens = fake.tokens(0, 100)
        collector.update(
            SimpleNamespace(  # type: ignore[arg-type]
                examples=torch.arange(100),
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                hidden=hidden,
            )
        )
        context.collected = {"tokens": collector.finish()}
        found = {m.metric: m.value for m in analyzer.measure(context) if isinstance(m, Measurement)}  # type: ignore[union-attr]
        counts[dtype] = (found["n_points"], found["n_distinct"])
    for dtype, (n_points, n_distinct) in counts.items():
        assert n_distinct == n_points / (2 if dtype in merged else 1)


def test_sentence_means() -> None:
    fake = evaluation(n=150, length=8)
    hidden = states(fake, (3, 3))
    results, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, views="sentence_means,tokens")
    keep = fake.attention_mask.clone()
    keep[:, 0] = False
    rows = keep.any(1).nonzero().flatten()
    means = torch.stack([hidden[1][row][keep[row]].double().mean(0) for row in rows]).float()
    squared = nearest_neighbors(means, 20).squared_distances.numpy()
    of_means = [m for m in results if m.component == "residual_sentence_mean"]
    assert one(of_means, "mle", layer=1).value == pytest.approx(mle_dimension(squared), rel=1e-5)
    assert one(of_means, "n_points", layer=1).value == len(rows)
    # The view of the tokens does not depend on the other one.
    alone, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden)
    assert [m for m in results if m.component == "residual"] == alone


def test_rows_of_nothing_but_special_tokens_have_no_mean() -> None:
    fake = evaluation(n=100)
    fake.attention_mask[3, 1:] = False
    results, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=states(fake, (3,)), views=["sentence_means"])
    assert one(results, "n_points", layer=0).value == 99


def test_dependent_tokens_widen_the_standard_error() -> None:
    """Each document has its own direction; tokens of a document taken for independent would hide it."""
    documents = np.repeat(np.arange(40), 10)
    scale = torch.exp(0.5 * torch.randn(40, 1, 24, generator=torch.Generator().manual_seed(0)))[documents]
    fake, free = (evaluation(n=400, group=group) for group in (documents, np.arange(400)))
    hidden = tuple(layer * scale for layer in states(fake, (24,)))
    by_document = one(run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden)[0], "pca_participation_ratio", layer=0)
    by_row = one(run(IntrinsicDimensionAnalyzer(), free, hidden=hidden)[0], "pca_participation_ratio", layer=0)
    assert by_document.value == by_row.value
    assert by_document.stderr is not None
    assert by_row.stderr is not None
    assert by_document.stderr > 1.5 * by_row.stderr


def test_values_that_are_not_finite_are_named() -> None:
    fake = evaluation()
    hidden = states(fake, (3, 3))
    hidden[1][5, 1, 0] = torch.inf
    hidden[1][6, 1, 2] = torch.nan
    results, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden)
    assert one(results, "twonn", layer=0).value is not None
    n = int(one(results, "n_points", layer=1).value)  # type: ignore[arg-type]
    for metric in (*VALUES, "n_distinct"):
        found = one(results, metric, layer=1)
        assert found.value is None
        assert found.reason == f"the hidden states of 2 of {n} points are not finite"


def test_equidistant_points_have_no_nearest_neighbour_dimension() -> None:
    """One-hot embeddings: every pair is equally far; only the linear dimensions mean something."""
    fake = evaluation(n=300)
    results, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=(torch.eye(60)[fake.input_ids],))
    for metric in ("twonn", "twonn_ml", "mle"):
        assert "equally far" in str(one(results, metric, layer=0).reason)
    assert one(results, "pca_participation_ratio", layer=0).value == pytest.approx(57)


def test_more_neighbours_than_points() -> None:
    fake = evaluation(n=300)
    types = torch.randn(60, 10, generator=torch.Generator().manual_seed(0))
    results, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=(types[fake.input_ids],), k=58)
    found = one(results, "mle", layer=0)
    assert found.value is None
    assert found.reason == "58 distinct points have fewer than k = 58 neighbours each"
    assert one(results, "twonn", layer=0).value is not None
    assert one(results, "twonn", layer=0).stderr is None  # 58 points cannot be divided into parts of 50


def test_too_small_an_evaluation_set_is_not_applicable() -> None:
    fake = evaluation(n=5, length=8)
    with pytest.raises(NotApplicable, match=r"has \d+ tokens \(special ones left out\) in 5 rows; .* at least 50"):
        run(IntrinsicDimensionAnalyzer(), fake, hidden=states(fake, (3,)))
    # One view of two is possible: the other says why it is not.
    fake = evaluation(n=20)
    results, _ = run(
        IntrinsicDimensionAnalyzer(), fake, hidden=states(fake, (3, 3)), views=["tokens", "sentence_means"]
    )
    refused = [m for m in results if m.component == "residual_sentence_mean"]
    assert {m.reason for m in refused} == {"fewer than 50 sentence means in the evaluation set"}
    assert {(m.metric, m.layer) for m in refused} == {(metric, layer) for metric in VALUES for layer in (0, 1)}


def test_a_network_without_blocks_is_not_applicable() -> None:
    fake = evaluation()
    with pytest.raises(NotApplicable, match=r"blocks of this network are not known.*--blocks"):
        run(IntrinsicDimensionAnalyzer(), fake, hidden=states(fake, (3,)), n_layers=None)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"max_samples": 49}, "max_samples: .* greater than or equal to 50"),
        ({"k": 1}, "k: "),
        ({"views": "word"}, "views"),
        ({"views": []}, "views"),
        ({"max_sample": 500}, 'Did you mean "max_samples"'),
    ],
)
def test_parameters_out_of_bounds(given: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        parse_params(IntrinsicDimensionAnalyzer.Params, "intrinsic_dimension", given)


def test_views_are_a_set() -> None:
    def views(value: Any) -> tuple[str, ...]:
        return parse_params(IntrinsicDimensionAnalyzer.Params, "intrinsic_dimension", {"views": value}).views

    assert views("tokens") == ("tokens",)
    assert views("sentence_means, tokens") == views(["sentence_means", "tokens", "tokens"])
    assert views(["sentence_means", "tokens"]) == ("tokens", "sentence_means")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_five_layers_of_2000_points_take_seconds(one_thread: None) -> None:
    fake = evaluation(n=400)
    hidden = states(fake, (8, 8, 8, 8, 8), width=64)
    start = time.process_time()
    results, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=hidden, batch=400)
    assert one(results, "n_points", layer=4).value == 2000
    assert time.process_time() - start < 6


def test_real_networks(stories_model: Any) -> None:
    """Equal beginnings of text coincide at every layer of a causal model, whatever the shape of the batch."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(stories_model, dtype=torch.float32).eval()
    fake = evaluation(n=60, length=24)
    ids = fake.input_ids
    ids += 300  # past the single bytes, which this network was never trained on
    ids[:, :7] = ids[0, :7]  # one beginning of six words for all texts
    ids[:, 0] = BOS
    fake.attention_mask[:, :12] = True
    ids[fake.attention_mask & (ids == PAD + 300)] = 307
    hidden = [[] for _ in range(model.config.num_hidden_layers + 1)]  # type: ignore[var-annotated]
    with torch.no_grad():
        for start in range(0, 60, 7):
            out = model(ids[start : start + 7], output_hidden_states=True)
            for layer, seen in enumerate(out.hidden_states):
                hidden[layer].append(seen)
    results, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=tuple(torch.cat(part) for part in hidden))
    rows, positions = eligible(fake)  # type: ignore[arg-type]
    contexts = [tuple(ids[row, : position + 1].tolist()) for row, position in zip(rows, positions, strict=True)]
    n_contexts = len(set(contexts))
    assert n_contexts < len(contexts) - 6 * 58
    for layer in range(1, 6):
        assert one(results, "n_distinct", layer=layer).value == n_contexts
        assert 1 < one(results, "mle", layer=layer).value < 40  # type: ignore[operator]
    assert one(results, "n_distinct", layer=0).value <= 59  # type: ignore[operator]

"""The analyzer of similarity: which checkpoints it compares, on which points, and what cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation
from series_fakes import compare, extract_of, pick, view_of
from tiny_models import ARCHITECTURES, VOCABULARY, unknown_net

from trace_offline.analyzers._token_sample import sample_tokens
from trace_offline.analyzers.similarity import SimilarityAnalyzer
from trace_offline.core.errors import NotApplicable
from trace_offline.estimators.cka import centred_kernel, cka, u_centred_kernel, unit_points
from trace_offline.estimators.neighbors import nearest_neighbors
from trace_offline.estimators.neighbourhood_overlap import neighbourhood_overlap, overlap_by_chance
from trace_offline.estimators.procrustes import procrustes_distance
from trace_offline.estimators.pwcca import pwcca

NEUTRAL = {"cka": 1.0, "cka_debiased": 1.0, "procrustes_distance": 0.0, "pwcca": 1.0, "neighbourhood_overlap": 1.0}
BOS = 1


def evaluation(n: int = 40, length: int = 10, **more: Any) -> FakeEvaluation:
    ids = torch.randint(3, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = BOS
    ids[:, 1] = 3 + torch.arange(n)  # no two texts begin alike, so that contexts are all different
    mask = torch.arange(length) < torch.randint(4, length + 1, (n, 1), generator=torch.Generator().manual_seed(1))
    fake = FakeEvaluation(ids, attention_mask=mask, **more)
    fake.special_token_ids = (BOS,)  # type: ignore[attr-defined]
    return fake


def planted(*clouds: np.ndarray) -> dict[str, torch.Tensor]:
    return {f"layer_{layer}": torch.from_numpy(cloud.astype(np.float32)) for layer, cloud in enumerate(clouds)}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_checkpoint_is_exactly_neutral_to_itself_in_every_architecture(kind: str, tmp_path: Path) -> None:
    fake, analyzer = evaluation(), SimilarityAnalyzer()
    parts = [extract_of(analyzer, view_of(ARCHITECTURES[kind](seed=seed)), fake) for seed in (0, 1, 1)]
    assert {len(part) for part in parts} == {4}
    found = compare(analyzer, parts, fake, tmp_path)
    for layer in range(4):
        for position, label in ((0, "first"), (1, "final"), (2, "final"), (2, "previous")):
            for metric, neutral in NEUTRAL.items():
                item = pick(found, position, metric, layer=layer, label=label, component="residual")
                assert item.value == neutral, (metric, layer)
                assert item.stderr == 0.0
        for metric, neutral in NEUTRAL.items():
            item = pick(found, 1, metric, layer=layer, label="previous")
            assert item.value is not None
            assert abs(item.value - neutral) > 1e-3
            assert item.stderr is not None
            assert item.stderr > 0
    assert not [item for position, item in found if position == 0 and item.label == "previous"]


def test_numbers_are_those_of_the_estimators_on_the_sampled_tokens(tmp_path: Path) -> None:
    fake, analyzer = evaluation(), SimilarityAnalyzer()
    parts = [extract_of(analyzer, view_of(ARCHITECTURES["gpt2"](seed=seed)), fake) for seed in (0, 1)]
    found = compare(analyzer, parts, fake, tmp_path, k=5)
    keep = fake.attention_mask & (fake.input_ids != BOS)
    clusters = keep.nonzero()[:, 0].numpy()
    with torch.no_grad():
        states = [
            ARCHITECTURES["gpt2"](seed=seed)(
                input_ids=fake.input_ids, attention_mask=fake.attention_mask.long(), output_hidden_states=True
            ).hidden_states[2][keep]
            for seed in (0, 1)
        ]
    new, old = states[1], states[0]
    expected = {
        "cka": cka(centred_kernel(new), centred_kernel(old), clusters),
        "cka_debiased": cka(u_centred_kernel(new), u_centred_kernel(old), clusters),
        "procrustes_distance": procrustes_distance(unit_points(new), unit_points(old), clusters),
        "pwcca": pwcca(new, old),
    }
    for metric, estimate in expected.items():
        item = pick(found, 1, metric, layer=2, label="previous")
        assert item.value == pytest.approx(estimate.value, rel=1e-4)
        assert item.n == int(keep.sum())
        if metric != "pwcca":
            assert item.stderr == pytest.approx(estimate.stderr, rel=1e-3)
    item = pick(found, 1, "neighbourhood_overlap", layer=2, label="first")
    overlap = neighbourhood_overlap(*(nearest_neighbors(part[f"layer_{2}"], 5).indices for part in parts))
    assert item.n == len(new)
    assert item.value == pytest.approx(float(overlap.mean()), abs=1e-12)
    chance = pick(found, 1, "neighbourhood_overlap_chance", layer=2, label="first")
    assert chance.value == overlap_by_chance(len(new), 5)


def test_points_that_coincide_have_no_neighbours_to_count(tmp_path: Path) -> None:
    """At the embedding output all tokens of one type are one point; only types are compared there."""
    fake, analyzer = evaluation(n=70), SimilarityAnalyzer()
    parts = [extract_of(analyzer, view_of(unknown_net(seed)), fake) for seed in (0, 1)]
    for part in parts:
        sample = sample_tokens(fake, 1000, 0)  # type: ignore[arg-type]
        types = fake.input_ids[torch.from_numpy(sample.rows), torch.from_numpy(sample.positions)]
        part["layer_0"] = torch.randn(VOCABULARY, 24, generator=torch.Generator().manual_seed(len(part)))[types]
    found = compare(analyzer, parts, fake, tmp_path)
    assert pick(found, 1, "neighbourhood_overlap", layer=0, label="previous").n == len(types.unique())
    assert pick(found, 1, "neighbourhood_overlap", layer=0, label="previous").value == 1.0
    assert pick(found, 1, "neighbourhood_overlap", layer=1, label="previous").n == len(sample)


def test_rotations_and_noise_are_told_apart(tmp_path: Path) -> None:
    fake, analyzer = evaluation(n=60), SimilarityAnalyzer()
    m = len(sample_tokens(fake, 1000, 0))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    base = rng.standard_normal((m, 8)) * np.geomspace(4, 1, 8)
    rotated = 3 * base @ np.linalg.qr(rng.standard_normal((8, 8)))[0] - 1
    mapped = base @ rng.standard_normal((8, 8))
    noise = rng.standard_normal((m, 8))
    found = compare(analyzer, [planted(c) for c in (base, rotated, mapped, noise, base)], fake, tmp_path)
    for metric, neutral in NEUTRAL.items():
        assert pick(found, 1, metric, label="first").value == pytest.approx(
            neutral, abs=1e-5 if "cka" in metric else 1e-3
        )
    assert pick(found, 2, "pwcca", label="first").value == pytest.approx(1, abs=1e-6)
    assert float(pick(found, 2, "cka", label="first").value or 1) < 0.95
    unrelated = pick(found, 3, "cka_debiased", label="first")
    assert unrelated.value is not None
    assert unrelated.stderr is not None
    assert abs(unrelated.value) < 4 * unrelated.stderr + 0.01
    chance = pick(found, 3, "neighbourhood_overlap_chance", label="first").value
    item = pick(found, 3, "neighbourhood_overlap", label="first")
    assert item.value is not None
    assert item.stderr is not None
    assert chance is not None
    assert abs(item.value - chance) < 5 * item.stderr
    assert pick(found, 4, "procrustes_distance", label="final").value == 0.0


def test_a_series_of_one_is_its_own_start_and_end(tmp_path: Path) -> None:
    fake, analyzer = evaluation(), SimilarityAnalyzer()
    part = extract_of(analyzer, view_of(unknown_net()), fake)
    found = compare(analyzer, [part], fake, tmp_path)
    assert {item.label for _, item in found} == {"first", "final"}
    for _, item in found:
        if item.metric in NEUTRAL:
            assert item.value == NEUTRAL[item.metric]


def test_what_cannot_be_compared_has_a_reason_and_the_rest_its_number(tmp_path: Path) -> None:
    fake, analyzer = evaluation(), SimilarityAnalyzer()
    m = len(sample_tokens(fake, 1000, 0))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    fine = rng.standard_normal((m, 6))
    broken = fine.copy()
    broken[3, 2] = np.nan
    constant = np.ones((m, 6))
    wide = rng.standard_normal((m, m + 1))
    found = compare(analyzer, [planted(fine, fine), planted(broken, constant), planted(wide, fine)], fake, tmp_path)
    for metric in NEUTRAL:
        assert "found NaN" in str(pick(found, 1, metric, layer=0, label="first").reason)
    assert "all points coincide" in str(pick(found, 1, "cka", layer=1, label="first").reason)
    assert "only 1 tokens have distinct points in both" in str(
        pick(found, 1, "neighbourhood_overlap", layer=1, label="first").reason
    )
    assert f"{m} points of {m + 1} features" in str(pick(found, 2, "pwcca", layer=0, label="first").reason)
    assert pick(found, 2, "cka_debiased", layer=0, label="first").value is not None
    assert pick(found, 2, "cka", layer=1, label="first").value == 1.0


def test_networks_that_grew_are_compared_where_they_can_be(tmp_path: Path) -> None:
    fake, analyzer = evaluation(), SimilarityAnalyzer()
    m = len(sample_tokens(fake, 1000, 0))  # type: ignore[arg-type]
    cloud = np.random.default_rng(0).standard_normal((m, 4))
    found = compare(analyzer, [planted(cloud), planted(cloud, cloud), planted(cloud, cloud)], fake, tmp_path)
    labels = {(position, item.label) for position, item in found if item.layer == 1}
    assert labels == {(1, "final"), (2, "previous"), (2, "final")}


def test_the_sample_follows_seed_and_size_and_the_extract_only_its_size(tmp_path: Path) -> None:
    fake, analyzer = evaluation(), SimilarityAnalyzer()
    view = view_of(unknown_net())
    first = extract_of(analyzer, view, fake, max_samples=50)
    assert {tuple(table.shape) for table in first.values()} == {(50, 24)}
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.values(), extract_of(analyzer, view, fake, max_samples=50).values(), strict=True)
    )
    other = extract_of(analyzer, view, fake, max_samples=50, seed=1)
    assert not torch.equal(first["layer_1"], other["layer_1"])
    params = analyzer.Params(max_samples=50, k=3)
    assert analyzer.extract_params(params) == {"max_samples": 50}
    whole = extract_of(analyzer, view, fake)
    found = compare(analyzer, [first, whole], fake, tmp_path, max_samples=50)
    assert "extracts do not match" in str(pick(found, 1, "cka", layer=0, label="first").reason)


def test_not_applicable_without_blocks_or_tokens() -> None:
    analyzer, view = SimilarityAnalyzer(), view_of(unknown_net())
    view.blocks = None
    with pytest.raises(NotApplicable, match="name its blocks with --blocks"):
        extract_of(analyzer, view, evaluation())
    with pytest.raises(NotApplicable, match="needs at least 4"):
        extract_of(analyzer, view_of(unknown_net()), evaluation(n=1, length=4))


def test_tokens_of_one_document_only_are_grouped_by_row() -> None:
    fake = evaluation(group=np.zeros(40, np.int64))
    sample = sample_tokens(fake, 1000, 0)  # type: ignore[arg-type]
    assert np.array_equal(sample.clusters, sample.rows)
    keep = fake.attention_mask.numpy().copy()
    keep[:, 0] = False
    assert np.array_equal(np.stack([sample.rows, sample.positions]), np.stack(np.nonzero(keep)))
    grouped = sample_tokens(evaluation(group=np.arange(40) // 4), 1000, 0)  # type: ignore[arg-type]
    assert np.array_equal(grouped.clusters, grouped.rows // 4)

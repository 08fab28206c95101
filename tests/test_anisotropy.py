"""Anisotropy and outliers against all pairs written out, closed forms and their sampling spread."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from trace_offline.estimators.anisotropy import max_to_median_norm, mean_cosine, top_dimension_share
from trace_offline.estimators.subsampling import jackknife_stderr


def all_pairs(points: np.ndarray, clusters: np.ndarray) -> float:
    cosines = cosine_similarity(points.astype(np.float64))
    return float(cosines[clusters[:, None] != clusters[None, :]].mean())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_mean_over_all_pairs_of_different_clusters(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((40, 6)) + 0.7
    clusters = rng.integers(0, 9, 40) * 100
    found = mean_cosine(torch.from_numpy(scale * points), clusters)
    assert found.value == pytest.approx(all_pairs(points, clusters), abs=1e-12)
    left = [all_pairs(points[clusters != g], clusters[clusters != g]) for g in np.unique(clusters)]
    assert found.stderr == pytest.approx(float(jackknife_stderr(np.array(left))), rel=1e-9)
    alone = mean_cosine(torch.from_numpy(points))
    assert alone.value == pytest.approx(all_pairs(points, np.arange(40)), abs=1e-12)


def test_closed_forms() -> None:
    one_way = torch.arange(1.0, 8)[:, None] * torch.tensor([[1.0, -2.0, 2.0]])
    assert mean_cosine(one_way).value == pytest.approx(1.0, abs=1e-15)
    assert mean_cosine(one_way).stderr == pytest.approx(0.0, abs=1e-8)
    assert mean_cosine(torch.eye(5)).value == 0.0
    assert mean_cosine(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == mean_cosine(torch.tensor([[2.0, 0.0], [-1.0, 0.0]]))
    assert mean_cosine(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])).value == -1.0
    assert mean_cosine(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])).stderr is None


def test_stderr_covers_the_truth() -> None:
    """Points around a mean, in clusters that share a part: 95 % intervals hold the value of a very large sample."""
    rng = np.random.default_rng(0)

    def draw(clusters: int) -> np.ndarray:
        shared = np.repeat(rng.standard_normal((clusters, 10)), 4, axis=0)
        return 0.8 + shared + 0.5 * rng.standard_normal((4 * clusters, 10))

    truth = mean_cosine(torch.from_numpy(draw(50_000)), np.repeat(np.arange(50_000), 4)).value
    assert truth is not None
    covered = 0
    for _ in range(200):
        found = mean_cosine(torch.from_numpy(draw(40)), np.repeat(np.arange(40), 4))
        assert found.value is not None
        assert found.stderr is not None
        covered += abs(found.value - truth) <= 1.96 * found.stderr
    assert 180 <= covered <= 198


@pytest.mark.parametrize("seed", range(3))
def test_top_dimensions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((60, 8)) * np.array([1, 1, 9, 1, 1, 5, 1, 1])
    clusters = np.repeat(np.arange(20), 3)
    found = top_dimension_share(torch.from_numpy(points), 2, clusters)
    assert found.value == pytest.approx((points[:, [2, 5]] ** 2).sum() / (points**2).sum(), rel=1e-12)
    left = [
        (points[clusters != g][:, [2, 5]] ** 2).sum() / (points[clusters != g] ** 2).sum() for g in range(20)
    ]  # fmt: skip
    assert found.stderr == pytest.approx(float(jackknife_stderr(np.array(left))), rel=0.15)
    assert top_dimension_share(torch.ones(5, 8), 2).value == 0.25
    assert top_dimension_share(torch.from_numpy(points), 8).value == pytest.approx(1.0, abs=1e-15)


def test_largest_norm() -> None:
    points = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 50.0]))
    assert max_to_median_norm(points) == 50 / 3
    assert max_to_median_norm(torch.ones(1, 4)) == 1.0


def test_what_is_not_defined_is_an_error() -> None:
    with pytest.raises(ValueError, match="no direction"):
        mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="belong to one text"):
        mean_cosine(torch.ones(3, 2), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="belong to one text"):
        mean_cosine(torch.ones(1, 2))
    with pytest.raises(ValueError, match="expected points"):
        mean_cosine(torch.ones(3))
    nan = torch.full((3, 2), math.nan)
    for function in (mean_cosine, max_to_median_norm, lambda p: top_dimension_share(p, 1)):
        with pytest.raises(ValueError, match="found NaN"):
            function(nan)
    with pytest.raises(ValueError, match="all points are 0"):
        top_dimension_share(torch.zeros(3, 2), 1)
    with pytest.raises(ValueError, match="between 1 and 2 dimensions, found 3"):
        top_dimension_share(torch.ones(3, 2), 3)
    with pytest.raises(ValueError, match="half of the points are 0"):
        max_to_median_norm(torch.zeros(3, 2))

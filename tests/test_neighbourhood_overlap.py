"""Neighbourhood overlap against sets written out, its expectation by chance, and edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group
from sklearn.neighbors import NearestNeighbors

from trace_offline.estimators.neighbors import nearest_neighbors
from trace_offline.estimators.neighbourhood_overlap import neighbourhood_overlap, overlap_by_chance


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 5, 49])
def test_overlap_is_that_of_sets_from_another_search(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((50, 6))
    y = x + rng.standard_normal((50, 6))
    found = neighbourhood_overlap(*(nearest_neighbors(torch.from_numpy(t), k).indices for t in (x, y)))
    a, b = (NearestNeighbors(n_neighbors=k).fit(t).kneighbors(return_distance=False) for t in (x, y))
    expected = [len(set(p) & set(q)) / len(set(p) | set(q)) for p, q in zip(a.tolist(), b.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-15)


def test_the_same_points_overlap_exactly_and_rotations_too() -> None:
    x = torch.randn(80, 5, generator=torch.Generator().manual_seed(0)).double()
    rotated = 2 * x @ torch.from_numpy(ortho_group.rvs(5, random_state=0)) + 1
    indices = nearest_neighbors(x, 7).indices
    assert neighbourhood_overlap(indices, nearest_neighbors(x.clone(), 7).indices).tolist() == [1.0] * 80
    assert neighbourhood_overlap(indices, nearest_neighbors(rotated, 7).indices).tolist() == [1.0] * 80


@pytest.mark.parametrize(("n", "k"), [(30, 3), (30, 10), (200, 10), (5, 4)])
def test_chance_is_the_mean_of_unrelated_sets(n: int, k: int) -> None:
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.permuted(np.tile(np.arange(n - 1), (20_000, 1)), axis=1)[:, :k]) for _ in range(2))
    found = neighbourhood_overlap(a, b)
    assert float(found.mean()) == pytest.approx(
        overlap_by_chance(n, k), abs=5 * float(found.std()) / 20_000**0.5 + 1e-12
    )


def test_wrong_shapes_are_errors() -> None:
    with pytest.raises(ValueError, match="two tables"):
        neighbourhood_overlap(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="expected between 1 and 4 neighbours of 5 points, found 5"):
        overlap_by_chance(5, 5)

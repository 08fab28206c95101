"""Orthogonal Procrustes distance against scipy, closed forms and its own sampling spread."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ortho_group

from trace_offline.estimators.cka import unit_points
from trace_offline.estimators.procrustes import procrustes_distance
from trace_offline.estimators.subsampling import jackknife_stderr


def distance(x: np.ndarray, y: np.ndarray) -> float:
    found = procrustes_distance(unit_points(torch.from_numpy(x)), unit_points(torch.from_numpy(y))).value
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "width"), [(60, 8), (10, 30), (2, 3), (50, 1)])
def test_distance_is_what_the_best_rotation_leaves(seed: int, n: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, n, width))
    a, b = (t - t.mean(0) for t in (x, y))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    rotation, _ = orthogonal_procrustes(a, b)
    assert distance(x, y) == pytest.approx(np.linalg.norm(a @ rotation - b), abs=1e-9)
    nuclear = np.linalg.svd(a.T @ b, compute_uv=False).sum()
    assert distance(x, y) == pytest.approx(math.sqrt(max(0, 2 - 2 * nuclear)), abs=1e-6)


def test_widths_may_differ_and_nothing_shared_is_the_square_root_of_two() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 6))
    padded = np.concatenate([x, np.zeros((30, 3))], axis=1) @ ortho_group.rvs(9, random_state=1)
    y = rng.standard_normal((30, 9))
    assert distance(x, y) == pytest.approx(distance(padded, y), abs=1e-12)
    assert distance(y, x) == pytest.approx(distance(x, y), abs=1e-12)
    basis = np.linalg.qr(rng.standard_normal((30, 10)) - 0)[0]
    basis = np.linalg.qr(basis - basis.mean(0))[0]
    assert distance(basis[:, :4], basis[:, 4:8]) == pytest.approx(math.sqrt(2), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_rotations_are_at_distance_zero_and_the_same_exactly(seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((40, 7))
    assert distance(x, -3 * x @ ortho_group.rvs(7, random_state=seed) + 2) < 1e-14
    table = unit_points(torch.from_numpy(x))
    same = procrustes_distance(table, table.clone())
    assert (same.value, same.stderr) == (0.0, 0.0)


def test_small_distances_keep_their_digits() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 5))
    change = rng.standard_normal((50, 5))
    at = [distance(x, x + scale * change) / scale for scale in (1e-4, 1e-9)]
    assert at[1] == pytest.approx(at[0], rel=1e-3)


def test_triangle_inequality() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        x, y, z = rng.standard_normal((3, 12, 3))
        assert distance(x, z) <= distance(x, y) + distance(y, z) + 1e-12


def test_stderr_is_that_of_leaving_out_clusters_and_of_new_samples() -> None:
    rng = np.random.default_rng(1)
    mix = rng.standard_normal((5, 5))
    values, errors = [], []
    clusters = np.repeat(np.arange(40), 3)
    for repeat in range(120):
        x = np.repeat(rng.standard_normal((40, 5)), 3, axis=0) + 0.2 * rng.standard_normal((120, 5))
        y = np.tanh(x @ mix) + 0.5 * np.repeat(rng.standard_normal((40, 5)), 3, axis=0)
        a, b = (unit_points(torch.from_numpy(t)) for t in (x, y))
        found = procrustes_distance(a, b, clusters)
        values.append(found.value)
        errors.append(found.stderr)
        if repeat < 3:
            left = np.array([distance(x[clusters != g], y[clusters != g]) for g in range(40)])
            assert found.stderr == pytest.approx(float(jackknife_stderr(left)), rel=0.15)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.2)  # type: ignore[arg-type]


def test_other_points_are_an_error() -> None:
    with pytest.raises(ValueError, match="same points, found 3 and 4"):
        procrustes_distance(torch.zeros(3, 2), torch.zeros(4, 2))

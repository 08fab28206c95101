"""The count sketch: linear, unbiased, with the promised variance, and the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trace_offline.estimators.sketch import CountSketch, seed_for, squared_distance_variance

PLANTED = ([-3.0, 10.0, -9.0, -5.0], [-2.0, -9.0, 7.0, 7.0])


def sketch(values: np.ndarray, size: int, seed: int) -> np.ndarray:
    made = CountSketch(size, seed)
    made.add(torch.from_numpy(values))
    return made.values


def dense_projection(n: int, size: int, seed: int) -> np.ndarray:
    return np.stack([sketch(column, size, seed) for column in np.eye(n)], axis=1)


def test_it_is_a_matrix_with_one_sign_in_every_column() -> None:
    matrix = dense_projection(50, 16, 3)
    assert (np.abs(matrix).sum(0) == 1).all()
    assert set(np.unique(matrix)) == {-1.0, 0.0, 1.0}
    values = np.random.default_rng(0).standard_normal(50)
    np.testing.assert_allclose(sketch(values, 16, 3), matrix @ values, atol=1e-14)


def test_pieces_and_types_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    whole = sketch(values.reshape(-1).numpy(), 32, 1)
    pieces = CountSketch(32, 1)
    for row in values:
        pieces.add(row)
    np.testing.assert_allclose(pieces.values, whole, atol=1e-12)
    monkeypatch.setattr("trace_offline.estimators.sketch._CHUNK", 5)
    np.testing.assert_allclose(sketch(values.numpy(), 32, 1), whole, atol=1e-12)
    half = CountSketch(32, 1)
    half.add(values.bfloat16())
    np.testing.assert_allclose(half.values, sketch(values.bfloat16().double().numpy(), 32, 1), atol=1e-12)


@pytest.mark.parametrize("kind", ["normal", "sparse", "aligned"])
def test_distances_are_unbiased_with_the_stated_error(kind: str) -> None:
    rng = np.random.default_rng(0)
    n, size = 3000, 256
    values = rng.standard_normal(n)
    if kind == "aligned":
        values = np.tile(np.repeat([1.0, 0.0], 16), n // 32 + 1)[:n]
    repeats = 400
    if kind == "sparse":
        values, repeats = values[:5], 8000  # collisions are rare and large
    truth = float(values @ values)
    found = np.array([np.square(sketch(values, size, seed)).sum() for seed in range(repeats)])
    bound = squared_distance_variance(truth, size)
    assert found.mean() == pytest.approx(truth, abs=4 * np.sqrt(bound / repeats))
    assert found.var() < 1.25 * bound
    if kind == "normal":
        assert found.var() > 0.75 * bound


def test_buckets_are_even_and_signs_fair() -> None:
    counts = np.zeros(64)
    signs = 0.0
    for place in range(4096):
        one = np.zeros(4096)
        one[place] = 1
        if place % 8 == 0:
            found = sketch(one, 64, 9)
            counts += np.abs(found)
            signs += found.sum()
    assert abs(signs) < 4 * np.sqrt(512)
    assert ((counts - 8) ** 2 / 8).sum() < 64 + 4 * np.sqrt(2 * 64)


def test_the_projection_is_the_same_for_ever() -> None:
    """Extracts made by another version are compared with new ones: these numbers must never change."""
    assert sketch(np.arange(1.0, 11.0), 4, 0).tolist() == PLANTED[0]
    assert sketch(np.arange(1.0, 11.0), 4, 7).tolist() == PLANTED[1]
    assert sketch(np.array([3.0, 4.0]), 1, 0).tolist() in ([7.0], [-7.0], [1.0], [-1.0])


def test_named_vectors_have_seeds_of_their_own_for_ever() -> None:
    assert seed_for(0, "1.mlp") == 18031073327943679449
    assert len({seed_for(seed, name) for seed in range(10) for name in "abc"}) == 30


def test_size_must_be_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of 2 as size of a sketch, found 12"):
        CountSketch(12, 0)

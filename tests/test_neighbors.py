"""Nearest neighbours and distinct rows against brute force in float64 and a k-d tree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from trace_offline.estimators import neighbors
from trace_offline.estimators.distinct import distinct_rows
from trace_offline.estimators.neighbors import nearest_neighbors


def brute_force(points: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All differences in float64, self left out by index, ties in the order of the index."""
    x = points.double().numpy()
    squared = np.square(x[:, None, :] - x[None, :, :]).sum(2)
    np.fill_diagonal(squared, np.inf)
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(squared, order, 1), order


def clouds() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    centres = torch.randint(0, 6, (300,), generator=g)
    clustered = 1e4 * normal(6, 24)[centres] + 1e-3 * normal(300, 24)
    repeated = normal(40, 16)[torch.randint(0, 40, (300,), generator=g)]
    outlier = normal(200, 32)
    outlier[7] = 1e6
    return {
        "gaussian": normal(300, 48),
        "offset": 1e3 + 1e-2 * normal(300, 48),
        "clusters": clustered,
        "duplicates": repeated,
        "constant": torch.full((60, 5), 3.25),
        "grid": torch.cartesian_prod(*[torch.arange(6.0)] * 3),
        "outlier": outlier,
        "one feature": normal(200, 1),
        "wide": normal(50, 700),
        "float64": normal(200, 10).double() * 1e-6 + 1.0,
        "bfloat16": normal(200, 20).bfloat16(),
        "collinear": torch.linspace(0, 1, 150)[:, None] * normal(1, 20),
    }


@pytest.mark.parametrize("name", clouds())
@pytest.mark.parametrize("k", [1, 2, 20])
def test_equals_brute_force_in_float64(name: str, k: int) -> None:
    points = clouds()[name]
    found = nearest_neighbors(points, k)
    squared, order = brute_force(points, k)
    assert found.squared_distances.dtype == torch.float64
    assert bool((found.squared_distances >= 0).all())
    np.testing.assert_allclose(found.squared_distances.numpy(), squared, rtol=1e-12, atol=0)
    np.testing.assert_array_equal(found.indices.numpy(), order)


def test_the_float32_product_alone_is_wrong_where_this_is_right() -> None:
    """The clouds above are hard: from the product alone squared distances come out negative."""
    points = clouds()["offset"]
    product = torch.cdist(points, points, compute_mode="use_mm_for_euclid_dist")
    norms = points.square().sum(1)
    naive = norms[:, None] + norms[None] - 2 * points @ points.T
    assert bool((naive < 0).any())
    exact = nearest_neighbors(points, 1).squared_distances[:, 0].sqrt()
    product.fill_diagonal_(torch.inf)
    assert float((product.amin(1) - exact).abs().max()) > 0.5 * float(exact.max())


def test_equals_k_d_tree() -> None:
    points = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1))
    found = nearest_neighbors(points, 20)
    distance, index = cKDTree(points.double().numpy()).query(points.double().numpy(), k=21)
    np.testing.assert_allclose(found.squared_distances.sqrt().numpy(), distance[:, 1:], rtol=1e-12)
    np.testing.assert_array_equal(found.indices.numpy(), index[:, 1:])
    np.testing.assert_allclose(found.log_distances.numpy(), np.log(distance[:, 1:]), atol=1e-12)


@pytest.mark.parametrize("name", ["gaussian", "clusters", "duplicates", "grid"])
def test_block_size_does_not_change_the_answer(name: str) -> None:
    points = clouds()[name]
    whole, small = nearest_neighbors(points, 5), nearest_neighbors(points, 5, block_bytes=1)
    assert torch.equal(whole.squared_distances, small.squared_distances)
    assert torch.equal(whole.indices, small.indices)


def test_reduced_precision_products_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """When torch may compute float32 products in TF32 or bfloat16, the float32 stage is skipped."""
    seen = []
    original = neighbors._search_by_product

    def spy(points, centred, *rest):  # type: ignore[no-untyped-def]
        seen.append(centred.dtype)
        return original(points, centred, *rest)

    monkeypatch.setattr(neighbors, "_search_by_product", spy)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    nearest_neighbors(clouds()["gaussian"], 3)
    assert seen == [torch.float64]


def test_float32_product_certifies_ordinary_clouds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow stages are for the hard points only."""

    def refuse(*_: object) -> None:
        raise AssertionError("fell back to differences")

    monkeypatch.setattr(neighbors, "_search_by_differences", refuse)
    nearest_neighbors(torch.randn(1000, 64, generator=torch.Generator().manual_seed(2)), 20)
    g = torch.Generator().manual_seed(3)
    far = 1e3 * torch.randn(6, 24, generator=g)[torch.arange(300) % 6] + 0.1 * torch.randn(300, 24, generator=g)
    nearest_neighbors(far, 20)
    with pytest.raises(AssertionError, match="fell back"):
        nearest_neighbors(clouds()["constant"], 20)


@pytest.mark.parametrize(
    ("points", "k", "text"),
    [
        (torch.zeros(5), 1, r"floating-point matrix \[points, features\], found \(5,\)"),
        (torch.zeros(5, 2, dtype=torch.int64), 1, "found .* torch.int64"),
        (torch.zeros(5, 2), 0, "at least 1 neighbour, found k = 0"),
        (torch.zeros(5, 2), 5, "5 neighbours need at least 6 points, found 5"),
        (torch.zeros(0, 2), 1, "at least 2 points, found 0"),
        (torch.tensor([[1.0], [float("nan")], [0.0]]), 1, "finite points, found NaN"),
        (torch.tensor([[1.0], [float("inf")], [0.0]]), 1, "finite points"),
    ],
)
def test_refuses(points: torch.Tensor, k: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        nearest_neighbors(points, k)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 40), width=st.integers(1, 6), levels=st.integers(1, 4))
def test_any_small_integer_cloud(seed: int, n: int, width: int, levels: int) -> None:
    """Many ties and duplicates: the order among equals is that of the index."""
    points = torch.randint(0, levels, (n, width), generator=torch.Generator().manual_seed(seed)).float()
    k = min(n - 1, 4)
    found = nearest_neighbors(points, k)
    squared, order = brute_force(points, k)
    np.testing.assert_array_equal(found.squared_distances.numpy(), squared)
    np.testing.assert_array_equal(found.indices.numpy(), order)


# --- distinct rows


def greedy(points: np.ndarray, tolerance: float) -> list[int]:
    """The definition, one row after the other."""
    x, kept = points.astype(np.float64), []
    for i in range(len(x)):
        limits = [tolerance * max(np.linalg.norm(x[i]), np.linalg.norm(x[j])) for j in kept]
        if all(np.linalg.norm(x[i] - x[j]) > limit for j, limit in zip(kept, limits, strict=True)):
            kept.append(i)
    return kept


def test_distinct_exact() -> None:
    rows = np.array([[1, 2], [0.0, 1], [1, 2], [-0.0, 1], [1, 2.0000002], [0, 1]], np.float32)
    np.testing.assert_array_equal(distinct_rows(rows), [0, 1, 4])
    np.testing.assert_array_equal(distinct_rows(rows[::-1]), [0, 1, 3])
    np.testing.assert_array_equal(distinct_rows(np.zeros((0, 3), np.float32)), [])
    np.testing.assert_array_equal(distinct_rows(np.zeros((4, 0), np.float32)), [0])
    np.testing.assert_array_equal(distinct_rows(np.full((9, 3), -0.0)), [0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distinct_exact_equals_numpy_unique(dtype: type) -> None:
    rows = np.random.default_rng(0).integers(-2, 3, (500, 3)).astype(dtype)
    _, first = np.unique(rows, axis=0, return_index=True)
    np.testing.assert_array_equal(distinct_rows(rows), np.sort(first))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 60),
    tolerance=st.sampled_from([1e-6, 1e-2, 0.3, 1.0, 2.5]),
    offset=st.sampled_from([0.0, 100.0]),
)
def test_distinct_within_tolerance_follows_the_definition(seed: int, n: int, tolerance: float, offset: float) -> None:
    generator = np.random.default_rng(seed)
    base = offset + generator.standard_normal((max(1, n // 3), 4))
    rows = base[generator.integers(0, len(base), n)] + generator.standard_normal((n, 4)) * generator.choice([1e-7, 1.0])
    np.testing.assert_array_equal(distinct_rows(rows, tolerance=tolerance), greedy(rows, tolerance))


def test_rounding_noise_is_not_a_second_point() -> None:
    generator = np.random.default_rng(3)
    base = generator.standard_normal((50, 64)).astype(np.float32)
    noisy = base * (1 + 1e-7 * generator.standard_normal((50, 64)).astype(np.float32))
    rows = np.concatenate([base, noisy])
    assert len(distinct_rows(rows)) > 50
    np.testing.assert_array_equal(distinct_rows(rows, tolerance=1e-5), np.arange(50))


def test_a_collapsed_cloud_is_one_point_and_quick() -> None:
    rows = 1 + 1e-7 * np.random.default_rng(0).standard_normal((3000, 64))
    np.testing.assert_array_equal(distinct_rows(rows, tolerance=1e-5), [0])


@pytest.mark.parametrize(
    ("rows", "tolerance", "text"),
    [
        (np.zeros(3), 0.0, "matrix"),
        (np.zeros((3, 1), int), 0.0, "floating-point"),
        (np.array([[np.nan]]), 0.0, "finite"),
        (np.zeros((3, 1)), -1.0, "at least 0, found -1.0"),
    ],
)
def test_distinct_refuses(rows: np.ndarray, tolerance: float, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        distinct_rows(rows, tolerance=tolerance)

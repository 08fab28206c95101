"""The sample-size curve and its continuation: exact laws, known manifolds, what has no limit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dimension_clouds import benchmark, manifold
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_offline.estimators.extrapolation import (
    curve_levels,
    extrapolated_dimension,
    nested_subsamples,
    sample_size_curve,
)
from trace_offline.estimators.gride import gride
from trace_offline.estimators.mle_dimension import mle_dimension
from trace_offline.estimators.neighbors import nearest_neighbors
from trace_offline.estimators.twonn import neighbor_log_ratios, twonn_fit, twonn_maximum_likelihood

# --- nested subsamples


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 8), st.integers(0, 5))
def test_subsamples_are_nested_and_disjoint(n: int, levels: int, seed: int) -> None:
    if n >> (levels - 1) < 1:
        with pytest.raises(ValueError, match=f"cannot halve {n} points {levels - 1} times"):
            nested_subsamples(n, levels, np.random.default_rng(seed))
        return
    found = nested_subsamples(n, levels, np.random.default_rng(seed))
    np.testing.assert_array_equal(found[0][0], np.arange(n))
    for level, parts in enumerate(found):
        assert len(parts) == 2**level
        assert {len(part) for part in parts} == {n >> level}
        together = np.concatenate(parts)
        assert len(np.unique(together)) == len(together) > n - 2**level
        for index, part in enumerate(parts if level else []):
            assert set(part) <= set(found[level - 1][index // 2])


def test_every_point_is_as_likely_as_any_other() -> None:
    drawn = np.zeros(21)
    for seed in range(600):
        drawn[nested_subsamples(21, 3, np.random.default_rng(seed))[2][0]] += 1
    assert np.abs(drawn / 600 - 5 / 21).max() < 5 * math.sqrt(5 / 21 * 16 / 21 / 600)


def test_levels() -> None:
    assert [curve_levels(n) for n in (99, 100, 199, 200, 400, 2000, 10_000, 10**7)] == [0, 1, 1, 2, 3, 5, 7, 8]


# --- the curve


def test_the_curve_is_the_estimators_on_every_subsample() -> None:
    points = torch.from_numpy(manifold("curved", 500, 6, 0, width=20))
    curve = sample_size_curve(points, 4, k=80, generator=np.random.default_rng(3))
    np.testing.assert_array_equal(curve.n, [500, 250, 125, 62])
    for level, parts in enumerate(nested_subsamples(500, 4, np.random.default_rng(3))):
        tables = [nearest_neighbors(points[part], 2).squared_distances.numpy() for part in parts]
        ratios = [neighbor_log_ratios(table) for table in tables]
        fits = [twonn_fit(ratio) for ratio in ratios]
        assert curve.twonn[level] == pytest.approx(np.mean(fits))
        if level:
            assert curve.twonn_sd[level - 1] == pytest.approx(np.std(fits, ddof=1))
        assert curve.twonn_ml[level] == pytest.approx(twonn_maximum_likelihood(np.concatenate(ratios)))
        assert curve.squared_distance[level] == pytest.approx(np.concatenate(tables)[:, 1].mean())
    assert len(curve.mle) == 3  # 62 points have no 80 neighbours
    assert curve.mle[0] == pytest.approx(mle_dimension(nearest_neighbors(points, 80).squared_distances.numpy()))
    known = nearest_neighbors(points, 90).squared_distances.numpy()
    again = sample_size_curve(points, 4, k=80, generator=np.random.default_rng(3), full=known)
    for one, other in ((curve.twonn, again.twonn), (curve.mle, again.mle), (curve.twonn_ml, again.twonn_ml)):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_single_subsamples_scatter_more_the_smaller_they_are() -> None:
    """The spread of one TwoNN at n points is about d/√n: what looks like a movement there may be none."""
    curve = sample_size_curve(
        torch.from_numpy(manifold("gauss", 3200, 5, 0, width=12)), 6, generator=np.random.default_rng(0)
    )
    expected = curve.twonn[1:] / np.sqrt(curve.n[1:])
    # From eight subsamples on the spread itself is known to about a quarter.
    assert ((curve.twonn_sd / expected)[2:] > 0.7).all()
    assert ((curve.twonn_sd / expected)[2:] < 2).all()


# --- the continuation


@settings(max_examples=60, deadline=None)
@given(st.floats(0.5, 200), st.floats(-0.5, 0.6), st.integers(3, 8), st.floats(1e-12, 1e12))
def test_the_law_itself_is_continued_exactly(limit: float, bend: float, levels: int, unit: float) -> None:
    distance = np.geomspace(0.3, 1.0, levels)
    found = limit * (1 - bend * distance) ** (1 / 3)
    assert extrapolated_dimension(found, distance * unit) == pytest.approx(limit, rel=1e-9)


@pytest.mark.parametrize("dimension", [10, 20, 40])
def test_the_law_of_the_sphere_in_many_dimensions(dimension: int) -> None:
    """d = D(1 − ρ)/(1 − ρ/2) for second neighbours at a third to two thirds of the typical squared distance."""
    distance = np.linspace(0.33, 0.6, 7)
    found = dimension * (1 - distance) / (1 - distance / 2)
    third = extrapolated_dimension(found, distance) - dimension
    assert abs(third) < 0.05 * dimension
    # The nearest of the estimates is off by a fifth, and a straight line through them overshoots twice as far.
    assert found[0] < 0.82 * dimension
    straight = extrapolated_dimension(found, distance, power=1) - dimension
    assert straight > 1.5 * abs(third)


@pytest.mark.parametrize(
    ("dimensions", "distances", "text"),
    [
        ([5.0, 5.0], [1.0, 2.0], r"3 or more sizes, found \(2,\)"),
        ([5.0, 5.0, 5.0], [1.0, 2.0], r"found \(3,\) and \(2,\)"),
        ([5.0, np.nan, 5.0], [1.0, 2.0, 3.0], "positive, finite"),
        ([5.0, -1.0, 5.0], [1.0, 2.0, 3.0], "positive, finite"),
        ([5.0, 5.0, 5.0], [2.0, 2.0, 2.0], "equally far at all sample sizes"),
        ([5.0, 8.0, 11.0], [1.0, 1.5, 2.0], "not positive: there are different dimensions at different scales"),
    ],
)
def test_what_has_no_continuation(dimensions: list[float], distances: list[float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        extrapolated_dimension(np.array(dimensions), np.array(distances))


def test_a_subsample_too_small_is_named() -> None:
    with pytest.raises(ValueError, match="halving 20 points 3 times leaves 2; at least 4"):
        sample_size_curve(torch.rand(20, 3), 4, generator=np.random.default_rng(0))


def both(kind: str, n: int, dimension: int, seed: int) -> tuple[float, dict[str, float]]:
    """The continuation, and the nearest-neighbour estimates it competes with."""
    points = torch.from_numpy(manifold(kind, n, dimension, seed))
    squared = nearest_neighbors(points, 20).squared_distances.numpy()
    curve = sample_size_curve(points, curve_levels(n), generator=np.random.default_rng(seed), full=squared)
    ratios = neighbor_log_ratios(squared)
    others = {"twonn": twonn_fit(ratios), "twonn_ml": twonn_maximum_likelihood(ratios)}
    others |= {"mle": mle_dimension(squared), "gride": gride(squared, 8, 16), "gride 2/4": gride(squared, 2, 4)}
    return extrapolated_dimension(curve.twonn_ml, curve.squared_distance), others


NEIGHBORS = ("twonn", "twonn_ml", "mle", "gride")


def committed(kind: str, dimension: int, n: int) -> dict[str, float]:
    rows = json.loads((benchmark("common").RESULTS / "dimension_bias.json").read_text())
    asked = (kind, dimension, n)
    return {row["estimator"]: row["ours"] for row in rows if (row["manifold"], row["true"], row["n"]) == asked}


@pytest.mark.parametrize("kind", ["gauss", "cube", "curved"])
@pytest.mark.parametrize("dimension", [5, 10])
def test_recommended_estimator_is_within_ten_percent(kind: str, dimension: int) -> None:
    """Planted dimension 5 and 10 in 256, at the 2,000 points that are the default, and at 10,000."""
    assert both(kind, 2000, dimension, 0)[0] == pytest.approx(dimension, rel=0.15)  # a single cloud scatters by 6 %
    for n in (2000, 10_000):
        assert committed(kind, dimension, n)["twonn_extrapolated"] == pytest.approx(dimension, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gauss", "cube", "curved"])
@pytest.mark.parametrize("dimension", [5, 10])
def test_a_single_fresh_cloud_of_the_recommended_size_is_within_ten_percent(kind: str, dimension: int) -> None:
    assert both(kind, 10_000, dimension, 77)[0] == pytest.approx(dimension, rel=0.1)


def test_the_page_says_which_estimator_is_recommended_and_where_it_holds() -> None:
    page = (Path(__file__).parents[1] / "docs" / "analyzers" / "intrinsic_dimension.md").read_text(encoding="utf-8")
    assert "Recommended for the dimension itself: `twonn_extrapolated` at n = 10,000" in page
    assert "does not hold on folded clouds" in page


@pytest.mark.parametrize("kind", ["gauss", "cube", "curved"])
@pytest.mark.parametrize("dimension", [20, 40])
def test_the_committed_continuation_is_closer_than_every_nearest_neighbour_estimate(kind: str, dimension: int) -> None:
    found = committed(kind, dimension, 10_000)
    errors = {name: abs(value - dimension) for name, value in found.items()}
    assert errors["twonn_extrapolated"] < min(errors[name] for name in NEIGHBORS)
    # What the page warns of: clouds that fold back do not follow the law.
    folded = committed("rolls", dimension, 10_000)
    assert abs(folded["twonn_extrapolated"] - dimension) > abs(folded["twonn"] - dimension)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gauss", "cube", "curved"])
@pytest.mark.parametrize("dimension", [5, 10, 20, 40])
def test_the_committed_result_is_what_comes_out(kind: str, dimension: int) -> None:
    found = [both(kind, 10_000, dimension, seed) for seed in range(3)]
    expected = committed(kind, dimension, 10_000)
    assert np.mean([item[0] for item in found]) == pytest.approx(expected["twonn_extrapolated"], rel=1e-3)
    for name in NEIGHBORS:
        assert np.mean([item[1][name] for item in found]) == pytest.approx(expected[name], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gauss", "cube", "sphere"])
@pytest.mark.parametrize("dimension", [20, 40])
def test_fresh_clouds_agree(kind: str, dimension: int) -> None:
    found, others = both(kind, 10_000, dimension, 77)
    assert abs(found - dimension) < min(abs(value - dimension) for value in others.values())

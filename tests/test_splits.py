"""Sampling and splitting whole groups, and control labels."""

from __future__ import annotations

import numpy as np
import pytest

from trace_offline.estimators.splits import Part, control_labels, sample_groups, split_groups


@pytest.mark.parametrize("seed", range(3))
def test_split_never_cuts_a_group_and_keeps_the_shares(seed: int) -> None:
    groups = np.random.default_rng(seed).integers(0, 200, 3000)
    parts = split_groups(groups, seed)
    for group in np.unique(groups):
        assert len(set(parts[groups == group])) == 1
    shares = [len(np.unique(groups[parts == part])) / 200 for part in Part]
    assert shares == [0.6, 0.2, 0.2]
    np.testing.assert_array_equal(parts, split_groups(groups, seed))
    assert (parts != split_groups(groups, seed + 1)).any()


def test_split_does_not_depend_on_the_order_of_rows() -> None:
    groups = np.repeat(np.arange(40), 3)
    order = np.random.default_rng(0).permutation(120)
    np.testing.assert_array_equal(split_groups(groups, 5)[order], split_groups(groups[order], 5))


def test_own_split_is_kept() -> None:
    groups = np.repeat(np.arange(50), 2)
    fixed = (groups >= 30).astype(np.int8)
    parts = split_groups(groups, 0, fixed=fixed)
    np.testing.assert_array_equal(parts == Part.TEST, fixed == 1)
    assert [len(np.unique(groups[parts == part])) for part in Part] == [22, 8, 20]


@pytest.mark.parametrize(("count", "parts"), [(1, {0}), (2, {0, 2}), (3, {0, 1, 2}), (4, {0, 1, 2})])
def test_few_groups(count: int, parts: set[int]) -> None:
    assert set(split_groups(np.arange(count), 0).tolist()) == parts


def test_nothing_to_score_or_to_fit_in_the_own_split() -> None:
    assert Part.TEST not in split_groups(np.arange(9), 0, fixed=np.zeros(9, dtype=np.int8))
    assert set(split_groups(np.arange(9), 0, fixed=np.ones(9, dtype=np.int8)).tolist()) == {Part.TEST}


def test_sample_takes_whole_groups_up_to_the_limit() -> None:
    rng = np.random.default_rng(1)
    every = np.arange(300)
    groups = np.sort(rng.integers(0, 300, 4000))
    keep = sample_groups(every, groups, 1000, seed=0)
    assert 950 < keep.sum() <= 1000
    assert not set(groups[keep]) & set(groups[~keep])
    assert keep.tolist() == sample_groups(every, groups, 1000, seed=0).tolist()
    assert keep.tolist() != sample_groups(every, groups, 1000, seed=1).tolist()
    assert sample_groups(every, groups, 4000, seed=0).all()
    other = np.sort(rng.integers(0, 300, 4000))
    shared = set(other[sample_groups(every, other, 1000, 0)]) & set(groups[keep])
    assert len(shared) > 50  # two tasks prefer the same sentences
    assert sample_groups(every, np.full(90, 17), 50, seed=0).all()  # one group too large is taken whole


def test_sample_and_split_are_independent() -> None:
    groups = np.arange(2000)
    keep = sample_groups(groups, groups, 1000, seed=0)
    parts = split_groups(groups, seed=0)
    assert abs((parts[keep] == Part.TEST).mean() - 0.2) < 0.04


def test_control_labels_belong_to_types_and_follow_the_distribution() -> None:
    rng = np.random.default_rng(0)
    types = rng.integers(0, 4000, 30_000)
    labels = rng.choice(3, size=30_000, p=[0.6, 0.3, 0.1])
    control = control_labels(types, labels, seed=0)
    assert all(len(set(control[types == kind])) == 1 for kind in range(0, 4000, 97))
    np.testing.assert_allclose(np.bincount(control) / 30_000, [0.6, 0.3, 0.1], atol=0.04)
    assert abs((control == labels).mean() - 0.46) < 0.03  # independent of the real label
    np.testing.assert_array_equal(control, control_labels(types, labels, seed=0))
    assert (control != control_labels(types, labels, seed=1)).any()

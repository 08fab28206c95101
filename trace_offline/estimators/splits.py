"""Random choices that must be the same at every checkpoint: sampling and splitting whole groups, control labels."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int64]

_SAMPLE, _SPLIT, _CONTROL = 1, 2, 3


class Part(IntEnum):
    """Which part of the data a row belongs to."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2


def _keys(groups: Codes, seed: int, stream: int) -> tuple[Codes, NDArray[np.float64]]:
    """Distinct groups, sorted, and one random key each."""
    distinct = np.unique(groups)
    return distinct, np.random.default_rng([seed, stream]).random(len(distinct))


def sample_groups(all_groups: Codes, groups: Codes, limit: int, seed: int) -> NDArray[np.bool_]:
    """Rows of randomly chosen whole groups, about ``limit`` rows in all.

    ``all_groups``: every group of the evaluation set, so that two tasks prefer the same groups. ``groups [M]``: group
    of each row. Groups are taken in random order while they fit; a first group larger than ``limit`` is taken
    all the same, for a group is never cut. Returns a mask ``[M]``.
    """
    if len(groups) <= limit:
        return np.ones(len(groups), dtype=np.bool_)
    distinct, keys = _keys(all_groups, seed, _SAMPLE)
    ranks = np.empty(len(distinct), dtype=np.int64)
    ranks[np.argsort(keys, kind="stable")] = np.arange(len(distinct))
    rank = ranks[np.searchsorted(distinct, groups)]
    sizes = np.bincount(rank, minlength=len(distinct))
    taken = np.cumsum(sizes) <= limit
    if not sizes[taken].any():
        taken[: int(np.flatnonzero(sizes)[0]) + 1] = True
    return taken[rank]


def split_groups(
    groups: Codes, seed: int, validation: float = 0.2, test: float = 0.2, fixed: NDArray[np.integer] | None = None
) -> NDArray[np.int64]:
    """Part (train 0, validation 1, test 2) of every row; no group is ever in two parts.

    ``groups [M]``. Without ``fixed``, ``validation`` and ``test`` are the shares of the groups. With ``fixed [M]``
    (0 fit, 1 score), rows marked 1 are the test part and the same ratio validation : train as before is kept within
    the rest. Every part gets at least one group where there are enough groups (three, or two to fit).
    """
    parts = np.full(len(groups), Part.TRAIN, dtype=np.int64)
    distinct, keys = _keys(groups, seed, _SPLIT)
    order = distinct[np.argsort(keys, kind="stable")]
    if fixed is None:
        n_test = min(max(1, round(test * len(order))), max(0, len(order) - 1))
        parts[np.isin(groups, order[:n_test])] = Part.TEST
        order = order[n_test:]
    else:
        scored = np.unique(groups[np.asarray(fixed) == 1])
        parts[np.isin(groups, scored)] = Part.TEST
        order = order[~np.isin(order, scored)]
    n_validation = min(max(1, round(validation / (1.0 - test) * len(order))), max(0, len(order) - 1))
    parts[np.isin(groups, order[:n_validation])] = Part.VALIDATION
    return parts


def control_labels(types: Codes, labels: Codes, seed: int) -> Codes:
    """Labels of a control task: every word type gets one label, drawn from the distribution of the real ones.

    ``types [M]`` codes of word types, ``labels [M]`` real labels. A type has the same label wherever it occurs, so a
    probe can learn the task only by memorising types. Returns ``[M]``.

    Reference: J. Hewitt and P. Liang (2019), Designing and Interpreting Probes with Control Tasks, EMNLP,
    arXiv:1909.03368.
    """
    distinct, which = np.unique(types, return_inverse=True)
    drawn = np.random.default_rng([seed, _CONTROL]).choice(labels, size=len(distinct))
    return np.asarray(drawn[which.reshape(-1)], dtype=np.int64)

"""Fixed masks for masked-LM evaluation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trace_offline.core.errors import UsageError
from trace_offline.evaluation.validate import IGNORED


def choose_masked(eligible: npt.NDArray[np.bool_], probability: float, seed: int, row: int) -> npt.NDArray[np.int64]:
    """Positions of one row to mask: ``round(probability · n)`` of the n eligible ones, at least one, ascending.

    Depends on ``seed`` and ``row`` only, so every build of the same text masks the same positions. Raises UsageError
    for a probability outside (0, 1].
    """
    if not 0 < probability <= 1:
        raise UsageError(f"mask probability must be above 0 and at most 1; found {probability}.")
    positions = np.flatnonzero(eligible)
    count = min(len(positions), max(1, round(probability * len(positions))))
    return np.sort(np.random.default_rng([seed, row]).choice(positions, size=count, replace=False))


def masked_row(
    ids: npt.NDArray[np.int64], masked: npt.NDArray[np.int64], mask_id: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """``ids [T]`` with the mask token at ``masked``, and labels ``[T]``: the original ids there, −100 elsewhere."""
    inputs, labels = ids.copy(), np.full_like(ids, IGNORED)
    inputs[masked] = mask_id
    labels[masked] = ids[masked]
    return inputs, labels

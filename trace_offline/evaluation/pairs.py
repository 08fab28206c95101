"""Minimal pairs in an evaluation set: which rows belong together, and where in them to look.

Each row has a ``pair`` (a number that it shares with one other row, −1: none) and a ``variant`` (0: the original, or
acceptable, member and every row without a pair; 1: the changed, or unacceptable, one). Annotations of the task
``violation`` mark the tokens to compare in both members; their label is the kind of change.

Rows of variant 1 stand after all others. What is measured on "the evaluation set" is measured on the rows before them:
texts that somebody spoilt on purpose are no sample of anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trace_offline.core.errors import EvaluationSetError
from trace_offline.evaluation.annotations import Annotations

VIOLATION = "violation"
"""The task whose annotations mark what to compare."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """``pair [N]``, ``variant [N]``: see the module's docstring; int64, checked."""

    pair: Integers
    variant: Integers

    def __len__(self) -> int:
        return int(self.variant.sum())

    @property
    def n_originals(self) -> int:
        """Rows that nobody changed: all before the first of variant 1."""
        return len(self.variant) - len(self)

    def members(self) -> Integers:
        """``[P, 2]``: row of the original and of the changed member of each pair, in the order of the originals."""
        original = np.flatnonzero((self.pair >= 0) & (self.variant == 0))
        changed = np.flatnonzero(self.variant == 1)
        order = np.argsort(self.pair[changed], kind="stable")
        place = np.searchsorted(self.pair[changed][order], self.pair[original])
        return np.stack([original, changed[order][place]], axis=1)


def check_pairs(
    pair: npt.NDArray[np.integer],
    variant: npt.NDArray[np.integer],
    n: int,
    split: npt.NDArray[np.integer] | None,
    annotations: Annotations,
    where: str,
) -> Pairs:
    """``pair [N]`` and ``variant [N]`` of N = ``n`` rows as Pairs.

    Two rows a pair, one of each variant; variant 1 last and only in pairs; both members on one side of the split;
    annotations of the task ``violation`` only in pairs, of one label a pair, and in both members or neither.
    Raises EvaluationSetError naming the pair.
    """

    def refuse(what: str) -> None:
        raise EvaluationSetError(f"{where}: {what}")

    for name, values in (("pair", pair), ("variant", variant)):
        if values.shape != (n,) or values.dtype.kind not in "iu":
            refuse(f"{name} must be {n} whole numbers, one for each row; found {values.dtype} {values.shape}.")
    found = Pairs(pair.astype(np.int64), variant.astype(np.int64))
    pair, variant = found.pair, found.variant

    if (pair < -1).any() or ((variant != 0) & (variant != 1)).any():
        refuse("pair must be 0 or more, or -1 for rows without a pair, and variant 0 (original) or 1 (changed).")
    alone = np.flatnonzero((pair < 0) & (variant == 1))
    if len(alone):
        refuse(f"row {alone[0]} has variant 1 (changed) but no pair; give it the number of its original's pair.")
    numbers, counts = np.unique(pair[pair >= 0], return_counts=True)
    changed = np.bincount(np.searchsorted(numbers, pair[variant == 1]), minlength=len(numbers))
    bad = np.flatnonzero((counts != 2) | (changed != 1))
    if len(bad):
        refuse(
            f"pair {numbers[bad[0]]} has {counts[bad[0]]} rows, {changed[bad[0]]} of them changed; a pair is two rows, "
            "one of variant 0 (original) and one of variant 1 (changed)."
        )
    if (np.diff(variant) < 0).any():
        row = int(np.flatnonzero(np.diff(variant) < 0)[0])
        refuse(f"row {row} is changed (variant 1) and row {row + 1} is not; put the changed rows after all others.")
    members = found.members()
    if split is not None:
        torn = np.flatnonzero(split[members[:, 0]] != split[members[:, 1]])
        if len(torn):
            refuse(f"pair {pair[members[torn[0], 0]]} lies on both sides of the split; give both rows the same.")
    _check_violations(found, annotations.where(annotations.task == VIOLATION), refuse)
    return found


def _check_violations(pairs: Pairs, spans: Annotations, refuse: object) -> None:
    assert callable(refuse)
    labels: dict[tuple[int, int], set[str]] = {}
    for row, label in zip(spans.row.tolist(), spans.label.tolist(), strict=True):
        number = int(pairs.pair[row])
        if number < 0:
            refuse(f'row {row} has an annotation of the task "{VIOLATION}" but belongs to no pair.')
        labels.setdefault((number, int(pairs.variant[row])), set()).add(label)
    for (number, variant), mine in labels.items():
        others = labels.get((number, 1 - variant), set())
        if len(mine) > 1 or mine != others:
            shown = ["/".join(sorted(each)) or "nothing" for each in (mine, others)]
            refuse(
                f'pair {number}: the task "{VIOLATION}" must mark both members with one label, the kind of change; '
                f"found {shown[0]} in one and {shown[1]} in the other."
            )


@dataclass(frozen=True, slots=True)
class Member:
    """Where a text comes from: the pair (a key that no other pair has), its variant, the kind of change.

    ``marks``: how many words its source marks for comparison; 0: none, the tokens that differ are compared.
    """

    key: str
    variant: int
    kind: str
    marks: int = 0


Span = tuple[int, int]


def differing_tokens(original: Integers, changed: Integers, special: Iterable[int]) -> tuple[Span, Span] | None:
    """Tokens to compare in two rows of ids: all from the first to the last that differ.

    Where one row has only something more, the tokens after it are compared, one in each row. None when the rows are
    equal or end there.
    """
    shortest = min(len(original), len(changed))
    same = original[:shortest] == changed[:shortest]
    first = int(np.argmin(same)) if not same.all() else shortest
    if first == len(original) == len(changed):
        return None
    backwards = original[::-1][: shortest - first] == changed[::-1][: shortest - first]
    tail = int(np.argmin(backwards)) if not backwards.all() else shortest - first
    ends = len(original) - tail, len(changed) - tail
    if first < min(ends):
        return (first, ends[0]), (first, ends[1])
    if tail == 0 or int(original[ends[0]]) in set(special):
        return None
    return (ends[0], ends[0] + 1), (ends[1], ends[1] + 1)

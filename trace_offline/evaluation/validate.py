"""Checks on the content of an evaluation set, the same for writing and for reading.

Shape letters: N rows, T positions, M annotations. All arrays are numpy; ``where`` names the file in messages.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trace_offline.core.errors import EvaluationSetError
from trace_offline.evaluation.annotations import ranks

IGNORED = -100
"""Label of a position that does not count."""

ALIGNMENTS = ("last", "first", "mean")

_AT_POSITION = ("masked_lm", "classification")
"""Objectives whose labels belong to the prediction at the same position."""

Integers = npt.NDArray[np.integer]


def check_meaning(objective: str, labels_shifted: bool, alignment: str, has_labels: bool, where: str) -> None:
    """Refuse combinations that would compare labels with the wrong predictions.

    Raises EvaluationSetError.
    """
    if alignment not in ALIGNMENTS:
        raise EvaluationSetError(f'{where}: alignment must be one of {", ".join(ALIGNMENTS)}; found "{alignment}".')
    if not objective:
        raise EvaluationSetError(f'{where}: objective is empty; name it, for example "causal_lm" or "masked_lm".')
    if objective in _AT_POSITION and labels_shifted:
        raise EvaluationSetError(
            f'{where}: objective "{objective}" with labels_shifted=True would compare each label with the prediction '
            "before it. Pass labels_shifted=False: the labels belong to the prediction at their own position."
        )
    if not labels_shifted and not has_labels:
        raise EvaluationSetError(
            f"{where}: labels_shifted=False needs labels (what the prediction at each position is compared with, "
            f"{IGNORED} where nothing counts), and there are none. Pass labels=…, or leave labels_shifted=True for "
            "next-token prediction."
        )


def check_rows(
    input_ids: npt.NDArray[np.int64],
    attention_mask: Integers,
    labels: npt.NDArray[np.int64] | None,
    where: str,
    first_row: int = 0,
) -> None:
    """``[B, T]`` slices starting at row ``first_row``: ids ≥ 0, mask 0 or 1, something attended in each row and no
    padding before it, labels ≥ 0 or −100.

    Raises EvaluationSetError naming the file, the first bad row and what was expected.
    """
    bad = np.argwhere(input_ids < 0)
    if len(bad):
        row, position = bad[0]
        raise EvaluationSetError(
            f"{where}: row {first_row + row}, position {position}: token id {input_ids[row, position]}; token ids "
            "must be 0 or more. For padding use any valid id and set attention_mask to 0 there."
        )
    bad = np.argwhere((attention_mask != 0) & (attention_mask != 1))
    if len(bad):
        row, position = bad[0]
        raise EvaluationSetError(
            f"{where}: row {first_row + row}, position {position}: attention_mask is "
            f"{attention_mask[row, position]}; it must be 1 for tokens and 0 for padding (not the additive form)."
        )
    empty = np.flatnonzero(attention_mask.sum(1) == 0)
    if len(empty):
        raise EvaluationSetError(
            f"{where}: row {first_row + empty[0]} has no token (its attention_mask is 0 everywhere); leave it out."
        )
    # Networks count positions from the first column: behind padding they would be given the wrong ones.
    late = np.argwhere((attention_mask[:, :-1] == 0) & (attention_mask[:, 1:] != 0))
    if len(late):
        row, position = late[0]
        raise EvaluationSetError(
            f"{where}: row {first_row + row} has a token at position {position + 1}, after padding at {position}; "
            "positions would be counted wrongly. Put each text at the start of its row and pad on the right."
        )
    if labels is not None:
        bad = np.argwhere((labels < 0) & (labels != IGNORED))
        if len(bad):
            row, position = bad[0]
            raise EvaluationSetError(
                f"{where}: row {first_row + row}, position {position}: label {labels[row, position]}; labels must be "
                f"0 or more, or {IGNORED} where nothing counts."
            )


def check_row_numbers(
    n: int, group: npt.NDArray[np.int64] | None, split: npt.NDArray[np.int8] | None, where: str
) -> None:
    """``group`` and ``split`` are ``[N]``; split is 0 (fit) or 1 (score) and never cuts a group.

    Raises EvaluationSetError.
    """
    for name, values in (("group", group), ("split", split)):
        if values is not None and values.shape != (n,):
            raise EvaluationSetError(
                f"{where}: {name} must have one number for each of the {n} rows; its shape is {values.shape}."
            )
    if split is None:
        return
    bad = np.flatnonzero((split != 0) & (split != 1))
    if len(bad):
        raise EvaluationSetError(
            f"{where}: row {bad[0]}: split is {split[bad[0]]}; it must be 0 (fit probes here) or 1 (score here)."
        )
    if group is not None:
        both = np.intersect1d(group[split == 0], group[split == 1])
        if len(both):
            raise EvaluationSetError(
                f"{where}: group {both[0]} lies on both sides of the split; rows of one group belong together. Give "
                "all its rows the same split."
            )


class SpanTable(Protocol):
    """Annotations, ``[M]`` each."""

    @property
    def row(self) -> npt.NDArray[np.int64]:
        """Row of the set."""

    @property
    def task(self) -> npt.NDArray[np.object_]:
        """Name of the task."""

    @property
    def start(self) -> npt.NDArray[np.int64]:
        """First token position."""

    @property
    def end(self) -> npt.NDArray[np.int64]:
        """Token position after the last."""

    @property
    def label(self) -> npt.NDArray[np.object_]:
        """Name of the class."""


def check_spans(spans: SpanTable, n_rows: int, n_positions: int, where: str, multi_label: Collection[str] = ()) -> None:
    """Rows exist, ``0 ≤ start < end ≤ T``, and no two annotations of a task cover the same tokens; in the tasks
    ``multi_label`` they may, with different labels.

    Raises EvaluationSetError naming the annotation.
    """
    row, task, start, end = spans.row, spans.task, spans.start, spans.end

    def refuse(index: int, what: str) -> None:
        raise EvaluationSetError(
            f'{where}: annotation {index} (row {row[index]}, task "{task[index]}", tokens {start[index]} to '
            f"{end[index]}): {what}"
        )

    bad = np.flatnonzero((row < 0) | (row >= n_rows))
    if len(bad):
        refuse(bad[0], f"there is no such row; the rows are 0 to {n_rows - 1}.")
    bad = np.flatnonzero(start >= end)
    if len(bad):
        refuse(bad[0], "it is empty; end is exclusive and must be greater than start.")
    bad = np.flatnonzero((start < 0) | (end > n_positions))
    if len(bad):
        refuse(bad[0], f"it leaves the row; the positions are 0 to {n_positions - 1} (end is exclusive).")
    again = _first_repeated(spans, multi_label)
    if again is not None:
        refuse(
            again,
            "these tokens already have this label; keep one."
            if task[again] in multi_label
            else "these tokens already have a label for this task; keep one, give them two tasks, or name the task "
            "in multi_label.",
        )


def _first_repeated(spans: SpanTable, multi_label: Collection[str]) -> int | None:
    """The first annotation that says what an earlier one says already; None when there is none."""
    several = np.fromiter((name in multi_label for name in spans.task), np.bool_, len(spans.task))
    keys = (np.where(several, ranks(spans.label), -1), spans.end, spans.start, ranks(spans.task), spans.row)
    # stable: of equal ones the first comes first
    order = np.lexsort(keys)
    same = np.ones(max(0, len(order) - 1), dtype=np.bool_)
    for key in keys:
        same &= key[order[1:]] == key[order[:-1]]
    return int(order[1:][same].min()) if same.any() else None


def check_spans_attended(
    row: npt.NDArray[np.int64],
    start: npt.NDArray[np.int64],
    end: npt.NDArray[np.int64],
    input_ids: npt.NDArray[np.int64],
    attention_mask: Integers,
    special_token_ids: tuple[int, ...],
    where: str,
    first_row: int = 0,
    labels: npt.NDArray[np.int64] | None = None,
) -> None:
    """Annotations of the rows in this ``[B, T]`` slice cover tokens only: no padding, no special token.

    ``labels``: given when they belong to their own position; a mask token that has a label stands for a real token.
    Raises EvaluationSetError.
    """
    usable = attention_mask.astype(bool)
    if special_token_ids:
        ordinary = ~np.isin(input_ids, special_token_ids)
        usable &= ordinary if labels is None else ordinary | (labels != IGNORED)
    unusable = np.concatenate([np.zeros((len(usable), 1), np.int64), (~usable).cumsum(1)], axis=1)
    local = row - first_row
    bad = np.flatnonzero(unusable[local, end] != unusable[local, start])
    if len(bad):
        index = bad[0]
        raise EvaluationSetError(
            f"{where}: the annotation of row {row[index]}, tokens {start[index]} to {end[index]}, covers padding or a "
            "special token; annotate only positions of real tokens."
        )


class AlternativeTable(Protocol):
    """Tokens that could stand in the place of others, ``[A]`` each."""

    @property
    def row(self) -> npt.NDArray[np.int64]:
        """Row of the set."""

    @property
    def position(self) -> npt.NDArray[np.int64]:
        """Token position."""

    @property
    def token(self) -> npt.NDArray[np.int64]:
        """The other token."""


def check_alternatives(
    alternatives: AlternativeTable,
    input_ids: npt.NDArray[np.int64],
    attention_mask: Integers,
    labels: npt.NDArray[np.int64] | None,
    where: str,
    first_row: int = 0,
) -> None:
    """Alternatives of the rows in this ``[B, T]`` slice stand at tokens, differ from them, and are one a place.

    ``labels``: given when they belong to their own position; where there is one it is the token meant.
    Raises EvaluationSetError naming the alternative.
    """
    row, position, token = alternatives.row - first_row, alternatives.position, alternatives.token
    n, t = input_ids.shape

    def refuse(bad: npt.NDArray[np.bool_], what: str) -> None:
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise EvaluationSetError(
                f"{where}: the alternative of row {row[at] + first_row}, position {position[at]} (token {token[at]}): "
                f"{what}"
            )

    refuse((row < 0) | (row >= n) | (position < 0) | (position >= t), "there is no such place in the set.")
    refuse(token < 0, "token ids are 0 or more.")
    refuse(attention_mask[row, position] == 0, "the place is padding.")
    there = input_ids if labels is None else np.where(labels == IGNORED, input_ids, labels)
    refuse(token == there[row, position], "it is the token that is there already.")
    places = row * t + position
    repeated = np.zeros(len(places), bool)
    repeated[1:] = places[1:] == places[:-1]
    refuse(repeated, "this place has another alternative; keep one.")

"""Rows of minimal pairs in order: originals, then the changed ones, with the tokens to compare marked in both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from trace_offline.core.errors import EvaluationSetError
from trace_offline.evaluation.pairs import VIOLATION, Integers, Member, Pairs, Span, differing_tokens


class PairRow(Protocol):
    """What is needed of a row under construction; ``annotations``: ``(task, start, end, label)``."""

    ids: Integers
    annotations: list[tuple[str, int, int, str]]
    member: Member | None
    truncated: bool


@dataclass
class PairTally:
    """What became of the pairs: ``kinds`` kept, ``dropped`` by reason, ``unmarked``: kept without tokens to compare."""

    kinds: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    unmarked: int = 0

    def summary(self) -> dict[str, Any]:
        """For ``evaluation_set.json``."""
        return {
            "pairs": sum(self.kinds.values()),
            "kinds": dict(sorted(self.kinds.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "without_tokens_to_compare": self.unmarked,
        }

    def warnings(self) -> list[str]:
        """One line for each reason for which pairs were dropped."""
        found = [f"{count} minimal pairs left out: {reason}." for reason, count in sorted(self.dropped.items())]
        if self.unmarked:
            found.append(
                f"{self.unmarked} minimal pairs have no tokens to compare (one sentence is the other's beginning); "
                "only whole sentences are compared there."
            )
        return found


def arrange_pairs(rows: Sequence[Any], special_token_ids: Iterable[int]) -> tuple[list[Any], Pairs | None, PairTally]:
    """Rows (``PairRow``) with those of pairs that cannot be compared left out, changed ones last; None without pairs.

    A pair is left out when one of its rows was truncated, when both have the same tokens, or when what is to be
    compared holds a special token (a word that the tokenizer does not know). Annotations of the task ``violation`` are
    replaced by the differing tokens where a word could not be aligned in one of the rows.
    """
    tally = PairTally()
    waiting: dict[str, PairRow] = {}
    keys: dict[str, int] = {}
    special = np.asarray(sorted(set(special_token_ids)), np.int64)
    for row in rows:
        if row.member is None:
            continue
        first = waiting.pop(row.member.key, None)
        if first is None:
            waiting[row.member.key] = row
            continue
        reason = _mark(*sorted((first, row), key=lambda each: each.member.variant), special=special, tally=tally)
        if reason is None:
            tally.kinds[row.member.kind] += 1
            keys[row.member.key] = len(keys)
        else:
            tally.dropped[reason] += 1
    if not tally.kinds and not tally.dropped:
        return list(rows), None, tally
    if not keys:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(tally.dropped.items()))
        raise EvaluationSetError(f"none of the minimal pairs can be compared with this tokenizer ({reasons}).")
    kept = [row for row in rows if row.member is None or row.member.key in keys]
    kept.sort(key=lambda row: 0 if row.member is None else row.member.variant)  # stable: the order stays otherwise
    pair = [-1 if row.member is None else keys[row.member.key] for row in kept]
    variant = [0 if row.member is None else row.member.variant for row in kept]
    return kept, Pairs(np.asarray(pair, np.int64), np.asarray(variant, np.int64)), tally


def _mark(original: PairRow, changed: PairRow, *, special: Integers, tally: PairTally) -> str | None:
    """Mark the tokens to compare; the reason why the pair cannot be compared, or None."""
    if original.truncated or changed.truncated:
        return "longer than a row"
    if np.array_equal(original.ids, changed.ids):
        return "both members have the same tokens"
    marked = [_spans(row) for row in (original, changed)]
    wanted = original.member.marks if original.member is not None else 0
    if not wanted or any(len(spans) != wanted for spans in marked):
        found = differing_tokens(original.ids, changed.ids, special.tolist())
        marked = [[], []] if found is None else [[found[0]], [found[1]]]
        tally.unmarked += found is None
    for row, spans in zip((original, changed), marked, strict=True):
        if any(np.isin(row.ids[start:end], special).any() for start, end in spans):
            return "a word that the tokenizer does not know is to be compared"
        kind = original.member.kind if original.member is not None else ""
        row.annotations = [each for each in row.annotations if each[0] != VIOLATION]
        row.annotations += [(VIOLATION, start, end, kind) for start, end in spans]
    return None


def _spans(row: PairRow) -> list[Span]:
    return [(start, end) for task, start, end, _ in row.annotations if task == VIOLATION]

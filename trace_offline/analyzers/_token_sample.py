"""A fixed random sample of tokens of the evaluation set, the same at every checkpoint of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from trace_offline.evaluation.evaluation_set import EvaluationSet

_CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class TokenSample:
    """``rows [M]``, ``positions [M]``: places in the evaluation set, in reading order; ``clusters [M]``: which of them
    depend on each other (same document, or same row where all is one document). int64.
    """

    rows: np.ndarray
    positions: np.ndarray
    clusters: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def sample_tokens(evaluation: EvaluationSet, most: int, seed: int) -> TokenSample:
    """At most ``most`` tokens that are neither padding nor special, drawn without replacement.

    The draw depends on the evaluation set and the seed only.
    """
    special = np.array(sorted(evaluation.special_token_ids), dtype=np.int64)
    step = max(1, _CHUNK_TOKENS // max(1, evaluation.max_length))
    found_rows, found_positions = [], []
    for start in range(0, evaluation.n_examples, step):
        tokens = evaluation.tokens(start, min(start + step, evaluation.n_examples))
        row, position = np.nonzero(tokens.attention_mask.numpy() & ~np.isin(tokens.input_ids.numpy(), special))
        found_rows.append(row + start)
        found_positions.append(position)
    rows, positions = np.concatenate(found_rows), np.concatenate(found_positions)
    if len(rows) > most:
        keep = np.sort(np.random.default_rng(seed).permutation(len(rows))[:most])
        rows, positions = rows[keep], positions[keep]
    clusters = evaluation.group[rows]
    if len(np.unique(clusters)) < 2:
        clusters = rows
    return TokenSample(rows.astype(np.int64), positions.astype(np.int64), np.asarray(clusters, dtype=np.int64))

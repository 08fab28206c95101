"""Collectors that gather hidden states of all layers at chosen places; they keep exactly what was asked for."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trace_offline.activations.batch import ForwardBatch
from trace_offline.activations.places import Places
from trace_offline.core.errors import EvaluationSetError

Pooling = Literal["last", "first", "mean"]


class HiddenStateTable:
    """Hidden states of M spans of tokens, ``float32 [L+1, M, D]`` on the CPU, in the order asked for.

    ``rows [M]``: row of the evaluation set; ``positions_start``, ``positions_end [M]``: token positions, end
    exclusive. ``pooling``: the ``last`` or ``first`` token of the span stands for it, or the ``mean`` of all.

    ``finish`` raises EvaluationSetError for spans that lie outside the set; spans that are empty are refused at once.
    """

    needs_hidden = True
    needs_logits = False

    def __init__(self, rows: Any, positions_start: Any, positions_end: Any, pooling: Pooling = "last") -> None:
        if pooling not in ("last", "first", "mean"):
            raise ValueError(f'pooling: expected "last", "first" or "mean", found "{pooling}"')
        row = np.asarray(rows, dtype=np.int64)
        start, end = np.asarray(positions_start, dtype=np.int64), np.asarray(positions_end, dtype=np.int64)
        if not row.shape == start.shape == end.shape or row.ndim != 1:
            raise ValueError(
                f"expected rows, starts and ends of one length, found {row.shape}, {start.shape} and {end.shape}"
            )
        bad = np.flatnonzero((start < 0) | (end <= start) | (row < 0))
        if len(bad):
            first = bad[0]
            raise EvaluationSetError(
                f"{len(bad)} of {len(row)} spans hold no token; the first: row {row[first]}, positions "
                f"{start[first]} to {end[first]} (end exclusive)."
            )
        if pooling == "last":
            start = end - 1
        elif pooling == "first":
            end = start + 1
        # one entry for each token to read, sorted by row so that each batch finds its own by bisection
        length = end - start
        span = np.repeat(np.arange(len(row)), length)
        offset = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
        order = np.argsort(row[span], kind="stable")
        self._token_row = row[span][order]
        self._token_position = (start[span] + offset)[order]
        self._token_span = span[order]
        self._length = torch.from_numpy(length)
        self._seen = 0
        self._table: Tensor | None = None

    def reads(self) -> Places:
        """The tokens of all spans, or the one that stands for each."""
        return Places.at(self._token_row, self._token_position)

    def update(self, batch: ForwardBatch) -> None:
        """Add the tokens of this batch to the means of their spans."""
        assert batch.hidden is not None
        if self._table is None:
            width = batch.hidden[0].shape[-1]
            self._table = torch.zeros(len(batch.hidden), len(self._length), width, dtype=torch.float32)
        examples = batch.examples.cpu().numpy()
        low = np.searchsorted(self._token_row, examples[0], side="left")
        high = np.searchsorted(self._token_row, examples[-1], side="right")
        if low == high:
            return
        position = self._token_position[low:high]
        longest = batch.input_ids.shape[1]
        if position.max() >= longest:
            at = int(position.argmax())
            raise EvaluationSetError(
                f"a span ends beyond the text: row {self._token_row[low:high][at]} position {position[at]}, but the "
                f"longest text of its batch has {longest} tokens. Rebuild the evaluation set."
            )
        device = batch.hidden[0].device
        b = torch.from_numpy(self._token_row[low:high] - examples[0]).to(device)
        t = torch.from_numpy(position).to(device)
        span = torch.from_numpy(self._token_span[low:high])
        weight = (1.0 / self._length[span].double())[:, None]
        single = bool((self._length[span] == 1).all())
        for layer, hidden in enumerate(batch.hidden):
            values = hidden[b, t].cpu()
            if single:
                self._table[layer, span] = values.float()
            else:
                # sums in float64 on the CPU: exact enough not to matter, and the same on every run
                partial, where = torch.unique(span, return_inverse=True)
                sums = torch.zeros(len(partial), values.shape[-1], dtype=torch.float64)
                sums.index_add_(0, where, values.double() * weight)
                self._table[layer, partial] += sums.float()
        self._seen += int(high - low)

    def finish(self) -> Tensor:
        """``float32 [L+1, M, D]``."""
        if self._seen != len(self._token_row):
            raise EvaluationSetError(
                f"{len(self._token_row) - self._seen} of {len(self._token_row)} tokens asked for lie in rows that the "
                f"evaluation set does not have (highest row asked for: {self._token_row.max()})."
            )
        return torch.zeros(0, len(self._length), 0) if self._table is None else self._table


class SentenceMeans:
    """Mean hidden state over the attended tokens of a row that are not in ``exclude_ids``: ``float32 [L+1, R, D]``.

    ``rows [R]``: rows of the evaluation set, in the order of the result. A row with no token left to average is an
    EvaluationSetError in ``finish``: there is no mean of nothing.
    """

    needs_hidden = True
    needs_logits = False

    def __init__(self, rows: Any, exclude_ids: Any = ()) -> None:
        self._rows = np.asarray(rows, dtype=np.int64)
        self._order = np.argsort(self._rows, kind="stable")
        self._sorted = self._rows[self._order]
        self._exclude = torch.tensor(sorted(int(i) for i in exclude_ids), dtype=torch.int64)
        self._count = torch.zeros(len(self._rows), dtype=torch.int64)
        self._table: Tensor | None = None

    def reads(self) -> Places:
        """Whole rows: the sum runs over all positions of the batch."""
        return Places.whole(self._rows)

    def update(self, batch: ForwardBatch) -> None:
        """Fill the means of the rows of this batch."""
        assert batch.hidden is not None
        if self._table is None:
            width = batch.hidden[0].shape[-1]
            self._table = torch.zeros(len(batch.hidden), len(self._rows), width, dtype=torch.float32)
        examples = batch.examples.cpu().numpy()
        low = np.searchsorted(self._sorted, examples[0], side="left")
        high = np.searchsorted(self._sorted, examples[-1], side="right")
        if low == high:
            return
        to = torch.from_numpy(self._order[low:high])
        b = torch.from_numpy(self._sorted[low:high] - examples[0]).to(batch.input_ids.device)
        keep = batch.attention_mask & ~torch.isin(batch.input_ids, self._exclude.to(batch.input_ids.device))
        kept = keep[b]
        count = kept.sum(1)
        self._count[to] = count.cpu()
        for layer, hidden in enumerate(batch.hidden):
            # where, not a product: 0 · inf at a padded position would poison the mean
            sums = torch.where(kept[..., None], hidden[b], 0).sum(1, dtype=torch.float64)
            self._table[layer, to] = (sums / count.clamp(min=1)[:, None]).float().cpu()

    def finish(self) -> Tensor:
        """``float32 [L+1, R, D]``."""
        empty = (self._count == 0).nonzero().flatten()
        if len(empty):
            raise EvaluationSetError(
                f"{len(empty)} of {len(self._rows)} rows hold no token to average, or are not in the evaluation set; "
                f"the first: row {self._rows[int(empty[0])]}."
            )
        return torch.zeros(0, len(self._rows), 0) if self._table is None else self._table

"""Which points a dimension is measured of: the views of the hidden states, the same places at every checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trace_offline.core.errors import NotApplicable, UsageError, nearest

if TYPE_CHECKING:
    from trace_offline.activations.batch import Collector, ForwardBatch
    from trace_offline.activations.places import Places
    from trace_offline.analyzers.base import Context
    from trace_offline.evaluation.evaluation_set import EvaluationSet

View = Literal["tokens", "last_tokens", "sentence_means"]

SMALLEST = 50
"""Fewest distinct points of which a dimension is stated."""

FEWEST_CLUSTERS = 20
COMPONENT: dict[View, str] = {
    "tokens": "residual",
    "last_tokens": "residual_last_token",
    "sentence_means": "residual_sentence_mean",
}
POINT_NAME: dict[View, str] = {
    "tokens": "tokens",
    "last_tokens": "last tokens of a row",
    "sentence_means": "sentence means",
}
FLATTENED = "trace_flattened"
_CLASSES = "classes"


@dataclass(frozen=True)
class Cloud:
    """What one view gathered: ``points [L+1, M, D]`` float32, and ``clusters [M]``: which points are dependent."""

    points: np.ndarray
    clusters: np.ndarray | None


@dataclass(frozen=True)
class Place:
    """Where the numbers of one cloud belong: layers are added later. ``noun``: what its points are, in the plural."""

    component: str
    noun: str
    task: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Flattened:
    """``points [L+1, R, T·D]`` float32: whole rows as one point each; ``padding``: share of positions that is none."""

    points: np.ndarray
    padding: float


class _CloudCollector:
    """Hands the batches to a collector of hidden states and keeps the clusters with its table."""

    needs_hidden = True
    needs_logits = False

    def __init__(self, collector: Any, clusters: np.ndarray | None) -> None:
        self._collector, self._clusters = collector, clusters

    def reads(self) -> Places:
        found: Places = self._collector.reads()
        return found

    def update(self, batch: ForwardBatch) -> None:
        self._collector.update(batch)

    def finish(self) -> Cloud:
        return Cloud(self._collector.finish().numpy(), self._clusters)


class FlattenedRows:
    """Rows of the evaluation set as vectors of length T·D, padding included, as TRACE builds its points.

    ``rows [R]``: ascending. T is the longest text among all batches that hold one of them; shorter batches are filled
    with zeros behind. Padded positions hold what the network computes there.
    """

    needs_hidden = True
    needs_logits = False

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows
        self._parts: list[list[np.ndarray]] = []
        self._attended = 0

    def reads(self) -> Places:
        from trace_offline.activations.places import Places

        return Places.whole(self._rows)

    def update(self, batch: ForwardBatch) -> None:
        import torch

        assert batch.hidden is not None
        examples = batch.examples.cpu().numpy()
        low, high = np.searchsorted(self._rows, [examples[0], examples[-1] + 1])
        if low == high:
            return
        at = torch.from_numpy(self._rows[low:high] - examples[0]).to(batch.input_ids.device)
        self._attended += int(batch.attention_mask[at].sum())
        self._parts.append([layer[at].float().cpu().numpy() for layer in batch.hidden])

    def finish(self) -> Flattened:
        longest = max(part[0].shape[1] for part in self._parts)
        layers = []
        for layer in range(len(self._parts[0])):
            blocks = [part[layer] for part in self._parts]
            filled = [np.pad(block, ((0, 0), (0, longest - block.shape[1]), (0, 0))) for block in blocks]
            layers.append(np.concatenate(filled).reshape(len(self._rows), -1))
        return Flattened(np.stack(layers), 1 - self._attended / (len(self._rows) * longest))


def collectors(context: Context) -> dict[str, Collector]:
    """A collector for every view asked for that has enough points, at places chosen by the seed; by its key.

    Raises NotApplicable when there are no layers to look at or no view has enough points; UsageError for a task the
    evaluation set does not have.
    """
    from trace_offline.activations.hidden_table import HiddenStateTable, SentenceMeans

    if context.model.n_layers is None:
        raise NotApplicable(
            "not applicable because the blocks of this network are not known, so it has no layers to look at; "
            "name its blocks with --blocks, for example --blocks 'layers.*'"
        )
    evaluation, params = context.evaluation, context.params
    rows, positions = eligible(evaluation)
    sentences, first_token = np.unique(rows, return_index=True)
    last_token = np.append(first_token[1:], len(rows)) - 1
    chosen: dict[str, Collector] = {}

    def table(where: np.ndarray) -> _CloudCollector:
        found = HiddenStateTable(rows[where], positions[where], positions[where] + 1)
        return _CloudCollector(found, clusters(evaluation.group, rows[where]))

    for view in params.views:
        if missing_view(view, context) is not None:
            continue
        generator = np.random.default_rng(context.seed)
        if view == "tokens" and len(rows) >= SMALLEST:
            chosen[view] = table(sample(len(rows), params.max_samples, generator))
        elif view == "last_tokens" and len(sentences) >= SMALLEST:
            chosen[view] = table(last_token[sample(len(sentences), params.max_samples, generator)])
        elif view == "sentence_means" and len(sentences) >= SMALLEST:
            kept = sentences[sample(len(sentences), params.max_samples, generator)]
            means = SentenceMeans(kept, evaluation.special_token_ids)
            chosen[view] = _CloudCollector(means, clusters(evaluation.group, kept))
    for key, where in class_places(context).items():
        if len(where) >= SMALLEST:
            spans = HiddenStateTable(where[:, 0], where[:, 1], where[:, 2], pooling=evaluation.alignment)  # type: ignore[arg-type]
            chosen[key] = _CloudCollector(spans, clusters(evaluation.group, where[:, 0]))
    if params.trace_flattened:
        keep = sample(evaluation.n_examples, params.trace_flattened_rows, np.random.default_rng(context.seed))
        chosen[FLATTENED] = FlattenedRows(keep)
    if not chosen:
        raise NotApplicable(
            f"not applicable because the evaluation set has {len(rows)} tokens (special ones left out) in "
            f"{len(sentences)} rows; a dimension needs at least {SMALLEST} points (views asked for: "
            f"{', '.join(params.views)})"
        )
    return chosen


def places(context: Context) -> Iterator[tuple[str, Place, str | None]]:
    """Key of the collector, where its numbers belong, and why the view has no points (None when it may have)."""
    for view in context.params.views:
        yield view, Place(COMPONENT[view], POINT_NAME[view]), missing_view(view, context)
    task = context.params.classes_of
    for key in class_places(context):
        label = key.removeprefix(f"{_CLASSES}:")
        yield key, Place(COMPONENT["tokens"], f'annotations "{label}" of {task}', task, label), None


def missing_view(view: View, context: Context) -> str | None:
    """Why a view has no meaning for this evaluation set, or None."""
    if view == "last_tokens" and context.evaluation.objective == "masked_lm":
        return (
            "the last token of a row stands for the row only where it is the one that has seen all others; in a masked "
            "set every token has; look at sentence_means"
        )
    return None


def class_places(context: Context) -> Mapping[str, np.ndarray]:
    """Key of each class of the task ``classes_of`` → spans ``[M, 3]`` (row, start, end), at most ``max_samples``.

    Raises UsageError for a task the evaluation set does not have.
    """
    evaluation, task = context.evaluation, context.params.classes_of
    if not task:
        return {}
    if task not in evaluation.tasks:
        known = ", ".join(evaluation.tasks) or "none"
        raise UsageError(
            f'intrinsic_dimension.classes_of: the evaluation set has no task "{task}".'
            f"{nearest(task, evaluation.tasks)} Its tasks: {known}."
        )
    spans = evaluation.spans(task)
    where = np.stack([spans.row, spans.start, spans.end], axis=1)
    found = {}
    for code, name in enumerate(spans.classes):
        mine = np.flatnonzero(spans.label == code)
        keep = sample(len(mine), context.params.max_samples, np.random.default_rng(context.seed))
        found[f"{_CLASSES}:{name}"] = where[mine[keep]]
    return found


def eligible(evaluation: EvaluationSet) -> tuple[np.ndarray, np.ndarray]:
    """Rows and positions of all tokens that are neither padding nor special, in reading order; int64 ``[n]`` each."""
    special = np.array(sorted(evaluation.special_token_ids), dtype=np.int64)
    step = max(1, (1 << 20) // max(1, evaluation.max_length))
    rows, positions = [], []
    for start in range(0, evaluation.n_examples, step):
        tokens = evaluation.tokens(start, min(start + step, evaluation.n_examples))
        row, position = np.nonzero(tokens.attention_mask.numpy() & ~np.isin(tokens.input_ids.numpy(), special))
        rows.append(row + start)
        positions.append(position)
    return np.concatenate(rows), np.concatenate(positions)


def sample(n: int, most: int, generator: np.random.Generator) -> np.ndarray:
    """``most`` of ``range(n)`` at random, ascending; all of them when there are no more."""
    return np.arange(n) if n <= most else np.sort(generator.permutation(n)[:most])


def clusters(group: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
    """Which points depend on each other: those of one group (document), or of one row where groups are too few.

    None, all points for themselves, where rows are too few as well.
    """
    for found in (group[rows], rows):
        if len(np.unique(found)) >= FEWEST_CLUSTERS:
            return found
    return None

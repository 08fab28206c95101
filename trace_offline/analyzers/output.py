"""What the network predicts where an annotated word begins, by the class of that word.

The prediction looked at is the one for the first sub-word of each annotated word: made one position earlier when labels
are shifted (causal language models), at the word itself otherwise; only where the evaluation set has a target there.

``class_probability`` is the share of probability on tokens that begin a word of the right class. With p(c | v) the
share of class c among the annotated words of the evaluation set that begin with token v,

    mass on c = Σ_v p(v) · p(c | v),

averaged over the words of class c. Tokens that begin no annotated word count for no class, so the masses sum to at most
1; nothing is rescaled. ``class_share`` is what a predictor that knows only how often each token begins a word would
reach: the share of class c, and Σ_c share² over all words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trace_offline.activations.batch import IGNORED, Collector, ForwardBatch
from trace_offline.analyzers._measurements import check_targets, chunks, measurement, missing, not_finite
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import EvaluationSetError, NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Result
from trace_offline.estimators.clustered import Codes, Floats, cluster_codes, ratio, sum_of_squared_shares

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.evaluation.evaluation_set import EvaluationSet, Spans

_COUNT, _NLL, _CORRECT, _MASS = range(4)
_METRICS = ("accuracy", "loss", "class_probability")
_ROWS = 1024


@dataclass(frozen=True)
class TaskSums:
    """Sums per cluster and class ``[G, K, 4]`` (words, NLL, correct, mass on the right class) of one task."""

    classes: tuple[str, ...]
    sums: Floats
    undefined: int
    infinite: int


class _Task:
    """The words of one task in the order of their rows, and what each token says about the class of a word."""

    def __init__(self, spans: Spans, evaluation: EvaluationSet, clusters: Codes) -> None:
        order = np.argsort(spans.row, kind="stable")
        self.row, self.label = spans.row[order], spans.label[order]
        self.position = spans.start[order] - (1 if evaluation.labels_shifted else 0)
        self.classes = spans.classes
        self.tokens, self.shares = class_given_token(first_tokens(spans, evaluation)[order], self.label, self.classes)
        self.cluster = clusters[self.row]
        self.sums: Floats = np.zeros((int(clusters.max()) + 1, len(self.classes), 4))
        self.undefined = self.infinite = 0

    def words(self, examples: Codes, targets: Tensor) -> tuple[Codes, Codes]:
        """Words of this batch that have a target: (index into the words, place b·T + t)."""
        by_row = np.argsort(examples, kind="stable")
        rows = examples[by_row]
        low, high = np.searchsorted(self.row, rows[0], "left"), np.searchsorted(self.row, rows[-1], "right")
        index = np.arange(low, high)
        slot = np.minimum(np.searchsorted(rows, self.row[index]), len(rows) - 1)
        length = targets.shape[1]
        here = (rows[slot] == self.row[index]) & (self.position[index] >= 0) & (self.position[index] < length)
        index, slot = index[here], slot[here]
        place = by_row[slot] * length + self.position[index]
        scored = targets.cpu().numpy().reshape(-1)[place] != IGNORED
        return index[scored], place[scored]


def first_tokens(spans: Spans, evaluation: EvaluationSet) -> Codes:
    """Token ``[M]`` that begins each annotated word, −100 where it cannot be known.

    Where a prediction has a target, that is the token meant (a masked token shows another in its place). Elsewhere it
    is the token in the text for language models, and unknown for sets whose labels are no tokens.
    """
    shift = 1 if evaluation.labels_shifted else 0
    language = evaluation.objective in ("causal_lm", "masked_lm")
    found = np.full(len(spans.row), IGNORED, dtype=np.int64)
    for start in range(0, evaluation.n_examples, _ROWS):
        stop = min(start + _ROWS, evaluation.n_examples)
        here = np.flatnonzero((spans.row >= start) & (spans.row < stop))
        if not len(here):
            continue
        batch = evaluation.tokens(start, stop)
        row, position = spans.row[here] - start, spans.start[here]
        target = batch.targets.numpy()[row, np.maximum(position - shift, 0)]
        known = (target != IGNORED) & (position >= shift)
        shown = batch.input_ids.numpy()[row, position] if language else np.full(len(here), IGNORED)
        found[here] = np.where(known, target, shown)
    return found


def class_given_token(tokens: Codes, labels: Codes, classes: tuple[str, ...]) -> tuple[Codes, Floats]:
    """p(class | token begins the word) from counts: distinct tokens ``[U]`` and shares ``[U, K]``."""
    known = tokens != IGNORED
    distinct, which = np.unique(tokens[known], return_inverse=True)
    cells = which.reshape(-1) * len(classes) + labels[known]
    counts = np.bincount(cells, minlength=len(distinct) * len(classes)).reshape(len(distinct), len(classes))
    return distinct, counts / np.maximum(counts.sum(1, keepdims=True), 1)


class WordPredictionCollector:
    """Reads the predictions of first sub-words and keeps sums per class; one gather per batch for all tasks."""

    needs_hidden = False
    needs_logits = True

    def __init__(self, evaluation: EvaluationSet, tasks: tuple[str, ...]) -> None:
        clusters = cluster_codes(evaluation.group)
        self._tasks = {name: _Task(evaluation.spans(name), evaluation, clusters) for name in tasks}
        self._tokens = np.unique(np.concatenate([task.tokens for task in self._tasks.values()]))
        self._places = {name: np.searchsorted(self._tokens, task.tokens) for name, task in self._tasks.items()}

    def update(self, batch: ForwardBatch) -> None:
        """Add the annotated words of this batch."""
        examples = batch.examples.cpu().numpy()
        found = {name: task.words(examples, batch.targets) for name, task in self._tasks.items()}
        places = np.unique(np.concatenate([place for _, place in found.values()]))
        if not len(places):
            return
        nll, correct, undefined, on_tokens = self._read(batch, places)
        for name, (index, place) in found.items():
            if len(index):
                at = np.searchsorted(places, place)
                self._add(name, index, nll[at], correct[at], undefined[at], on_tokens[at])

    def _read(self, batch: ForwardBatch, places: Codes) -> tuple[Floats, Floats, Codes, Floats]:
        """NLL, correct, undefined ``[n]`` and probabilities of the tokens that begin words ``[n, U]``."""
        import torch

        log_p = batch.log_probabilities
        classes = log_p.shape[-1]
        flat = log_p.reshape(-1, classes)
        if self._tokens[-1] >= classes:
            raise EvaluationSetError(
                f"a word of the evaluation set begins with token {self._tokens[-1]}, but the network predicts the "
                f"classes 0 to {classes - 1}. Build the evaluation set with this checkpoint's tokenizer."
            )
        tokens = torch.from_numpy(self._tokens).to(flat.device)
        where = torch.from_numpy(places).to(flat.device)
        targets = batch.targets.reshape(-1)[where]
        check_targets(targets, classes)
        parts = []
        for part in chunks(len(places), classes):
            rows = flat[where[part]]
            top, predicted = rows.max(-1)
            target = targets[part]
            parts.append(
                (
                    -rows.gather(1, target[:, None])[:, 0].double(),
                    (predicted == target).double(),
                    top.isnan().long(),
                    rows[:, tokens].exp(),
                )
            )
        nll, correct, undefined, on_tokens = (
            torch.cat(list(column)).cpu().numpy() for column in zip(*parts, strict=True)
        )
        return nll, correct, undefined, on_tokens

    def _add(self, name: str, index: Codes, nll: Floats, correct: Floats, undefined: Codes, on_tokens: Floats) -> None:
        task = self._tasks[name]
        label = task.label[index]
        mass = on_tokens[:, self._places[name]] @ task.shares.astype(np.float32)
        task.undefined += int(undefined.sum())
        task.infinite += int(np.isinf(nll).sum())
        groups, classes = task.sums.shape[:2]
        cells = task.cluster[index] * classes + label
        for slot, values in enumerate((np.ones(len(index)), nll, correct, mass[np.arange(len(index)), label])):
            task.sums[:, :, slot] += np.bincount(cells, weights=values, minlength=groups * classes).reshape(groups, -1)

    def finish(self) -> dict[str, TaskSums]:
        """Sums by task."""
        return {name: TaskSums(t.classes, t.sums, t.undefined, t.infinite) for name, t in self._tasks.items()}


class OutputAnalyzer(Analyzer):
    """Predictions by the class of the word that is predicted."""

    name = "output"
    version = "1"
    summary = "next-token accuracy, loss and probability on the right class of word, per annotated task and class"
    reference = "Cochran 1977, Sampling Techniques, 6.3 (standard error of a ratio over sequences)"
    needs = frozenset({Need.LOGITS, Need.LABELS})
    metrics = (
        MetricSpec("accuracy", "1", "share of words of the class whose first sub-word is the most likely prediction"),
        MetricSpec("loss", "nats", "mean negative log-probability of the first sub-word of words of the class"),
        MetricSpec("class_probability", "1", "mean probability on tokens that begin words of the right class"),
        MetricSpec("class_share", "1", "chance level of class_probability: the class's share of the words"),
    )

    class Params(BaseParams):
        """No parameters."""

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """One listener to the logits. Raises NotApplicable when nothing is annotated."""
        evaluation = context.evaluation
        if not evaluation.tasks:
            raise NotApplicable("not applicable because the evaluation set has no annotated task")
        return {"words": WordPredictionCollector(evaluation, evaluation.tasks)}

    def measure(self, context: Context) -> Iterator[Result]:
        """For every task: each class by its name, then all words together (label None)."""
        collected: dict[str, TaskSums] = context.collected["words"]
        for task, found in collected.items():
            yield from self._task(task, found)

    def _task(self, task: str, found: TaskSums) -> Iterator[Result]:
        counts = found.sums[:, :, _COUNT]
        total = int(counts.sum())
        broken, unbounded = not_finite(found.undefined, found.infinite, total)
        reasons = {"accuracy": broken, "loss": unbounded, "class_probability": broken}
        slots = {"accuracy": _CORRECT, "loss": _NLL, "class_probability": _MASS}
        for k, label in (*enumerate(found.classes), (None, None)):
            count = counts.sum(1) if k is None else counts[:, k]
            n = int(count.sum())
            nothing = None if n else "no prediction of the evaluation set has such a word as its target"
            for metric in _METRICS:
                reason = nothing or reasons[metric]
                if reason is not None:
                    yield missing(metric, reason, n, task=task, label=label)
                    continue
                values = found.sums[:, :, slots[metric]]
                estimate = ratio(values.sum(1) if k is None else values[:, k], count)
                yield measurement(metric, estimate, n, task=task, label=label)
            if total == 0:
                yield missing("class_share", str(nothing), 0, task=task, label=label)
                continue
            share = sum_of_squared_shares(counts) if k is None else ratio(count, counts.sum(1))
            yield measurement("class_share", share, total, task=task, label=label)

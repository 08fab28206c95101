"""What the network predicts where an annotated word begins, by the class of that word.

The prediction looked at is the one for the first sub-word of each annotated word: made one position earlier when labels
are shifted (causal language models), at the word itself otherwise; only where the evaluation set has a target there.

``class_probability`` is the share of probability on tokens that begin a word of the right class. With p(c | v) the
share of class c among the annotated words of the evaluation set that begin with token v,

    mass on c = Σ_v p(v) · p(c | v),

averaged over the words of class c. Tokens that begin no annotated word count for no class, so the masses sum to at most
1; nothing is rescaled. ``class_share`` is what a predictor that knows only how often each token begins a word would
reach: the share of class c, and Σ_c share² over all words.

``class_mass`` counts a token wholly for every class that it ever begins a word of:

    mass on c = Σ_v p(v) · 1[some annotated word of class c begins with v],

so a token that begins words of two classes counts for both and the masses may sum to more than 1.
``class_mass_chance`` is its value for the same predictor: the share of all words whose first token begins some word of
class c.

Calibration comes in two kinds. ``calibration_error`` bins the words *of a class* by the confidence of the most likely
token; being right is more likely for some classes than for others at equal confidence, so it says how much confidence
misleads on this class and need not be 0 even for the true distribution. ``class_calibration_error`` (classwise) bins
*all* words by p(c), the ``class_probability`` of c, and compares with how often the word is of class c.
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
from trace_offline.estimators.calibration import CalibrationBins
from trace_offline.estimators.clustered import (
    JACKKNIFE_GROUPS,
    Codes,
    Estimate,
    Floats,
    cluster_codes,
    ratio,
    sum_of_squared_shares,
)

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.evaluation.evaluation_set import EvaluationSet, Spans

_COUNT, _NLL, _CORRECT, _MASS, _TARGET, _WHOLE_MASS = range(6)
_METRICS = {
    "accuracy": _CORRECT,
    "loss": _NLL,
    "class_probability": _MASS,
    "target_probability": _TARGET,
    "class_mass": _WHOLE_MASS,
}
_ROWS = 1024
_CALIBRATED_CLASSES = 256
"""Calibration bins are kept for each class and group of sequences: megabytes at this number of classes."""


@dataclass(frozen=True)
class TaskSums:
    """Sums per cluster and class ``[G, K, 6]`` of one task: words, NLL, correct, mass on the right class (shared among
    the classes of a token), probability of the token, mass on the right class (undivided).

    ``members [G, K]``: words whose first token begins some word of class c. ``confidence``, ``by_class``: calibration
    bins of groups × classes, none for very many classes. ``several``: some words carry several labels.
    """

    classes: tuple[str, ...]
    sums: Floats
    members: Floats
    confidence: CalibrationBins
    by_class: CalibrationBins
    several: bool
    undefined: int
    infinite: int


class _Task:
    """The words of one task in the order of their rows, and what each token says about the class of a word."""

    def __init__(self, spans: Spans, evaluation: EvaluationSet, clusters: Codes) -> None:
        order = np.argsort(spans.row, kind="stable")
        # Half as wide as usual: these are held for every word of the set, however large it is.
        self.row, self.label = spans.row[order].astype(np.int32), spans.label[order].astype(np.int32)
        self.position = (spans.start[order] - (1 if evaluation.labels_shifted else 0)).astype(np.int32)
        self.classes = spans.classes
        tokens = first_tokens(spans, evaluation)[order]
        self.tokens, self.shares = class_given_token(tokens, spans.label[order], self.classes)
        self.cluster = clusters[self.row].astype(np.int32)
        clusters_n, self.n_classes = int(clusters.max()) + 1, len(self.classes)
        self.sums: Floats = np.zeros((clusters_n, self.n_classes, 6))
        self.members: Floats = np.zeros((clusters_n, self.n_classes))
        self.coarse = cluster_codes(evaluation.group, JACKKNIFE_GROUPS)[self.row].astype(np.int32)
        groups = int(self.coarse.max(initial=0)) + 1 if self.n_classes <= _CALIBRATED_CLASSES else 0
        places = np.unique(self.row.astype(np.int64) * (evaluation.max_length + 1) + spans.start[order])
        self.several = len(places) < len(self.row)
        self.confidence = CalibrationBins(groups * self.n_classes)
        self.by_class = CalibrationBins(groups * self.n_classes)
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
        nll, correct, top, target, on_tokens = self._read(batch, places)
        for name, (index, place) in found.items():
            if len(index):
                at = np.searchsorted(places, place)
                self._add(name, index, nll[at], correct[at], top[at], target[at], on_tokens[at])

    def _read(self, batch: ForwardBatch, places: Codes) -> tuple[Floats, Floats, Floats, Codes, Floats]:
        """NLL, correct, top probability (NaN: undefined), target ``[n]``; p of tokens that begin words ``[n, U]``."""
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
                    top.double().exp(),
                    target,
                    rows[:, tokens].exp(),
                )
            )
        nll, correct, confidence, labels, on_tokens = (
            torch.cat(list(column)).cpu().numpy() for column in zip(*parts, strict=True)
        )
        return nll, correct, confidence, labels, on_tokens

    def _add(
        self,
        name: str,
        index: Codes,
        nll: Floats,
        correct: Floats,
        top: Floats,
        target: Codes,
        on_tokens: Floats,
    ) -> None:
        task = self._tasks[name]
        label, cluster, coarse = (codes[index].astype(np.int64) for codes in (task.label, task.cluster, task.coarse))
        rows = np.arange(len(index))
        known = on_tokens[:, self._places[name]]
        shared = known @ task.shares.astype(np.float32)
        whole = known @ (task.shares > 0).astype(np.float32)
        task.undefined += int(np.isnan(top).sum())
        task.infinite += int(np.isinf(nll).sum())
        groups, classes = task.sums.shape[:2]
        cells = cluster * classes + label
        columns = (np.ones(len(index)), nll, correct, shared[rows, label], np.exp(-nll), whole[rows, label])
        for slot, values in enumerate(columns):
            task.sums[:, :, slot] += np.bincount(cells, weights=values, minlength=groups * classes).reshape(groups, -1)
        token = np.minimum(np.searchsorted(task.tokens, target), len(task.tokens) - 1)
        belongs = (task.shares[token] > 0) & (task.tokens[token] == target)[:, None]
        np.add.at(task.members, cluster, belongs.astype(np.float64))
        if not task.undefined and len(task.confidence.sums):
            task.confidence.add(top, correct.astype(bool), coarse * classes + label)
            every = (coarse[:, None] * classes + np.arange(classes)).reshape(-1)
            hit = label[:, None] == np.arange(classes)
            task.by_class.add(shared.reshape(-1).astype(np.float64), hit.reshape(-1), every)

    def finish(self) -> dict[str, TaskSums]:
        """Sums by task."""
        return {
            name: TaskSums(t.classes, t.sums, t.members, t.confidence, t.by_class, t.several, t.undefined, t.infinite)
            for name, t in self._tasks.items()
        }


class OutputAnalyzer(Analyzer):
    """Predictions by the class of the word that is predicted."""

    name = "output"
    version = "1"
    summary = "next-token accuracy, loss, calibration and probability on the right class of word, per task and class"
    reference = (
        "Cochran 1977, Sampling Techniques, 6.3 (standard error of a ratio over sequences); Guo et al. 2017, "
        "arXiv:1706.04599, and Kull et al. 2019, arXiv:1910.12656 (calibration error, classwise)"
    )
    needs = frozenset({Need.LOGITS, Need.LABELS})
    on_host = True
    metrics = (
        MetricSpec("accuracy", "1", "share of words of the class whose first sub-word is the most likely prediction"),
        MetricSpec("loss", "nats", "mean negative log-probability of the first sub-word of words of the class"),
        MetricSpec("class_probability", "1", "mean probability on tokens that begin words of the right class"),
        MetricSpec("class_share", "1", "chance level of class_probability: the class's share of the words"),
        MetricSpec("target_probability", "1", "mean probability of the first sub-word of words of the class"),
        MetricSpec("class_mass", "1", "mean probability on tokens that begin some word of the right class, undivided"),
        MetricSpec("class_mass_chance", "1", "chance level of class_mass: share of words that begin with such tokens"),
        MetricSpec("calibration_error", "1", "expected calibration error of the most likely token, words of the class"),
        MetricSpec(
            "class_calibration_error", "1", "classwise: all words, class_probability against being of the class"
        ),
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
        many = one_label = None
        if len(found.classes) > _CALIBRATED_CLASSES:
            many = f"calibration is measured for up to {_CALIBRATED_CLASSES} classes; the task has {len(found.classes)}"
        if found.several:
            one_label = "words of this task carry several labels, so that their probabilities need not sum to 1"
        for k, label in (*enumerate(found.classes), (None, None)):
            where = {"task": task, "label": label}
            count = counts.sum(1) if k is None else counts[:, k]
            n = int(count.sum())
            nothing = None if n else "no prediction of the evaluation set has such a word as its target"
            for metric, slot in _METRICS.items():
                reason = nothing or (unbounded if metric == "loss" else broken)
                if reason is not None:
                    yield missing(metric, reason, n, **where)
                    continue
                values = found.sums[:, :, slot]
                estimate = ratio(values.sum(1) if k is None else values[:, k], count)
                yield measurement(metric, estimate, n, **where)
            confidence = _calibration(found.confidence, k, counts)
            yield measurement("calibration_error", confidence, n, nothing or broken or many, **where)
            if total == 0:
                for metric in ("class_share", "class_mass_chance", "class_calibration_error"):
                    yield missing(metric, str(nothing), 0, **where)
                continue
            share = sum_of_squared_shares(counts) if k is None else ratio(count, counts.sum(1))
            yield measurement("class_share", share, total, **where)
            chance = _mass_chance(counts, found.members) if k is None else ratio(found.members[:, k], counts.sum(1))
            yield measurement("class_mass_chance", chance, total, **where)
            if k is not None:
                calibration = _calibration(found.by_class, k, counts)
                yield measurement("class_calibration_error", calibration, total, broken or many or one_label, **where)


def _calibration(bins: CalibrationBins, k: int | None, counts: Floats) -> Estimate:
    """Calibration error of one class, or of all words together."""
    classes = counts.shape[1]
    table = bins.sums.reshape(-1, classes, *bins.sums.shape[1:])
    chosen = CalibrationBins(len(table), bins.n_bins)
    chosen.sums = table.sum(1) if k is None else table[:, k]
    return chosen.error()


def _mass_chance(counts: Floats, members: Floats) -> Estimate:
    """Σ_c s_c m_c with s_c the share of class c and m_c its chance level; standard error by linearisation."""
    per_cluster = counts.sum(1)
    total = float(per_cluster.sum())
    shares, chances = counts.sum(0) / total, members.sum(0) / total
    return Estimate(float(shares @ chances), ratio(counts @ chances + members @ shares, per_cluster).stderr)

"""Does the network prefer the right form of a word over the wrong one, where the evaluation set names both?

At a place with an alternative (the wrong number of a verb, say) both forms follow the same tokens, so the two
probabilities of one prediction decide: p(right) against p(wrong). Nothing else the network might say counts, so that a
network that does not know the word can still know its number.

Places are broken down by the annotations that cover them: the number of the verb, how many nouns of the other number
stand between it and its subject (attractors).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from trace_offline.activations.batch import IGNORED, Collector, ForwardBatch
from trace_offline.analyzers._measurements import check_targets, measurement, missing
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Result
from trace_offline.estimators.clustered import Codes, Floats, cluster_codes, cluster_sums, combined_ratios, ratio

if TYPE_CHECKING:
    from trace_offline.evaluation.evaluation_set import EvaluationSet

_COUNT, _CORRECT, _SHARE, _MARGIN, _FREQUENCY = range(5)
_ROWS = 1024
_METRICS = {
    "accuracy": _CORRECT,
    "relative_probability": _SHARE,
    "margin": _MARGIN,
    "frequency_accuracy": _FREQUENCY,
}


@dataclass(frozen=True)
class Choices:
    """Every place with an alternative, in the order of the set: log p(right), log p(wrong) ``[A]``, NaN if not scored;
    the right token ``[A]``, −100 if not scored.
    """

    right: Floats
    wrong: Floats
    token: Codes


class ChoiceCollector:
    """Reads two log-probabilities at every place that has an alternative."""

    needs_hidden = False
    needs_logits = True

    def __init__(self, evaluation: EvaluationSet) -> None:
        assert evaluation.alternatives is not None
        self._others = evaluation.alternatives
        self._shift = 1 if evaluation.labels_shifted else 0
        n = len(self._others)
        self._found = Choices(np.full(n, np.nan), np.full(n, np.nan), np.full(n, IGNORED, dtype=np.int64))

    def update(self, batch: ForwardBatch) -> None:
        """Add the places of this batch whose prediction has a target."""
        import torch

        examples = batch.examples.cpu().numpy()
        low, high = np.searchsorted(self._others.row, [examples[0], examples[-1] + 1])
        index = np.arange(low, high)
        position = self._others.position[low:high] - self._shift
        inside = (position >= 0) & (position < batch.targets.shape[1])
        index, position = index[inside], position[inside]
        b = torch.from_numpy(self._others.row[index] - examples[0]).to(batch.targets.device)
        t = torch.from_numpy(position).to(batch.targets.device)
        target = batch.targets[b, t]
        scored = target != IGNORED
        index, b, t, target = index[scored.cpu().numpy()], b[scored], t[scored], target[scored]
        if not len(index):
            return
        wrong = torch.from_numpy(self._others.token[index]).to(target.device)
        log_p = batch.log_probabilities
        check_targets(torch.cat([target, wrong]), log_p.shape[-1])
        self._found.right[index] = log_p[b, t, target].double().cpu().numpy()
        self._found.wrong[index] = log_p[b, t, wrong].double().cpu().numpy()
        self._found.token[index] = target.cpu().numpy()

    def finish(self) -> Choices:
        """What was read."""
        return self._found


class AgreementAnalyzer(Analyzer):
    """The right form of a word against the wrong one."""

    name = "agreement"
    version = "1"
    summary = "share of places where the right form of a word is more likely than the wrong one, by attractors"
    reference = (
        "Linzen, Dupoux & Goldberg 2016, arXiv:1611.01368 (agreement, attractors); Marvin & Linzen 2018, "
        "arXiv:1808.09031 (comparing the probabilities of two forms)"
    )
    needs = frozenset({Need.LOGITS, Need.LABELS})
    on_host = True
    metrics = (
        MetricSpec("accuracy", "1", "share of places with p(right) > p(wrong), equal ones half; chance 0.5"),
        MetricSpec(
            "balanced_accuracy", "1", "mean accuracy of the classes of a task; chance 0.5 whatever their shares"
        ),
        MetricSpec("relative_probability", "1", "mean p(right) / (p(right) + p(wrong)); 0.5 without a preference"),
        MetricSpec("margin", "nats", "mean log p(right) − log p(wrong)"),
        MetricSpec(
            "frequency_accuracy",
            "1",
            "accuracy of always taking the form that is more frequent in the evaluation set, this place left out",
        ),
    )

    class Params(BaseParams):
        """Which annotations break the places down."""

        tasks: tuple[str, ...] = Field(
            ("agreement", "attractors"),
            description="annotated tasks by whose classes places are broken down; those the set does not have are left",
        )

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """One listener to the logits. Raises NotApplicable when no place has an alternative."""
        others = context.evaluation.alternatives
        if others is None or not len(others):
            raise NotApplicable(
                "not applicable because the evaluation set names no other form of any word (no alternatives). Build it "
                "from JSONL with alternatives, or from a corpus with --task agreement"
            )
        return {"choices": ChoiceCollector(context.evaluation)}

    def measure(self, context: Context) -> Iterator[Result]:
        """All places (task and label None), then those of every class of every task."""
        evaluation, found = context.evaluation, context.collected["choices"]
        others = evaluation.alternatives
        assert others is not None
        scored = np.flatnonzero(found.token != IGNORED)
        if not len(scored):
            raise NotApplicable("not applicable because no place that has an alternative is predicted")
        values = _values(found, scored, evaluation)
        clusters = cluster_codes(evaluation.group)[others.row[scored]]
        yield from _numbers(values, clusters, {})
        for task in context.params.tasks:
            if task not in evaluation.tasks:
                continue
            place, label, classes = _classes_at(evaluation, task, scored)
            tables = []
            for k, name in enumerate(classes):
                chosen = place[label == k]
                yield from _numbers(values[chosen], clusters[chosen], {"task": task, "label": name})
                tables.append(cluster_sums(values[chosen], clusters[chosen], int(clusters.max()) + 1))
            yield _balanced(tables, len(place), task)


def _values(found: Choices, scored: Codes, evaluation: EvaluationSet) -> Floats:
    """``[n, 5]``: 1, right is preferred, relative probability, margin, the more frequent form is right."""
    right, wrong = found.right[scored], found.wrong[scored]
    with np.errstate(invalid="ignore", over="ignore"):
        margin = right - wrong
        # both impossible: no preference
        margin = np.where(np.isneginf(right) & np.isneginf(wrong), 0.0, margin)
        share = 1.0 / (1.0 + np.exp(-margin))
    counts = _token_counts(evaluation)
    assert evaluation.alternatives is not None
    mine, other = found.token[scored], evaluation.alternatives.token[scored]
    size = max(len(counts), int(mine.max()) + 1, int(other.max()) + 1)
    counts = np.concatenate([counts, np.zeros(size - len(counts), dtype=counts.dtype)])
    frequency = _preferred((counts[mine] - 1 - counts[other]).astype(np.float64))
    return np.stack([np.ones(len(scored)), _preferred(margin), share, margin, frequency], axis=1)


def _preferred(difference: Floats) -> Floats:
    """1 where positive, ½ where 0, 0 where negative; NaN stays."""
    return np.where(np.isnan(difference), np.nan, 0.5 * (np.sign(difference) + 1.0))


def _token_counts(evaluation: EvaluationSet) -> Codes:
    """How often each token is the target of a prediction, over the whole set."""
    counts = np.zeros(1, dtype=np.int64)
    for start in range(0, evaluation.n_examples, _ROWS):
        targets = evaluation.tokens(start, min(start + _ROWS, evaluation.n_examples)).targets.numpy()
        found = np.bincount(targets[targets != IGNORED], minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return counts


def _classes_at(evaluation: EvaluationSet, task: str, scored: Codes) -> tuple[Codes, Codes, tuple[str, ...]]:
    """(index into ``scored``, class) for every annotation of a task that covers a scored place."""
    assert evaluation.alternatives is not None
    row, position = evaluation.alternatives.row[scored], evaluation.alternatives.position[scored]
    spans = evaluation.spans(task)
    # annotations of a row are few: look at those of each place's row, one after the other
    first, stop = np.searchsorted(spans.row, row, "left"), np.searchsorted(spans.row, row, "right")
    places, labels = [], []
    for step in range(int((stop - first).max(initial=0))):
        here = np.flatnonzero(first + step < stop)
        at = first[here] + step
        covers = (spans.start[at] <= position[here]) & (position[here] < spans.end[at])
        places.append(here[covers])
        labels.append(spans.label[at[covers]])
    if not places:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), spans.classes
    return np.concatenate(places), np.concatenate(labels), spans.classes


def _numbers(values: Floats, clusters: Codes, where: dict[str, str]) -> Iterator[Result]:
    n = len(values)
    undefined = int(np.isnan(values[:, _MARGIN]).sum())
    for metric, slot in _METRICS.items():
        reason = None if n else "no place of this class is predicted and has an alternative"
        if undefined and metric != "frequency_accuracy":
            reason = f"the logits of {undefined} of {n} predictions are not numbers"
        elif metric == "margin" and np.isinf(values[:, slot]).any():
            reason = f"{int(np.isinf(values[:, slot]).sum())} of {n} places have a form of probability 0"
        if reason is not None:
            yield missing(metric, reason, n, **where)
            continue
        sums = cluster_sums(values[:, [slot, _COUNT]], clusters, int(clusters.max()) + 1)
        yield measurement(metric, ratio(sums[:, 0], sums[:, 1]), n, **where)


def _balanced(tables: list[Floats], n: int, task: str) -> Result:
    used = [table for table in tables if table[:, _COUNT].any()]
    if len(used) < 2:
        reason = f"the places with an alternative have {len(used)} class of this task; a balance needs two"
        return missing("balanced_accuracy", reason, n, task=task)
    correct, count = (np.stack([table[:, slot] for table in used], axis=1) for slot in (_CORRECT, _COUNT))
    if np.isnan(correct).any():
        return missing("balanced_accuracy", "the logits of some predictions are not numbers", n, task=task)
    estimate = combined_ratios(correct, count, np.full(len(used), 1 / len(used)))
    return measurement("balanced_accuracy", estimate, n, task=task)

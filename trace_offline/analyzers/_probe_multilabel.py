"""Tasks in which one span may carry several labels: one independent yes/no problem per label, solved together.

Shape letters: L+1 layers, U distinct spans, C labels that are learned, S label sets (C real, then C control).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from trace_offline.analyzers._measurements import measurement, missing
from trace_offline.analyzers._probe_data import Prepared, TaskWords, word_types
from trace_offline.analyzers._probe_fit import FitOptions, calibration_of, fit_sets
from trace_offline.core.types import Result
from trace_offline.estimators.classification import f1_per_class, macro_f1, mean_by_cluster
from trace_offline.estimators.clustered import (
    JACKKNIFE_GROUPS,
    Codes,
    Estimate,
    cluster_codes,
    cluster_sums,
    jackknife,
)
from trace_offline.estimators.splits import Part, control_labels

if TYPE_CHECKING:
    from trace_offline.analyzers.probe_weights import Probe
    from trace_offline.evaluation.evaluation_set import EvaluationSet

_WHOLE = ("accuracy", "macro_f1", "nll", "confidence", "calibration_error", "majority_accuracy", "converged")
_CONTROL = ("control_accuracy", "selectivity")
_PER_LABEL = ("f1", "confidence", "support", "penalty")
_NOT_HERE = ("expected_layer", "centre_of_gravity")


def is_multilabel(words: TaskWords) -> bool:
    """Whether some span carries more than one label of this task."""
    return len(np.unique(words.span, axis=0)) < len(words.span)


class MultiLabelTask:
    """One task, ready to fit: distinct spans and which labels each carries."""

    def __init__(self, words: TaskWords, evaluation: EvaluationSet, min_count: int, control: bool, seed: int) -> None:
        span, first, which = np.unique(words.span, axis=0, return_index=True, return_inverse=True)
        holds = np.zeros((len(span), len(words.classes)), dtype=np.int64)
        holds[which.reshape(-1), words.label] = 1
        part = words.part[first]
        self.words = replace(
            words, where=words.where[first], label=holds[:, 0], group=words.group[first], part=part, span=span
        )
        train = holds[part == Part.TRAIN]
        fewer = np.minimum(train.sum(0), len(train) - train.sum(0))
        self.excluded = {
            name: f"{fewer[code]} training spans on the rarer side, fewer than min_class_count = {min_count}: left out"
            for code, name in enumerate(words.classes)
            if fewer[code] < min_count
        }
        self.kept = np.flatnonzero(fewer >= min_count)
        self.holds = holds[:, self.kept]
        empty = [part.name.lower() for part in Part if not (self.words.part == part).any()]
        self.reason: str | None = None
        if empty:
            self.reason = f"no {words.unit} of this task left for {' or '.join(empty)}"
        elif not len(self.kept):
            self.reason = f"no label has min_class_count = {min_count} training spans with and without it"
        sets: list[Codes] = list(self.holds.T)
        if control and self.reason is None:
            types = word_types(evaluation, span)
            sets += [control_labels(types, column, seed + 7919 * k) for k, column in enumerate(self.holds.T)]
        self.sets = sets
        self.control = control
        self.prepared = Prepared(self.words, np.arange(2), {}, self.words.label, None, self.reason)

    def results(
        self, table: torch.Tensor, finite: list[bool], options: FitOptions
    ) -> tuple[list[Result], dict[tuple[str, int], Probe]]:
        """Measurements of all layers, and the probes by ("task=label", layer)."""
        usable = [layer for layer, good in enumerate(finite) if good] if self.reason is None else []
        results: list[Result] = []
        probes: dict[tuple[str, int], Probe] = {}
        fitted = dict(zip(usable, fit_sets(table, usable, self.sets, self.prepared, options), strict=True))
        for layer in range(len(table)):
            where: dict[str, Any] = {"layer": layer, "component": "residual", "task": self.words.task}
            if layer not in fitted:
                results.extend(self._nothing(self.reason or f"hidden states of layer {layer} are not finite", where))
                continue
            found, penalties, converged = fitted[layer]
            results.extend(self._layer(table[layer], found, penalties, converged, where))
            for k, code in enumerate(self.kept):
                probes[f"{self.words.task}={self.words.classes[code]}", layer] = found[k]
        reason = self.reason or "not defined for a task whose words carry several labels"
        results.extend(missing(m, reason, component="residual", task=self.words.task) for m in _NOT_HERE)
        return results, probes

    def _nothing(self, reason: str, where: dict[str, Any]) -> Iterator[Result]:
        for metric in _WHOLE + (_CONTROL if self.control else ()):
            yield missing(metric, reason, **where)
        for label in self.words.classes:
            for metric in _PER_LABEL:
                yield missing(metric, self.excluded.get(label, reason), label=label, **where)

    def _layer(
        self,
        matrix: torch.Tensor,
        probes: list[Probe],
        penalties: list[float | None],
        converged: bool,
        where: dict[str, Any],
    ) -> Iterator[Result]:
        """A decision is one span and one label; totals are means over all decisions of the test spans."""
        test = self.prepared.at(Part.TEST)
        states, groups = matrix[self.words.where[test]], self.words.group[test]
        log_p = np.stack([probe.log_probabilities(states).double().numpy() for probe in probes], axis=1)
        truth = np.stack(self.sets, axis=1)[test]
        said = log_p.argmax(2)
        right = np.take_along_axis(log_p, truth[..., None], 2)[..., 0]
        correct = said == truth
        count = len(self.kept)
        real, n = slice(0, count), len(test)

        def mean(values: NDArray[Any]) -> Estimate:
            return mean_by_cluster(values.reshape(n, -1).mean(1), groups)

        yield measurement("accuracy", mean(correct[:, real]), n, **where)
        coarse = cluster_codes(groups, JACKKNIFE_GROUPS)
        columns = [said * truth == 1, said, truth]
        sums = np.stack([cluster_sums(c[:, real].astype(float), coarse, int(coarse.max()) + 1) for c in columns], 1)
        yield measurement("macro_f1", jackknife(sums, macro_f1), n, **where)
        yield measurement("nll", mean(-right[:, real]), n, **where)
        yield measurement("confidence", mean(np.exp(right[:, real])), n, **where)
        flat = log_p[:, real].reshape(n * count, 2)
        calibration = calibration_of(flat, correct[:, real].reshape(-1), np.repeat(groups, count))
        yield measurement("calibration_error", calibration, n, **where)
        usual = self.holds[self.prepared.at(Part.TRAIN)].mean(0) > 0.5
        yield measurement("majority_accuracy", mean(truth[:, real] == usual), n, **where)
        yield measurement("converged", Estimate(float(converged), None), n, **where)
        if self.control:
            control = correct[:, count:]
            yield measurement("control_accuracy", mean(control), n, **where)
            yield measurement("selectivity", mean(correct[:, real].astype(float) - control), n, **where)
        place = {int(code): k for k, code in enumerate(self.kept)}
        for code, label in enumerate(self.words.classes):
            if code not in place:
                for metric in _PER_LABEL:
                    yield missing(metric, self.excluded[label], label=label, **where)
                continue
            k = place[code]
            having = truth[:, k] == 1
            support = int(having.sum())
            reason = None if support else "no test span has this label"
            f1 = jackknife(sums[:, :, k : k + 1], lambda c: f1_per_class(c)[..., 0])
            yield measurement("f1", f1, support, reason, label=label, **where)
            sure = mean_by_cluster(np.exp(log_p[having, k, 1]), groups[having])
            yield measurement("confidence", sure, support, reason, label=label, **where)
            yield measurement("support", Estimate(float(support), None), support, label=label, **where)
            free = None if penalties[k] is not None else "a probe with a hidden layer has no penalty"
            held = len(self.prepared.at(Part.VALIDATION))
            yield measurement("penalty", Estimate(penalties[k], None), held, free, label=label, **where)

"""Tasks in which one span may carry several labels: one independent yes/no problem per label, solved together.

Shape letters: L+1 layers, U distinct spans, C labels that are learned, S label sets (C real, then C control).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from trace_offline.analyzers._measurements import measurement, missing
from trace_offline.analyzers._probe_data import Prepared, TaskWords, word_types
from trace_offline.analyzers._probe_fit import Fitted, Request
from trace_offline.analyzers._probe_scores import calibration_of, code_length
from trace_offline.analyzers._probe_summary import depth
from trace_offline.analyzers._probe_task import CONTROL, NO_PENALTY, code_results, no_code, random_states
from trace_offline.core.types import Array, Result
from trace_offline.estimators.classification import confusion_matrix, f1_per_class, macro_f1, mean_by_cluster
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
_PER_LABEL = ("f1", "confidence", "support", "penalty")


def is_multilabel(words: TaskWords) -> bool:
    """Whether some span carries more than one label of this task."""
    return len(np.unique(words.span, axis=0)) < len(words.span)


class MultiLabelTask:
    """One task of one repetition: distinct spans and which labels each carries. ``params``: those of ``probe``."""

    def __init__(self, words: TaskWords, evaluation: EvaluationSet, params: Any, seed: int) -> None:
        self.evaluation, self.params, self.seed = evaluation, params, seed
        min_count = params.min_class_count
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
        if params.control and self.reason is None:
            types = word_types(evaluation, span)
            sets += [control_labels(types, column, seed + 7919 * k) for k, column in enumerate(self.holds.T)]
        self.sets = sets
        self.prepared = Prepared(self.words, np.arange(2), {}, self.words.label, None, self.reason)
        names = [f"{words.task}={words.classes[code]}" for code in self.kept]
        self.names = names
        self.classes: dict[str, tuple[str, ...]] = dict.fromkeys(names, ("no", "yes"))
        self.layers: list[int] = []
        self._random: torch.Tensor | None = None

    def requests(self, states: Sequence[torch.Tensor], finite: Sequence[bool]) -> list[Request]:
        """Every layer that can be probed, all labels at once; then the random vectors, if asked for."""
        if self.reason is not None:
            return []
        self.layers = [layer for layer, good in enumerate(finite) if good]
        asked = [Request(states[layer], self.prepared, self.sets, 2, self.seed) for layer in self.layers]
        if self.params.random_baseline:
            self._random, words = random_states(self.evaluation, self.words, states[0].shape[1], self.seed)
            ready = replace(self.prepared, words=words)
            asked.append(Request(self._random, ready, self.sets[: len(self.kept)], 2, self.seed, code=False))
        return asked

    def results(
        self, states: Sequence[torch.Tensor], fitted: Sequence[Fitted]
    ) -> tuple[list[Result], dict[tuple[str, int], Probe]]:
        """Numbers of all layers and of the task, and the probes by ("task=label", layer)."""
        results: list[Result] = []
        probes: dict[tuple[str, int], Probe] = {}
        by_layer = dict(zip(self.layers, fitted, strict=False))
        test = self.prepared.at(Part.TEST)
        groups, hits = self.words.group[test], []
        for layer in range(len(states)):
            where: dict[str, Any] = {"layer": layer, "component": "residual", "task": self.words.task}
            if layer not in by_layer:
                results.extend(self._nothing(self.reason or f"hidden states of layer {layer} are not finite", where))
                continue
            found = by_layer[layer]
            log_p, truth = self._decisions(states[layer][torch.from_numpy(self.words.where[test])], found)
            hits.append((log_p.argmax(2) == truth)[:, : len(self.kept)].mean(1))
            results.extend(self._layer(log_p, truth, found, where))
            probes |= {(name, layer): probe for name, probe in zip(self.names, found.probes, strict=False)}
        results.extend(depth(self.words.task, self.layers, hits, self._usual(), groups, self.reason))
        if self.params.random_baseline:
            results.append(self._baseline(fitted))
        return results, probes

    def _usual(self) -> NDArray[np.float64]:
        """Share of the labels of each test span that the more frequent answer of training spans gets right."""
        if self.reason is not None:
            return np.zeros(len(self.prepared.at(Part.TEST)))
        usual = self.holds[self.prepared.at(Part.TRAIN)].mean(0) > 0.5
        return np.asarray((self.holds[self.prepared.at(Part.TEST)] == usual).mean(1))

    def _decisions(self, states: torch.Tensor, found: Fitted) -> tuple[NDArray[np.float64], Codes]:
        """``log p [n, S, 2]`` of the test spans and the truth ``[n, S]`` of the label sets that were fitted."""
        log_p = np.stack([probe.log_probabilities(states).double().numpy() for probe in found.probes], axis=1)
        return log_p, np.stack(self.sets[: len(found.probes)], axis=1)[self.prepared.at(Part.TEST)]

    def _baseline(self, fitted: Sequence[Fitted]) -> Result:
        """Accuracy of the same probes on vectors that carry nothing but which word it is."""
        where: dict[str, Any] = {"component": "residual", "task": self.words.task}
        if self._random is None:
            return missing("random_accuracy", str(self.reason), **where)
        test = self.prepared.at(Part.TEST)
        log_p, truth = self._decisions(self._random[torch.from_numpy(test)], fitted[-1])
        hits = (log_p.argmax(2) == truth).mean(1)
        return measurement("random_accuracy", mean_by_cluster(hits, self.words.group[test]), len(test), **where)

    def _nothing(self, reason: str, where: dict[str, Any]) -> Iterator[Result]:
        for metric in _WHOLE + (CONTROL if self.params.control else ()) + no_code(self.params):
            yield missing(metric, reason, **where)
        for label in self.words.classes:
            for metric in _PER_LABEL:
                yield missing(metric, self.excluded.get(label, reason), label=label, **where)

    def _layer(
        self, log_p: NDArray[np.float64], truth: Codes, found: Fitted, where: dict[str, Any]
    ) -> Iterator[Result]:
        """A decision is one span and one label; totals are means over all decisions of the test spans."""
        test = self.prepared.at(Part.TEST)
        groups = self.words.group[test]
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
        yield measurement("majority_accuracy", mean_by_cluster(self._usual(), groups), n, **where)
        yield measurement("converged", Estimate(float(found.converged), None), n, **where)
        if self.params.control:
            control = correct[:, count:]
            yield measurement("control_accuracy", mean(control), n, **where)
            yield measurement("selectivity", mean(correct[:, real].astype(float) - control), n, **where)
        if found.bits is not None:
            training = self.words.group[self.prepared.at(Part.TRAIN)]
            sent = [found.bits[:count], found.bits[count:]]
            codes = [code_length(bits.sum(0), count, training) if len(bits) else None for bits in sent]
            yield from code_results(codes[0], codes[1], where)
        penalties = found.penalties
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
            free = None if penalties[k] is not None else NO_PENALTY
            held = len(self.prepared.at(Part.VALIDATION))
            yield measurement("penalty", Estimate(penalties[k], None), held, free, label=label, **where)
            counts = confusion_matrix(said[:, k].astype(np.int64), truth[:, k], 2)
            yield Array("confusion", tuple(counts.reshape(-1).astype(float).tolist()), label=label, **where)

"""A task whose words carry one label each: what is fitted for it, and the numbers that are reported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trace_offline.analyzers._measurements import measurement, missing
from trace_offline.analyzers._probe_data import TaskWords, prepare, word_types
from trace_offline.analyzers._probe_fit import Fitted, Request
from trace_offline.analyzers._probe_scores import LayerScores, layer_scores, requests_of
from trace_offline.analyzers._probe_summary import depth
from trace_offline.core.types import Array, Result
from trace_offline.estimators.classification import mean_by_cluster
from trace_offline.estimators.clustered import Estimate
from trace_offline.estimators.splits import Part

if TYPE_CHECKING:
    from trace_offline.analyzers.probe_weights import Probe
    from trace_offline.evaluation.evaluation_set import EvaluationSet

WHOLE = ("accuracy", "macro_f1", "nll", "confidence", "calibration_error", "majority_accuracy", "penalty", "converged")
CONTROL = ("control_accuracy", "selectivity")
CODE = ("codelength", "compression")
PER_CLASS = ("f1", "confidence", "support")
NO_PENALTY = "a probe with a hidden layer has no penalty"


def random_states(evaluation: EvaluationSet, words: TaskWords, width: int, seed: int) -> tuple[Tensor, TaskWords]:
    """One random Gaussian vector for each word type, ``[M, width]``, and the words that point into them."""
    types = word_types(evaluation, words.span)
    vectors = np.random.default_rng([seed, 4]).standard_normal((int(types.max()) + 1, width))
    return torch.from_numpy(vectors[types].astype(np.float32)), replace(words, where=np.arange(len(types)))


def code_results(code: Any, control: Any, where: dict[str, Any]) -> Iterator[Result]:
    """Code length and compression of the real labels, and code length of the control task; each may be None."""
    if code is not None:
        yield measurement("codelength", code.bits, code.n, **where)
        yield measurement("compression", code.compression, code.n, **where)
    if control is not None:
        yield measurement("control_codelength", control.bits, control.n, **where)


def no_code(params: Any) -> tuple[str, ...]:
    """Metrics of the online code that are asked for."""
    if not params.codelength:
        return ()
    return (*CODE, "control_codelength") if params.control else CODE


class SingleLabelTask:
    """One task of one repetition. ``params``: those of the analyzer ``probe``."""

    def __init__(self, words: TaskWords, evaluation: EvaluationSet, params: Any, seed: int) -> None:
        self.words, self.evaluation, self.params, self.seed = words, evaluation, params, seed
        self.ready = prepare(words, evaluation, params.min_class_count, params.control, seed)
        self.classes = {words.task: tuple(words.classes[code] for code in self.ready.kept)}
        self.layers: list[int] = []
        self._random: tuple[Tensor, Any] | None = None

    def requests(self, states: Sequence[Tensor], finite: Sequence[bool]) -> list[Request]:
        """Every layer that can be probed; then the random vectors, if asked for."""
        if self.ready.reason is not None:
            return []
        self.layers = [layer for layer, good in enumerate(finite) if good]
        asked = requests_of(states, self.layers, self.ready, self.seed)
        if self.params.random_baseline:
            vectors, words = random_states(self.evaluation, self.ready.words, states[0].shape[1], self.seed)
            ready = replace(self.ready, words=words, control=None)
            self._random = vectors, ready
            asked.append(Request(vectors, ready, [ready.label], len(ready.kept), self.seed, code=False))
        return asked

    def results(
        self, states: Sequence[Tensor], fitted: Sequence[Fitted]
    ) -> tuple[list[Result], dict[tuple[str, int], Probe]]:
        """Numbers of all layers and of the task, and the probes by (task, layer)."""
        ready = self.ready
        scores = {
            layer: layer_scores(layer, states[layer], ready, found)
            for layer, found in zip(self.layers, fitted, strict=False)
        }
        test = ready.at(Part.TEST)
        groups = ready.words.group[test]
        usual = np.zeros(len(test), dtype=np.bool_)
        if ready.reason is None:
            usual = ready.label[test] == np.bincount(ready.label[ready.at(Part.TRAIN)]).argmax()
        results: list[Result] = []
        for layer in range(len(states)):
            if layer in scores:
                results.extend(self._layer(scores[layer], mean_by_cluster(usual, groups)))
            else:
                results.extend(self._nothing(layer, ready.reason or f"hidden states of layer {layer} are not finite"))
        hits = [scores[layer].real.correct for layer in self.layers]
        results.extend(depth(self.words.task, self.layers, hits, usual, groups, ready.reason))
        if self.params.random_baseline:
            results.append(self._baseline(fitted))
        return results, {(self.words.task, layer): found.probe for layer, found in scores.items()}

    def _baseline(self, fitted: Sequence[Fitted]) -> Result:
        """Accuracy of the same probe on vectors that carry nothing but which word it is."""
        where: dict[str, Any] = {"component": "residual", "task": self.words.task}
        if self._random is None:
            return missing("random_accuracy", str(self.ready.reason), **where)
        vectors, ready = self._random
        found = layer_scores(0, vectors, ready, fitted[-1])
        return measurement("random_accuracy", found.real.accuracy, len(found.real.correct), **where)

    def _nothing(self, layer: int, reason: str) -> Iterator[Result]:
        where: dict[str, Any] = {"layer": layer, "component": "residual", "task": self.words.task}
        for metric in WHOLE + (CONTROL if self.params.control else ()) + no_code(self.params):
            yield missing(metric, reason, **where)
        for label in self.words.classes:
            for metric in PER_CLASS:
                yield missing(metric, self.ready.excluded.get(label, reason), label=label, **where)

    def _layer(self, found: LayerScores, majority: Estimate) -> Iterator[Result]:
        ready = self.ready
        where: dict[str, Any] = {"layer": found.layer, "component": "residual", "task": self.words.task}
        real = found.real
        n = len(real.correct)
        yield measurement("accuracy", real.accuracy, n, **where)
        yield measurement("macro_f1", real.macro_f1, n, **where)
        yield measurement("nll", real.nll, n, **where)
        yield measurement("confidence", real.confidence, n, **where)
        yield measurement("majority_accuracy", majority, n, **where)
        yield measurement("calibration_error", found.calibration, n, **where)
        unpenalised = None if found.penalty is not None else NO_PENALTY
        held = len(ready.at(Part.VALIDATION))
        yield measurement("penalty", Estimate(found.penalty, None), held, unpenalised, **where)
        yield measurement("converged", Estimate(float(found.converged), None), n, **where)
        if found.control is not None:
            yield measurement("control_accuracy", found.control.accuracy, n, **where)
            gain = real.correct.astype(np.float64) - found.control.correct
            paired = mean_by_cluster(gain, ready.words.group[ready.at(Part.TEST)])
            yield measurement("selectivity", paired, n, **where)
        yield from code_results(found.code, found.control_code, where)
        yield from self._classes(found, where)
        size = len(ready.words.classes)
        confusion = np.zeros((size, size))
        confusion[np.ix_(ready.kept, ready.kept)] = real.confusion
        yield Array("confusion", tuple(confusion.reshape(-1).tolist()), **where)

    def _classes(self, found: LayerScores, where: dict[str, Any]) -> Iterator[Result]:
        ready = self.ready
        place = {int(code): k for k, code in enumerate(ready.kept)}
        for code, label in enumerate(ready.words.classes):
            if label in ready.excluded:
                for metric in PER_CLASS:
                    yield missing(metric, ready.excluded[label], label=label, **where)
                continue
            k = place[code]
            n = found.real.support[k]
            reason = None if n else "no test word of this class"
            yield measurement("f1", found.real.class_f1[k], n, reason, label=label, **where)
            yield measurement("confidence", found.real.class_confidence[k], n, reason, label=label, **where)
            yield measurement("support", Estimate(float(n), None), n, label=label, **where)

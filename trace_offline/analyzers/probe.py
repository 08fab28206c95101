"""Linear probes: how well a linear classifier reads an annotation off the hidden states of each layer.

A multinomial logistic regression is fit anew at every checkpoint for each annotated task and layer 0…L. Words are split
by sentence (train 60 %, validation 20 %, test 20 %; or the evaluation set's own split, whose fitting part is divided
3 : 1); features are standardised with the statistics of the training words; the penalty is chosen by validation NLL;
the probe is refit at that penalty on training and validation words and scored on the test words, once.

Standard errors take sentences as the independent units (of a document with several sentences, the document). They
describe the finite test set, not the choice of training sentences or of the seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
from pydantic import Field

from trace_offline.activations.batch import Collector
from trace_offline.analyzers._measurements import measurement, missing
from trace_offline.analyzers._probe_data import Prepared, TaskWords, choose_words, chosen_tasks, prepare
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Array, Result
from trace_offline.estimators.classification import mean_by_cluster
from trace_offline.estimators.clustered import Estimate
from trace_offline.estimators.splits import Part

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.activations.hidden_table import Pooling
    from trace_offline.analyzers._probe_fit import LayerScores

_WHOLE = ("accuracy", "macro_f1", "nll", "confidence", "majority_accuracy", "penalty", "converged")
_CONTROL = ("control_accuracy", "selectivity")
_PER_CLASS = ("f1", "confidence", "support")


class ProbeAnalyzer(Analyzer):
    """A linear probe per annotated task and layer, refit at this checkpoint."""

    name = "probe"
    version = "2"
    summary = "linear probes per annotated task and layer, with control task, majority baseline and per-class scores"
    reference = (
        "Alain & Bengio 2016, Understanding intermediate layers using linear classifier probes, arXiv:1610.01644; "
        "Hewitt & Liang 2019, Designing and Interpreting Probes with Control Tasks, arXiv:1909.03368; "
        "Böhning 1992, Multinomial logistic regression algorithm, Ann. Inst. Statist. Math. 44 (the solver)"
    )
    needs = frozenset({Need.HIDDEN_STATES})
    metrics = (
        MetricSpec("accuracy", "1", "share of test words classified rightly"),
        MetricSpec("macro_f1", "1", "mean F1 over the classes that occur among the test words"),
        MetricSpec("nll", "nats", "mean negative log-probability of the right class of test words"),
        MetricSpec("confidence", "1", "mean probability of the right class; with a label: over words of that class"),
        MetricSpec("majority_accuracy", "1", "accuracy of always answering the most frequent class of training words"),
        MetricSpec("control_accuracy", "1", "accuracy on the control task: one random label for each word type"),
        MetricSpec("selectivity", "1", "accuracy − control_accuracy; standard error from the paired difference"),
        MetricSpec("penalty", "1", "λ chosen on validation words: mean NLL + (λ/2)‖W‖², standardised features"),
        MetricSpec("converged", "1", "1 when the solver reached its tolerance for the probes of this layer, else 0"),
        MetricSpec("f1", "1", "F1 of one class"),
        MetricSpec("support", "words", "test words of one class"),
    )

    class Params(BaseParams):
        """What to probe, on how many words, how regularised."""

        tasks: tuple[str, ...] = Field((), description="annotated tasks to probe; none named = all")
        alignment: Literal["auto", "last", "first", "mean"] = Field(
            "auto", description="sub-word that stands for a word; auto = as the evaluation set says"
        )
        max_words: int = Field(20_000, ge=50, le=1_000_000, description="words per task, sampled by whole sentences")
        min_class_count: int = Field(
            5, ge=1, le=10_000, description="classes with fewer training words are left out, with the reason"
        )
        penalties: tuple[Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)], ...] = Field(
            (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5), min_length=1, max_length=30, description="grid of λ to choose from"
        )
        control: bool = Field(True, description="also fit the control task (doubles the problems solved)")
        max_iterations: int = Field(500, ge=1, le=100_000, description="of the solver, per penalty")
        tolerance: float = Field(
            5e-4, gt=0, le=0.1, description="gradient norm, relative to the intercept-only model, at which a fit ends"
        )

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """One table of hidden states, shared by all tasks.

        Raises NotApplicable without blocks or annotations, UsageError for an unknown task.
        """
        if context.model.n_layers is None:
            raise NotApplicable(
                "not applicable because the blocks of this network are not known, so it has no hidden states to "
                "probe; name them with --blocks"
            )
        if not context.evaluation.tasks:
            raise NotApplicable("not applicable because the evaluation set has no annotated task")
        from trace_offline.activations.hidden_table import HiddenStateTable

        distinct, _ = self._words(context)
        alignment = context.params.alignment
        pooling = context.evaluation.alignment if alignment == "auto" else alignment
        return {"words": HiddenStateTable(distinct[:, 0], distinct[:, 1], distinct[:, 2], cast("Pooling", pooling))}

    def measure(self, context: Context) -> Iterator[Result]:
        """Every task, layer by layer; a task or layer that cannot be probed gives reasons and stops no other.

        The array ``confusion`` holds counts row by row (true class) over all classes of the task in sorted order, the
        order of the labels of metric ``f1``; classes that were left out have empty rows and columns.
        """
        table: Tensor = context.collected["words"]
        params: ProbeAnalyzer.Params = context.params
        finite = [bool(matrix.isfinite().all()) for matrix in table]
        for words in self._words(context)[1]:
            ready = prepare(words, context.evaluation, params.min_class_count, params.control, context.seed)
            yield from self._task(table, finite, ready, params)

    @staticmethod
    def _words(context: Context) -> tuple[np.ndarray, list[TaskWords]]:
        tasks = chosen_tasks(context.evaluation, context.params.tasks)
        return choose_words(context.evaluation, tasks, context.params.max_words, context.seed)

    def _task(self, table: Tensor, finite: list[bool], ready: Prepared, params: Params) -> Iterator[Result]:
        from trace_offline.analyzers._probe_fit import fit_layers

        usable = [layer for layer, good in enumerate(finite) if good] if ready.reason is None else []
        scores = fit_layers(table, usable, ready, params.penalties, params.tolerance, params.max_iterations)
        majority = self._majority(ready) if usable else Estimate(None, None)
        for layer in range(len(table)):
            if layer in usable:
                yield from self._layer(next(scores), ready, majority)
            else:
                reason = ready.reason or f"hidden states of layer {layer} are not finite"
                yield from self._nothing(layer, ready, params.control, reason)

    @staticmethod
    def _majority(ready: Prepared) -> Estimate:
        test = ready.at(Part.TEST)
        answer = np.bincount(ready.label[ready.at(Part.TRAIN)]).argmax()
        return mean_by_cluster(ready.label[test] == answer, ready.words.group[test])

    @staticmethod
    def _nothing(layer: int, ready: Prepared, control: bool, reason: str) -> Iterator[Result]:
        where: dict[str, Any] = {"layer": layer, "component": "residual", "task": ready.words.task}
        for metric in _WHOLE + (_CONTROL if control else ()):
            yield missing(metric, reason, **where)
        for label in ready.words.classes:
            for metric in _PER_CLASS:
                yield missing(metric, ready.excluded.get(label, reason), label=label, **where)

    def _layer(self, found: LayerScores, ready: Prepared, majority: Estimate) -> Iterator[Result]:
        where: dict[str, Any] = {"layer": found.layer, "component": "residual", "task": ready.words.task}
        real = found.real
        n = len(real.correct)
        yield measurement("accuracy", real.accuracy, n, **where)
        yield measurement("macro_f1", real.macro_f1, n, **where)
        yield measurement("nll", real.nll, n, **where)
        yield measurement("confidence", real.confidence, n, **where)
        yield measurement("majority_accuracy", majority, n, **where)
        yield measurement("penalty", Estimate(found.penalty, None), len(ready.at(Part.VALIDATION)), **where)
        yield measurement("converged", Estimate(float(found.converged), None), n, **where)
        if found.control is not None:
            yield measurement("control_accuracy", found.control.accuracy, n, **where)
            gain = real.correct.astype(np.float64) - found.control.correct
            paired = mean_by_cluster(gain, ready.words.group[ready.at(Part.TEST)])
            yield measurement("selectivity", paired, n, **where)
        yield from self._classes(found, ready, where)
        size = len(ready.words.classes)
        confusion = np.zeros((size, size))
        confusion[np.ix_(ready.kept, ready.kept)] = real.confusion
        yield Array("confusion", tuple(confusion.reshape(-1).tolist()), **where)

    @staticmethod
    def _classes(found: LayerScores, ready: Prepared, where: dict[str, Any]) -> Iterator[Result]:
        place = {int(code): k for k, code in enumerate(ready.kept)}
        for code, label in enumerate(ready.words.classes):
            if label in ready.excluded:
                for metric in _PER_CLASS:
                    yield missing(metric, ready.excluded[label], label=label, **where)
                continue
            k = place[code]
            n = found.real.support[k]
            reason = None if n else "no test word of this class"
            yield measurement("f1", found.real.class_f1[k], n, reason, label=label, **where)
            yield measurement("confidence", found.real.class_confidence[k], n, reason, label=label, **where)
            yield measurement("support", Estimate(float(n), None), n, label=label, **where)

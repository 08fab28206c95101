"""Probes: how well a small classifier reads an annotation off the hidden states of each layer.

A multinomial logistic regression (or, on demand, a classifier with one hidden layer) is fit anew at every checkpoint
for each annotated task and layer 0…L. Words are split by sentence (train 60 %, validation 20 %, test 20 %; or the
evaluation set's own split, whose fitting part is divided 3 : 1); features are standardised with the statistics of the
training words; the penalty is chosen by validation NLL; the probe is refit at that penalty on training and validation
words and scored on the test words, once.

Standard errors take sentences as the independent units (of a document with several sentences, the document). They
describe the finite test set; with several repetitions also the choice of training sentences and of the seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Literal, cast

import numpy as np
from pydantic import Field

from trace_offline.activations.batch import Collector
from trace_offline.analyzers._probe_data import TaskWords, choose_words, chosen_tasks, repeat_seed
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Artifact, Result

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.activations.hidden_table import Pooling
    from trace_offline.analyzers._probe_fit import FitOptions
    from trace_offline.analyzers._probe_multilabel import MultiLabelTask
    from trace_offline.analyzers._probe_task import SingleLabelTask
    from trace_offline.analyzers.probe_weights import Probe

BLOCK_FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)


class ProbeAnalyzer(Analyzer):
    """A probe per annotated task and layer, refit at this checkpoint."""

    name = "probe"
    version = "2"
    summary = "probes per annotated task and layer, with control task, baselines, code length and per-class scores"
    reference = (
        "Alain & Bengio 2016, Understanding intermediate layers using linear classifier probes, arXiv:1610.01644; "
        "Hewitt & Liang 2019, Designing and Interpreting Probes with Control Tasks, arXiv:1909.03368; "
        "Tenney, Das & Pavlick 2019, BERT Rediscovers the Classical NLP Pipeline, arXiv:1905.05950 (expected layer); "
        "Voita & Titov 2020, Information-Theoretic Probing with Minimum Description Length, arXiv:2003.12298; "
        "Böhning 1992, Multinomial logistic regression algorithm, Ann. Inst. Statist. Math. 44 (the solver)"
    )
    needs = frozenset({Need.HIDDEN_STATES})
    metrics = (
        MetricSpec("accuracy", "1", "share of test words classified rightly"),
        MetricSpec("macro_f1", "1", "mean F1 over the classes that occur among the test words"),
        MetricSpec("nll", "nats", "mean negative log-probability of the right class of test words"),
        MetricSpec("confidence", "1", "mean probability of the right class; with a label: over words of that class"),
        MetricSpec("calibration_error", "1", "expected calibration error of the probe; biased upwards for few words"),
        MetricSpec("majority_accuracy", "1", "accuracy of always answering the most frequent class of training words"),
        MetricSpec("control_accuracy", "1", "accuracy on the control task: one random label for each word type"),
        MetricSpec("selectivity", "1", "accuracy − control_accuracy; standard error from the paired difference"),
        MetricSpec("penalty", "1", "λ chosen on validation words: mean NLL + (λ/2)‖W‖², standardised features"),
        MetricSpec("converged", "1", "1 when the solver reached its tolerance for the probes of this layer, else 0"),
        MetricSpec("f1", "1", "F1 of one class"),
        MetricSpec("support", "words", "test words of one class"),
        MetricSpec(
            "expected_layer", "layers", "layer at which accuracy is gained over layer 0, on average; layer NULL"
        ),
        MetricSpec("centre_of_gravity", "layers", "mean layer, weighted by accuracy above the majority; layer NULL"),
        MetricSpec("random_accuracy", "1", "accuracy on one random Gaussian vector for each word type; layer NULL"),
        MetricSpec("codelength", "bits", "online code of the labels of all training words"),
        MetricSpec("compression", "1", "bits of the uniform code divided by codelength"),
        MetricSpec("control_codelength", "bits", "codelength of the control task"),
    )

    class Params(BaseParams):
        """What to probe, on how many words, with what."""

        tasks: tuple[str, ...] = Field((), description="annotated tasks to probe; none named = all")
        alignment: Literal["auto", "last", "first", "mean"] = Field(
            "auto", description="sub-word that stands for a word; auto = as the evaluation set says"
        )
        view: Literal["word", "sentence"] = Field(
            "word", description="what stands for a labelled span: its own tokens, or the mean of all tokens of its row"
        )
        split_by: Literal["sentence", "word_type"] = Field(
            "sentence",
            description="what is never on both sides of the split; word_type: no word is known from training",
        )
        repeats: int = Field(
            1,
            ge=1,
            le=100,
            description="repetitions with other splits, control labels and initial weights; means of all",
        )
        kind: Literal["linear", "mlp"] = Field("linear", description="logistic regression, or one hidden layer (ReLU)")
        hidden_width: int = Field(64, ge=1, le=8192, description="units of the hidden layer (mlp)")
        max_passes: int = Field(100, ge=1, le=10_000, description="passes over the training words at most (mlp)")
        patience: int = Field(5, ge=1, le=1000, description="passes without a better validation NLL that end it (mlp)")
        random_baseline: bool = Field(False, description="also probe random vectors that only tell word types apart")
        codelength: bool = Field(False, description="also measure the description length (doubles the cost)")
        block_fractions: tuple[Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)], ...] = Field(
            BLOCK_FRACTIONS, min_length=1, max_length=50, description="ends of the online code's blocks, as shares"
        )
        weights: bool = Field(False, description="keep the probes (of the first repetition) as an artifact")
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
        from trace_offline.activations.hidden_table import HiddenStateTable, SentenceMeans

        distinct, _ = self._words(context)
        if context.params.view == "sentence":
            return {"words": SentenceMeans(distinct[:, 0], context.evaluation.special_token_ids)}
        pooling = cast("Pooling", self._alignment(context))
        return {"words": HiddenStateTable(distinct[:, 0], distinct[:, 1], distinct[:, 2], pooling)}

    def measure(self, context: Context) -> Iterator[Result]:
        """Every task, layer by layer; a task or layer that cannot be probed gives reasons and stops no other.

        All layers, tasks, repetitions and label sets are fitted as one list of problems. The array ``confusion`` holds
        counts row by row (true class) over all classes of the task in sorted order, the order of the labels of metric
        ``f1``; classes that were left out have empty rows and columns. The artifact ``probes`` is read by
        ``trace_offline.load_probe``.
        """
        from trace_offline.analyzers import _probe_multilabel, _probe_task
        from trace_offline.analyzers._probe_fit import fit_requests
        from trace_offline.analyzers._probe_summary import combine

        table: Tensor = context.collected["words"]
        params: ProbeAnalyzer.Params = context.params
        states = list(table)
        finite = [bool(matrix.isfinite().all()) for matrix in states]
        tasks: list[tuple[int, SingleLabelTask | MultiLabelTask]] = []
        for repeat in range(params.repeats):
            seed = repeat_seed(context.seed, repeat)
            for words in self._words(context, seed)[1]:
                several = _probe_multilabel.is_multilabel(words)
                kind = _probe_multilabel.MultiLabelTask if several else _probe_task.SingleLabelTask
                tasks.append((repeat, kind(words, context.evaluation, params, seed)))
        asked = [task.requests(states, finite) for _, task in tasks]
        fitted = iter(fit_requests([request for requests in asked for request in requests], self._options(context)))
        by_task: dict[str, list[list[Result]]] = {}
        probes: dict[tuple[str, int], Probe] = {}
        classes: dict[str, tuple[str, ...]] = {}
        for (repeat, task), requests in zip(tasks, asked, strict=True):
            results, kept = task.results(states, [next(fitted) for _ in requests])
            by_task.setdefault(task.words.task, []).append(results)
            if repeat == 0:
                probes |= kept
                classes |= task.classes
        for repeats in by_task.values():
            yield from combine(repeats)
        if params.weights and probes:
            yield self._artifact(probes, classes, context)

    @staticmethod
    def _alignment(context: Context) -> str:
        chosen: str = context.params.alignment
        return context.evaluation.alignment if chosen == "auto" else chosen

    @staticmethod
    def _words(context: Context, split_seed: int | None = None) -> tuple[np.ndarray, list[TaskWords]]:
        params: ProbeAnalyzer.Params = context.params
        return choose_words(
            context.evaluation,
            chosen_tasks(context.evaluation, params.tasks),
            params.max_words,
            context.seed,
            split_by=params.split_by,
            view=params.view,
            split_seed=split_seed,
        )

    @staticmethod
    def _options(context: Context) -> FitOptions:
        from trace_offline.analyzers._probe_fit import FitOptions

        params: ProbeAnalyzer.Params = context.params
        device = str(context.model.device)
        return FitOptions(
            penalties=params.penalties,
            tolerance=params.tolerance,
            max_iterations=params.max_iterations,
            kind=params.kind,
            hidden_width=params.hidden_width,
            max_passes=params.max_passes,
            patience=params.patience,
            fractions=params.block_fractions if params.codelength else None,
            device=device if device.startswith("cuda") else "cpu",  # others lack float64 or its factorisations
        )

    @staticmethod
    def _artifact(
        probes: dict[tuple[str, int], Probe], classes: dict[str, tuple[str, ...]], context: Context
    ) -> Artifact:
        from trace_offline.analyzers.probe_weights import dump_probes

        params: ProbeAnalyzer.Params = context.params
        content = dump_probes(
            probes, classes, kind=params.kind, alignment=ProbeAnalyzer._alignment(context), view=params.view
        )
        return Artifact("probes", content, ".safetensors")

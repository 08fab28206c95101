"""Frozen probes: fitted at one checkpoint, applied to the hidden states of another.

A probe that is refit at every checkpoint asks what can be read; a frozen one asks whether it can still be read the same
way. The difference is how far the representation has moved, not what it knows. Scaling, weights and intercept all stay
as fitted. Fitting and splits are those of the analyzer ``probe`` at the same sample of words, so a probe frozen at a
checkpoint and applied to it has exactly the accuracy of the probe refit there.

``trace_confidence`` is the number that TRACE plots: the mean probability of a class over all words, whether or not they
belong to it, under the probe of the last checkpoint. It is here for comparison with published curves only. It rises
with the share of the class and with any drift towards it, and says nothing about whether words are told apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StringConstraints

from trace_offline.activations.batch import Collector
from trace_offline.analyzers._measurements import measurement, missing
from trace_offline.analyzers._probe_data import Prepared, TaskWords, choose_words, chosen_tasks, prepare
from trace_offline.analyzers.base import Context, Extract, MetricSpec, Need, SeriesAnalyzer, SeriesContext
from trace_offline.core.errors import NotApplicable, UsageError
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Array, Result
from trace_offline.estimators.classification import ClassificationScores, mean_by_cluster
from trace_offline.estimators.splits import Part

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.activations.hidden_table import Pooling
    from trace_offline.analyzers.probe_weights import Probe
    from trace_offline.evaluation.evaluation_set import EvaluationSet

_FROZEN = ("frozen_accuracy", "frozen_macro_f1", "frozen_confidence")
_EXTRACT = ("tasks", "alignment", "max_words", "layers")

Reference = Annotated[str, StringConstraints(pattern=r"^(first|last|\d+)$")]
Key = tuple[str, int]


@dataclass(frozen=True)
class _Fitted:
    """What was fitted at one checkpoint, by (task, index of layer)."""

    probes: Mapping[Key, Probe]
    scores: Mapping[Key, ClassificationScores]


class ProbeTransferAnalyzer(SeriesAnalyzer):
    """Probes of one checkpoint applied to all others."""

    name = "probe_transfer"
    version = "1"
    summary = "probes frozen at one checkpoint and applied to all, beside probes refit at each; transfer matrix"
    reference = (
        "Aljaafari, Carvalho & Freitas 2025, TRACE for Tracking the Emergence of Semantic Representations in "
        "Transformers, arXiv:2507.03668 (frozen probes); Alain & Bengio 2016, arXiv:1610.01644 (linear probes)"
    )
    needs = frozenset({Need.HIDDEN_STATES})
    on_host = True
    metrics = (
        MetricSpec("refit_accuracy", "1", "accuracy of the probe fitted at this checkpoint, on its own test words"),
        MetricSpec(
            "gain_over_first",
            "1",
            "refit_accuracy here − at the first checkpoint; standard error from the paired difference",
        ),
        MetricSpec("frozen_accuracy", "1", "accuracy here of the probe fitted at the checkpoint that the label names"),
        MetricSpec("frozen_macro_f1", "1", "macro F1 here of the probe fitted at the checkpoint that the label names"),
        MetricSpec("frozen_confidence", "1", "mean probability that this probe gives to the right class"),
        MetricSpec(
            "trace_confidence",
            "1",
            "mean probability of one class over all words, right or not, by the last checkpoint's probe; misleading",
        ),
    )

    class Params(BaseParams):
        """What to probe, where to freeze."""

        references: tuple[Reference, ...] = Field(
            ("first", "last"),
            min_length=1,
            max_length=20,
            description="checkpoints to freeze at: first, last or a step",
        )
        matrix: bool = Field(True, description="also score every checkpoint's probe at every other (array)")
        tasks: tuple[str, ...] = Field((), description="annotated tasks to probe; none named = all")
        layers: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="layers to probe; none named = all")
        alignment: Literal["auto", "last", "first", "mean"] = Field(
            "auto", description="sub-word that stands for a word; auto = as the evaluation set says"
        )
        max_words: int = Field(
            2000,
            ge=50,
            le=1_000_000,
            description="words per task, sampled by whole sentences; kept for each checkpoint",
        )
        min_class_count: int = Field(
            5, ge=1, le=10_000, description="classes with fewer training words are left out of the task"
        )
        penalties: tuple[Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)], ...] = Field(
            (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5), min_length=1, max_length=30, description="grid of λ to choose from"
        )
        max_iterations: int = Field(500, ge=1, le=100_000, description="of the solver, per penalty")
        tolerance: float = Field(
            5e-4, gt=0, le=0.1, description="gradient norm, relative to the intercept-only model, at which a fit ends"
        )

    def extract_params(self, params: Any) -> Mapping[str, Any]:
        """Only what decides which hidden states are kept."""
        return {name: value for name, value in params.model_dump(mode="json").items() if name in _EXTRACT}

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """One table of hidden states. Raises NotApplicable without blocks or annotations, UsageError for an unknown
        task or layer.
        """
        depth = context.model.n_layers
        if depth is None:
            raise NotApplicable(
                "not applicable because the blocks of this network are not known, so it has no hidden states to "
                "probe; name them with --blocks"
            )
        if not context.evaluation.tasks:
            raise NotApplicable("not applicable because the evaluation set has no annotated task")
        beyond = [layer for layer in context.params.layers if layer > depth]
        if beyond:
            raise UsageError(f"probe_transfer.layers: expected 0 to {depth} for this network, found {beyond[0]}.")
        from trace_offline.activations.hidden_table import HiddenStateTable

        distinct, _ = _words(context.evaluation, context.params, context.seed)
        chosen = context.params.alignment
        pooling = cast("Pooling", context.evaluation.alignment if chosen == "auto" else chosen)
        return {"words": HiddenStateTable(distinct[:, 0], distinct[:, 1], distinct[:, 2], pooling)}

    def extract(self, context: Context) -> Mapping[str, Tensor]:
        """``hidden``: float32 ``[layers, words, D]``, so that a probe frozen here is the probe refit here, exactly."""
        import torch

        table: Tensor = context.collected["words"]
        layers = context.params.layers or range(len(table))
        return {"hidden": table[list(layers)].contiguous(), "layers": torch.tensor(list(layers))}

    def compare(self, series: SeriesContext) -> Iterator[tuple[int, Result]]:
        """Per checkpoint, task and layer the refit and the frozen scores.

        The array ``transfer_accuracy`` belongs to the last checkpoint: row = fitted at, column = scored at, both in the
        order of the series, row by row. It is left out for a layer that is not finite at some checkpoint.
        """
        prepared = [
            # with a control task, as the analyzer probe fits it: the same products make the same numbers
            prepare(words, series.evaluation, series.params.min_class_count, True, series.seed)
            for words in _words(series.evaluation, series.params, series.seed)[1]
        ]
        references = {name: _position(name, series.extracts) for name in series.params.references}
        fitted = [_fit(extract, prepared, series) for extract in series.extracts]
        layers: list[int] = series.extracts[0].load("layers").tolist()
        count = len(fitted)
        matrices: dict[Key, NDArray[np.float64]] = {}
        for position, extract in enumerate(series.extracts):
            table = extract.load("hidden")
            for ready in prepared:
                for index, layer in enumerate(layers):
                    key = (ready.words.task, index)
                    where: dict[str, Any] = {"layer": layer, "component": "residual", "task": ready.words.task}
                    for result in _at(position, key, table, ready, fitted, references, where):
                        yield position, result
                    if series.params.matrix and key in fitted[position].probes:
                        column = matrices.setdefault(key, np.full((count, count), np.nan))[:, position]
                        _column(column, key, table, ready, fitted)
        for (task, index), matrix in matrices.items():
            if np.isfinite(matrix).all():
                values = tuple(matrix.reshape(-1).tolist())
                yield count - 1, Array("transfer_accuracy", values, layers[index], "residual", task)


def _words(evaluation: EvaluationSet, params: Any, seed: int) -> tuple[NDArray[np.int64], list[TaskWords]]:
    return choose_words(evaluation, chosen_tasks(evaluation, params.tasks), params.max_words, seed)


def _position(reference: str, extracts: Sequence[Extract]) -> int:
    """Place of a reference in the series. Raises UsageError for a step that no checkpoint has."""
    if reference in ("first", "last"):
        return 0 if reference == "first" else len(extracts) - 1
    for extract in extracts:
        if extract.step == int(reference):
            return extract.position
    known = ", ".join(str(extract.step) for extract in extracts[:8]) + (", …" if len(extracts) > 8 else "")
    raise UsageError(
        f"probe_transfer.references: no checkpoint of this series has step {reference}; its steps: {known}."
    )


def _fit(extract: Extract, prepared: Sequence[Prepared], series: SeriesContext) -> _Fitted:
    from trace_offline.analyzers._probe_fit import FitOptions
    from trace_offline.analyzers._probe_scores import fit_tasks

    params = series.params
    options = FitOptions(params.penalties, params.tolerance, params.max_iterations, seed=series.seed)
    states = list(extract.load("hidden"))
    finite = [index for index, matrix in enumerate(states) if bool(matrix.isfinite().all())]
    usable = [ready for ready in prepared if ready.reason is None]
    probes: dict[Key, Probe] = {}
    scores: dict[Key, ClassificationScores] = {}
    for ready, layers in zip(usable, fit_tasks(states, finite, usable, options), strict=True):
        for found in layers:
            probes[ready.words.task, found.layer] = found.probe
            scores[ready.words.task, found.layer] = found.real
    return _Fitted(probes, scores)


def _test_states(table: Tensor, index: int, ready: Prepared) -> Tensor:
    return table[index][ready.words.where[ready.at(Part.TEST)]]


def _column(column: NDArray[np.float64], key: Key, table: Tensor, ready: Prepared, fitted: Sequence[_Fitted]) -> None:
    """Accuracy here of the probe of every checkpoint."""
    states, truth = _test_states(table, key[1], ready), ready.label[ready.at(Part.TEST)]
    for row, source in enumerate(fitted):
        if key in source.probes:
            predicted = source.probes[key].log_probabilities(states).argmax(1).numpy()
            column[row] = float((predicted == truth).mean())


def _at(
    position: int,
    key: Key,
    table: Tensor,
    ready: Prepared,
    fitted: Sequence[_Fitted],
    references: Mapping[str, int],
    where: dict[str, Any],
) -> Iterator[Result]:
    """The numbers of one checkpoint, task and layer."""
    from trace_offline.estimators.classification import score

    test = ready.at(Part.TEST)
    groups, n = ready.words.group[test], len(test)
    names = [ready.words.classes[code] for code in ready.kept]
    here = ready.reason or (
        None if key in fitted[position].probes else f"hidden states of layer {where['layer']} are not finite"
    )
    if here is None:
        yield measurement("refit_accuracy", fitted[position].scores[key].accuracy, n, **where)
    else:
        yield missing("refit_accuracy", here, **where)
    if here is None and key in fitted[0].scores:
        # the same words are tested at every checkpoint, so what their sentences share cancels
        gained = fitted[position].scores[key].correct.astype(np.float64) - fitted[0].scores[key].correct
        yield measurement("gain_over_first", mean_by_cluster(gained, groups), n, **where)
    else:
        yield missing("gain_over_first", here or "there is no probe of this layer at the first checkpoint", **where)
    states = None if here else _test_states(table, key[1], ready)
    for name, source in references.items():
        lost = here or (
            None if key in fitted[source].probes else f"there is no probe of this layer at the {name} checkpoint"
        )
        if lost is not None or states is None:
            for metric in _FROZEN:
                yield missing(metric, str(lost), label=name, **where)
            continue
        log_p = fitted[source].probes[key].log_probabilities(states).numpy()
        found = score(log_p, ready.label[test], groups)
        for metric, estimate in zip(_FROZEN, (found.accuracy, found.macro_f1, found.confidence), strict=True):
            yield measurement(metric, estimate, n, label=name, **where)
    final = fitted[-1].probes.get(key)
    if final is None or states is None:
        for label in names:
            yield missing(
                "trace_confidence",
                here or "there is no probe of this layer at the last checkpoint",
                label=label,
                **where,
            )
        return
    probabilities = final.log_probabilities(states).double().exp().numpy()
    for k, label in enumerate(names):
        yield measurement("trace_confidence", mean_by_cluster(probabilities[:, k], groups), n, label=label, **where)

"""Text the network has been trained on against text it has not, within one evaluation set.

Three comparisons. Whole rows: those that are among the training texts against the others. Single predictions: n-grams
that occur in training against n-grams that do not, though their first n − 1 tokens do, so that both sides continue a
known context. And by the length of the longest context before the prediction that occurs in training.

Known text is also *easier* text: what occurs twice is short and made of frequent words. A trigram model of the training
text cannot hold whole sentences by heart, so its gap between the same two sides says how much of the network's is due
to that; the gap beyond it is what calls for longer memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trace_offline.activations.batch import Collector, ForwardBatch
from trace_offline.analyzers._measurements import chunks, measurement, missing, not_finite
from trace_offline.analyzers._training_text import contexts_at, models_of, places_of, training_text_of
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Result
from trace_offline.estimators.clustered import Codes, Floats, cluster_codes, cluster_sums, combined_ratios, ratio
from trace_offline.estimators.ngram import WittenBell
from trace_offline.evaluation.training_text import TrainingText

Flags = NDArray[np.bool_]

_NLL, _CORRECT, _NGRAM = range(3)
_SIDES = ("seen", "novel")
_METRICS = (("loss", _NLL), ("accuracy", _CORRECT), ("ngram_loss", _NGRAM))


@dataclass(frozen=True)
class Predictions:
    """Every prediction that has a target, in the order of the pass: row and position of the token predicted, and
    ``values [n, 3]``: NLL, correct, NLL under the trigram model.
    """

    row: Codes
    position: Codes
    values: Floats


class PredictionCollector:
    """Keeps five numbers of every prediction."""

    needs_hidden = False
    needs_logits = True

    def __init__(self, training: TrainingText) -> None:
        self._training = training
        self._parts: list[Predictions] = []
        self._ngrams: WittenBell | None = None

    def update(self, batch: ForwardBatch) -> None:
        """Add the predictions of this batch that have a target."""
        places = places_of(batch)
        if not len(places.b):
            return
        log_p = batch.log_probabilities
        classes = log_p.shape[-1]
        if self._ngrams is None:
            self._ngrams = models_of(self._training, classes)
        for part in chunks(len(places.b), classes):
            rows, target = log_p[places.b[part], places.t[part]], places.target[part]
            nll = -rows.gather(1, target[:, None])[:, 0].double().cpu().numpy()
            correct = (rows.argmax(-1) == target).cpu().numpy()
            ngram = self._ngrams.probability(contexts_at(self._training, places, part), target.cpu().numpy())[-1]
            values = np.stack([nll, correct, -np.log(ngram)], axis=1)
            self._parts.append(Predictions(places.row[part], places.position[part], values))

    def finish(self) -> Predictions:
        """All predictions."""
        if not self._parts:
            return Predictions(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3)))
        return Predictions(
            np.concatenate([part.row for part in self._parts]),
            np.concatenate([part.position for part in self._parts]),
            np.concatenate([part.values for part in self._parts]),
        )


class MemorizationAnalyzer(Analyzer):
    """Known text against new text."""

    name = "memorization"
    version = "1"
    summary = "loss and accuracy on rows and n-grams that occur in the training text against those that do not"
    reference = (
        "Carlini et al. 2019, The Secret Sharer, arXiv:1802.08232 (known against new text); Cochran 1977, Sampling "
        "Techniques, 6.3 (standard errors over sequences)"
    )
    needs = frozenset({Need.LOGITS, Need.LABELS})
    on_host = True
    metrics = (
        MetricSpec("loss", "nats", "mean negative log-probability of the target, this side only"),
        MetricSpec("accuracy", "1", "share of targets that are the most likely token, this side only"),
        MetricSpec("ngram_loss", "nats", "the same loss under the trigram model of the training text"),
        MetricSpec("loss_gap", "nats", "loss of the novel side − loss of the seen side"),
        MetricSpec("accuracy_gap", "1", "accuracy of the seen side − accuracy of the novel side"),
        MetricSpec("ngram_loss_gap", "nats", "loss_gap of the trigram model: how much easier the seen side is"),
        MetricSpec("excess_loss_gap", "nats", "loss_gap − ngram_loss_gap"),
        MetricSpec("share_seen", "1", "share of the predictions that lie on the seen side"),
    )

    class Params(BaseParams):
        """How long an n-gram is, and how far contexts are told apart."""

        ngram: int = Field(5, ge=2, description="tokens of the n-grams that are called seen or novel, the target last")
        max_context: int = Field(6, ge=1, description="contexts of this many known tokens or more are taken together")

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """One listener to the logits. Raises NotApplicable for a set that knows no training text."""
        return {"predictions": PredictionCollector(training_text_of(context.evaluation))}

    def measure(self, context: Context) -> Iterator[Result]:
        """Tasks ``text`` and ``ngram`` (labels seen, novel; gaps without a label), ``context`` (label: its length)."""
        found: Predictions = context.collected["predictions"]
        training, params = context.evaluation.training_text(), context.params
        clusters = cluster_codes(context.evaluation.group)[found.row]
        seen = training.seen[found.row]
        yield from _sides(found.values, clusters, seen, np.ones(len(seen), bool), "text")
        whole = training.matched[found.row, found.position]
        before = training.matched[found.row, found.position - 1]
        yield from _sides(found.values, clusters, whole >= params.ngram, before >= params.ngram - 1, "ngram")
        length = np.minimum(before, params.max_context)
        for k in range(params.max_context + 1):
            label = str(k) if k < params.max_context else f"{k}+"
            yield from _one_side(found.values, clusters, length == k, {"task": "context", "label": label})


def _sides(values: Floats, clusters: Codes, seen: Flags, asked: Flags, task: str) -> Iterator[Result]:
    for side, chosen in zip(_SIDES, (seen & asked, ~seen & asked), strict=True):
        yield from _one_side(values, clusters, chosen, {"task": task, "label": side})
    yield from _gaps(values, clusters, np.stack([seen & asked, ~seen & asked], axis=1), task)


def _one_side(values: Floats, clusters: Codes, chosen: Flags, where: dict[str, str]) -> Iterator[Result]:
    n = int(chosen.sum())
    for metric, slot in _METRICS:
        reason = _reason(values[chosen], slot, n)
        if reason is not None:
            yield missing(metric, reason, n, **where)
            continue
        sums = _by_cluster(values[chosen][:, slot], clusters[chosen])
        yield measurement(metric, ratio(sums[:, 0], sums[:, 1]), n, **where)


def _gaps(values: Floats, clusters: Codes, sides: Flags, task: str) -> Iterator[Result]:
    asked = sides.any(1)
    n = int(asked.sum())
    for metric, slot, weights in (
        ("loss_gap", _NLL, (-1.0, 1.0)),
        ("accuracy_gap", _CORRECT, (1.0, -1.0)),
        ("ngram_loss_gap", _NGRAM, (-1.0, 1.0)),
        ("excess_loss_gap", None, (-1.0, 1.0)),
    ):
        empty = [side for side, chosen in zip(_SIDES, sides.T, strict=True) if not chosen.any()]
        reason = f"no prediction is {' or '.join(empty)}" if empty else None
        reason = reason or _reason(values[asked], _NLL if slot is None else slot, n)
        if reason is not None:
            yield missing(metric, reason, n, task=task)
            continue
        column = values[:, _NLL] - values[:, _NGRAM] if slot is None else values[:, slot]
        tables = [_by_cluster(np.where(chosen, column, 0.0), clusters, chosen) for chosen in sides.T]
        numerators, denominators = (np.stack([table[:, i] for table in tables], axis=1) for i in (0, 1))
        yield measurement(metric, combined_ratios(numerators, denominators, np.asarray(weights)), n, task=task)
    if n:
        table = _by_cluster(sides[:, 0][asked].astype(np.float64), clusters[asked])
        yield measurement("share_seen", ratio(table[:, 0], table[:, 1]), n, task=task)
    else:
        yield missing("share_seen", "no prediction follows a known context of this length", 0, task=task)


def _by_cluster(values: Floats, clusters: Codes, counted: Flags | None = None) -> Floats:
    """Sums of the values and their number, ``[G, 2]``."""
    count = np.ones(len(values)) if counted is None else counted.astype(np.float64)
    return cluster_sums(np.stack([values, count], axis=1), clusters, int(clusters.max(initial=0)) + 1)


def _reason(values: Floats, slot: int, n: int) -> str | None:
    """Why a mean over these predictions has no value."""
    if n == 0:
        return "there is no such prediction in the evaluation set"
    if slot == _NGRAM:
        return None
    broken, infinite = not_finite(int(np.isnan(values[:, _NLL]).sum()), int(np.isinf(values[:, _NLL]).sum()), n)
    return infinite if slot == _NLL else broken

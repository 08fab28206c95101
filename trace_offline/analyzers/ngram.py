"""The network against n-gram models of its training text, at the same places.

How far a network has come is told by the simplest model it still resembles: early in training its predictions approach
the unigram distribution of the training text, then the bigram distribution, then leave both behind. Divergences are
exact sums over the vocabulary, not estimates from samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from trace_offline.activations.batch import Collector, ForwardBatch
from trace_offline.analyzers._measurements import chunks, measurement, missing, not_finite
from trace_offline.analyzers._training_text import contexts_at, models_of, places_of, training_text_of
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Result
from trace_offline.estimators.clustered import Codes, Floats, cluster_codes, cluster_sums, ratio
from trace_offline.estimators.ngram import WittenBell
from trace_offline.evaluation.training_text import TrainingText

_LOSS, _CORRECT, _DIVERGENCE, _SAME = range(4)


@dataclass(frozen=True)
class NgramSums:
    """Sums per cluster. ``model [G, 3]``: places, NLL, correct. ``orders [G, order, 4]``: NLL and correct of the n-gram
    model, KL(n-gram ‖ network), same most likely token. ``undefined``: predictions whose logits are NaN; ``infinite``:
    targets of probability 0; ``unbounded``: places where some token has probability 0.
    """

    model: Floats
    orders: Floats
    undefined: int
    infinite: int
    unbounded: int


class NgramCollector:
    """Reads every prediction beside those of the n-gram models."""

    needs_hidden = False
    needs_logits = True

    def __init__(self, training: TrainingText, groups: Codes) -> None:
        self._training = training
        self._clusters = cluster_codes(groups)
        n = int(self._clusters.max()) + 1
        self._model: Floats = np.zeros((n, 3))
        self._orders: Floats = np.zeros((n, len(training.levels), 4))
        self._undefined = self._infinite = self._unbounded = 0
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
            contexts = contexts_at(self._training, places, part)
            rows, target = log_p[places.b[part], places.t[part]], places.target[part]
            nll = -rows.gather(1, target[:, None])[:, 0].double().cpu().numpy()
            top = rows.argmax(-1).cpu().numpy()
            tokens = target.cpu().numpy()
            expected = self._ngrams.expectation(contexts, rows).cpu().numpy()
            self._undefined += int(rows[:, 0].isnan().sum())
            self._infinite += int(np.isinf(nll).sum())
            self._unbounded += int(np.isneginf(expected[-1]).sum())
            best = self._ngrams.most_likely(contexts)
            columns = np.stack(
                [
                    -np.log(self._ngrams.probability(contexts, tokens)),
                    best == tokens,
                    -self._ngrams.entropy(contexts) - expected,
                    best == top,
                ],
                axis=-1,
            )
            clusters, n = self._clusters[places.row[part]], len(self._model)
            own = np.stack([np.ones(len(nll)), nll, (top == tokens).astype(np.float64)], axis=1)
            self._model += cluster_sums(own, clusters, n)
            flat = columns.transpose(1, 0, 2).reshape(len(nll), -1)
            self._orders += cluster_sums(flat, clusters, n).reshape(self._orders.shape)

    def finish(self) -> NgramSums:
        """The sums over everything seen."""
        return NgramSums(self._model, self._orders, self._undefined, self._infinite, self._unbounded)


class NgramAnalyzer(Analyzer):
    """The network against n-gram models of its training text."""

    name = "ngram"
    version = "1"
    summary = "loss, divergence and agreement against unigram, bigram and trigram models of the training text"
    reference = (
        "Belrose et al. 2024, Neural Networks Learn Statistics of Increasing Complexity, arXiv:2402.04362 (divergence "
        "from n-gram models); Witten & Bell 1991, IEEE Trans. Inf. Theory 37(4) (interpolation)"
    )
    needs = frozenset({Need.LOGITS, Need.LABELS})
    on_host = True
    metrics = (
        MetricSpec("loss", "nats", "mean negative log-probability of the target under the network"),
        MetricSpec("accuracy", "1", "share of targets that are the network's most likely token"),
        MetricSpec("ngram_loss", "nats", "mean negative log-probability of the target under the n-gram model"),
        MetricSpec("ngram_accuracy", "1", "share of targets that are the n-gram model's most likely token"),
        MetricSpec("loss_difference", "nats", "loss − ngram_loss on the same places; negative: the network is better"),
        MetricSpec("divergence", "nats", "mean KL(n-gram ‖ network) over the whole vocabulary"),
        MetricSpec("same_prediction", "1", "share of places where network and n-gram model have one most likely token"),
    )

    class Params(BaseParams):
        """No parameters."""

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """One listener to the logits. Raises NotApplicable for a set that knows no training text."""
        training = training_text_of(context.evaluation)
        return {"ngrams": NgramCollector(training, context.evaluation.group)}

    def measure(self, context: Context) -> Iterator[Result]:
        """The network (label None), then each order by its n. Raises NotApplicable when there is no target."""
        found: NgramSums = context.collected["ngrams"]
        count = found.model[:, 0]
        n = int(count.sum())
        if n == 0:
            raise NotApplicable("not applicable because no position of the evaluation set has a target to predict")
        broken, infinite = not_finite(found.undefined, found.infinite, n)
        unbounded = broken
        if broken is None and found.unbounded:
            unbounded = f"at {found.unbounded} of {n} places some token has probability 0: the divergence is infinite"

        def number(metric: str, sums: Floats, reason: str | None, label: str | None = None) -> Result:
            if reason is not None:
                return missing(metric, reason, n, label=label)
            return measurement(metric, ratio(sums, count), n, label=label)

        yield number("loss", found.model[:, 1], infinite)
        yield number("accuracy", found.model[:, 2], broken)
        for k in range(found.orders.shape[1]):
            sums, label = found.orders[:, k], str(k + 1)
            yield number("ngram_loss", sums[:, _LOSS], None, label)
            yield number("ngram_accuracy", sums[:, _CORRECT], None, label)
            yield number("loss_difference", found.model[:, 1] - sums[:, _LOSS], infinite, label)
            yield number("divergence", sums[:, _DIVERGENCE], unbounded, label)
            yield number("same_prediction", sums[:, _SAME], broken, label)

"""Loss, perplexity, accuracy, entropy and calibration of the predictions, over all targets of the evaluation set.

Means are over targets (tokens), pooled: Σ over all targets / number of targets, not a mean of sequence means. Standard
errors take sequences as the independent units (rows of one document count as one).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trace_offline.activations.batch import IGNORED, Collector, ForwardBatch
from trace_offline.analyzers._measurements import check_targets, chunks, measurement, missing, not_finite
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Result
from trace_offline.estimators.calibration import BINS, CalibrationBins
from trace_offline.estimators.clustered import JACKKNIFE_GROUPS, Codes, Estimate, Floats, cluster_codes, ratio

if TYPE_CHECKING:
    from torch import Tensor

_COUNT, _NLL, _CORRECT, _ENTROPY = range(4)


@dataclass(frozen=True)
class PredictionSums:
    """Sums over the targets of each cluster ``[G, 4]`` (count, NLL, correct, entropy), and the calibration bins.

    ``undefined``: predictions whose logits are NaN; ``infinite``: targets of probability 0.
    """

    sums: Floats
    calibration: CalibrationBins
    undefined: int
    infinite: int

    @property
    def n(self) -> int:
        """Number of targets."""
        return int(self.sums[:, _COUNT].sum())


class PredictionCollector:
    """Reads the logits of every batch and keeps sums only."""

    needs_hidden = False
    needs_logits = True

    def __init__(self, groups: Codes, n_bins: int = BINS) -> None:
        self._clusters = cluster_codes(groups)
        self._coarse = cluster_codes(groups, JACKKNIFE_GROUPS)
        self._sums: Floats = np.zeros((int(self._clusters.max()) + 1, 4))
        self._calibration = CalibrationBins(int(self._coarse.max()) + 1, n_bins)
        self._undefined = self._infinite = 0

    def update(self, batch: ForwardBatch) -> None:
        """Add the predictions of this batch that have a target."""
        b, t = (batch.targets != IGNORED).nonzero(as_tuple=True)
        if not len(b):
            return
        log_p = batch.log_probabilities
        classes = log_p.shape[-1]
        targets = batch.targets[b, t]
        check_targets(targets, classes)
        examples = batch.examples[b].cpu().numpy()
        for part in chunks(len(b), classes):
            self._add(log_p[b[part], t[part]], targets[part], examples[part])

    def _add(self, log_p: Tensor, targets: Tensor, examples: Codes) -> None:
        top, predicted = log_p.max(-1)
        nll = -log_p.gather(1, targets[:, None])[:, 0]
        self._undefined += int(top.isnan().sum())
        self._infinite += int(nll.isinf().sum())
        correct = (predicted == targets).cpu().numpy()
        # exp(−∞) is exactly 0, and 0 · (−∞) is not: the floor makes p log p of an impossible class 0
        entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)
        clusters = self._clusters[examples]
        columns = (np.ones(len(examples)), nll.double().cpu().numpy(), correct, entropy.double().cpu().numpy())
        for slot, values in enumerate(columns):
            self._sums[:, slot] += np.bincount(clusters, weights=values, minlength=len(self._sums))
        if not self._undefined:
            self._calibration.add(top.double().exp().cpu().numpy(), correct, self._coarse[examples])

    def finish(self) -> PredictionSums:
        """The sums over everything seen."""
        return PredictionSums(self._sums, self._calibration, self._undefined, self._infinite)


class LossAnalyzer(Analyzer):
    """How well the network predicts the evaluation set."""

    name = "loss"
    version = "1"
    summary = "loss, perplexity, accuracy, entropy and calibration of the predictions"
    reference = (
        "Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv:1706.04599 (calibration error, 15 equal "
        "bins); Cochran 1977, Sampling Techniques, 6.3 (standard error of a ratio over sequences)"
    )
    needs = frozenset({Need.LOGITS, Need.LABELS})
    on_host = True
    metrics = (
        MetricSpec("loss", "nats", "mean negative log-probability of the target, per target token"),
        MetricSpec("perplexity", "1", "exp(loss); its standard error by the delta method"),
        MetricSpec("accuracy", "1", "share of targets that are the most likely class"),
        MetricSpec("entropy", "nats", "mean entropy of the predicted distribution"),
        MetricSpec(
            "calibration_error",
            "1",
            "expected calibration error of the most likely class; biased upwards for few targets",
        ),
    )

    class Params(BaseParams):
        """No parameters."""

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """One listener to the logits."""
        return {"predictions": PredictionCollector(context.evaluation.group)}

    def measure(self, context: Context) -> Iterator[Result]:
        """Five numbers for the whole network; None with the reason where logits are not finite.

        Raises NotApplicable when the evaluation set has no target.
        """
        found: PredictionSums = context.collected["predictions"]
        n = found.n
        if n == 0:
            raise NotApplicable("not applicable because no position of the evaluation set has a target to predict")
        broken, unbounded = not_finite(found.undefined, found.infinite, n)
        count = found.sums[:, _COUNT]
        if unbounded is None:
            loss = ratio(found.sums[:, _NLL], count)
            yield measurement("loss", loss, n)
            yield self._perplexity(loss, n)
        else:
            yield missing("loss", unbounded, n)
            yield missing("perplexity", unbounded, n)
        for metric, slot in (("accuracy", _CORRECT), ("entropy", _ENTROPY)):
            if broken is None:
                yield measurement(metric, ratio(found.sums[:, slot], count), n)
            else:
                yield missing(metric, broken, n)
        yield measurement("calibration_error", found.calibration.error(), n, broken)

    @staticmethod
    def _perplexity(loss: Estimate, n: int) -> Result:
        if loss.value is None or loss.value > 700.0:
            return missing("perplexity", f"exp({loss.value}) is larger than a number can be", n)
        value = math.exp(loss.value)
        return measurement("perplexity", Estimate(value, None if loss.stderr is None else value * loss.stderr), n)

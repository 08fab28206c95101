"""Do predictions repeat what stands before them, more than the text itself does?

A network that has learned little else still learns that words recur, and one that degenerates repeats itself. Read from
the predictions of the shared pass, without sampling: the most likely token, and the probability of all tokens of the
context together, against how often the text repeats a token of its context.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from trace_offline.activations.batch import IGNORED, Collector, ForwardBatch
from trace_offline.analyzers._measurements import check_targets, chunks, measurement, missing, not_finite
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Result
from trace_offline.estimators.clustered import Codes, Floats, cluster_codes, cluster_sums, ratio

if TYPE_CHECKING:
    from torch import Tensor

_COUNT, _PREDICTED, _WRONG, _MASS, _TEXT = range(5)


@dataclass(frozen=True)
class RepetitionSums:
    """Sums per cluster ``[G, 5]``: places, prediction is in the context, is there and wrong, probability on tokens of
    the context, target is in the context. ``undefined``: predictions whose logits are NaN.
    """

    sums: Floats
    undefined: int


class RepetitionCollector:
    """Reads every prediction together with the tokens before it."""

    needs_hidden = False
    needs_logits = True

    def __init__(self, groups: Codes, special: tuple[int, ...], window: int) -> None:
        self._clusters = cluster_codes(groups)
        self._special, self._window = special, window
        self._sums: Floats = np.zeros((int(self._clusters.max()) + 1, 5))
        self._undefined = 0

    def update(self, batch: ForwardBatch) -> None:
        """Add the predictions of this batch that have a target."""
        import torch

        b, t = (batch.targets != IGNORED).nonzero(as_tuple=True)
        if not len(b):
            return
        log_p = batch.log_probabilities
        classes = log_p.shape[-1]
        targets = batch.targets[b, t]
        check_targets(targets, classes)
        special = torch.tensor(self._special, dtype=torch.int64, device=b.device)
        usable = batch.attention_mask & ~torch.isin(batch.input_ids, special) & (batch.input_ids < classes)
        back = torch.arange(min(self._window, batch.input_ids.shape[1]), device=b.device)
        examples = batch.examples[b].cpu().numpy()
        for part in chunks(len(b), classes + len(back)):
            rows = log_p[b[part], t[part]]
            here = t[part, None] - back
            context = batch.input_ids[b[part, None], here.clamp_min(0)]
            kept = (here >= 0) & usable[b[part, None], here.clamp_min(0)]
            self._add(rows, targets[part], context, kept, self._clusters[examples[part]])

    def _add(self, rows: Tensor, target: Tensor, context: Tensor, kept: Tensor, clusters: Codes) -> None:
        """``rows [n, V]``, ``target [n]``, ``context [n, W]`` with the places that count in ``kept``."""
        import torch

        classes = rows.shape[1]
        # what does not count goes to a column of its own, which is not looked at
        present = torch.zeros(len(rows), classes + 1, dtype=torch.bool, device=rows.device)
        present.scatter_(1, torch.where(kept, context, classes), value=True)
        present = present[:, :classes]
        predicted = rows.argmax(-1)
        repeats = present.gather(1, predicted[:, None])[:, 0]
        columns = (
            torch.ones_like(repeats, dtype=torch.float64),
            repeats.double(),
            (repeats & (predicted != target)).double(),
            torch.where(present, rows.exp(), 0).sum(-1, dtype=torch.float64),
            present.gather(1, target[:, None])[:, 0].double(),
        )
        self._undefined += int(rows[:, 0].isnan().sum())
        self._sums += cluster_sums(torch.stack(columns, 1).cpu().numpy(), clusters, len(self._sums))

    def finish(self) -> RepetitionSums:
        """The sums over everything seen."""
        return RepetitionSums(self._sums, self._undefined)


class RepetitionAnalyzer(Analyzer):
    """Predictions that repeat their context."""

    name = "repetition"
    version = "1"
    summary = "how often predictions repeat a token of their context, against how often the text does"
    reference = (
        "Welleck et al. 2020, Neural Text Generation with Unlikelihood Training, arXiv:1908.04319 (rep/ℓ and wrep/ℓ); "
        "Cochran 1977, Sampling Techniques, 6.3 (standard errors over sequences)"
    )
    needs = frozenset({Need.LOGITS, Need.LABELS})
    on_host = True
    metrics = (
        MetricSpec("prediction_repeats", "1", "share of most likely tokens that stand in the context (rep/ℓ)"),
        MetricSpec("wrong_prediction_repeats", "1", "share of most likely tokens that do so and are wrong (wrep/ℓ)"),
        MetricSpec("text_repeats", "1", "share of targets that stand in the context: what the text does"),
        MetricSpec("prediction_excess", "1", "prediction_repeats − text_repeats"),
        MetricSpec("repeated_mass", "1", "mean probability of all tokens of the context together"),
        MetricSpec("mass_excess", "1", "repeated_mass − text_repeats; 0 when the network repeats as often as the text"),
    )

    class Params(BaseParams):
        """How far back the context goes."""

        window: int = Field(128, ge=1, description="tokens before the prediction that are looked at (ℓ)")

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """One listener to the logits. Raises NotApplicable when predictions are not of the next token."""
        evaluation = context.evaluation
        if evaluation.objective != "causal_lm" or not evaluation.labels_shifted:
            raise NotApplicable("not applicable because predictions of this evaluation set are not of the next token")
        window = context.params.window
        return {"repetition": RepetitionCollector(evaluation.group, tuple(evaluation.special_token_ids), window)}

    def measure(self, context: Context) -> Iterator[Result]:
        """Six numbers for the whole network. Raises NotApplicable when there is no target."""
        found: RepetitionSums = context.collected["repetition"]
        count = found.sums[:, _COUNT]
        n = int(count.sum())
        if n == 0:
            raise NotApplicable("not applicable because no position of the evaluation set has a target to predict")
        broken, _ = not_finite(found.undefined, 0, n)
        text = found.sums[:, _TEXT]
        for metric, values, reason in (
            ("prediction_repeats", found.sums[:, _PREDICTED], broken),
            ("wrong_prediction_repeats", found.sums[:, _WRONG], broken),
            ("text_repeats", text, None),
            ("prediction_excess", found.sums[:, _PREDICTED] - text, broken),
            ("repeated_mass", found.sums[:, _MASS], broken),
            ("mass_excess", found.sums[:, _MASS] - text, broken),
        ):
            yield missing(metric, reason, n) if reason else measurement(metric, ratio(values, count), n)

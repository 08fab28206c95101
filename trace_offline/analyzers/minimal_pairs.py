"""Minimal pairs: how much more surprising is the changed member, where it is changed and as a whole?

Surprisal of a token is −log₂ p(token | tokens before it); that of a word or a sentence is the sum over its tokens. Only
causal language models have it from one pass: a masked one would need a pass for every token (pseudo-log-likelihood).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from trace_offline.activations.batch import IGNORED, Collector, ForwardBatch
from trace_offline.analyzers._measurements import check_targets, measurement, missing
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Array, Result
from trace_offline.estimators.clustered import Codes, Estimate, Floats, cluster_codes
from trace_offline.estimators.paired import mean_within_clusters, paired_test, share_positive
from trace_offline.evaluation.pairs import VIOLATION

if TYPE_CHECKING:
    from trace_offline.evaluation.evaluation_set import EvaluationSet

_MISSING_SET = (
    "not applicable because the evaluation set holds no minimal pairs. Build one with: trace-offline evaluation-set "
    "build OUT --from PAIRS.jsonl --tokenizer CHECKPOINT (BLiMP, or pairs of trace-offline corpus intervene)"
)


_SAME = 1e-9
"""Bits below which a difference is rounding: the same probabilities added up in another order."""


@dataclass(frozen=True)
class RowSurprisal:
    """Sums in bits ``[N]``: ``whole`` over all targets of a row, ``marked`` over its marked tokens.

    ``targets [N]``: how many there are. ``marked`` is NaN where no token is marked or one of them is not predicted.
    """

    whole: Floats
    marked: Floats
    targets: Codes


class SurprisalCollector:
    """Reads the probability of each token of the rows that belong to a pair."""

    needs_hidden = False
    needs_logits = True

    def __init__(self, evaluation: EvaluationSet) -> None:
        assert evaluation.pairs is not None
        n = evaluation.n_examples
        self._paired = evaluation.pairs.pair >= 0
        self._spans: list[list[tuple[int, int]]] = [[] for _ in range(n)]
        if VIOLATION in evaluation.tasks:
            spans = evaluation.spans(VIOLATION)
            for row, start, end in zip(spans.row.tolist(), spans.start.tolist(), spans.end.tolist(), strict=True):
                self._spans[row].append((start, end))
        self._whole: Floats = np.zeros(n)
        self._marked: Floats = np.full(n, np.nan)
        self._targets: Codes = np.zeros(n, np.int64)

    def update(self, batch: ForwardBatch) -> None:
        """Add the rows of this batch that belong to pairs."""
        rows = batch.examples.cpu().numpy()
        wanted = np.flatnonzero(self._paired[rows])
        if not len(wanted):
            return
        log_p = batch.log_probabilities
        check_targets(batch.targets, log_p.shape[-1])
        counted = batch.targets != IGNORED
        # position t holds what is said about token t + 1
        bits = -log_p.gather(2, batch.targets.clamp_min(0)[..., None])[..., 0].double() / math.log(2)
        scored = counted.cpu().numpy()
        surprisal = np.where(scored, bits.cpu().numpy(), 0.0)
        self._whole[rows[wanted]] = surprisal[wanted].sum(1)
        self._targets[rows[wanted]] = scored[wanted].sum(1)
        for place in wanted.tolist():
            spans = self._spans[rows[place]]
            if spans and all(start > 0 and scored[place, start - 1 : end - 1].all() for start, end in spans):
                self._marked[rows[place]] = sum(surprisal[place, start - 1 : end - 1].sum() for start, end in spans)

    def finish(self) -> RowSurprisal:
        """The sums of every row."""
        return RowSurprisal(self._whole, self._marked, self._targets)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of one kind, ``[P, 2]`` (original, changed) each; ``clusters [P]``: pairs that share an original."""

    whole: Floats
    marked: Floats
    targets: Codes
    clusters: Codes

    def at(self, keep: Codes) -> _Pairs:
        clusters = np.unique(self.clusters[keep], return_inverse=True)[1].reshape(-1)
        return _Pairs(self.whole[keep], self.marked[keep], self.targets[keep], clusters)


class MinimalPairsAnalyzer(Analyzer):
    """How the model takes each kind of change to a sentence."""

    name = "minimal_pairs"
    version = "1"
    summary = (
        "rise of surprisal where a sentence was changed, and how often the original is preferred, by kind of change"
    )
    reference = (
        "Warstadt et al. 2020, BLiMP, TACL 8, arXiv:1912.00582 (whole sentences); Wilcox et al. 2018, arXiv:1809.00042 "
        "and Futrell et al. 2019, arXiv:1903.03260 (surprisal where it is violated); Wilcoxon 1945 (signed ranks)"
    )
    needs = frozenset({Need.LOGITS, Need.LABELS, Need.PAIRS})
    on_host = True
    metrics = (
        MetricSpec("surprisal_original", "bits", "mean surprisal of the marked tokens in the original"),
        MetricSpec("surprisal_changed", "bits", "mean surprisal of the marked tokens in the changed sentence"),
        MetricSpec("surprisal_rise", "bits", "mean of changed − original, within pairs"),
        MetricSpec(
            "rise_p_wilcoxon", "1", "two-sided p-value: the rise is symmetric about 0 (Wilcoxon's signed ranks)"
        ),
        MetricSpec("rise_p_sign", "1", "two-sided p-value: rise and fall are equally frequent (sign test)"),
        MetricSpec(
            "preferred_at_position", "1", "share of pairs whose marked tokens surprise less in the original; chance 0.5"
        ),
        MetricSpec("preferred_sentence", "1", "share of pairs whose original is more probable as a whole; chance 0.5"),
        MetricSpec("preferred_per_token", "1", "the same by the mean over tokens; chance 0.5"),
        MetricSpec("sentence_rise", "bits", "mean of changed − original of the surprisal of whole sentences"),
        MetricSpec(
            "shorter_original", "1", "share of pairs whose original has fewer tokens: what length alone would prefer"
        ),
    )

    class Params(BaseParams):
        """Parameters."""

        keep_pairs: bool = Field(
            False, description="store the rise of every pair as arrays, to compare the same pairs between checkpoints"
        )

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """One listener to the logits. Raises NotApplicable without pairs, and for models that are not causal."""
        evaluation = context.evaluation
        if evaluation.pairs is None or not len(evaluation.pairs):
            raise NotApplicable(_MISSING_SET)
        if not evaluation.labels_shifted or evaluation.has_labels:
            raise NotApplicable(
                "not applicable because the probability of a sentence is the product of its next-token probabilities, "
                f"and this evaluation set ({evaluation.objective}) "
                + ("has labels of its own" if evaluation.labels_shifted else "is not scored on the next token")
            )
        return {"surprisal": SurprisalCollector(evaluation)}

    def measure(self, context: Context) -> Iterator[Result]:
        """For each kind of change, then all pairs together (label None)."""
        evaluation, found = context.evaluation, context.collected["surprisal"]
        assert evaluation.pairs is not None
        members = evaluation.pairs.members()
        kinds = _kinds(evaluation, members)
        every = _Pairs(
            found.whole[members],
            found.marked[members],
            found.targets[members],
            cluster_codes(evaluation.group[members[:, 0]], len(members)),
        )
        for kind in sorted({kind for kind in kinds.tolist() if kind is not None}):
            yield from self._kind(every.at(np.flatnonzero(kinds == kind)), kind, context.params.keep_pairs)
        yield from self._kind(every, None, context.params.keep_pairs)

    def _kind(self, pairs: _Pairs, label: str | None, keep: bool) -> Iterator[Result]:
        yield from self._at_position(pairs, label, keep)
        where = {"task": VIOLATION, "label": label}
        n = len(pairs.whole)
        shorter = share_positive((pairs.targets[:, 1] - pairs.targets[:, 0]).astype(np.float64), pairs.clusters)
        yield measurement("shorter_original", shorter, n, **where)
        reason = _not_numbers(pairs.whole)
        if not reason and not pairs.targets.all():
            reason = "a sentence has no predicted token"
        if reason:
            for metric in ("preferred_sentence", "preferred_per_token", "sentence_rise"):
                yield missing(metric, reason, n, **where)
            return
        rise = _difference(pairs.whole)
        mean = pairs.whole / pairs.targets
        yield measurement("preferred_sentence", share_positive(rise, pairs.clusters), n, **where)
        per_token = share_positive(_difference(mean), pairs.clusters)
        yield measurement("preferred_per_token", per_token, n, **where)
        yield measurement("sentence_rise", mean_within_clusters(rise, pairs.clusters), n, **where)
        if keep:
            yield Array("sentence_rise", tuple(rise.tolist()), task=VIOLATION, label=label)

    def _at_position(self, pairs: _Pairs, label: str | None, keep: bool) -> Iterator[Result]:
        where = {"task": VIOLATION, "label": label}
        # NaN logits make a marked sum NaN as well, and are no reason to leave a pair out quietly
        broken = _not_numbers(pairs.whole)
        pairs = pairs.at(np.flatnonzero(~np.isnan(pairs.marked).any(axis=1)))
        n = len(pairs.marked)
        reason = broken or (None if n else "no pair has marked tokens that are predicted in both sentences")
        if reason:
            for spec in self.metrics[:6]:
                yield missing(spec.name, reason, n, **where)
            return
        rise = _difference(pairs.marked)
        for name, column in (("surprisal_original", 0), ("surprisal_changed", 1)):
            yield measurement(name, mean_within_clusters(pairs.marked[:, column], pairs.clusters), n, **where)
        yield measurement("surprisal_rise", mean_within_clusters(rise, pairs.clusters), n, **where)
        test = paired_test(rise)
        for name, p in (("rise_p_wilcoxon", test.wilcoxon), ("rise_p_sign", test.sign)):
            if p is None:
                yield missing(name, "no pair differs: there is nothing to test", n, **where)
            else:
                yield measurement(name, Estimate(p, None), n, **where)
        yield measurement("preferred_at_position", share_positive(rise, pairs.clusters), n, **where)
        if keep:
            yield Array("surprisal_rise", tuple(rise.tolist()), task=VIOLATION, label=label)


def _difference(values: Floats) -> Floats:
    """Changed − original of ``values [P, 2]``, exactly 0 where the two differ by rounding only."""
    found = values[:, 1] - values[:, 0]
    return np.where(np.abs(found) <= _SAME, 0.0, found)


def _kinds(evaluation: EvaluationSet, members: Codes) -> np.ndarray:
    """Kind of change of each pair ``[P]``, None where nothing is marked."""
    found = np.full(evaluation.n_examples, None, dtype=object)
    if VIOLATION in evaluation.tasks:
        spans = evaluation.spans(VIOLATION)
        found[spans.row] = np.array(spans.classes, dtype=object)[spans.label]
    return found[members[:, 0]]


def _not_numbers(whole: Floats) -> str | None:
    """Why sums over sentences are no numbers, if so."""
    broken, endless = int(np.isnan(whole).any(1).sum()), int(np.isinf(whole).any(1).sum())
    if broken:
        return f"the logits of {broken} of {len(whole)} pairs are not numbers"
    return (
        f"{endless} of {len(whole)} pairs hold a token of probability 0: its surprisal is infinite" if endless else None
    )

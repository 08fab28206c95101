"""How many dimensions the representations of each layer fill.

Points are the hidden states of a fixed random sample of tokens (view ``tokens``, component ``residual``) or the means
over the tokens of each row (view ``sentence_means``, component ``residual_sentence_mean``); padding and special tokens
never count. The same places are read at every checkpoint.

Only distinct points count. Tokens of one type coincide at the embedding output, equal beginnings of text coincide at
all layers of a causal model, the latter up to rounding: a batch of another shape sums in another order. Rows that
agree to within a small multiple of the rounding of the precision in use are therefore one point. ``n_points`` and
``n_distinct`` say how many were read and how many were left; where too few are left there is no value but a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Measurement, Result

if TYPE_CHECKING:
    from trace_offline.activations.batch import Collector, ForwardBatch
    from trace_offline.evaluation.evaluation_set import EvaluationSet

View = Literal["tokens", "sentence_means"]

SMALLEST = 50
"""Fewest distinct points of which a dimension is stated."""

_FEWEST_CLUSTERS = 20
_JACKKNIFE_PARTS = 20
_COMPONENT: dict[View, str] = {"tokens": "residual", "sentence_means": "residual_sentence_mean"}
_POINT_NAME: dict[View, str] = {"tokens": "tokens", "sentence_means": "sentence means"}
_NEIGHBOR_METRICS = ("twonn", "twonn_ml", "mle")
_SPECTRAL_METRICS = ("pca_participation_ratio", "pca_90", "pca_99")

# Rows of one context, computed in batches of different shapes, differ by up to 8e-7 of their length in float32, 2e-3
# in float16 and 1.6e-2 in bfloat16 (measured, 5 layers), where different contexts differ by 5e-3 and more.
_SAME_POINT = {"float16": 4e-3, "bfloat16": 3e-2}
_SAME_POINT_FLOAT32 = 1e-5


@dataclass(frozen=True)
class Cloud:
    """What one view gathered: ``points [L+1, M, D]`` float32, and ``clusters [M]``: which points are dependent."""

    points: np.ndarray
    clusters: np.ndarray | None


class _CloudCollector:
    """Hands the batches to a collector of hidden states and keeps the clusters with its table."""

    needs_hidden = True
    needs_logits = False

    def __init__(self, collector: Any, clusters: np.ndarray | None) -> None:
        self._collector, self._clusters = collector, clusters

    def update(self, batch: ForwardBatch) -> None:
        self._collector.update(batch)

    def finish(self) -> Cloud:
        return Cloud(self._collector.finish().numpy(), self._clusters)


class IntrinsicDimensionAnalyzer(Analyzer):
    """TwoNN, maximum likelihood over k neighbours, and linear dimensions of every layer, with standard errors."""

    name = "intrinsic_dimension"
    version = "1"
    summary = "How many dimensions the representations of each layer fill: nearest-neighbour and linear estimates."
    reference = (
        "Facco et al. 2017, doi:10.1038/s41598-017-11873-y; Levina & Bickel 2004 with MacKay & Ghahramani 2005; "
        "participation ratio: Gao et al. 2017, doi:10.1101/214262"
    )
    needs = frozenset({Need.HIDDEN_STATES})
    metrics = (
        MetricSpec("twonn", "dimensions", "TwoNN, published line fit without the largest tenth of the ratios"),
        MetricSpec("twonn_ml", "dimensions", "TwoNN by maximum likelihood over all ratios"),
        MetricSpec("mle", "dimensions", "Levina-Bickel over k neighbours, inverses averaged over points"),
        MetricSpec("pca_participation_ratio", "dimensions", "(sum of eigenvalues)² / sum of their squares"),
        MetricSpec("pca_90", "components", "principal components that hold 90 % of the variance"),
        MetricSpec("pca_99", "components", "principal components that hold 99 % of the variance"),
        MetricSpec("n_points", "points", "places read"),
        MetricSpec("n_distinct", "points", "different points among them, which all other numbers rest on"),
    )

    class Params(BaseParams):
        """Points, neighbours and subsamples."""

        max_samples: int = Field(2000, ge=SMALLEST, le=200_000, description="most points to read for each view")
        k: int = Field(20, ge=2, le=1000, description="neighbours of each point for the metric mle")
        subsamples: int = Field(20, ge=4, le=10_000, description="subsamples for the standard errors of twonn and mle")
        views: tuple[View, ...] = Field(
            ("tokens",), min_length=1, description="what the points are: tokens, sentence_means, or both"
        )

        @field_validator("views", mode="before")
        @classmethod
        def _one_or_more(cls, value: Any) -> Any:
            """``tokens,sentence_means`` as text, and each view once, in the order of the definition."""
            if isinstance(value, str):
                value = [part.strip() for part in value.split(",")]
            if isinstance(value, list | tuple) and all(part in _COMPONENT for part in value):
                return tuple(view for view in _COMPONENT if view in value)
            return value

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """One table of hidden states for each view, at places chosen by the seed."""
        from trace_offline.activations.hidden_table import HiddenStateTable, SentenceMeans

        if context.model.n_layers is None:
            raise NotApplicable(
                "not applicable because the blocks of this network are not known, so it has no layers to look at; "
                "name its blocks with --blocks, for example --blocks 'layers.*'"
            )
        evaluation, params = context.evaluation, context.params
        rows, positions = _eligible(evaluation)
        chosen: dict[str, Collector] = {}
        generator = np.random.default_rng(context.seed)
        if "tokens" in params.views and len(rows) >= SMALLEST:
            keep = _sample(len(rows), params.max_samples, generator)
            table = HiddenStateTable(rows[keep], positions[keep], positions[keep] + 1)
            chosen["tokens"] = _CloudCollector(table, _clusters(evaluation.group, rows[keep]))
        generator = np.random.default_rng(context.seed)
        sentences = np.unique(rows)
        if "sentence_means" in params.views and len(sentences) >= SMALLEST:
            kept = sentences[_sample(len(sentences), params.max_samples, generator)]
            means = SentenceMeans(kept, evaluation.special_token_ids)
            chosen["sentence_means"] = _CloudCollector(means, _clusters(evaluation.group, kept))
        if not chosen:
            raise NotApplicable(
                f"not applicable because the evaluation set has {len(rows)} tokens (special ones left out) in "
                f"{len(sentences)} rows; a dimension needs at least {SMALLEST} points (views asked for: "
                f"{', '.join(params.views)})"
            )
        return chosen

    def measure(self, context: Context) -> Iterator[Result]:
        """Every metric for every layer and view; a number that has no meaning is None with the reason."""
        tolerance = _SAME_POINT.get(str(context.model.dtype).removeprefix("torch."), _SAME_POINT_FLOAT32)
        for view in context.params.views:
            cloud = context.collected.get(view)
            if cloud is None:
                reason = f"fewer than {SMALLEST} {_POINT_NAME[view]} in the evaluation set"
                for layer in range((context.model.n_layers or 0) + 1):
                    yield from _nothing(_NEIGHBOR_METRICS + _SPECTRAL_METRICS, reason, 0, layer, _COMPONENT[view])
                continue
            for layer, points in enumerate(cloud.points):
                yield from _layer(points, cloud.clusters, context, tolerance, layer, view)


def _eligible(evaluation: EvaluationSet) -> tuple[np.ndarray, np.ndarray]:
    """Rows and positions of all tokens that are neither padding nor special, in reading order; int64 ``[n]`` each."""
    special = np.array(sorted(evaluation.special_token_ids), dtype=np.int64)
    step = max(1, (1 << 20) // max(1, evaluation.max_length))
    rows, positions = [], []
    for start in range(0, evaluation.n_examples, step):
        tokens = evaluation.tokens(start, min(start + step, evaluation.n_examples))
        row, position = np.nonzero(tokens.attention_mask.numpy() & ~np.isin(tokens.input_ids.numpy(), special))
        rows.append(row + start)
        positions.append(position)
    return np.concatenate(rows), np.concatenate(positions)


def _sample(n: int, most: int, generator: np.random.Generator) -> np.ndarray:
    """``most`` of ``range(n)`` at random, ascending; all of them when there are no more."""
    return np.arange(n) if n <= most else np.sort(generator.permutation(n)[:most])


def _clusters(group: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
    """Which points depend on each other: those of one group (document), or of one row where groups are too few.

    None, all points for themselves, where rows are too few as well.
    """
    for clusters in (group[rows], rows):
        if len(np.unique(clusters)) >= _FEWEST_CLUSTERS:
            return clusters
    return None


def _layer(
    points: np.ndarray, clusters: np.ndarray | None, context: Context, tolerance: float, layer: int, view: View
) -> Iterator[Measurement]:
    from trace_offline.estimators.distinct import distinct_rows

    metrics, component = _NEIGHBOR_METRICS + _SPECTRAL_METRICS, _COMPONENT[view]
    broken = int((~np.isfinite(points)).any(1).sum())
    yield Measurement("n_points", float(len(points)), n=len(points), layer=layer, component=component)
    if broken:
        reason = f"the hidden states of {broken} of {len(points):,} points are not finite"
        yield from _nothing((*metrics, "n_distinct"), reason, len(points), layer, component)
        return
    kept = distinct_rows(points, tolerance=tolerance)
    n = len(kept)
    yield Measurement("n_distinct", float(n), n=len(points), layer=layer, component=component)
    if n < SMALLEST:
        reason = f"only {n} distinct points among {len(points):,} {_POINT_NAME[view]}; at least {SMALLEST} are needed"
        yield from _nothing(metrics, reason, n, layer, component)
        return
    points, clusters = points[kept], None if clusters is None else clusters[kept]
    if clusters is not None and len(np.unique(clusters)) < _FEWEST_CLUSTERS:
        clusters = None
    estimates = _neighbor_estimates(points, clusters, context) | _spectral_estimates(points, clusters, context.seed)
    for metric, (value, stderr, missing) in estimates.items():
        yield Measurement(metric, value, stderr=stderr, n=n, layer=layer, component=component, reason=missing)


Estimate = tuple[float | None, float | None, str | None]


def _neighbor_estimates(points: np.ndarray, clusters: np.ndarray | None, context: Context) -> dict[str, Estimate]:
    """TwoNN (fit and maximum likelihood) and MLE from one neighbour search: value, stderr, reason."""
    import torch

    from trace_offline.estimators.mle_dimension import mle_dimension
    from trace_offline.estimators.neighbors import nearest_neighbors
    from trace_offline.estimators.subsampling import subsample_stderr
    from trace_offline.estimators.twonn import neighbor_log_ratios, twonn_fit, twonn_maximum_likelihood

    k, n = context.params.k, len(points)
    table = torch.from_numpy(points).to(context.model.device)
    wanted: dict[str, Callable[[np.ndarray], float]] = {
        "twonn": lambda squared: twonn_fit(neighbor_log_ratios(squared)),
        "twonn_ml": lambda squared: twonn_maximum_likelihood(neighbor_log_ratios(squared)),
        "mle": lambda squared: mle_dimension(squared[:, :k]),
    }
    found: dict[str, Estimate] = {}
    if n <= k:
        found["mle"] = (None, None, f"{n} distinct points have fewer than k = {k} neighbours each")
        del wanted["mle"]
    n_neighbors = max(2, k) if "mle" in wanted else 2
    squared = nearest_neighbors(table, n_neighbors).squared_distances.cpu().numpy()
    for metric, estimator in list(wanted.items()):
        try:
            found[metric] = (estimator(squared), None, None)
        except ValueError as error:
            found[metric] = (None, None, str(error))
            del wanted[metric]

    def statistics(part: np.ndarray) -> Sequence[float]:
        rest = nearest_neighbors(table[torch.from_numpy(part).to(table.device)], n_neighbors)
        return [estimator(rest.squared_distances.cpu().numpy()) for estimator in wanted.values()]

    if wanted:
        try:
            errors = subsample_stderr(
                statistics,
                [found[metric][0] for metric in wanted],  # type: ignore[misc]
                n,
                subsamples=context.params.subsamples,
                smallest=max(SMALLEST, 2 * (n_neighbors + 1)),
                seed=context.seed,
                clusters=clusters,
            )
        except ValueError:
            # A part of the points can be degenerate where all of them are not; there is then no standard error.
            errors = None
        for index, metric in enumerate(wanted):
            found[metric] = (found[metric][0], None if errors is None else errors[index], None)
    return {metric: found[metric] for metric in _NEIGHBOR_METRICS}


def _spectral_estimates(points: np.ndarray, clusters: np.ndarray | None, seed: int) -> dict[str, Estimate]:
    """The linear dimensions: value and jackknife standard error."""
    from trace_offline.estimators import pca_dimension as pca
    from trace_offline.estimators.subsampling import jackknife_stderr, partition

    spectrum = pca.covariance_spectrum(points)
    parts = partition(len(points), _JACKKNIFE_PARTS, np.random.default_rng(seed), clusters)
    left_out = [
        (
            pca.participation_ratio(rest),
            pca.fractional_components_for_variance(rest, 0.9),
            pca.fractional_components_for_variance(rest, 0.99),
        )
        for rest in pca.leave_out_spectra(points, parts)
    ]
    errors = jackknife_stderr(np.array(left_out))
    values = (
        pca.participation_ratio(spectrum),
        float(pca.components_for_variance(spectrum, 0.9)),
        float(pca.components_for_variance(spectrum, 0.99)),
    )
    return {
        metric: (value, float(stderr), None)
        for metric, value, stderr in zip(_SPECTRAL_METRICS, values, errors, strict=True)
    }


def _nothing(metrics: Sequence[str], reason: str, n: int, layer: int, component: str) -> Iterator[Measurement]:
    for metric in metrics:
        yield Measurement(metric, None, n=n, layer=layer, component=component, reason=reason)

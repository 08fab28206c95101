"""How many dimensions the representations of each layer fill.

Points are the hidden states of a fixed random sample of tokens (view ``tokens``, component ``residual``), the last
token of each row (``last_tokens``, ``residual_last_token``), the means over the tokens of each row
(``sentence_means``, ``residual_sentence_mean``), or the annotated words of one class at a time (``classes_of``; task
and label are set); padding and special tokens never count. The same places are read at every checkpoint.

Only distinct points count. Tokens of one type coincide at the embedding output, equal beginnings of text coincide at
all layers of a causal model, the latter up to rounding: a batch of another shape sums in another order. Rows that
agree to within a small multiple of the rounding of the precision in use are therefore one point. ``n_points`` and
``n_distinct`` say how many were read and how many were left; where too few are left there is no value but a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, field_validator

from trace_offline.analyzers import _dimension_points as sources
from trace_offline.analyzers._dimension_estimates import estimates, metrics_of
from trace_offline.analyzers._dimension_points import FEWEST_CLUSTERS, SMALLEST, Place, View
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Array, Measurement, Result

if TYPE_CHECKING:
    from trace_offline.activations.batch import Collector

SMALLEST_FLATTENED = 10
"""Fewest distinct rows of which TRACE's flattened dimension is stated; it needs to look like TRACE's, not be good."""

# Rows of one context, computed in batches of different shapes, differ by up to 8e-7 of their length in float32, 2e-3
# in float16 and 1.6e-2 in bfloat16 (measured, 5 layers), where different contexts differ by 5e-3 and more.
_SAME_POINT = {"tf32": 4e-3, "float16": 4e-3, "bfloat16": 3e-2}
_SAME_POINT_FLOAT32 = 1e-5


class IntrinsicDimensionAnalyzer(Analyzer):
    """TwoNN, maximum likelihood over k neighbours, GRIDE and linear dimensions of every layer, with standard errors."""

    name = "intrinsic_dimension"
    version = "1"
    summary = "How many dimensions the representations of each layer fill: nearest-neighbour and linear estimates."
    reference = (
        "Facco et al. 2017, doi:10.1038/s41598-017-11873-y; Levina & Bickel 2004 with MacKay & Ghahramani 2005; "
        "Denti et al. 2022, doi:10.1038/s41598-022-20991-1; Fukunaga & Olsen 1971, doi:10.1109/T-C.1971.223208; "
        "participation ratio: Gao et al. 2017, doi:10.1101/214262"
    )
    needs = frozenset({Need.HIDDEN_STATES})
    metrics = (
        MetricSpec("twonn", "dimensions", "TwoNN, published line fit without the largest tenth of the ratios"),
        MetricSpec("twonn_ml", "dimensions", "TwoNN by maximum likelihood over all ratios"),
        MetricSpec("mle", "dimensions", "Levina-Bickel over k neighbours, inverses averaged over points"),
        MetricSpec("gride", "dimensions", "GRIDE at the largest scale; all scales are in the array of the same name"),
        MetricSpec(
            "local_pca", "dimensions", "directions above 5 % of the largest in neighbourhoods, mean over points"
        ),
        MetricSpec(
            "twonn_extrapolated", "dimensions", "TwoNN over sample sizes, continued to neighbours at distance 0"
        ),
        MetricSpec("pca_participation_ratio", "dimensions", "(sum of eigenvalues)² / sum of their squares"),
        MetricSpec("pca_90", "components", "principal components that hold 90 % of the variance"),
        MetricSpec("pca_99", "components", "principal components that hold 99 % of the variance"),
        MetricSpec("n_points", "points", "places read"),
        MetricSpec("n_distinct", "points", "different points among them, which all other numbers rest on"),
        MetricSpec("trace_flattened_twonn", "dimensions", "TwoNN of whole padded rows as TRACE takes it; misleading"),
        MetricSpec("trace_flattened_padding", "1", "share of the positions in those rows that are padding"),
    )

    class Params(BaseParams):
        """Points, neighbours, subsamples, and the extras that are off by default."""

        max_samples: int = Field(2000, ge=SMALLEST, le=200_000, description="most points to read for each view")
        k: int = Field(20, ge=2, le=1000, description="neighbours of each point for the metric mle")
        subsamples: int = Field(20, ge=4, le=10_000, description="subsamples for the standard errors of twonn and mle")
        views: tuple[View, ...] = Field(
            ("tokens",),
            min_length=1,
            description="what the points are: tokens, last_tokens (of each row), sentence_means, or several of them",
        )
        classes_of: str = Field("", description="an annotated task: also the words of each of its classes separately")
        gride_to: int = Field(
            16, ge=0, le=1024, description="farthest neighbour of GRIDE: scales 1/2, 2/4, 4/8, … up to it; 0 = no GRIDE"
        )
        curve: bool = Field(
            False, description="the sample-size curve by nested subsamples, and twonn_extrapolated from it"
        )
        local_pca_k: int = Field(
            0, ge=0, le=1000, description="neighbours of each point for local_pca; 0 = no local_pca"
        )
        local_pca_points: int = Field(
            200, ge=20, le=200_000, description="points around which local_pca looks, drawn at random"
        )
        trace_flattened: bool = Field(
            False, description="also TRACE's dimension of whole padded rows, for comparison with its numbers only"
        )
        trace_flattened_rows: int = Field(
            128, ge=SMALLEST_FLATTENED, le=10_000, description="rows of that comparison (TRACE: its batch of 128)"
        )

        @field_validator("views", mode="before")
        @classmethod
        def _one_or_more(cls, value: Any) -> Any:
            """``tokens,sentence_means`` as text, and each view once, in the order of the definition."""
            if isinstance(value, str):
                value = [part.strip() for part in value.split(",")]
            if isinstance(value, list | tuple) and all(part in sources.COMPONENT for part in value):
                return tuple(view for view in sources.COMPONENT if view in value)
            return value

        @field_validator("local_pca_k")
        @classmethod
        def _a_neighborhood(cls, value: int) -> int:
            if value == 1:
                raise ValueError("a neighbourhood of 1 point has no directions; take 0 (off) or at least 2")
            return value

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """One table of hidden states for each view, at places chosen by the seed."""
        return sources.collectors(context)

    def measure(self, context: Context) -> Iterator[Result]:
        """Every metric for every layer and view; a number that has no meaning is None with the reason."""
        tolerance = _SAME_POINT.get(str(context.model.dtype).removeprefix("torch."), _SAME_POINT_FLOAT32)
        layers = range((context.model.n_layers or 0) + 1)
        for key, place, missing in sources.places(context):
            cloud = context.collected.get(key)
            if cloud is None:
                reason = missing or f"fewer than {SMALLEST} {place.noun} in the evaluation set"
                for layer in layers:
                    yield from _nothing(metrics_of(context.params), reason, 0, layer, place)
                continue
            for layer, points in enumerate(cloud.points):
                yield from _layer(points, cloud.clusters, context, tolerance, layer, place)
        if sources.FLATTENED in context.collected:
            yield from _flattened(context.collected[sources.FLATTENED], context, tolerance)


def _layer(
    points: np.ndarray, clusters: np.ndarray | None, context: Context, tolerance: float, layer: int, place: Place
) -> Iterator[Result]:
    from trace_offline.estimators.distinct import distinct_rows

    metrics = metrics_of(context.params)
    where: dict[str, Any] = {"layer": layer, "component": place.component, "task": place.task, "label": place.label}
    broken = int((~np.isfinite(points)).any(1).sum())
    yield Measurement("n_points", float(len(points)), n=len(points), **where)
    if broken:
        reason = f"the hidden states of {broken} of {len(points):,} points are not finite"
        yield from _nothing((*metrics, "n_distinct"), reason, len(points), layer, place)
        return
    kept = distinct_rows(points, tolerance=tolerance)
    n = len(kept)
    yield Measurement("n_distinct", float(n), n=len(points), **where)
    if n < SMALLEST:
        reason = f"only {n} distinct points among {len(points):,} {place.noun}; at least {SMALLEST} are needed"
        yield from _nothing(metrics, reason, n, layer, place)
        return
    points, clusters = points[kept], None if clusters is None else clusters[kept]
    if clusters is not None and len(np.unique(clusters)) < FEWEST_CLUSTERS:
        clusters = None
    found, arrays = estimates(points, clusters, context)
    for metric, (value, stderr, missing) in found.items():
        yield Measurement(metric, value, stderr=stderr, n=n, reason=missing, **where)
    for name, values in arrays.items():
        yield Array(name, values, **where)


def _flattened(rows: sources.Flattened, context: Context, tolerance: float) -> Iterator[Measurement]:
    """TwoNN of whole rows, T·D numbers each, padding included: TRACE's number, not a dimension of representations."""
    import torch

    from trace_offline.estimators.distinct import distinct_rows
    from trace_offline.estimators.neighbors import nearest_neighbors
    from trace_offline.estimators.subsampling import subsample_stderr
    from trace_offline.estimators.twonn import neighbor_log_ratios, twonn_fit

    def twonn(points: np.ndarray) -> float:
        return twonn_fit(neighbor_log_ratios(nearest_neighbors(torch.from_numpy(points), 2).squared_distances.numpy()))

    place, n_rows = Place(sources.FLATTENED, "rows"), rows.points.shape[1]
    for layer, points in enumerate(rows.points):
        where: dict[str, Any] = {"layer": layer, "component": place.component}
        yield Measurement("trace_flattened_padding", rows.padding, n=n_rows, **where)
        broken = int((~np.isfinite(points)).any(1).sum())
        if broken:
            reason = f"the hidden states of {broken} of {n_rows:,} rows are not finite"
            yield from _nothing(("trace_flattened_twonn",), reason, n_rows, layer, place)
            continue
        points = points[distinct_rows(points, tolerance=tolerance)]
        n = len(points)
        if n < SMALLEST_FLATTENED:
            reason = f"only {n} distinct rows among {n_rows:,}; at least {SMALLEST_FLATTENED} are needed"
            yield from _nothing(("trace_flattened_twonn",), reason, n, layer, place)
            continue
        try:
            value = twonn(points)
        except ValueError as error:
            yield from _nothing(("trace_flattened_twonn",), str(error), n, layer, place)
            continue
        try:
            errors = subsample_stderr(
                lambda part, points=points: [twonn(points[part])],  # type: ignore[misc]
                [value],
                n,
                subsamples=context.params.subsamples,
                smallest=25,
                seed=context.seed,
            )
        except ValueError:
            errors = None
        yield Measurement("trace_flattened_twonn", value, stderr=None if errors is None else errors[0], n=n, **where)


def _nothing(metrics: Sequence[str], reason: str, n: int, layer: int, place: Place) -> Iterator[Measurement]:
    for metric in metrics:
        yield Measurement(
            metric,
            None,
            n=n,
            layer=layer,
            component=place.component,
            task=place.task,
            label=place.label,
            reason=reason,
        )

"""How much the representations of a checkpoint resemble those of the previous, the first and the final one.

The hidden states of the same tokens are compared layer by layer, so that nothing but the weights differs. What was
extracted from a checkpoint are these hidden states; all measures come from them, in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from trace_offline.analyzers._measurements import missing
from trace_offline.analyzers._token_sample import TokenSample, sample_tokens
from trace_offline.analyzers.base import Context, Extract, MetricSpec, Need, SeriesAnalyzer, SeriesContext
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Measurement, Result

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.activations.batch import Collector
    from trace_offline.estimators.cka import Kernel
    from trace_offline.estimators.clustered import Estimate

_COMPONENT = "residual"
_FEWEST = 4
_METRICS = ("cka", "cka_debiased", "procrustes_distance", "pwcca", "neighbourhood_overlap")
# Rows of one context computed in batches of different shapes agree to 8e-7 of their length in float32.
_SAME_POINT = 1e-5


class SimilarityAnalyzer(SeriesAnalyzer):
    """CKA, Procrustes distance, PWCCA and neighbourhood overlap between checkpoints, for every layer."""

    name = "similarity"
    version = "1"
    summary = "how much each layer's representations resemble those of the previous, first and final checkpoint"
    reference = (
        "Kornblith et al. 2019, arXiv:1905.00414 (CKA); Song et al. 2012 (debiased); Ding et al. 2021, "
        "arXiv:2108.01661 (Procrustes); Morcos et al. 2018, arXiv:1806.05759 (PWCCA); Doimo et al. 2020, "
        "arXiv:2007.03506 (neighbourhood overlap)"
    )
    needs = frozenset({Need.HIDDEN_STATES})
    on_host = True
    metrics = (
        MetricSpec("cka", "1", "linear centred kernel alignment: 1 equal up to rotation, shift and scale"),
        MetricSpec("cka_debiased", "1", "the same from unbiased estimates: about 0 for unrelated representations"),
        MetricSpec("procrustes_distance", "1", "what is left after the best rotation, 0 to √2"),
        MetricSpec("pwcca", "1", "projection-weighted canonical correlation: 1 equal up to a linear map"),
        MetricSpec("neighbourhood_overlap", "1", "mean Jaccard index of the sets of k nearest neighbours"),
        MetricSpec("neighbourhood_overlap_chance", "1", "expected overlap of random sets of neighbours"),
    )

    class Params(BaseParams):
        """Points and neighbours."""

        max_samples: int = Field(1000, ge=_FEWEST, le=5000, description="most tokens to compare")
        k: int = Field(10, ge=1, le=1000, description="neighbours of each token for neighbourhood_overlap")
        jackknife_parts: int = Field(
            10, ge=0, le=100, description="parts left out for the standard error of pwcca; 0: none"
        )

    def extract_params(self, params: Any) -> Mapping[str, Any]:
        """Only which tokens were read."""
        return {"max_samples": params.max_samples}

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """One table of hidden states at the sampled tokens."""
        from trace_offline.activations.hidden_table import HiddenStateTable

        if context.model.n_layers is None:
            raise NotApplicable(
                "not applicable because the blocks of this network are not known, so it has no layers to compare; "
                "name its blocks with --blocks, for example --blocks 'layers.*'"
            )
        sample = sample_tokens(context.evaluation, context.params.max_samples, context.seed)
        if len(sample) < _FEWEST:
            raise NotApplicable(
                f"not applicable because the evaluation set has {len(sample)} tokens (special ones left out); a "
                f"comparison needs at least {_FEWEST}"
            )
        return {"hidden": HiddenStateTable(sample.rows, sample.positions, sample.positions + 1)}

    def extract(self, context: Context) -> Mapping[str, Tensor]:
        """``layer_i``: ``float32 [M, D]`` for each layer."""
        return {f"layer_{layer}": table.contiguous() for layer, table in enumerate(context.collected["hidden"])}

    def compare(self, series: SeriesContext) -> Iterator[tuple[int, Result]]:
        """Every metric of every layer to the previous (label ``previous``), first and final checkpoint.

        One layer at a time: four checkpoints' points of one layer are held in memory.
        """
        sample = sample_tokens(series.evaluation, series.params.max_samples, series.seed)
        extracts = series.extracts
        names = [frozenset(extract.names()) for extract in extracts]
        for layer in range(max(map(len, names))):
            key = f"layer_{layer}"
            final = _load(extracts[-1], key, names[-1])
            first = final if len(extracts) == 1 else _load(extracts[0], key, names[0])
            previous: _Points | None = None
            for index, extract in enumerate(extracts):
                kept = {0: first, len(extracts) - 1: final}
                current = kept[index] if index in kept else _load(extract, key, names[index])
                if current is None:
                    continue
                for label, other in (("previous", previous), ("first", first), ("final", final)):
                    if other is not None:
                        yield from _pair(extract.position, current, other, sample, series, layer, label)
                previous = current


@dataclass
class _Points:
    """One layer of one checkpoint, with what the measures make of it, each made once."""

    raw: Tensor
    kernels: dict[str, Kernel] = field(default_factory=dict)
    unit: Tensor | None = None
    neighbours: dict[tuple[bytes, int], Tensor] = field(default_factory=dict)
    _distinct: np.ndarray | None = None

    def kernel(self, metric: str) -> Kernel:
        from trace_offline.estimators.cka import centred_kernel, u_centred_kernel

        if metric not in self.kernels:
            self.kernels[metric] = (centred_kernel if metric == "cka" else u_centred_kernel)(self.raw)
        return self.kernels[metric]

    def unit_points(self) -> Tensor:
        from trace_offline.estimators.cka import unit_points

        if self.unit is None:
            self.unit = unit_points(self.raw)
        return self.unit

    def distinct(self) -> np.ndarray:
        from trace_offline.estimators.distinct import distinct_rows

        if self._distinct is None:
            self._distinct = distinct_rows(self.raw.numpy(), tolerance=_SAME_POINT)
        return self._distinct

    def nearest(self, kept: np.ndarray, k: int) -> Tensor:
        import torch

        from trace_offline.estimators.neighbors import nearest_neighbors

        key = (kept.tobytes(), k)
        if key not in self.neighbours:
            self.neighbours[key] = nearest_neighbors(self.raw[torch.from_numpy(kept)], k).indices
        return self.neighbours[key]


def _load(extract: Extract, key: str, names: frozenset[str]) -> _Points | None:
    """None where a checkpoint has no such layer: a run whose network grew."""
    return _Points(extract.load(key)) if key in names else None


def _pair(
    position: int, one: _Points, other: _Points, sample: TokenSample, series: SeriesContext, layer: int, label: str
) -> Iterator[tuple[int, Result]]:
    """All metrics of one pair; one that is not defined here is None with the reason."""
    where = {"layer": layer, "component": _COMPONENT, "label": label}
    if not len(one.raw) == len(other.raw) == len(sample):
        reason = f"{len(one.raw)} and {len(other.raw)} tokens were read, {len(sample)} expected: extracts do not match"
        for metric in (*_METRICS, "neighbourhood_overlap_chance"):
            yield position, missing(metric, reason, len(sample), **where)
        return
    for metric in _METRICS[:-1]:
        try:
            found = _measure(metric, one, other, sample, series)
        except ValueError as error:
            yield position, missing(metric, str(error), len(sample), **where)
        else:
            yield position, Measurement(metric, found.value, stderr=found.stderr, n=len(sample), **where)  # type: ignore[arg-type]
    yield from ((position, result) for result in _overlap(one, other, sample, series.params.k, where))


def _measure(metric: str, one: _Points, other: _Points, sample: TokenSample, series: SeriesContext) -> Estimate:
    from trace_offline.estimators.cka import cka
    from trace_offline.estimators.procrustes import procrustes_distance
    from trace_offline.estimators.pwcca import pwcca
    from trace_offline.estimators.subsampling import partition

    if metric == "procrustes_distance":
        return procrustes_distance(one.unit_points(), other.unit_points(), sample.clusters)
    if metric == "pwcca":
        count = min(series.params.jackknife_parts, len(np.unique(sample.clusters)))
        parts = partition(len(sample), count, np.random.default_rng(series.seed), sample.clusters) if count > 1 else ()
        return pwcca(one.raw, other.raw, parts)
    return cka(one.kernel(metric), other.kernel(metric), sample.clusters)


def _overlap(
    one: _Points, other: _Points, sample: TokenSample, k: int, where: Mapping[str, Any]
) -> Iterator[Measurement]:
    """Mean overlap over the points that are distinct in both: neighbours at distance 0 are decided by nothing."""
    from trace_offline.estimators.clustered import cluster_sums, ratio
    from trace_offline.estimators.neighbourhood_overlap import neighbourhood_overlap, overlap_by_chance

    metrics = ("neighbourhood_overlap", "neighbourhood_overlap_chance")
    try:
        kept = np.intersect1d(one.distinct(), other.distinct(), assume_unique=True)
    except ValueError as error:
        yield from (missing(metric, str(error), len(sample), **where) for metric in metrics)
        return
    n = len(kept)
    if n < k + 2:
        reason = f"only {n} tokens have distinct points in both; k = {k} neighbours need at least {k + 2}"
        yield from (missing(metric, reason, n, **where) for metric in metrics)
        return
    values = neighbourhood_overlap(one.nearest(kept, k), other.nearest(kept, k)).numpy()
    codes = np.unique(sample.clusters[kept], return_inverse=True)[1].reshape(-1)
    count = int(codes.max()) + 1
    found = ratio(cluster_sums(values, codes, count), cluster_sums(np.ones(n), codes, count))
    yield Measurement(metrics[0], found.value, stderr=found.stderr, n=n, **where)
    yield Measurement(metrics[1], overlap_by_chance(n, k), n=n, **where)

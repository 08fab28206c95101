"""The shape of each layer's representations: their cone, their outliers, their ranks, their sparsity.

Points are the hidden states of a fixed random sample of tokens, as often as tokens occur (a frequent word counts more).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from trace_offline.analyzers._measurements import missing
from trace_offline.analyzers._token_sample import TokenSample, sample_tokens
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Measurement, Result
from trace_offline.estimators.clustered import Estimate

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.activations.batch import Collector

_COMPONENT = "residual"
_FEWEST = 4
_JACKKNIFE_PARTS = 20
_SPECTRAL = ("effective_rank", "proportional_effective_rank", "stable_rank", "condition_number")


class GeometryAnalyzer(Analyzer):
    """Anisotropy, norm outliers, ranks, condition number and sparsity of the hidden states of every layer."""

    name = "geometry"
    version = "1"
    summary = "anisotropy, norm outliers, effective rank, condition number and sparsity of each layer's representations"
    reference = (
        "Ethayarajh 2019, arXiv:1909.00512 (anisotropy); Timkey & van Schijndel 2021, arXiv:2109.04404 (outlier "
        "dimensions); Roy & Vetterli 2007 (effective rank); Hurley & Rickard 2009, arXiv:0811.4706 (Gini, Hoyer)"
    )
    needs = frozenset({Need.HIDDEN_STATES})
    on_host = True
    metrics = (
        MetricSpec("anisotropy", "1", "mean cosine of two tokens of different texts"),
        MetricSpec("norm", "activation units", "mean Euclidean norm of a token's hidden state"),
        MetricSpec("norm_max_to_median", "1", "largest norm of a token over the median norm"),
        MetricSpec("top_dimension_share", "1", "share of the sum of squares held by the largest dimensions"),
        MetricSpec("effective_rank", "dimensions", "exp of the entropy of the normalised singular values, centred"),
        MetricSpec("proportional_effective_rank", "1", "effective rank / width"),
        MetricSpec("stable_rank", "dimensions", "sum of the covariance's eigenvalues / the largest"),
        MetricSpec("condition_number", "1", "largest / smallest singular value of the centred hidden states"),
        MetricSpec("gini", "1", "Gini index of the magnitudes in a token's hidden state, mean over tokens"),
        MetricSpec("hoyer", "1", "Hoyer's sparsity of a token's hidden state, mean over tokens"),
    )

    class Params(BaseParams):
        """Points and outliers."""

        max_samples: int = Field(2000, ge=_FEWEST, le=200_000, description="most tokens to read")
        top_dimensions: int = Field(3, ge=1, description="how many dimensions top_dimension_share adds up")

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """One table of hidden states at the sampled tokens."""
        from trace_offline.activations.hidden_table import HiddenStateTable

        if context.model.n_layers is None:
            raise NotApplicable(
                "not applicable because the blocks of this network are not known, so it has no layers to look at; "
                "name its blocks with --blocks, for example --blocks 'layers.*'"
            )
        sample = sample_tokens(context.evaluation, context.params.max_samples, context.seed)
        if len(sample) < _FEWEST:
            raise NotApplicable(
                f"not applicable because the evaluation set has {len(sample)} tokens (special ones left out); a shape "
                f"needs at least {_FEWEST}"
            )
        return {"hidden": HiddenStateTable(sample.rows, sample.positions, sample.positions + 1)}

    def measure(self, context: Context) -> Iterator[Result]:
        """Every metric for every layer; one that is not defined there is None with the reason."""
        sample = sample_tokens(context.evaluation, context.params.max_samples, context.seed)
        for layer, points in enumerate(context.collected["hidden"]):
            yield from _layer(points, sample, context, layer)


def _layer(points: Tensor, sample: TokenSample, context: Context, layer: int) -> Iterator[Measurement]:
    import torch

    from trace_offline.estimators.anisotropy import max_to_median_norm, mean_cosine, top_dimension_share
    from trace_offline.estimators.sparsity import gini, hoyer

    where: dict[str, Any] = {"layer": layer, "component": _COMPONENT}
    broken = int((~torch.isfinite(points)).any(1).sum())
    if broken:
        reason = f"the hidden states of {broken} of {len(points):,} tokens are not finite"
        for spec in GeometryAnalyzer.metrics:
            yield missing(spec.name, reason, len(points), **where)
        return
    clusters = sample.clusters
    # A vector of zeros has neither direction nor sparsity.
    there = (points != 0).any(1)
    directed, their = points[there], clusters[there.numpy()]
    top = min(context.params.top_dimensions, points.shape[1])
    norms = torch.linalg.vector_norm(points.double(), dim=1)
    numbers: dict[str, tuple[Callable[[], Estimate], int]] = {
        "anisotropy": (lambda: mean_cosine(directed, their), len(directed)),
        "norm": (lambda: _mean(norms, clusters), len(points)),
        "norm_max_to_median": (lambda: Estimate(max_to_median_norm(points), None), len(points)),
        "top_dimension_share": (lambda: top_dimension_share(points, top, clusters), len(points)),
        "gini": (lambda: _mean(gini(directed), their), len(directed)),
        "hoyer": (lambda: _mean(hoyer(directed), their), len(directed)),
    }
    for metric, (estimate, n) in numbers.items():
        if n == 0:
            yield missing(metric, "all hidden states are 0", len(points), **where)
            continue
        try:
            found = estimate()
        except ValueError as error:
            yield missing(metric, str(error), n, **where)
        else:
            yield Measurement(metric, found.value, stderr=found.stderr, n=n, **where)
    yield from _spectral(points.numpy(), clusters, context.seed, where)


def _mean(values: Tensor, clusters: np.ndarray) -> Estimate:
    """Mean over tokens with the standard error over texts."""
    from trace_offline.estimators.clustered import cluster_sums, ratio

    codes = np.unique(clusters, return_inverse=True)[1].reshape(-1).astype(np.int64)
    count = int(codes.max()) + 1
    return ratio(cluster_sums(values.numpy(), codes, count), cluster_sums(np.ones(len(values)), codes, count))


def _spectral(points: np.ndarray, clusters: np.ndarray, seed: int, where: dict[str, Any]) -> Iterator[Measurement]:
    """Numbers of the singular values of the centred points, with the delete-group jackknife over texts."""
    from trace_offline.estimators.pca_dimension import covariance_spectrum, leave_out_spectra
    from trace_offline.estimators.subsampling import jackknife_stderr, partition

    n, width = points.shape
    try:
        spectrum = covariance_spectrum(points)
    except ValueError as error:
        for metric in _SPECTRAL:
            yield missing(metric, str(error), n, **where)
        return
    values, deficient = _spectral_numbers(spectrum, n, width)
    errors: np.ndarray | None = None
    count = min(_JACKKNIFE_PARTS, len(np.unique(clusters)))
    if count >= 2:
        parts = partition(n, count, np.random.default_rng(seed), clusters)
        try:
            left_out = [
                _spectral_numbers(rest, n - len(part), width)[0]
                for part, rest in zip(parts, leave_out_spectra(points, parts), strict=True)
            ]
            errors = jackknife_stderr(np.array(left_out))
        except ValueError:
            # What is left without a part can be degenerate where the whole is not: there is then no standard error.
            errors = None
    for index, metric in enumerate(_SPECTRAL):
        if metric == "condition_number" and deficient is not None:
            yield missing(metric, deficient, n, **where)
            continue
        stderr = None if errors is None or not np.isfinite(errors[index]) else float(errors[index])
        yield Measurement(metric, float(values[index]), stderr=stderr, n=n, **where)


def _spectral_numbers(spectrum: np.ndarray, n: int, width: int) -> tuple[np.ndarray, str | None]:
    """The numbers of ``_SPECTRAL`` from covariance eigenvalues; and why there is no condition number, or None."""
    import torch

    from trace_offline.estimators.singular_values import effective_rank, numerical_rank, stable_rank

    singular = torch.from_numpy(np.sqrt(spectrum))
    rank = effective_rank(singular)
    deficient = None
    if n <= width:
        deficient = f"{n} tokens do not fill {width} dimensions"
    elif numerical_rank(singular, (n, width)) < width:
        deficient = "not of full rank within rounding: the smallest singular value cannot be told from 0"
    condition = np.nan if deficient is not None else float(singular[0] / singular[-1])
    return np.array([rank, rank / width, stable_rank(singular), condition]), deficient

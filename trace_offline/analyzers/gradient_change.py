"""How the gradient of the evaluation loss turns along the run: against the first, previous and final checkpoint's.

The gradient of the mean loss on the same texts is kept of each checkpoint as ``weight_change`` keeps weights: all of it
of a small network, a random projection of each part (layer × component) and some rows of its matrices of a larger one.
Projections of the gradients without each of several parts of the texts give standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, field_validator

from trace_offline.analyzers._matrix_similarity import keep_matrices, similarity_numbers
from trace_offline.analyzers._measurements import missing
from trace_offline.analyzers._vector_change import (
    EXACT,
    LEFT_OUT,
    SIZE,
    SKETCH,
    Pair,
    compare_vectors,
    load_part,
    pairs_of,
    part_key,
    part_place,
    parts_of,
)
from trace_offline.analyzers.base import Context, MetricSpec, Need, SeriesAnalyzer, SeriesContext
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Measurement, Result
from trace_offline.estimators.sketch import CountSketch, seed_for

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.activations.batch import Collector

_SEQUENCES = "sequences"


class GradientChangeAnalyzer(SeriesAnalyzer):
    """Distance, cosine, CKA and PWCCA of the loss gradients of every part of the network along the run."""

    name = "gradient_change"
    version = "1"
    summary = "distance, cosine, CKA and PWCCA of the loss gradient to the first, previous and final checkpoint"
    reference = (
        "Kornblith et al. 2019, arXiv:1905.00414 (CKA); Morcos et al. 2018, arXiv:1806.05759 (PWCCA); Weinberger et "
        "al. 2009, arXiv:0902.2206 (count sketch, for networks too large to keep)"
    )
    needs = frozenset({Need.LOSS_GRADIENTS, Need.WEIGHTS, Need.LABELS})
    metrics = (
        MetricSpec("gradient_distance", "nats / weight unit", "Euclidean distance between two checkpoints' gradients"),
        MetricSpec("gradient_relative_distance", "1", "distance over the length of the gradient there"),
        MetricSpec("gradient_cosine_checkpoints", "1", "cosine of the angle between the gradients of two checkpoints"),
        MetricSpec("gradient_cka", "1", "linear CKA of the gradient's matrices: 1 equal up to rotation, shift, scale"),
        MetricSpec("gradient_cka_debiased", "1", "the same from unbiased estimates: about 0 for unrelated matrices"),
        MetricSpec("gradient_pwcca", "1", "projection-weighted canonical correlation: 1 equal up to a linear map"),
        MetricSpec("gradient_pwcca_chance", "1", "the same with the samples of the other matrix in random order"),
    )

    class Params(BaseParams):
        """How much data, and what is kept of its gradient."""

        max_sequences: int = Field(128, ge=2, description="rows of the evaluation set in the loss")
        parts: int = Field(12, ge=4, le=1000, description="independent parts of the rows, for standard errors")
        max_exact_parameters: int = Field(
            10_000_000, ge=0, description="gradients of up to this many parameters are kept as they are (4 bytes each)"
        )
        projection_size: int = Field(
            4096, ge=16, le=1 << 20, description="numbers kept of each part of the network and the rows; a power of 2"
        )
        matrices: bool = Field(True, description="also CKA and PWCCA of the gradient's matrices")
        per_matrix: bool = Field(True, description="also of every matrix by itself, label previous|its name and so on")
        matrix_rows: int = Field(
            256, ge=0, le=1 << 20, description="rows of each matrix of a larger network kept for debiased CKA; 0: none"
        )

        @field_validator("projection_size")
        @classmethod
        def _power_of_two(cls, value: int) -> int:
            if value & (value - 1):
                raise ValueError("must be a power of 2")
            return value

    def extract_params(self, params: Any) -> Mapping[str, Any]:
        """Only what decides what is kept."""
        return dict(params.model_dump(mode="json", exclude={"matrices", "per_matrix"}))

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """None: gradients need passes of their own."""
        return {}

    def extract(self, context: Context) -> Mapping[str, Tensor]:
        """For each part ``exact/part``, or ``sketch/part`` with ``size/part``; ``left_out/part [G, k]``; matrices.

        Raises NotApplicable when there is no target or no floating-point parameter.
        """
        import torch

        from trace_offline.activations.components import parameter_groups
        from trace_offline.analyzers import _gradient_parts as data
        from trace_offline.analyzers._curvature_batch import in_dtype
        from trace_offline.analyzers._matrix_numbers import convolution_weights

        params, groups = context.params, parameter_groups(context.model)
        if not groups:
            raise NotApplicable("not applicable because the network has no floating-point parameters")
        source = data.Rows(context.evaluation)
        parts = data.choose_parts(source, params.max_sequences, params.parts, context.seed)
        # The groups are those of the loaded network; a copy in another precision no longer knows its blocks.
        model = context.model if context.model.dtype == "float64" else in_dtype(context.model, "float32")
        named = model.parameters_by_name()
        ordered = [(part_key(place), [(name, named[name]) for name in names]) for place, names in groups.items()]
        gradients = data.PartGradients(
            model, source, [tensor for _, tensors in ordered for _, tensor in tensors],
            data.TargetClasses(context.evaluation, (), ()), (),
        )  # fmt: skip
        widths = {key: sum(tensor.numel() for _, tensor in tensors) for key, tensors in ordered}
        total = torch.zeros(gradients.size, dtype=torch.float32, device=model.device)
        targets = np.zeros(len(parts))
        projected: dict[str, list[np.ndarray]] = {key: [] for key in widths}
        for index, part in enumerate(parts):
            rows, counts = gradients.of(part)
            total += rows[0]
            targets[index] = counts[0]
            for key, piece in zip(widths, rows[0].split(list(widths.values())), strict=True):
                projected[key].append(_projected(piece, params.projection_size, seed_for(context.seed, key)))
        mean, convolutions = total / float(targets.sum()), convolution_weights(context.model.module)
        found: dict[str, Tensor] = {_SEQUENCES: torch.tensor([sum(len(part.rows) for part in parts)])}
        for (key, tensors), piece in zip(ordered, mean.split(list(widths.values())), strict=True):
            whole = gradients.size <= params.max_exact_parameters or len(piece) <= params.projection_size
            pieces = piece.split([tensor.numel() for _, tensor in tensors])
            shaped = {name: own.reshape(t.shape) for (name, t), own in zip(tensors, pieces, strict=True)}
            found |= keep_matrices(
                key, shaped, convolutions, whole=whole, most_rows=params.matrix_rows, seed=context.seed
            )
            table = np.stack(projected[key])
            if len(parts) > 1:
                left_out = (table.sum(0) - table) / (targets.sum() - targets)[:, None]
                found[LEFT_OUT + key] = torch.from_numpy(left_out.astype(np.float32))
            if whole:
                found[EXACT + key] = piece.cpu().clone()
            else:
                found[SKETCH + key] = torch.from_numpy(table.sum(0) / targets.sum())
                square = float(piece.double().square().sum())
                found[SIZE + key] = torch.tensor([len(piece), square], dtype=torch.float64)
        return found

    def compare(self, series: SeriesContext) -> Iterator[tuple[int, Result]]:
        """Every part, every layer (component ``all``) and the network, to the first, previous and final checkpoint.

        One part at a time: four checkpoints' gradients of one part are held in memory.
        """
        extracts, params = series.extracts, series.params
        sequences = [int(extract.load(_SEQUENCES)[0]) for extract in extracts]
        totals: dict[tuple[int, str], dict[int | None, Pair]] = {}
        for part in parts_of(extracts):
            place = part_place(part)
            where = {"layer": place[0], "component": place[1]}
            loaded = pairs_of(extracts, partial(load_part, part=part, matrices=params.matrices))
            for index, label, one, other in loaded:
                position = extracts[index].position
                pair = compare_vectors(one, other, part, "gradients")
                yield from ((position, item) for item in _numbers(pair, where | {"label": label}, sequences[index]))
                matrices = similarity_numbers(
                    one.matrices if one else {}, other.matrices if other else {}, where, label, "gradient_",
                    series.seed, per_matrix=params.per_matrix,
                )  # fmt: skip
                yield from ((position, item) for item in matrices)
                layers = totals.setdefault((index, label), {})
                for layer in {place[0], None}:
                    layers[layer] = layers[layer] + pair if layer in layers else pair
        for (index, label), layers in totals.items():
            for layer, pair in layers.items():
                where = {"layer": layer, "component": "all", "label": label}
                yield from ((extracts[index].position, item) for item in _numbers(pair, where, sequences[index]))


def _projected(piece: Tensor, size: int, seed: int) -> np.ndarray:
    """The vector itself when it is no longer than its projection."""
    if len(piece) <= size:
        return np.asarray(piece.double().cpu().numpy())
    sketch = CountSketch(size, seed)
    sketch.add(piece)
    return sketch.values


def _numbers(pair: Pair, where: Mapping[str, Any], n: int) -> Iterator[Measurement]:
    """Distance, relative distance and cosine, with standard errors."""
    metrics = ("gradient_distance", "gradient_relative_distance", "gradient_cosine_checkpoints")
    if pair.reason is not None:
        yield from (missing(metric, pair.reason, n, **where) for metric in metrics)
        return
    distance, norm = math.sqrt(pair.distance), math.sqrt(pair.square_b)
    error = math.sqrt(pair.variance) / (2 * distance) if distance else 0.0
    yield Measurement(metrics[0], distance, stderr=_stderr(pair, error, _distance), n=n, **where)
    if norm == 0:
        yield missing(metrics[1], f"the gradient is 0 in the {where['label']} checkpoint", n, **where)
    else:
        stderr = _stderr(pair, error / norm, lambda a, b, p: _distance(a, b, p) / np.sqrt(b))
        yield Measurement(metrics[1], distance / norm, stderr=stderr, n=n, **where)
    cosine = pair.cosine()
    if cosine is None:
        yield missing(metrics[2], "the gradient is 0 in one of the two: there is no angle", n, **where)
        return
    error = math.sqrt(pair.variance) / (2 * math.sqrt(pair.square_a * pair.square_b))
    yield Measurement(metrics[2], cosine, stderr=_stderr(pair, error, lambda a, b, p: p / np.sqrt(a * b)), n=n, **where)


def _distance(a: np.ndarray, b: np.ndarray, product: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(a + b - 2 * product, 0.0))


def _stderr(pair: Pair, projection: float, statistic: Callable[..., np.ndarray]) -> float | None:
    """Jackknife over parts of the texts, and the error of the projection; None where the jackknife has no value."""
    from trace_offline.estimators.subsampling import jackknife_stderr

    if pair.distance == 0:
        return 0.0
    if pair.left_out is None:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(*pair.left_out)
    if not np.isfinite(values).all():
        return None
    return math.hypot(float(jackknife_stderr(values)), projection)

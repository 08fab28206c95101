"""How far the weights moved: distance and angle to the first, the previous and the final checkpoint, by part.

All weights of a checkpoint are kept when the network is small (``max_exact_parameters``). Of a larger one, each part
(layer × component) is kept as its exact norm and a short random projection that is the same for every checkpoint;
distances and cosines are then estimates, with standard errors. Matrices are compared by CKA and PWCCA as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from trace_offline.analyzers._matrix_similarity import keep_matrices, similarity_numbers
from trace_offline.analyzers._measurements import missing
from trace_offline.analyzers._vector_change import (
    EXACT,
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
from trace_offline.analyzers.base import Context, Extract, MetricSpec, Need, SeriesAnalyzer, SeriesContext
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Measurement, Result
from trace_offline.estimators.sketch import CountSketch, seed_for

if TYPE_CHECKING:
    from torch import Tensor


class WeightChangeAnalyzer(SeriesAnalyzer):
    """Distance, cosine and update-to-weight ratio of every part of the network along the run."""

    name = "weight_change"
    version = "1"
    summary = (
        "distance, cosine, CKA and PWCCA of the weights to first, previous and final checkpoint, by layer × component"
    )
    reference = (
        "Zhang, Bengio & Singer 2019, arXiv:1902.01996 (distance from the start, by layer); Charikar et al. 2002 and "
        "Weinberger et al. 2009, arXiv:0902.2206 (count sketch, for networks too large to keep); Kornblith et al. "
        "2019, arXiv:1905.00414 (CKA); Morcos et al. 2018, arXiv:1806.05759 (PWCCA)"
    )
    needs = frozenset({Need.WEIGHTS})
    metrics = (
        MetricSpec("distance", "weight units", "Euclidean distance between the weights of two checkpoints"),
        MetricSpec("relative_distance", "1", "distance over the norm of the weights there (first, final)"),
        MetricSpec("cosine", "1", "cosine of the angle between the weights of two checkpoints"),
        MetricSpec("update_to_weight_ratio", "1", "distance to the previous checkpoint over the norm there"),
        MetricSpec("update_to_weight_ratio_per_step", "1 / step", "the same over the training steps in between"),
        MetricSpec("weight_cka", "1", "linear CKA of the matrices: 1 equal up to rotation, shift and scale"),
        MetricSpec("weight_cka_debiased", "1", "the same from unbiased estimates: about 0 for unrelated matrices"),
        MetricSpec("weight_pwcca", "1", "projection-weighted canonical correlation: 1 equal up to a linear map"),
        MetricSpec("weight_pwcca_chance", "1", "the same with the samples of the other matrix in random order"),
    )

    class Params(BaseParams):
        """When to project, and how coarsely."""

        max_exact_parameters: int = Field(
            10_000_000, ge=0, description="networks up to this many parameters are kept as they are (4 bytes each)"
        )
        projection_size: int = Field(
            4096, ge=16, le=1 << 20, description="numbers kept of each part of a larger network; a power of 2"
        )
        matrices: bool = Field(True, description="also CKA and PWCCA of the matrices")
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
        return dict(params.model_dump(mode="json", include={"max_exact_parameters", "projection_size", "matrix_rows"}))

    def extract(self, context: Context) -> Mapping[str, Tensor]:
        """``exact/part`` (all entries) or ``sketch/part`` with ``size/part`` (entries, squared norm), for each part.

        And where its matrices are in it, or some rows of them (``keep_matrices``).

        Raises NotApplicable for a network without floating-point parameters.
        """
        import torch

        from trace_offline.activations.components import parameter_groups
        from trace_offline.analyzers._matrix_numbers import convolution_weights

        groups = parameter_groups(context.model)
        if not groups:
            raise NotApplicable("not applicable because the network has no floating-point parameters")
        parameters = context.model.parameters_by_name()
        total = sum(parameters[name].numel() for names in groups.values() for name in names)
        size = context.params.projection_size
        convolutions = convolution_weights(context.model.module)
        found: dict[str, Tensor] = {}
        for place, names in groups.items():
            tensors = [parameters[name].detach() for name in names]
            n = sum(tensor.numel() for tensor in tensors)
            key = part_key(place)
            whole = total <= context.params.max_exact_parameters or n <= size
            found |= keep_matrices(
                key, dict(zip(names, tensors, strict=True)), convolutions, whole=whole,
                most_rows=context.params.matrix_rows, seed=context.seed,
            )  # fmt: skip
            if whole:
                flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
                # Half precision is widened without loss.
                found[EXACT + key] = flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32).cpu()
                continue
            # A projection of its own for every part, so that errors are independent and add up in squares.
            sketch = CountSketch(size, seed_for(context.seed, key))
            for tensor in tensors:
                sketch.add(tensor)
            square = sum(float(tensor.double().square().sum()) for tensor in tensors)
            found[SKETCH + key] = torch.from_numpy(sketch.values)
            found[SIZE + key] = torch.tensor([n, square], dtype=torch.float64)
        return found

    def compare(self, series: SeriesContext) -> Iterator[tuple[int, Result]]:
        """Every part, every layer (component ``all``) and the network, to the first, previous and final checkpoint.

        One part at a time: four checkpoints' weights of one part are held in memory.
        """
        extracts, params = series.extracts, series.params
        totals: dict[tuple[int, str], dict[int | None, Pair]] = {}
        for part in parts_of(extracts):
            place = part_place(part)
            where = {"layer": place[0], "component": place[1]}
            loaded = pairs_of(extracts, partial(load_part, part=part, matrices=params.matrices))
            for index, label, one, other in loaded:
                pair = compare_vectors(one, other, part, "weights")
                yield from _numbers(extracts, index, label, pair, place[0], place[1])
                matrices = similarity_numbers(
                    one.matrices if one else {}, other.matrices if other else {}, where, label, "weight_",
                    series.seed, per_matrix=params.per_matrix,
                )  # fmt: skip
                yield from ((extracts[index].position, item) for item in matrices)
                layers = totals.setdefault((index, label), {})
                for layer in {place[0], None}:
                    layers[layer] = layers[layer] + pair if layer in layers else pair
        for (index, label), layers in totals.items():
            for layer, pair in layers.items():
                yield from _numbers(extracts, index, label, pair, layer, "all")


def _numbers(
    extracts: tuple[Extract, ...], index: int, label: str, pair: Pair, layer: int | None, component: str
) -> Iterator[tuple[int, Result]]:
    where: dict[str, Any] = {"layer": layer, "component": component}
    position = extracts[index].position
    update = label == "previous"
    relative = "update_to_weight_ratio" if update else "relative_distance"
    labelled = where | {"label": label}
    if pair.reason is not None:
        for metric in ("distance", "cosine", relative):
            yield position, missing(metric, pair.reason, pair.n, **(where if metric.startswith("update") else labelled))
        if update:
            yield position, missing("update_to_weight_ratio_per_step", pair.reason, pair.n, **where)
        return
    distance = math.sqrt(pair.distance)
    # What was not projected has no error; a distance of 0 between two sketches has none either.
    error = math.sqrt(pair.variance) / (2 * distance) if distance else 0.0
    stderr = None if pair.exact else error
    yield position, Measurement("distance", distance, stderr=stderr, n=pair.n, **labelled)
    cosine = pair.cosine()
    if cosine is None:
        yield position, missing("cosine", "all weights are 0 in one of the two: there is no angle", pair.n, **labelled)
    else:
        norms = math.sqrt(pair.square_a * pair.square_b)
        spread = None if pair.exact else math.sqrt(pair.variance) / (2 * norms)
        yield position, Measurement("cosine", cosine, stderr=spread, n=pair.n, **labelled)
    yield from ((position, item) for item in _ratios(extracts, index, pair, distance, stderr, relative, where, label))


def _ratios(
    extracts: tuple[Extract, ...],
    index: int,
    pair: Pair,
    distance: float,
    stderr: float | None,
    metric: str,
    where: dict[str, Any],
    label: str,
) -> Iterator[Result]:
    """The distance in units of the norm it is measured from; for the previous checkpoint also per step."""
    update = label == "previous"
    fields = where if update else where | {"label": label}
    per_step = "update_to_weight_ratio_per_step"
    norm = math.sqrt(pair.square_b)
    if norm == 0:
        reason = f"all weights are 0 in the {label} checkpoint"
        yield missing(metric, reason, pair.n, **fields)
        if update:
            yield missing(per_step, reason, pair.n, **fields)
        return
    yield Measurement(metric, distance / norm, stderr=None if stderr is None else stderr / norm, n=pair.n, **fields)
    if not update:
        return
    now, before = extracts[index].step, extracts[index - 1].step
    if now is None or before is None or now <= before:
        yield missing(per_step, f"the steps in between are not known (step {before} to {now})", pair.n, **fields)
        return
    scale = norm * (now - before)
    yield Measurement(per_step, distance / scale, stderr=None if stderr is None else stderr / scale, n=pair.n, **fields)

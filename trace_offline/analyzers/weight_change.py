"""How far the weights moved: distance and angle to the first, the previous and the final checkpoint, by part.

All weights of a checkpoint are kept when the network is small (``max_exact_parameters``). Of a larger one, each part
(layer × component) is kept as its exact norm and a short random projection that is the same for every checkpoint;
distances and cosines are then estimates, with standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from trace_offline.analyzers._measurements import missing
from trace_offline.analyzers.base import Context, Extract, MetricSpec, Need, SeriesAnalyzer, SeriesContext
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Measurement, Result
from trace_offline.estimators.sketch import CountSketch, seed_for, squared_distance_variance

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.activations.components import Place

_EXACT, _SKETCH, _SIZE = "exact/", "sketch/", "size/"


class WeightChangeAnalyzer(SeriesAnalyzer):
    """Distance, cosine and update-to-weight ratio of every part of the network along the run."""

    name = "weight_change"
    version = "1"
    summary = "distance and cosine of the weights to the first, previous and final checkpoint, by layer and component"
    reference = (
        "Zhang, Bengio & Singer 2019, arXiv:1902.01996 (distance from the start, by layer); Charikar et al. 2002 and "
        "Weinberger et al. 2009, arXiv:0902.2206 (count sketch, for networks too large to keep)"
    )
    needs = frozenset({Need.WEIGHTS})
    metrics = (
        MetricSpec("distance", "weight units", "Euclidean distance between the weights of two checkpoints"),
        MetricSpec("relative_distance", "1", "distance over the norm of the weights there (first, final)"),
        MetricSpec("cosine", "1", "cosine of the angle between the weights of two checkpoints"),
        MetricSpec("update_to_weight_ratio", "1", "distance to the previous checkpoint over the norm there"),
        MetricSpec("update_to_weight_ratio_per_step", "1 / step", "the same over the training steps in between"),
    )

    class Params(BaseParams):
        """When to project, and how coarsely."""

        max_exact_parameters: int = Field(
            10_000_000, ge=0, description="networks up to this many parameters are kept as they are (4 bytes each)"
        )
        projection_size: int = Field(
            4096, ge=16, le=1 << 20, description="numbers kept of each part of a larger network; a power of 2"
        )

        @field_validator("projection_size")
        @classmethod
        def _power_of_two(cls, value: int) -> int:
            if value & (value - 1):
                raise ValueError("must be a power of 2")
            return value

    def extract(self, context: Context) -> Mapping[str, Tensor]:
        """``exact/part`` (all entries) or ``sketch/part`` with ``size/part`` (entries, squared norm), for each part.

        Raises NotApplicable for a network without floating-point parameters.
        """
        import torch

        from trace_offline.activations.components import parameter_groups

        groups = parameter_groups(context.model)
        if not groups:
            raise NotApplicable("not applicable because the network has no floating-point parameters")
        parameters = context.model.parameters_by_name()
        total = sum(parameters[name].numel() for names in groups.values() for name in names)
        size = context.params.projection_size
        found: dict[str, Tensor] = {}
        for place, names in groups.items():
            tensors = [parameters[name].detach() for name in names]
            n = sum(tensor.numel() for tensor in tensors)
            key = _key(place)
            if total <= context.params.max_exact_parameters or n <= size:
                flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
                # Half precision is widened without loss.
                found[_EXACT + key] = flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32).cpu()
                continue
            # A projection of its own for every part, so that errors are independent and add up in squares.
            sketch = CountSketch(size, seed_for(context.seed, key))
            for tensor in tensors:
                sketch.add(tensor)
            square = sum(float(tensor.double().square().sum()) for tensor in tensors)
            found[_SKETCH + key] = torch.from_numpy(sketch.values)
            found[_SIZE + key] = torch.tensor([n, square], dtype=torch.float64)
        return found

    def compare(self, series: SeriesContext) -> Iterator[tuple[int, Result]]:
        """Every part, every layer (component ``all``) and the network, to the first, previous and final checkpoint.

        One part at a time: four checkpoints' weights of one part are held in memory.
        """
        extracts = series.extracts
        parts = {name.split("/", 1)[1] for extract in extracts for name in extract.names()}
        totals: dict[tuple[int, str], dict[int | None, _Pair]] = {}
        for part in sorted(parts):
            place = _place(part)
            for position, label, pair in _pairs(extracts, part):
                yield from _numbers(extracts, position, label, pair, place[0], place[1])
                layers = totals.setdefault((position, label), {})
                for layer in {place[0], None}:
                    layers[layer] = layers[layer] + pair if layer in layers else pair
        for (position, label), layers in totals.items():
            for layer, pair in layers.items():
                yield from _numbers(extracts, position, label, pair, layer, "all")


@dataclass(frozen=True)
class _Pair:
    """Sums over entries a of one checkpoint and b of the one it is compared with; ``variance`` of ``distance``."""

    n: int = 0
    square_a: float = 0.0
    square_b: float = 0.0
    product: float = 0.0
    distance: float = 0.0
    variance: float = 0.0
    reason: str | None = None

    def __add__(self, other: _Pair) -> _Pair:
        return _Pair(
            self.n + other.n,
            self.square_a + other.square_a,
            self.square_b + other.square_b,
            self.product + other.product,
            self.distance + other.distance,
            self.variance + other.variance,
            self.reason or other.reason,
        )


@dataclass(frozen=True)
class _Weights:
    """One part of one checkpoint: all its entries, or a sketch of them. ``size``: entries, squared norm."""

    values: Tensor
    exact: bool
    size: tuple[int, float]


def _key(place: Place) -> str:
    return f"{'none' if place.layer is None else place.layer}.{place.component}"


def _place(key: str) -> tuple[int | None, str]:
    layer, component = key.split(".", 1)
    return (None if layer == "none" else int(layer)), component


def _pairs(extracts: tuple[Extract, ...], part: str) -> Iterator[tuple[int, str, _Pair]]:
    """Position of a checkpoint, label, and the comparison of this part."""
    last = len(extracts) - 1
    final = _load(extracts[last], part)
    first = final if last == 0 else _load(extracts[0], part)
    previous: _Weights | None = None
    for index, extract in enumerate(extracts):
        kept = {0: first, last: final}
        current = kept[index] if index in kept else _load(extract, part)
        for label, other in (("previous", previous), ("first", first), ("final", final)):
            if label == "previous" and index == 0:
                continue
            yield index, label, _compare(current, other, part)
        previous = current


def _load(extract: Extract, part: str) -> _Weights | None:
    names = extract.names()
    if _EXACT + part in names:
        values = extract.load(_EXACT + part).double()
        return _Weights(values, True, (len(values), float(values.square().sum())))
    if _SKETCH + part not in names:
        return None
    count, square = extract.load(_SIZE + part).tolist()
    return _Weights(extract.load(_SKETCH + part), False, (int(count), square))


def _compare(a: _Weights | None, b: _Weights | None, part: str) -> _Pair:
    """Both come from extracts of one set of parameters: they were kept in the same way, or differ in size."""
    layer, component = _place(part)
    if a is None or b is None:
        there = f"layer {layer} {component}" if layer is not None else component
        return _Pair(a.size[0] if a else 0, reason=f"one of the two checkpoints has no {there}")
    n = a.size[0]
    if n != b.size[0] or a.exact != b.exact or len(a.values) != len(b.values):
        return _Pair(n, reason=f"{n} parameters here and {b.size[0]} there: the network changed its shape")
    square_a, square_b = a.size[1], b.size[1]
    if not (math.isfinite(square_a) and math.isfinite(square_b)):
        return _Pair(n, reason="some weights are not finite numbers")
    distance = float((a.values - b.values).square().sum())
    if a.exact:
        # Equal weights have the product of a number with itself, so that their cosine is exactly 1.
        product = square_a if distance == 0 else float(a.values @ b.values)
        return _Pair(n, square_a, square_b, product, distance)
    # Norms are exact, so the law of cosines is far better than the product of two sketches where weights are alike.
    variance = squared_distance_variance(distance, len(a.values))
    return _Pair(n, square_a, square_b, (square_a + square_b - distance) / 2, distance, variance)


def _numbers(
    extracts: tuple[Extract, ...], index: int, label: str, pair: _Pair, layer: int | None, component: str
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
    exact = pair.variance == 0 and (distance > 0 or pair.square_a == pair.square_b)
    stderr = None if exact else error
    yield position, Measurement("distance", distance, stderr=stderr, n=pair.n, **labelled)
    norms = math.sqrt(pair.square_a * pair.square_b)
    if norms == 0:
        yield position, missing("cosine", "all weights are 0 in one of the two: there is no angle", pair.n, **labelled)
    else:
        # Cauchy-Schwarz: only rounding and the error of the projection can leave [−1, 1]
        cosine = min(1.0, max(-1.0, pair.product / norms))
        spread = None if exact else math.sqrt(pair.variance) / (2 * norms)
        yield position, Measurement("cosine", cosine, stderr=spread, n=pair.n, **labelled)
    yield from ((position, item) for item in _ratios(extracts, index, pair, distance, stderr, relative, where, label))


def _ratios(
    extracts: tuple[Extract, ...],
    index: int,
    pair: _Pair,
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

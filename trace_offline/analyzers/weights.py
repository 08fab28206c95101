"""The weights by themselves: how large, how sparse and how close to low rank each part of the network is.

One part is a layer × component (attention, MLP, norm, embedding, head …, ``activations/components.py``). Numbers over
entries (norm, sparsity) treat all tensors of a part as one vector. Numbers of singular values treat its matrices as
one block-diagonal matrix, whose singular values are those of all of them; each matrix by itself is there too, under
its name as label. Nothing is estimated, so nothing has a standard error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from trace_offline.analyzers._measurements import missing
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Array, Measurement, Result

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trace_offline.activations.components import Place

_SPARSITY = ("gini", "hoyer")
_SPECTRAL = ("spectral_norm", "stable_rank", "effective_rank", "proportional_effective_rank", "condition_number")


class WeightsAnalyzer(Analyzer):
    """Norms, sparsity and singular values of every part of the network."""

    name = "weights"
    version = "1"
    summary = "norm, sparsity, spectral norm, ranks and condition number of the weights, by layer and component"
    reference = (
        "Rudelson & Vershynin 2007 (stable rank); Roy & Vetterli 2007 (effective rank); Diehl Martinez et al. 2024, "
        "arXiv:2410.11451 (proportional effective rank); Hurley & Rickard 2009, arXiv:0811.4706 (Gini, Hoyer)"
    )
    needs = frozenset({Need.WEIGHTS})
    metrics = (
        MetricSpec("norm", "weight units", "square root of the sum of squares of all entries"),
        MetricSpec("rms", "weight units", "root mean square of the entries: the norm without the size"),
        MetricSpec("gini", "1", "Gini index of the magnitudes: 0 all equal, towards 1 few carry all"),
        MetricSpec("hoyer", "1", "Hoyer's sparsity of the entries: 0 all equal, 1 a single one"),
        MetricSpec("spectral_norm", "weight units", "largest singular value"),
        MetricSpec("stable_rank", "dimensions", "squared norm / squared spectral norm"),
        MetricSpec("effective_rank", "dimensions", "exp of the entropy of the normalised singular values"),
        MetricSpec("proportional_effective_rank", "1", "effective rank / number of singular values"),
        MetricSpec("condition_number", "1", "largest / smallest singular value"),
    )

    class Params(BaseParams):
        """How much detail."""

        per_matrix: bool = Field(True, description="also give the numbers of every matrix, under its name as label")
        spectra: bool = Field(False, description="also keep all singular values of every matrix (arrays)")

    def measure(self, context: Context) -> Iterator[Result]:
        """Numbers of every layer × component, of every layer, of the network, and of every matrix.

        Raises NotApplicable for a network without floating-point parameters.
        """
        import torch

        from trace_offline.activations.components import ALL, parameter_groups

        groups = parameter_groups(context.model)
        if not groups:
            raise NotApplicable("not applicable because the network has no floating-point parameters")
        parameters = context.model.parameters_by_name()
        convolutions = _convolution_weights(context.model.module)
        squares: dict[Place, tuple[float, int]] = {}
        with torch.no_grad():
            for place, names in groups.items():
                tensors = {name: parameters[name].detach() for name in names}
                squares[place] = _sum_of_squares(tensors.values())
                yield from _entries(list(tensors.values()), *squares[place], place, None)
                yield from _spectral(tensors, convolutions, place, context.params)
        for layer in sorted({place.layer for place in groups if place.layer is not None}):
            parts = [squares[place] for place in groups if place.layer == layer]
            yield from _size(sum(s for s, _ in parts), sum(n for _, n in parts), layer, ALL, None)
        yield from _size(sum(s for s, _ in squares.values()), sum(n for _, n in squares.values()), None, ALL, None)


def _sum_of_squares(tensors: Iterable[Tensor]) -> tuple[float, int]:
    total, count = 0.0, 0
    for tensor in tensors:
        total += float(tensor.double().square().sum())
        count += tensor.numel()
    return total, count


def _size(square: float, n: int, layer: int | None, component: str, label: str | None) -> Iterator[Result]:
    where: dict[str, object] = {"layer": layer, "component": component, "label": label}
    if not square < float("inf"):  # NaN too
        reason = "some weights are not finite numbers"
        yield missing("norm", reason, n, **where)
        yield missing("rms", reason, n, **where)
        return
    yield Measurement("norm", square**0.5, n=n, **where)  # type: ignore[arg-type]
    yield Measurement("rms", (square / n) ** 0.5, n=n, **where)  # type: ignore[arg-type]


def _entries(tensors: Sequence[Tensor], square: float, n: int, place: Place, label: str | None) -> Iterator[Result]:
    """Size and sparsity of all entries as one vector."""
    import torch

    from trace_offline.estimators.sparsity import gini, hoyer

    yield from _size(square, n, place.layer, place.component, label)
    values = torch.cat([tensor.reshape(-1) for tensor in tensors])
    for metric, function in zip(_SPARSITY, (gini, hoyer), strict=True):
        where = {"layer": place.layer, "component": place.component, "label": label}
        try:
            yield Measurement(metric, float(function(values)), n=n, **where)  # type: ignore[arg-type]
        except ValueError as error:
            yield missing(metric, str(error), n, **where)


def _spectral(
    tensors: dict[str, Tensor], convolutions: frozenset[str], place: Place, params: WeightsAnalyzer.Params
) -> Iterator[Result]:
    """Numbers of singular values: of all matrices of a part together, and of each."""
    import torch

    from trace_offline.estimators.singular_values import numerical_rank, singular_values

    every: list[Tensor] = []
    full_rank, n, broken = True, 0, None
    for name, tensor in tensors.items():
        matrices = _matrices(tensor, name in convolutions)
        if not matrices:
            continue
        n += tensor.numel()
        try:
            found = [singular_values(matrix) for matrix in matrices]
        except ValueError as error:
            broken = f"{name}: {error}"
            if params.per_matrix:
                yield from _entries([tensor], *_sum_of_squares([tensor]), place, name)
                yield from _spectral_numbers(None, False, tensor.numel(), place, name, str(error))
            continue
        precision = torch.finfo(torch.float64 if tensor.dtype == torch.float64 else torch.float32).eps
        full = all(
            numerical_rank(values, (matrix.shape[0], matrix.shape[1]), precision) == len(values)
            for values, matrix in zip(found, matrices, strict=True)
        )
        values = torch.cat(found).sort(descending=True).values
        full_rank &= full
        every.append(values.cpu())
        if params.per_matrix:
            yield from _entries([tensor], *_sum_of_squares([tensor]), place, name)
            yield from _spectral_numbers(values, full, tensor.numel(), place, name, None)
        if params.spectra:
            yield Array("singular_values", tuple(values.tolist()), place.layer, place.component, label=name)
    if every or broken:
        union = torch.cat(every).sort(descending=True).values if every and broken is None else None
        yield from _spectral_numbers(union, full_rank, n, place, None, broken)


def _spectral_numbers(
    values: Tensor | None, full_rank: bool, n: int, place: Place, label: str | None, broken: str | None
) -> Iterator[Result]:
    from trace_offline.estimators.singular_values import effective_rank, stable_rank

    where = {"layer": place.layer, "component": place.component, "label": label}
    if values is None or float(values[0]) == 0:
        for metric in _SPECTRAL:
            yield missing(metric, broken or "all weights are 0", n, **where)
        return
    rank = effective_rank(values)
    numbers = {
        "spectral_norm": float(values[0]),
        "stable_rank": stable_rank(values),
        "effective_rank": rank,
        "proportional_effective_rank": rank / len(values),
    }
    for metric, value in numbers.items():
        yield Measurement(metric, value, n=n, **where)  # type: ignore[arg-type]
    if full_rank:
        condition = float(values[0] / values[-1])
        yield Measurement("condition_number", condition, n=n, **where)  # type: ignore[arg-type]
    else:
        reason = "not of full rank within rounding: the smallest singular value cannot be told from 0"
        yield missing("condition_number", reason, n, **where)


def _matrices(tensor: Tensor, convolution: bool) -> list[Tensor]:
    """The matrices a tensor holds: itself, a kernel as [outputs, rest], or one for every leading index (experts)."""
    if tensor.ndim < 2:
        return []
    if convolution or tensor.ndim == 2:
        return [tensor.flatten(1)]
    return list(tensor.flatten(0, -3))


def _convolution_weights(module: nn.Module) -> frozenset[str]:
    from torch.nn.modules.conv import _ConvNd

    return frozenset(
        f"{name}.weight" if name else "weight" for name, item in module.named_modules() if isinstance(item, _ConvNd)
    )

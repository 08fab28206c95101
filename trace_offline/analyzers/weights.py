"""The weights by themselves: how large, how sparse and how close to low rank each part of the network is.

One part is a layer × component (attention, MLP, norm, embedding, head …, ``activations/components.py``). Numbers over
entries (norm, sparsity) treat all tensors of a part as one vector. Numbers of singular values treat its matrices as
one block-diagonal matrix, whose singular values are those of all of them; each matrix by itself is there too, under
its name as label. Nothing is estimated, so nothing has a standard error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from trace_offline.analyzers._matrix_numbers import (
    convolution_weights,
    sparsity_numbers,
    spectra_of,
    spectral_numbers,
    union,
)
from trace_offline.analyzers._measurements import missing
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Array, Measurement, Result

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.activations.components import Place


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
        convolutions = convolution_weights(context.model.module)
        squares: dict[Place, tuple[float, int]] = {}
        with torch.no_grad():
            for place, names in groups.items():
                tensors = {name: parameters[name].detach() for name in names}
                squares[place] = _sum_of_squares(tensors.values())
                yield from _part(tensors, squares[place], convolutions, place, context.params)
        for layer in sorted({place.layer for place in groups if place.layer is not None}):
            parts = [squares[place] for place in groups if place.layer == layer]
            yield from _size(sum(s for s, _ in parts), sum(n for _, n in parts), {"layer": layer, "component": ALL})
        parts = list(squares.values())
        yield from _size(sum(s for s, _ in parts), sum(n for _, n in parts), {"component": ALL})


def _sum_of_squares(tensors: Iterable[Tensor]) -> tuple[float, int]:
    total, count = 0.0, 0
    for tensor in tensors:
        total += float(tensor.double().square().sum())
        count += tensor.numel()
    return total, count


def _size(square: float, n: int, where: Mapping[str, Any]) -> Iterator[Result]:
    if not square < float("inf"):  # NaN too
        reason = "some weights are not finite numbers"
        yield missing("norm", reason, n, **where)
        yield missing("rms", reason, n, **where)
        return
    yield Measurement("norm", square**0.5, n=n, **where)
    yield Measurement("rms", (square / n) ** 0.5, n=n, **where)


def _part(
    tensors: Mapping[str, Tensor],
    square: tuple[float, int],
    convolutions: frozenset[str],
    place: Place,
    params: WeightsAnalyzer.Params,
) -> Iterator[Result]:
    """All numbers of one part, and of each of its matrices."""
    import torch

    where = {"layer": place.layer, "component": place.component}
    yield from _size(*square, where)
    yield from sparsity_numbers(torch.cat([tensor.reshape(-1) for tensor in tensors.values()]), where)
    spectra = spectra_of(tensors, convolutions)
    for name, spectrum in spectra.items():
        labelled = where | {"label": name}
        if params.per_matrix:
            yield from _size(*_sum_of_squares([tensors[name]]), labelled)
            yield from sparsity_numbers(tensors[name], labelled)
            yield from spectral_numbers(spectrum, labelled)
        if params.spectra and spectrum.values is not None:
            yield Array("singular_values", tuple(spectrum.values.tolist()), place.layer, place.component, label=name)
    together = union(spectra)
    if together is not None:
        yield from spectral_numbers(together, where)

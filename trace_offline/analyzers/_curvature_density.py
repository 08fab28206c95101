"""Metrics and arrays of a spectral quadrature, the same for the whole Hessian and for a block of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch

from trace_offline.core.types import Array, Measurement, Result

if TYPE_CHECKING:
    from trace_offline.estimators.slq import Estimate, Quadrature

DISTRIBUTION = ("effective_rank", "negative_mass", "negative_fraction_lower", "negative_fraction_upper")

# Below this share of the largest |λ| the sign of an eigenvalue is rounding.
_ZERO = {torch.float32: 1e-5, torch.float64: 1e-12}


class Grid(Protocol):
    """The parameters that say how a density is drawn."""

    @property
    def grid_points(self) -> int: ...

    @property
    def broadening(self) -> float: ...


def distribution(
    quadrature: Quadrature, params: Grid, dtype: torch.dtype, component: str, layer: int | None = None
) -> Iterator[Result]:
    """Effective rank and negative mass with errors, bounds of the negative share, the density and what it is from."""

    def number(metric: str, value: float | None, stderr: float | None = None, reason: str | None = None) -> Measurement:
        return Measurement(
            metric, value, stderr, quadrature.probes, layer=layer, component=component, reason=reason
        )  # fmt: skip

    def array(name: str, values: list[float], label: str | None = None) -> Array:
        return Array(name, tuple(values), layer=layer, component=component, label=label)

    for metric, function in (
        ("negative_mass", quadrature.negative_share),
        ("effective_rank", quadrature.effective_rank),
    ):
        try:
            found: Estimate = function()
        except ZeroDivisionError as error:
            yield number(metric, None, reason=str(error))
        else:
            yield number(metric, found.value, found.stderr)
    low, high = quadrature.mass_below_bounds(-_ZERO[dtype] * quadrature.scale)
    yield number("negative_fraction_lower", low)
    yield number("negative_fraction_upper", high)
    grid, density, sigma = quadrature.density(params.grid_points, params.broadening)
    yield array("density_grid", grid.tolist())
    yield array("density", density.tolist())
    yield array("density_sigma", [sigma])
    for probe, (nodes, weights) in enumerate(quadrature.measures(), start=1):
        yield array("slq_nodes", nodes.tolist(), str(probe))
        yield array("slq_weights", weights.tolist(), str(probe))

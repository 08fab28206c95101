"""How the search in all blocks fits into the memory the user allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trace_offline.analyzers._curvature_batch import GIB
from trace_offline.analyzers._curvature_plan import WORK_VECTORS, BasisPlan, plan_basis
from trace_offline.core.errors import NotApplicable

if TYPE_CHECKING:
    from trace_offline.activations.components import Place
    from trace_offline.analyzers.hessian_blocks import HessianBlocksAnalyzer

_LEAST_TOGETHER = 2
_BESIDE_PROBES = 3


@dataclass(frozen=True)
class BlocksPlan:
    """How the blocks are searched.

    ``bases``: of each block whose vectors fit. ``too_large``: of the others, why. ``together``: probes of the whole
    held at once beside the eigenvectors of all blocks; 0: no vectors of the whole fit, so that each block is finished
    by itself, with probes of its own. ``room``: numbers that the bases of several blocks' quadratures may have
    together. ``bytes``: memory of all vectors.
    """

    bases: Mapping[Place, BasisPlan]
    too_large: Mapping[Place, str]
    together: int
    room: int
    bytes: int


def plan_blocks(
    orders: Mapping[Place, int], itemsize: int, params: HessianBlocksAnalyzer.Params, free: int | None = None
) -> BlocksPlan:
    """The best search within ``max_basis_gb`` (and ``free`` bytes, where they are fewer); ``orders``: place → n_b.

    With room for vectors of the whole, all blocks share their probes: the k + 1 eigenvectors of every block make k + 1
    vectors of the whole, a probe and its product two. Without, nothing longer than a block is held.

    Raises:
        NotApplicable: not one block fits.

    """
    bases: dict[Place, BasisPlan] = {}
    too_large: dict[Place, str] = {}
    for place, order in orders.items():
        try:
            bases[place] = plan_basis(
                order, itemsize, k=params.k, smallest=1, max_steps=params.max_steps,
                slq_steps=max(params.slq_steps, 1), max_basis_gb=params.max_basis_gb, free=free,
            )  # fmt: skip
        except NotApplicable as error:
            too_large[place] = error.message.removeprefix("not applicable because ")
    if not bases:
        raise NotApplicable(f"not applicable because not even the smallest block fits: {min(too_large.values())}")
    vector = sum(orders.values()) * itemsize
    allowed = int(params.max_basis_gb * GIB) if free is None else min(int(params.max_basis_gb * GIB), free)
    held = params.k + 1
    rest = allowed // vector - held - _BESIDE_PROBES
    together = min(params.trace_probes, rest // 2)
    if too_large or together < _LEAST_TOGETHER:
        return BlocksPlan(bases, too_large, 0, 0, max(plan.bytes for plan in bases.values()))
    room = allowed // itemsize - sum(orders.values()) * (held + WORK_VECTORS)
    probes = (2 * together + held + _BESIDE_PROBES) * vector
    search = max(plan.bytes for plan in bases.values()) + held * vector
    return BlocksPlan(bases, too_large, together, max(room, 0), min(max(probes, search), allowed))

"""How a search for eigenvalues fits into memory: full basis, restarts, or fewer vectors; on the device or the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from trace_offline.activations.memory import free_memory, is_halved
from trace_offline.analyzers._curvature_batch import GIB
from trace_offline.core.errors import NotApplicable
from trace_offline.estimators.operators import HostVectors, SymmetricOperator
from trace_offline.estimators.thick_restart import LEAST_EXTRA

WORK_VECTORS = 5
"""Vectors in use beside a basis and the pairs found: of a product, of its orthogonalisation."""

RESTARTED_PRODUCTS = 4
"""With restarts the search may take this many times ``max_steps``: it forgets what it has compressed away."""

_USER = "max_basis_gb"
_FREE = "free memory"


@dataclass(frozen=True)
class BasisPlan:
    """``k``: largest eigenvalues looked for. ``basis``: vectors held. ``max_steps``: products. ``slq_steps``.

    ``vectors``: those in memory at once, of ``vector_bytes`` each. ``limit``: what bounds them. ``host``: they live in
    host memory, because the device has no room for them.
    """

    k: int
    basis: int
    max_steps: int
    slq_steps: int
    vectors: int
    vector_bytes: int
    limit: str = _USER
    host: bool = False

    @property
    def bytes(self) -> int:
        """Memory of all vectors."""
        return self.vectors * self.vector_bytes

    @property
    def fewer(self) -> str:
        """Why there are no more than ``k`` eigenvalues."""
        advice = "; raise it" if self.limit == _USER else ""
        return f"{self.limit} has room for the vectors of {self.k} eigenvalues only{advice}"


def plan_basis(
    n: int,
    itemsize: int,
    *,
    k: int,
    smallest: int,
    max_steps: int,
    slq_steps: int,
    max_basis_gb: float,
    free: int | None = None,
    instead: str = "",
) -> BasisPlan:
    """The best search that stays within ``max_basis_gb`` (and ``free`` bytes, where they are fewer).

    In memory at once: the basis and one vector more, the pairs found (k + smallest), some five work vectors. When
    ``max_steps`` vectors do not fit, a smaller basis is restarted; when not even that fits, fewer eigenvalues are
    looked for, down to one; a quadrature has no more steps than the basis has vectors. ``instead``: what else the user
    could do, for the message.

    Raises:
        NotApplicable: not even one eigenvalue fits.

    """
    allowed = int(max_basis_gb * GIB)
    limit = _USER if free is None or free >= allowed else _FREE
    affordable = (allowed if free is None else min(allowed, free)) // (n * itemsize)
    wanted = min(max_steps, n)
    for rank in range(min(k, n), 0, -1):
        held = min(rank + smallest, n)
        beside = held + WORK_VECTORS + 1
        room = affordable - beside
        if room >= wanted:
            return BasisPlan(
                rank, wanted, wanted, min(slq_steps, room), wanted + beside, n * itemsize, limit
            )  # fmt: skip
        if room >= min(rank + smallest + LEAST_EXTRA, n):
            products = max_steps * RESTARTED_PRODUCTS
            return BasisPlan(rank, room, products, min(slq_steps, room), room + beside, n * itemsize, limit)
    least = min(1 + smallest + LEAST_EXTRA, n) + min(1 + smallest, n) + WORK_VECTORS + 1
    found = f"max_basis_gb is {max_basis_gb:g}: raise max_basis_gb"
    if limit == _FREE:
        found = f"only {(free or 0) / GIB:.3g} GiB are free: lower max_graph_gb, or take a device with more memory"
    raise NotApplicable(
        f"not applicable because one eigenvalue of {n:,} parameters needs at least {least} vectors, "
        f"{least * n * itemsize / GIB:.3g} GiB, and {found}{instead}"
    )


@dataclass(frozen=True)
class Placement:
    """Where vectors go. ``free``: None where what was asked fits; else the bytes there are, and less must be asked."""

    host: bool
    free: int | None = None


def place_for(needed: int, device: torch.device, reserve: int) -> Placement:
    """The device when ``needed`` bytes fit there beside ``reserve``, else the host, else the larger of the two."""
    memory = free_memory(device)
    if memory.device is None:
        return Placement(host=False)
    room = max(memory.device - reserve, 0)
    if is_halved():
        room //= 2
    if needed <= room:
        return Placement(host=False)
    if memory.host is None or needed <= memory.host:
        return Placement(host=True)
    return Placement(host=memory.host > room, free=max(memory.host, room))


def settle(
    plan: BasisPlan, operator: SymmetricOperator, reserve: int, again: Callable[[int | None], BasisPlan]
) -> tuple[BasisPlan, SymmetricOperator]:
    """The plan as the memory that is free now allows, and the operator with its vectors there.

    The user's bound decides what is computed; the device decides only where, as long as either it or the host has that
    much. ``reserve``: bytes that a product takes on the device for itself. ``again``: the plan for fewer bytes.
    """
    where = place_for(plan.bytes, operator.device, reserve)
    if where.free is not None:
        plan = again(where.free)
    return replace(plan, host=where.host), vectors_at(operator, where.host)


def vectors_at(operator: SymmetricOperator, host: bool) -> SymmetricOperator:
    """The operator itself, or with its vectors on the host."""
    return HostVectors(operator) if host else operator

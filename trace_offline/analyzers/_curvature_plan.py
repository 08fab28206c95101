"""How a search for eigenvalues fits into the memory the user allows: full basis, restarts, or fewer vectors."""

from __future__ import annotations

from dataclasses import dataclass

from trace_offline.analyzers._curvature_batch import GIB
from trace_offline.core.errors import NotApplicable
from trace_offline.estimators.thick_restart import LEAST_EXTRA

_WORK_VECTORS = 5

RESTARTED_PRODUCTS = 4
"""With restarts the search may take this many times ``max_steps``: it forgets what it has compressed away."""


@dataclass(frozen=True)
class BasisPlan:
    """``k``: largest eigenvalues looked for. ``basis``: vectors held. ``max_steps``: products. ``slq_steps``."""

    k: int
    basis: int
    max_steps: int
    slq_steps: int


def plan_basis(
    n: int, itemsize: int, *, k: int, smallest: int, max_steps: int, slq_steps: int, max_basis_gb: float
) -> BasisPlan:
    """The best search that stays within ``max_basis_gb``.

    In memory at once: the basis and one vector more, the pairs found (k + smallest), some five work vectors. When
    ``max_steps`` vectors do not fit, a smaller basis is restarted; when not even that fits, fewer eigenvalues are
    looked for, down to one; a quadrature has no more steps than the basis has vectors.

    Raises:
        NotApplicable: not even one eigenvalue fits.

    """
    affordable = int(max_basis_gb * GIB) // (n * itemsize)
    wanted = min(max_steps, n)
    for rank in range(min(k, n), 0, -1):
        held = min(rank + smallest, n)
        room = affordable - held - _WORK_VECTORS - 1
        if room >= wanted:
            return BasisPlan(rank, wanted, wanted, min(slq_steps, room))
        if room >= min(rank + smallest + LEAST_EXTRA, n):
            return BasisPlan(rank, room, max_steps * RESTARTED_PRODUCTS, min(slq_steps, room))
    least = min(1 + smallest + LEAST_EXTRA, n) + min(1 + smallest, n) + _WORK_VECTORS + 1
    raise NotApplicable(
        f"not applicable because one eigenvalue of {n:,} parameters needs at least {least} vectors, "
        f"{least * n * itemsize / GIB:.3g} GiB, and max_basis_gb is {max_basis_gb:g}: raise max_basis_gb"
    )

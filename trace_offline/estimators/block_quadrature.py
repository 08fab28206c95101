"""Spectral quadratures of several operators side by side, so that one round of products can serve them all.

Powers of a diagonal block are no parts of the powers of the whole matrix: ``(H v)_b = H_bb v_b + Σ_{c≠b} H_bc v_c``.
Random vectors cancel that sum on average from what is linear in H (the trace) or a product of two (its square), not
from the higher powers that a density is made of. Each block therefore has products of its own. What they can share is
the work before the product, building the gradient's graph: ``products`` is asked for all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from trace_offline.estimators.krylov import Floats, Krylov
from trace_offline.estimators.operators import SymmetricOperator
from trace_offline.estimators.slq import Quadrature, probe_space, quadrature_of

Products = Callable[[Sequence[int], Sequence[Tensor]], Sequence[Tensor]]


def block_quadratures(
    operators: Sequence[SymmetricOperator],
    products: Products,
    *,
    probes: int,
    steps: Sequence[int],
    generators: Sequence[torch.Generator],
    exact: Sequence[tuple[Floats, Tensor]],
    room: int,
) -> list[Quadrature]:
    """``spectral_quadrature`` of each operator, in rounds of one product each.

    Args:
        operators: blocks of one matrix, or any others.
        products: (which operators, one vector ``[n_b]`` for each) → their products.
        probes: random vectors for each, at least 1.
        steps: products per probe, of each.
        generators: source of the probes of each; the numbers do not depend on who else is there.
        exact: known eigenvalues ``[d_b]`` and vectors ``[d_b, n_b]`` of each.
        room: numbers that the bases held at once may have; an operator whose basis alone has more goes alone.

    Raises:
        ValueError: no probes or no steps.
        NonFiniteError: a product is NaN or infinite.

    """
    if probes < 1 or min(steps, default=1) < 1:
        raise ValueError(f"expected probes and steps >= 1, found {probes} and {list(steps)}")
    spaces: list[list[Krylov]] = [[] for _ in operators]
    before = [operator.products for operator in operators]
    costs = [(count + 1) * operator.n for count, operator in zip(steps, operators, strict=True)]
    random = [place for place, (values, _) in enumerate(exact) if len(values) < operators[place].n]
    for group in _groups(random, costs, room):
        for _ in range(probes):
            active = {
                place: probe_space(operators[place], steps[place], generators[place], *exact[place]) for place in group
            }
            for place, space in active.items():
                spaces[place].append(space)
            while active:
                places = list(active)
                images = products(places, [active[place].pending for place in places])
                for place, image in zip(places, images, strict=True):
                    space = active[place]
                    if not space.absorb(image.to(operators[place].device)) or space.full:
                        space.release()
                        del active[place]
    return [
        quadrature_of(operator, found, np.asarray(known[0], dtype=np.float64), operator.products - first)
        for operator, found, known, first in zip(operators, spaces, exact, before, strict=True)
    ]


def _groups(places: Sequence[int], costs: Sequence[int], room: int) -> list[list[int]]:
    """In order, as many together as fit."""
    groups: list[list[int]] = []
    used = 0
    for place in places:
        if not groups or used + costs[place] > room:
            groups.append([])
            used = 0
        groups[-1].append(place)
        used += costs[place]
    return groups

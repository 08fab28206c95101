"""Both ends of a spectrum in bounded memory: thick-restart Lanczos.

When the basis is full it is compressed to its best Ritz vectors and the search goes on from there, so that a model
whose full basis does not fit still gets its eigenvalues, for more products.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trace_offline.estimators.hvp import NonFiniteError
from trace_offline.estimators.krylov import Floats
from trace_offline.estimators.lanczos import Eigenpairs, Spectrum, extreme_eigenpairs, ritz_accuracy, wanted_places
from trace_offline.estimators.operators import SymmetricOperator, orthogonalize, standard_normal

LEAST_EXTRA = 6
"""Vectors a restarted basis must hold beyond the wanted ones."""

_CHUNK = 1 << 16


def bounded_eigenpairs(
    operator: SymmetricOperator,
    *,
    largest: int,
    smallest: int = 0,
    tolerance: float = 1e-3,
    max_steps: int = 150,
    max_basis: int | None = None,
    generator: torch.Generator,
    locked: Eigenpairs | None = None,
) -> Spectrum:
    """``extreme_eigenpairs`` with at most ``max_basis`` basis vectors; restarts when ``max_steps`` need more.

    Raises ValueError as ``extreme_eigenpairs`` does, and when ``max_basis`` is below ``largest + smallest + 6``.
    """
    if max_basis is None or max_basis >= min(max_steps, operator.n):
        return extreme_eigenpairs(
            operator, largest=largest, smallest=smallest, tolerance=tolerance, max_steps=max_steps,
            generator=generator, locked=locked,
        )  # fmt: skip
    return restarted_eigenpairs(
        operator, largest=largest, smallest=smallest, tolerance=tolerance, max_products=max_steps,
        capacity=max_basis, generator=generator, locked=locked,
    )  # fmt: skip


def restarted_eigenpairs(
    operator: SymmetricOperator,
    *,
    largest: int,
    smallest: int = 0,
    tolerance: float = 1e-3,
    max_products: int = 600,
    capacity: int,
    generator: torch.Generator,
    locked: Eigenpairs | None = None,
) -> Spectrum:
    """Thick-restart Lanczos (Wu & Simon, SIAM J. Matrix Anal. Appl. 22, 2000) with full re-orthogonalisation.

    ``H Q_m = Q_m S + β q_{m+1} e_mᵀ`` holds before and after a restart: the kept Ritz vectors and q_{m+1} are the new
    basis, S is diagonal but for its last row and column. Convergence is judged as in ``extreme_eigenpairs``.

    Args:
        operator: n, dtype, device, product.
        largest: how many at the upper end.
        smallest: how many at the lower end.
        tolerance: relative accuracy of the eigenvalues.
        max_products: most products.
        capacity: most basis vectors, at least ``largest + smallest + 6`` (and one more is allocated).
        generator: source of the start vector.
        locked: pairs already found; the search goes on in their complement and the answer holds the best of both.

    Returns:
        A Spectrum; ``ritz`` are the values of the last basis, ``restarts`` how often it was compressed.

    Raises:
        ValueError: nothing wanted, or a basis too small.
        NonFiniteError: a product is NaN or infinite.

    """
    held = 0 if locked is None else len(locked)
    largest, smallest = min(largest, operator.n), min(smallest, operator.n)
    capacity = min(capacity, operator.n - held)
    least = min(largest + smallest + LEAST_EXTRA, operator.n - held)
    if largest < 0 or smallest < 0 or largest + smallest == 0 or max_products < 1 or tolerance <= 0:
        raise ValueError(
            "expected largest + smallest >= 1, max_products >= 1 and tolerance > 0, found "
            f"largest={largest}, smallest={smallest}, max_products={max_products}, tolerance={tolerance}"
        )
    if capacity < least:
        raise ValueError(
            f"expected a basis of at least {least} vectors for {largest} + {smallest} eigenvalues, found {capacity}"
        )
    search = _Restarted(operator, largest, smallest, tolerance, capacity, locked)
    return search.run(max_products, generator)


class _Restarted:
    def __init__(
        self,
        operator: SymmetricOperator,
        largest: int,
        smallest: int,
        tolerance: float,
        capacity: int,
        locked: Eigenpairs | None,
    ) -> None:
        self.operator, self.locked, self.tolerance = operator, locked, tolerance
        self.largest, self.smallest, self.capacity = largest, smallest, capacity
        self.held = None if locked is None else locked.vectors
        self.basis = torch.empty(capacity + 1, operator.n, dtype=operator.dtype, device=operator.device)
        self.inner = np.zeros((capacity, capacity))
        self.size, self.beta, self.restarts = 0, 0.0, 0
        self.scale = 0.0 if locked is None or not len(locked) else float(np.abs(locked.values).max())
        self.breakdown = max(100 * torch.finfo(operator.dtype).eps, 1e-3 * tolerance)
        # Steps after which a random direction has seen what lies beyond the wanted values (see lanczos).
        self.fresh = 1 + 1.85 * np.log(max(operator.n, 2))

    def run(self, max_products: int, generator: torch.Generator) -> Spectrum:
        start = self.operator.products
        converged, since = False, 0
        closed: Floats | None = None
        room = self.operator.n - (0 if self.held is None else len(self.held))
        if not room:
            return self._result(True, 0)
        self._random(generator)
        while self.operator.products - start < max_products:
            is_open = self._step()
            since += 1
            values, _, order, converged = self._pairs()
            if self.size == room:
                converged = True
                break
            # One open space from one vector is the ordinary case; after a closure, or beside locked pairs, a random
            # direction must have had the time to show what lies beyond.
            if converged and is_open and (since >= self.fresh or (self.locked is None and closed is None)):
                break
            if not is_open:
                wanted = values[order][wanted_places(len(values), self.largest, self.smallest)]
                slack = self.tolerance * self.scale
                if (
                    converged
                    and closed is not None
                    and len(closed) == len(wanted)
                    and np.abs(closed - wanted).max() <= slack
                ):
                    break  # a new direction brought an invariant subspace, but nothing better
                closed, since, converged = wanted, 0, False
            if self.size == self.capacity:
                self._restart()
            if not is_open:
                self._random(generator)
        return self._result(converged, self.operator.products - start)

    def _random(self, generator: torch.Generator) -> None:
        spanned = self.basis[: self.size]
        vector = orthogonalize(standard_normal(self.operator, generator), self.held, spanned)
        vector = orthogonalize(vector / torch.linalg.vector_norm(vector), self.held, spanned)
        self.basis[self.size] = vector / torch.linalg.vector_norm(vector)

    def _step(self) -> bool:
        """One product; False when it left nothing outside the basis."""
        place = self.size
        image = orthogonalize(self.operator.product(self.basis[place]), self.held, passes=1)
        spanned = self.basis[: place + 1]
        along = spanned @ image
        rest = orthogonalize(torch.addmv(image, spanned.T, along, alpha=-1.0), self.held, spanned)
        coefficients = along.double().cpu().numpy()
        self.beta = float(torch.linalg.vector_norm(rest))
        if not (np.isfinite(coefficients).all() and np.isfinite(self.beta)):
            raise NonFiniteError(f"a Hessian-vector product is not finite (step {place + 1} of Lanczos)")
        self.inner[place, : place + 1] = self.inner[: place + 1, place] = coefficients
        self.size += 1
        self.scale = max(self.scale, float(np.abs(coefficients).max()), self.beta)
        if self.beta <= self.breakdown * self.scale:
            self.beta = 0.0
            return False
        self.basis[self.size] = rest / self.beta
        return True

    def _restart(self) -> None:
        """Keep the wanted Ritz vectors and half of the room beyond them, split between the ends; go on behind them."""
        values, vectors = np.linalg.eigh(self.inner[: self.size, : self.size])
        order = np.argsort(-values, kind="stable")
        extra = max((self.size - self.largest - self.smallest - 2) // 2, 0)
        top = self.largest + (extra if not self.smallest else extra - extra // 3)
        bottom = self.smallest + (extra // 3 if self.smallest else 0)
        if not self.largest:
            top, bottom = 0, self.smallest + extra
        places = order[wanted_places(self.size, top, bottom)][: self.size - 1]
        mix = torch.as_tensor(vectors[:, places].T.copy(), dtype=self.basis.dtype, device=self.basis.device)
        for first in range(0, self.operator.n, _CHUNK):
            part = slice(first, first + _CHUNK)
            self.basis[: len(places), part] = mix @ self.basis[: self.size, part]
        self.basis[len(places)] = self.basis[self.size]
        self.inner[:] = 0
        self.inner[np.arange(len(places)), np.arange(len(places))] = values[places]
        self.size = len(places)
        self.restarts += 1

    def _ritz(self) -> tuple[Floats, Floats, Floats]:
        values, vectors = np.linalg.eigh(self.inner[: self.size, : self.size])
        residuals = self.beta * np.abs(vectors[-1]) if self.size else np.zeros(0)
        # Rounding of the products shows as a floor that no residual of a recurrence knows of.
        floor = 4 * torch.finfo(self.operator.dtype).eps * self.scale
        return values, vectors, np.hypot(residuals, floor)

    def _pairs(self) -> tuple[Floats, Floats, NDArray[np.intp], bool]:
        """Values and residuals of all, their descending order, and whether the wanted ones converged."""
        values, _, residuals = self._ritz()
        if self.locked is not None:
            values = np.concatenate((values, self.locked.values))
            residuals = np.concatenate((residuals, self.locked.residuals))
        order = np.argsort(-values, kind="stable")
        if len(values) < max(self.largest, self.smallest):
            return values, residuals, order, False
        _, good = ritz_accuracy(values[order], residuals[order], self.tolerance, self.largest, self.smallest)
        wanted = wanted_places(len(values), self.largest, self.smallest)
        return values, residuals, order, bool(good[wanted].all())

    def _result(self, converged: bool, products: int) -> Spectrum:
        values, residuals, order, _ = self._pairs()
        errors, good = ritz_accuracy(values[order], residuals[order], self.tolerance, self.largest, self.smallest)
        wanted = wanted_places(len(values), self.largest, self.smallest)
        places = order[wanted]
        pairs = Eigenpairs(
            values[places], residuals[places], errors[wanted], good[wanted] & converged, self._vectors(places)
        )
        return Spectrum(
            pairs=pairs,
            n_largest=min(self.largest, len(values)),
            n_smallest=min(self.smallest, len(values)),
            ritz=values[order],
            ritz_residuals=residuals[order],
            products=products,
            complete=not self.restarts and self.size == self.operator.n - (0 if self.held is None else len(self.held)),
            restarts=self.restarts,
        )

    def _vectors(self, places: NDArray[np.intp]) -> Tensor:
        _, vectors, _ = self._ritz()
        coefficients = np.zeros((len(places), self.size))
        own = places < self.size
        coefficients[own] = vectors[:, places[own]].T
        rows = torch.as_tensor(coefficients, dtype=self.basis.dtype, device=self.basis.device) @ self.basis[: self.size]
        if self.locked is not None:
            kept = np.flatnonzero(~own)
            rows[kept] = self.locked.vectors[places[kept] - self.size]
        return rows

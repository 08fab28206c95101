"""Both ends of the spectrum of a symmetric operator by Lanczos with full re-orthogonalisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trace_offline.estimators.hvp import NonFiniteError
from trace_offline.estimators.operators import SymmetricOperator, orthogonalize, standard_normal

Floats = NDArray[np.float64]

# An eigenvalue smaller than this share of the largest is wanted only to the accuracy of one at this share: relative
# accuracy of numbers that are zero beside the largest one cannot be had, nor does anybody need it.
_SMALL = 0.01


class Krylov:
    """An orthonormal Krylov basis of an operator, grown by one product at a time.

    ``H Q_m = Q_m T_m + β_m q_{m+1} e_mᵀ`` with ``T_m`` tridiagonal (Golub & Van Loan, Matrix Computations, 10.1). Each
    new vector is orthogonalised twice against all earlier ones; without that, converged eigenvalues come back as
    copies of themselves. When the space is exhausted (β ≈ 0) the basis holds an invariant subspace and can go on with a
    fresh random vector: ``T`` then falls into blocks.

    Args:
        operator: the symmetric operator.
        capacity: most vectors the basis may hold; ``capacity + 1`` vectors ``[n]`` are allocated at once.
        breakdown: β below this share of the largest |entry| of T (and of ``scale``) counts as zero.
        deflated: ``[d, n]`` orthonormal rows, or None; the operator becomes ``P H P`` with ``P = I − Σ q qᵀ``.
        scale: size of the deflated part: beside a large eigenvalue taken out, what is left may be rounding only.

    """

    def __init__(
        self,
        operator: SymmetricOperator,
        capacity: int,
        *,
        breakdown: float,
        deflated: Tensor | None = None,
        scale: float = 0.0,
    ) -> None:
        self.operator = operator
        self.deflated = deflated
        self.dimension = operator.n - (0 if deflated is None else len(deflated))
        self.capacity = min(capacity, self.dimension)
        self._breakdown = breakdown
        self._basis = torch.empty(self.capacity + 1, operator.n, dtype=operator.dtype, device=operator.device)
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.block_starts: list[int] = []
        self.scale = scale
        self.noise = 0.0

    @property
    def size(self) -> int:
        """Vectors that have been multiplied: the order m of ``T``."""
        return len(self.alphas)

    @property
    def basis(self) -> Tensor:
        """``[m, n]``, orthonormal rows."""
        return self._basis[: self.size]

    @property
    def full(self) -> bool:
        """Whether no further product can be taken: memory used up, or the whole space spanned."""
        return self.size >= self.capacity

    def begin(self, generator: torch.Generator) -> None:
        """Start a block: a random direction, uniform on the sphere of what is not spanned yet."""
        for _ in range(8):
            vector = orthogonalize(standard_normal(self.operator, generator), self.deflated, self.basis)
            norm = float(torch.linalg.vector_norm(vector))
            if norm > 0:
                # In a complement of few dimensions little is left of the vector, and rounding of the removed part
                # weighs more: normalise, then orthogonalise once more.
                vector = orthogonalize(vector / norm, self.deflated, self.basis)
                self._basis[self.size] = vector / torch.linalg.vector_norm(vector)
                self.block_starts.append(self.size)
                return
        raise RuntimeError("no direction is left outside the Krylov space")

    def step(self) -> bool:
        """Take one product. False when it closed the space (β ≈ 0): call ``begin`` before the next step.

        Raises:
            NonFiniteError: the product is NaN or infinite.

        """
        place = self.size
        vector = self._basis[place]
        image = self.operator.product(vector)
        # First pass of the orthogonalisation, kept apart to look at its coefficients.
        spanned = self._basis[: place + 1]
        along = spanned @ orthogonalize(image, self.deflated, passes=1)
        rest = torch.addmv(image, spanned.T, along, alpha=-1.0)
        rest = orthogonalize(rest, self.deflated, spanned)
        coefficients = along.double().cpu().numpy()
        alpha = float(coefficients[-1])
        beta = float(torch.linalg.vector_norm(rest))
        if not (np.isfinite(alpha) and np.isfinite(beta)):
            raise NonFiniteError(f"a Hessian-vector product is not finite (step {place + 1} of Lanczos)")
        # Exact products of a symmetric matrix have zeros here, and β before; what is found instead is rounding.
        if place:
            coefficients[-2] -= self.betas[-1]
        self.noise = max(self.noise, float(np.linalg.norm(coefficients[:-1])))
        self.alphas.append(alpha)
        self.scale = max(self.scale, abs(alpha), beta)
        closed = beta <= self._breakdown * self.scale or self.size == self.dimension
        self.betas.append(0.0 if closed else beta)
        if not closed:
            self._basis[place + 1] = rest / beta
        return not closed

    def ritz(self, block: int = -1) -> tuple[Floats, Floats, Floats]:
        """Eigenvalues ``[b]`` (ascending), eigenvectors ``[b, b]`` (columns), residuals ``[b]`` of a block of T.

        The residual of a Ritz pair is ``‖H y − θ y‖ = β_m |s_m|``, s its eigenvector of T: no product needed. The
        rounding of the products, as seen in how far ``QᵀHQ`` is from tridiagonal, is added in quadrature.
        """
        start, stop = self.block_range(block)
        off = np.asarray(self.betas[start : stop - 1])
        matrix = np.diag(np.asarray(self.alphas[start:stop])) + np.diag(off, 1) + np.diag(off, -1)
        values, vectors = np.linalg.eigh(matrix)
        return values, vectors, np.hypot(self.betas[stop - 1] * np.abs(vectors[-1]), self.noise)

    def block_range(self, block: int) -> tuple[int, int]:
        """First and last-plus-one basis index of a block."""
        starts = [*[s for s in self.block_starts if s < self.size], self.size]
        index = block if block >= 0 else len(starts) - 1 + block
        return starts[index], starts[index + 1]

    @property
    def blocks(self) -> int:
        """Blocks of ``T`` with at least one product."""
        return sum(start < self.size for start in self.block_starts)


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs, largest first.

    ``values [r]``; ``residuals [r]``: ``‖H y − λ y‖`` (within that distance of each value lies an eigenvalue for
    certain); ``errors [r]``: estimated distance to it, ``min(ρ, ρ²/gap)``; ``converged [r]``; ``vectors [r, n]``,
    orthonormal rows.
    """

    values: Floats
    residuals: Floats
    errors: Floats
    converged: NDArray[np.bool_]
    vectors: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def take(self, index: list[int]) -> Eigenpairs:
        """The pairs at these places, in this order."""
        return Eigenpairs(
            self.values[index], self.residuals[index], self.errors[index], self.converged[index], self.vectors[index]
        )


@dataclass(frozen=True)
class Spectrum:
    """What Lanczos found: the wanted ``pairs`` (largest first), all Ritz values, and what it cost.

    ``ritz`` and ``ritz_residuals`` are all Ritz values (descending) with their residuals; the inner ones are no
    eigenvalues. ``complete``: the basis spans the whole space, so ``ritz`` is the exact spectrum.
    """

    pairs: Eigenpairs
    n_largest: int
    n_smallest: int
    ritz: Floats
    ritz_residuals: Floats
    products: int
    complete: bool

    @property
    def largest(self) -> Eigenpairs:
        """The largest algebraic eigenvalues, largest first."""
        return self.pairs.take(list(range(self.n_largest)))

    @property
    def smallest(self) -> Eigenpairs:
        """The smallest algebraic eigenvalues, smallest first."""
        total = len(self.pairs)
        return self.pairs.take([total - 1 - place for place in range(self.n_smallest)])


def extreme_eigenpairs(
    operator: SymmetricOperator,
    *,
    largest: int,
    smallest: int = 0,
    tolerance: float = 1e-3,
    max_steps: int = 150,
    generator: torch.Generator,
    locked: Eigenpairs | None = None,
) -> Spectrum:
    """The ``largest`` and ``smallest`` algebraic eigenvalues of a symmetric operator, with vectors and residuals.

    Single-vector Lanczos with full re-orthogonalisation (Golub & Van Loan 10.1; Parlett, The Symmetric Eigenvalue
    Problem, 1980). It stops when the estimated error ``min(ρ, ρ²/gap)`` (Parlett, theorem 11.7.1) of every wanted
    eigenvalue is at most ``tolerance · max(|λ|, 0.01 max|λ|)`` and every residual at most ``√tolerance · max|λ|``.
    A single vector sees one direction of each eigenspace; when its Krylov space closes, a new random vector continues
    in the complement until nothing above (below) the wanted values comes out of it, so exact multiplicities of
    low-rank and degenerate matrices are counted. Copies hidden in a rich spectrum show as Ritz values above the
    wanted ones in a later run in the complement of the found pairs: pass them as ``locked`` to go on from there.

    Args:
        operator: n, dtype, device, product.
        largest: how many at the upper end (at most n are returned).
        smallest: how many at the lower end.
        tolerance: relative accuracy of the eigenvalues; not below about 1e-5 in float32, 1e-12 in float64.
        max_steps: most products; also the size of the basis, ``(max_steps + 1) · n`` numbers.
        generator: source of the start vectors.
        locked: pairs already found; the search goes on in their complement and the answer holds the best of both.

    Returns:
        A Spectrum; pairs that did not converge in ``max_steps`` are marked in ``pairs.converged``.

    Raises:
        ValueError: nothing wanted, or no steps, or a tolerance that is not positive.
        NonFiniteError: a product is NaN or infinite.

    """
    if largest < 0 or smallest < 0 or largest + smallest == 0 or max_steps < 1 or tolerance <= 0 or operator.n < 1:
        raise ValueError(
            "expected largest + smallest >= 1, max_steps >= 1, tolerance > 0 and n >= 1, found "
            f"largest={largest}, smallest={smallest}, max_steps={max_steps}, tolerance={tolerance}, n={operator.n}"
        )
    before = operator.products
    threshold = max(100 * torch.finfo(operator.dtype).eps, 1e-3 * tolerance)
    held = None if locked is None else locked.vectors
    scale = 0.0 if locked is None or not len(locked) else float(np.abs(locked.values).max())
    krylov = Krylov(operator, max_steps, breakdown=threshold, deflated=held, scale=scale)
    search = _Search(krylov, locked, min(largest, operator.n), min(smallest, operator.n), tolerance)
    if krylov.dimension:
        krylov.begin(generator)
    while not krylov.full:
        open_ended = krylov.step()
        if search.finished():
            break
        if not open_ended and not krylov.full:
            krylov.begin(generator)
    return search.result(operator.products - before)


class _Search:
    """Which Ritz values are wanted and whether they are good enough."""

    def __init__(
        self, krylov: Krylov, locked: Eigenpairs | None, largest: int, smallest: int, tolerance: float
    ) -> None:
        self.krylov, self.locked, self.tolerance = krylov, locked, tolerance
        self.largest, self.smallest = largest, smallest
        self._closed: list[tuple[Floats, Floats]] = []

    def finished(self) -> bool:
        values, residuals = self._all()
        if len(values) < max(self.largest, self.smallest):
            return False
        order = np.argsort(-values, kind="stable")
        _, converged = _accuracy(values[order], residuals[order], self.tolerance)
        wanted = _wanted(len(values), self.largest, self.smallest)
        return bool(converged[wanted].all()) and self._complement_is_lower(values[order])

    def _complement_is_lower(self, values: Floats) -> bool:
        """After a restart: does the current block hold nothing beyond what we are about to return?"""
        if self.krylov.blocks == 1 and self.locked is None:
            # One open block is the ordinary case. One closed block says nothing about the rest of the space.
            return self.krylov.betas[-1] > 0 or self.krylov.size == self.krylov.dimension
        theta, _, rho = self.krylov.ritz()
        slack = self.tolerance * np.abs(values).max()
        above = self.largest and theta[-1] + rho[-1] > values[self.largest - 1] + slack
        below = self.smallest and theta[0] - rho[0] < values[-self.smallest] - slack
        return not (above or below)

    def _all(self) -> tuple[Floats, Floats]:
        # Blocks before the current one do not change any more: solve each once.
        while len(self._closed) < self.krylov.blocks - 1:
            theta, _, rho = self.krylov.ritz(len(self._closed))
            self._closed.append((theta, rho))
        parts = list(self._closed)
        if self.krylov.size:
            theta, _, rho = self.krylov.ritz()
            parts.append((theta, rho))
        if self.locked is not None:
            parts.append((self.locked.values, self.locked.residuals))
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def result(self, products: int) -> Spectrum:
        values, residuals = self._all()
        order = np.argsort(-values, kind="stable")
        errors, converged = _accuracy(values[order], residuals[order], self.tolerance)
        wanted = _wanted(len(values), self.largest, self.smallest)
        complete = self.krylov.size == self.krylov.dimension
        if not complete and not self._complement_is_lower(values[order]):
            # A block closed and max_steps came before the rest of the space was searched.
            converged = np.zeros_like(converged)
        pairs = Eigenpairs(
            values[order][wanted],
            residuals[order][wanted],
            errors[wanted],
            converged[wanted],
            self._vectors(order[wanted]),
        )
        total = len(values)
        return Spectrum(
            pairs,
            min(self.largest, total),
            min(self.smallest, total),
            values[order],
            residuals[order],
            products,
            complete,
        )

    def _vectors(self, places: NDArray[np.intp]) -> Tensor:
        krylov = self.krylov
        coefficients = np.zeros((len(places), krylov.size))
        for block in range(krylov.blocks):
            first, last = krylov.block_range(block)
            _, vectors, _ = krylov.ritz(block)
            own = np.flatnonzero((places >= first) & (places < last))
            coefficients[own, first:last] = vectors[:, places[own] - first].T
        rows = torch.as_tensor(coefficients, dtype=krylov.operator.dtype, device=krylov.operator.device) @ krylov.basis
        if self.locked is not None:
            # Locked pairs come after all Ritz values of the new basis.
            kept = np.flatnonzero(places >= krylov.size)
            rows[kept] = self.locked.vectors[places[kept] - krylov.size]
        return rows


def _wanted(total: int, largest: int, smallest: int) -> NDArray[np.intp]:
    """Places of the wanted values in a descending list: both ends, none twice."""
    places = np.arange(total)
    return places[(places < largest) | (places >= total - smallest)]


def _accuracy(values: Floats, residuals: Floats, tolerance: float) -> tuple[Floats, NDArray[np.bool_]]:
    """Estimated errors and convergence of Ritz values sorted in descending order."""
    scale = float(np.abs(values).max())
    gaps = np.full(len(values), np.inf)
    if len(values) > 1:
        # From this value to the nearest end of each neighbour's interval of uncertainty.
        steps = -np.diff(values)
        gaps[:-1] = steps - residuals[1:]
        gaps[1:] = np.minimum(gaps[1:], steps - residuals[:-1])
    errors = residuals.copy()
    separate = gaps > residuals
    errors[separate] = residuals[separate] ** 2 / gaps[separate]
    target = tolerance * np.maximum(np.abs(values), _SMALL * scale)
    return errors, (errors <= target) & (residuals <= np.sqrt(tolerance) * scale)

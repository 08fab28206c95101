"""Both ends of the spectrum of a symmetric operator by Lanczos with full re-orthogonalisation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trace_offline.estimators.krylov import Floats, Krylov
from trace_offline.estimators.operators import SymmetricOperator

# An eigenvalue below this share of the largest |λ| is wanted only to the accuracy of one at this share: relative
# accuracy of numbers that are zero beside the largest cannot be had. At the lower end the share is larger, because late
# in training the smallest eigenvalue is the edge of a bulk near 0, on which most of the products would be spent.
_SMALL_LARGEST = 0.01
_SMALL_SMALLEST = 0.1

# Steps, per ln n, that a search for missed copies takes at least: 11 for n = 200, 24 for n = 250,000.
_STEPS_PER_LOG = 1.85


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
    eigenvalues. ``complete``: the basis spans the whole space, so ``ritz`` is the exact spectrum. ``restarts``: how
    often a bounded basis was compressed on the way.
    """

    pairs: Eigenpairs
    n_largest: int
    n_smallest: int
    ritz: Floats
    ritz_residuals: Floats
    products: int
    complete: bool
    restarts: int = 0

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
    eigenvalue is at most ``tolerance · max(|λ|, c max|λ|)``, c = 0.01 at the upper end and 0.1 at the lower, and every
    residual at most ``√tolerance · max|λ|``.

    A single vector sees one direction of each eigenspace. When its Krylov space closes, a new random vector continues
    in the complement until nothing beyond the wanted values comes out of it, so the multiplicities of low-rank and
    degenerate matrices are counted. Copies hidden in a rich spectrum show only in a later run in the complement of the
    found pairs: pass those as ``locked`` to look for them.

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
    ends = min(largest, operator.n), min(smallest, operator.n)
    while True:
        left = max_steps - (operator.products - before)
        search = _Search(operator, locked, ends, tolerance, left)
        search.run(generator)
        found = search.result(operator.products - before)
        if search.settled or operator.products - before >= max_steps:
            break
        # Copies came out of the complement of earlier finds; there may be more of them beside the new ones.
        locked = found.pairs
    if not search.settled:
        # Stopped by max_steps: what the rest of the space holds was not looked at.
        found = replace(found, pairs=replace(found.pairs, converged=np.zeros_like(found.pairs.converged)))
    return found


class _Search:
    """One Lanczos run: which Ritz values are wanted, whether they are good enough, whether others may lie beyond."""

    def __init__(
        self,
        operator: SymmetricOperator,
        locked: Eigenpairs | None,
        ends: tuple[int, int],
        tolerance: float,
        max_steps: int,
    ) -> None:
        held = None if locked is None else locked.vectors
        scale = 0.0 if locked is None or not len(locked) else float(np.abs(locked.values).max())
        threshold = max(100 * torch.finfo(operator.dtype).eps, 1e-3 * tolerance)
        self.krylov = Krylov(operator, max_steps, breakdown=threshold, deflated=held, scale=scale)
        self.locked, self.tolerance = locked, tolerance
        self.largest, self.smallest = ends
        self.settled = False
        self._closed: list[tuple[Floats, Floats]] = []

    def run(self, generator: torch.Generator) -> None:
        krylov = self.krylov
        if krylov.dimension:
            krylov.begin(generator)
        while not krylov.full:
            is_open = krylov.step()
            fresh = krylov.blocks > 1 or self.locked is not None
            if self._wanted_converged():
                if not fresh and is_open:
                    # The ordinary case: one vector, one open space.
                    self.settled = True
                    return
                if fresh and self._nothing_beyond(wanted_too=True):
                    self.settled = True
                    return
                if fresh and is_open and self._nothing_beyond(wanted_too=False):
                    return
            if not is_open and not krylov.full:
                krylov.begin(generator)
        complete = krylov.size == krylov.dimension
        self.settled = complete or (krylov.blocks == 1 and self.locked is None and krylov.betas[-1] > 0)

    def _wanted_converged(self) -> bool:
        values, residuals = self._all()
        if len(values) < max(self.largest, self.smallest):
            return False
        order = np.argsort(-values, kind="stable")
        _, converged = self._accuracy(values[order], residuals[order])
        return bool(converged[wanted_places(len(values), self.largest, self.smallest)].all())

    def _nothing_beyond(self, *, wanted_too: bool) -> bool:
        """Does the current block, begun in the complement of earlier finds, prove that nothing better is left there?

        Its top is that of the whole complement: when even that does not exceed the last wanted value, nothing can.
        With ``wanted_too=False`` only those of its values count that are not among the wanted themselves. Small
        residuals alone prove nothing, as a random vector hardly sees a single eigenvector among n: an open block must
        also have a length that grows with ln n, since the error of m steps from a random start falls about as
        (ln n / m)² (Kuczynski & Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992).
        """
        values, residuals = self._all()
        order = np.argsort(-values, kind="stable")
        start, stop = self.krylov.block_range(-1)
        needed = 1 + _STEPS_PER_LOG * np.log(self.krylov.dimension)
        if self.krylov.betas[-1] > 0 and stop - start < needed:
            return False
        places = np.arange(start, stop)
        if not wanted_too:
            places = np.setdiff1d(places, order[wanted_places(len(values), self.largest, self.smallest)])
        if not len(places):
            return wanted_too
        # Residuals, not estimated errors: a gap to values the block has not seen yet would be no gap.
        slack = self.tolerance * np.abs(values).max()
        ranked = values[order]
        above = self.largest and (values + residuals)[places].max() > ranked[self.largest - 1] + slack
        below = self.smallest and (values - residuals)[places].min() < ranked[-self.smallest] - slack
        return not (above or below)

    def _accuracy(self, values: Floats, residuals: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        return ritz_accuracy(values, residuals, self.tolerance, self.largest, self.smallest)

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
        errors, converged = self._accuracy(values[order], residuals[order])
        wanted = wanted_places(len(values), self.largest, self.smallest)
        pairs = Eigenpairs(
            values[order][wanted],
            residuals[order][wanted],
            errors[wanted],
            converged[wanted],
            self._vectors(order[wanted]),
        )
        return Spectrum(
            pairs=pairs,
            n_largest=min(self.largest, len(values)),
            n_smallest=min(self.smallest, len(values)),
            ritz=values[order],
            ritz_residuals=residuals[order],
            products=products,
            complete=self.krylov.size == self.krylov.dimension,
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


def wanted_places(total: int, largest: int, smallest: int) -> NDArray[np.intp]:
    """Places of the wanted values in a descending list: both ends, none twice."""
    places = np.arange(total)
    return places[(places < largest) | (places >= total - smallest)]


def ritz_accuracy(
    values: Floats, residuals: Floats, tolerance: float, largest: int, smallest: int
) -> tuple[Floats, NDArray[np.bool_]]:
    """Estimated errors and convergence of Ritz values in descending order.

    Values closer to each other than their residuals are one cluster: its eigenvalues, as a set, are off by at most
    ``R²/gap``, R the joint residual and gap the distance to what is not of the cluster (Parlett 11.7).
    """
    share = np.full(len(values), _SMALL_LARGEST)
    share[max(largest, len(values) - smallest) :] = _SMALL_SMALLEST
    scale = float(np.abs(values).max())
    new = -np.diff(values) > np.maximum(residuals[1:], residuals[:-1])
    cluster = np.concatenate(([0], np.cumsum(new)))
    count = int(cluster[-1]) + 1
    joint = np.bincount(cluster, weights=residuals**2, minlength=count)
    edges = np.flatnonzero(new)
    # From one cluster to the nearest end of the next one's interval of uncertainty.
    between = values[edges] - values[edges + 1] if count > 1 else np.zeros(0)
    radius = np.sqrt(joint)
    gaps = np.full(count, np.inf)
    gaps[:-1] = between - radius[1:]
    gaps[1:] = np.minimum(gaps[1:], between - radius[:-1])
    errors = residuals.copy()
    separate = (gaps > radius)[cluster]
    errors[separate] = np.minimum(errors, joint[cluster] / np.where(gaps > 0, gaps, 1.0)[cluster])[separate]
    target = tolerance * np.maximum(np.abs(values), share * scale)
    return errors, (errors <= target) & (residuals <= np.sqrt(tolerance) * scale)

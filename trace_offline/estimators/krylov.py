"""A Krylov basis kept orthonormal: what Lanczos and stochastic quadrature are both made of."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trace_offline.estimators.hvp import NonFiniteError
from trace_offline.estimators.operators import SymmetricOperator, orthogonalize, standard_normal

Floats = NDArray[np.float64]


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
        return self.absorb(self.operator.product(self.pending))

    @property
    def pending(self) -> Tensor:
        """``[n]``: the vector whose product is the next to be taken."""
        return self._basis[self.size]

    def absorb(self, image: Tensor) -> bool:
        """``step`` with a product taken elsewhere: ``image`` is the operator times ``pending``."""
        place = self.size
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

    def release(self) -> None:
        """Free the basis; what the recurrence knows stays."""
        self._basis = self._basis[:0].clone()

    @property
    def blocks(self) -> int:
        """Blocks of ``T`` with at least one product."""
        return sum(start < self.size for start in self.block_starts)

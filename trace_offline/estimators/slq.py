"""Spectral density, trace and negative mass of a symmetric operator by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trace_offline.estimators.lanczos import Krylov
from trace_offline.estimators.operators import SymmetricOperator

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over ``probes`` random vectors with its standard error (None when it cannot be had from one probe)."""

    value: float
    stderr: float | None
    probes: int


@dataclass(frozen=True)
class Quadrature:
    """A spectral distribution as weighted points: ``φ(λ) = (1/n) Σ_i δ(λ − λ_i)``, the mean of ``probes`` estimates.

    Each estimate has the ``exact`` eigenvalues with weight 1/n each, and nodes with weights that share the rest,
    ``(n − d)/n``. ``nodes[p]``, ``weights[p]``: ``[m_p]``, ascending; weights of one probe sum to (n − d)/n.
    ``closed[p]``: the Krylov space of the probe closed before its last step, so its distribution is exact.
    ``scale``: largest |node|; ``n``: order of the operator; ``products``: what it cost.
    """

    nodes: tuple[Floats, ...]
    weights: tuple[Floats, ...]
    closed: tuple[bool, ...]
    exact: Floats
    n: int
    products: int

    @property
    def probes(self) -> int:
        """Random vectors used; 0 when all eigenvalues were given."""
        return len(self.nodes)

    @property
    def scale(self) -> float:
        """The largest absolute value the distribution reaches."""
        return max((float(np.abs(part).max()) for part in (self.exact, *self.nodes) if len(part)), default=0.0)

    @property
    def span(self) -> tuple[float, float]:
        """Smallest and largest point."""
        points = np.concatenate((self.exact, *self.nodes))
        return float(points.min()), float(points.max())

    def integral(self, function: Callable[[Floats], Floats]) -> Estimate:
        """``∫ f(λ) φ(λ) dλ = (1/n) Σ_i f(λ_i)`` with its standard error over probes."""
        return _estimate(self._per_probe(function))

    def trace(self) -> Estimate:
        """``Tr H = n ∫ λ φ(λ) dλ``: unbiased, exact in the given eigenpairs and Hutchinson's estimate of the rest.

        One-point information suffices: the first moment of the quadrature of a probe v is ``vᵀHv`` itself.
        """
        return _estimate(self.n * self._per_probe(lambda points: points))

    def mass_below(self, bound: float) -> Estimate:
        """Share of all eigenvalues below ``bound``."""
        return self.integral(lambda points: (points < bound).astype(np.float64))

    def mass_below_bounds(self, bound: float) -> tuple[float, float]:
        """Limits between which the share below ``bound`` of the probes' own distributions lies for certain.

        Gauss quadrature knows a distribution function at a point only up to the weights around it (the
        Chebyshev-Markov-Stieltjes inequalities; Szegő, Orthogonal Polynomials, 3.41): with i nodes below the bound,
        ``Σ_{j<i} w_j ≤ F ≤ Σ_{j≤i+1} w_j``. Limits of the mean over the probes used; their scatter comes on top.
        """
        known = float((self.exact < bound).sum()) / self.n
        low, high = [known], [known]
        if self.probes:
            low, high = [], []
            for nodes, weights, closed in zip(self.nodes, self.weights, self.closed, strict=True):
                below = int((nodes < bound).sum())
                low.append(known + float(weights[: below if closed else max(below - 1, 0)].sum()))
                high.append(known + float(weights[: below if closed else below + 1].sum()))
        return float(np.mean(low)), float(np.mean(high))

    def negative_share(self) -> Estimate:
        """``Σ_{λ<0} |λ| / Σ |λ|``: how much of the absolute curvature is negative; jackknife standard error.

        Raises:
            ZeroDivisionError: the operator is zero.
        """
        below = self._per_probe(lambda points: np.maximum(-points, 0.0))
        total = self._per_probe(np.abs)
        if total.sum() == 0:
            raise ZeroDivisionError("the operator is zero: no curvature to share out")
        value = float(below.sum() / total.sum())
        count = len(below)
        if self.probes == 0:
            return Estimate(value, 0.0, 0)
        if count == 1:
            return Estimate(value, None, 1)
        # Leaving out the only probe with curvature leaves 0/0; such a sample says nothing and keeps the whole's value.
        rest = total.sum() - total
        left_out = np.where(rest > 0, (below.sum() - below) / np.where(rest > 0, rest, 1.0), value)
        spread = (count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum())
        return Estimate(value, float(np.sqrt(spread)), count)

    def density(self, points: int = 1024, broadening: float = 0.01) -> tuple[Floats, Floats, float]:
        """The density on a grid: every point mass spread by a Gaussian of standard deviation σ.

        ``σ = broadening · (λ_max − λ_min)`` (of the largest |λ| when all points coincide, and ``broadening`` itself
        when all are zero). The grid ends 6 σ beyond the extreme points. A symmetric kernel moves no mean: the density
        integrates to 1 and its mean times n is the trace, to the accuracy of the grid.

        Returns:
            grid ``[points]``, density ``[points]`` (per unit of eigenvalue), σ.

        Raises:
            ValueError: a grid too coarse for its kernel.
        """
        low, high = self.span
        width = high - low
        sigma = broadening * (width or self.scale or 1.0)
        grid = np.linspace(low - 6 * sigma, high + 6 * sigma, points)
        if points < 2 or grid[1] - grid[0] > sigma:
            needed = int(np.ceil((width + 12 * sigma) / sigma)) + 1
            raise ValueError(
                f"a broadening of {broadening:g} needs at least {needed} grid points, found {points}: the grid would "
                "step over its own kernel"
            )
        density = np.zeros(points)
        for nodes, weights in self.measures():
            offsets = (grid[:, None] - nodes[None, :]) / sigma
            density += (np.exp(-0.5 * offsets**2) @ weights) / (sigma * np.sqrt(2 * np.pi))
        return grid, density / max(self.probes, 1), sigma

    def measures(self) -> list[tuple[Floats, Floats]]:
        """Per probe: all points, exact ones included, ascending, and weights that sum to 1."""
        own = np.full(len(self.exact), 1.0 / self.n)
        parts = list(zip(self.nodes, self.weights, strict=True)) or [(np.zeros(0), np.zeros(0))]
        result = []
        for nodes, weights in parts:
            points = np.concatenate((self.exact, nodes))
            order = np.argsort(points, kind="stable")
            result.append((points[order], np.concatenate((own, weights))[order]))
        return result

    def _per_probe(self, function: Callable[[Floats], Floats]) -> Floats:
        known = float(function(self.exact).sum()) / self.n if len(self.exact) else 0.0
        if not self.probes:
            return np.array([known])
        return np.array([known + float(function(x) @ w) for x, w in zip(self.nodes, self.weights, strict=True)])


def _estimate(samples: Floats) -> Estimate:
    count = len(samples)
    if count == 1:
        return Estimate(float(samples[0]), None, 1)
    return Estimate(float(samples.mean()), float(samples.std(ddof=1) / np.sqrt(count)), count)


def spectral_quadrature(
    operator: SymmetricOperator,
    *,
    probes: int,
    steps: int,
    generator: torch.Generator,
    exact_values: Floats | None = None,
    exact_vectors: Tensor | None = None,
) -> Quadrature:
    """Stochastic Lanczos quadrature of the spectral density (Ubaru, Chen & Saad, SIAM J. Matrix Anal. 38, 2017;
    for Hessians of networks Ghorbani, Krishnan & Xiao, ICML 2019, arXiv 1901.10159).

    Each probe v is uniform on the unit sphere; ``steps`` of Lanczos give the Gauss quadrature of its spectral measure
    ``Σ_i (vᵀu_i)² δ(λ − λ_i)``, whose mean over v is the density. Known eigenpairs are deflated: they enter with
    their own weight, and the probes only see the complement, ``P H P``. That takes the largest terms out of the
    variance and lets the same steps resolve the bulk (Papyan, arXiv 1811.07062). The trace stays exactly unbiased
    whatever the quality of the pairs, because Tr H = Σ qᵀHq + Tr(P H P) for any orthonormal q; the pairs must not come
    from the same random vectors as the probes.

    Args:
        operator: n, dtype, device, product.
        probes: random vectors (at least 2 for a standard error).
        steps: products per probe.
        generator: source of the probes.
        exact_values: ``[d]``, known eigenvalues (Rayleigh quotients of ``exact_vectors``).
        exact_vectors: ``[d, n]``, orthonormal rows.

    Returns:
        A Quadrature. When the known pairs span the whole space no probe is used and everything is exact.

    Raises:
        ValueError: no probes, no steps, or values and vectors that do not belong together.
        NonFiniteError: a product is NaN or infinite.
    """
    if probes < 1 or steps < 1 or operator.n < 1:
        raise ValueError(f"expected probes, steps and n >= 1, found {probes}, {steps} and {operator.n}")
    values = np.zeros(0) if exact_values is None else np.asarray(exact_values, dtype=np.float64)
    count = 0 if exact_vectors is None else len(exact_vectors)
    if len(values) != count:
        raise ValueError(f"expected one vector for each known eigenvalue, found {len(values)} and {count}")
    before = operator.products
    share = (operator.n - count) / operator.n
    nodes: list[Floats] = []
    weights: list[Floats] = []
    closed: list[bool] = []
    for _ in range(probes if count < operator.n else 0):
        krylov = Krylov(
            operator, steps, breakdown=100 * torch.finfo(operator.dtype).eps, deflated=exact_vectors if count else None
        )
        krylov.begin(generator)
        is_open = True
        while is_open and not krylov.full:
            is_open = krylov.step()
        theta, vectors, _ = krylov.ritz()
        nodes.append(theta)
        weights.append(share * vectors[0] ** 2)
        closed.append(not is_open)
    return Quadrature(tuple(nodes), tuple(weights), tuple(closed), values, operator.n, operator.products - before)

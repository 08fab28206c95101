"""Spectral density, trace and negative mass of a symmetric operator by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trace_offline.estimators.krylov import Floats, Krylov
from trace_offline.estimators.operators import SymmetricOperator


@dataclass(frozen=True)
class Estimate:
    """A mean over ``probes`` random vectors and its standard error: None from one probe, 0 when nothing was random."""

    value: float
    stderr: float | None
    probes: int


@dataclass(frozen=True)
class Quadrature:
    """A spectral distribution as weighted points: ``φ(λ) = (1/n) Σ_i δ(λ − λ_i)``, the mean of ``probes`` estimates.

    Each estimate has the ``exact`` eigenvalues with weight 1/n each, and nodes with weights that share the rest,
    ``(n − d)/n``. ``nodes[p]``, ``weights[p]``: ``[m_p]``, ascending; weights of one probe sum to (n − d)/n.
    ``closed[p]``: the Krylov space of the probe closed, so its distribution is exact. ``recurrences[p]``: diagonal
    ``[m_p]`` and off-diagonal ``[m_p − 1]`` of the tridiagonal matrix behind it. ``n``: order of the operator;
    ``products``: what it cost.
    """

    nodes: tuple[Floats, ...]
    weights: tuple[Floats, ...]
    closed: tuple[bool, ...]
    recurrences: tuple[tuple[Floats, Floats], ...]
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
        return self._estimate(self._per_probe(function))

    def samples(self, function: Callable[[Floats], Floats]) -> Floats:
        """``Σ_i f(λ_i)`` as each probe estimates it, ``[probes]`` (one exact value when no probe was used)."""
        return self.n * self._per_probe(function)

    def trace(self) -> Estimate:
        """``Tr H = n ∫ λ φ(λ) dλ``: unbiased, exact in the given eigenpairs and Hutchinson's estimate of the rest.

        One-point information suffices: the first moment of the quadrature of a probe v is ``vᵀHv`` itself.
        """
        return self._estimate(self.samples(lambda points: points))

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

    def truncated(self, steps: int) -> Quadrature:
        """The same probes after their first ``steps`` products only: what a shorter run would have given, for free."""
        rules, closed = [], []
        for (diagonal, off), done in zip(self.recurrences, self.closed, strict=True):
            rules.append(_gauss_rule(diagonal[:steps], off[: steps - 1], 1.0 - len(self.exact) / self.n))
            closed.append(done and steps >= len(diagonal))
        return replace(self, nodes=tuple(r[0] for r in rules), weights=tuple(r[1] for r in rules), closed=tuple(closed))

    def negative_share(self) -> Estimate:
        """``Σ_{λ<0} |λ| / Σ |λ|``: how much of the absolute curvature is negative; 0 = convex, ½ = as much as positive.

        |λ| has a kink at 0, where the spectra of networks crowd, so the quadrature of m steps alternates around the
        limit as m grows. The value is the mean over the quadratures of m/2 + 1 … m steps (all from the same products),
        and the standard error joins their spread to the jackknife error over probes.

        Raises:
            ZeroDivisionError: the operator is zero.

        """
        longest = max((len(nodes) for nodes in self.nodes), default=0)
        first = longest if all(self.closed) else longest // 2 + 1
        runs = [_share(self.truncated(steps)) for steps in range(first, longest + 1)] if longest else [_share(self)]
        shares = np.array([share for share, _ in runs])
        errors = [error for _, error in runs]
        value = float(shares.mean())
        if self.probes == 0:
            return Estimate(value, 0.0, 0)
        if self.probes == 1 or (len(runs) == 1 and not all(self.closed)):
            return Estimate(value, None, self.probes)
        spread = float(shares.std(ddof=1)) if len(runs) > 1 else 0.0
        return Estimate(value, float(np.hypot(np.mean(errors), spread)), self.probes)

    def effective_rank(self) -> Estimate:
        """``exp(−Σ p_i ln p_i)`` with ``p_i = |λ_i| / Σ|λ|``: in how many directions the absolute curvature lies.

        The exponential of the spectral entropy (Roy & Vetterli, EUSIPCO 2007): 1 for rank one, n for a multiple of the
        identity. A quadrature of few steps lumps small eigenvalues together, and equal shares have the largest entropy,
        so for a definite operator the value comes down as the steps grow. How far it moved over the second half of the
        steps enters the standard error beside the jackknife error over probes.

        Raises:
            ZeroDivisionError: the operator is zero.

        """
        value, error = self._entropy_rank()
        if self.probes < 2 or all(self.closed):
            return Estimate(value, 0.0 if self.probes == 0 else error, self.probes)
        longest = max(len(nodes) for nodes in self.nodes)
        half, _ = self.truncated(max(longest // 2, 1))._entropy_rank()
        return Estimate(value, float(np.hypot(error or 0.0, value - half)), self.probes)

    def _entropy_rank(self) -> tuple[float, float | None]:
        """The value from these nodes, and its jackknife standard error over probes (None for a single one)."""
        mass = self.samples(np.abs)
        weighted = self.samples(lambda points: np.abs(points) * np.log(np.where(points == 0, 1.0, np.abs(points))))
        if not mass.any():
            raise ZeroDivisionError("the operator is zero: there is no curvature to share out")

        def rank(total: float, logs: float) -> float:
            return float(np.exp(np.log(total) - logs / total))

        value = rank(float(mass.mean()), float(weighted.mean()))
        count = len(mass)
        if count == 1:
            return value, None
        rest, logs = (mass.sum() - mass) / (count - 1), (weighted.sum() - weighted) / (count - 1)
        left_out = np.array([rank(r, w) if r > 0 else value for r, w in zip(rest, logs, strict=True)])
        return value, float(np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum()))

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
        # Points that differ by rounding only are one point.
        sigma = broadening * (width if width > 1e-6 * self.scale else self.scale or 1.0)
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

    def _estimate(self, samples: Floats) -> Estimate:
        if self.probes == 0:
            return Estimate(float(samples[0]), 0.0, 0)
        if self.probes == 1:
            return Estimate(float(samples[0]), None, 1)
        return Estimate(float(samples.mean()), float(samples.std(ddof=1) / np.sqrt(self.probes)), self.probes)

    def _per_probe(self, function: Callable[[Floats], Floats]) -> Floats:
        known = float(function(self.exact).sum()) / self.n if len(self.exact) else 0.0
        if not self.probes:
            return np.array([known])
        return np.array([known + float(function(x) @ w) for x, w in zip(self.nodes, self.weights, strict=True)])


def _share(quadrature: Quadrature) -> tuple[float, float]:
    """Negative share of the absolute curvature and its jackknife standard error over probes (0 for a single one)."""
    below = quadrature._per_probe(lambda points: np.maximum(-points, 0.0))
    total = quadrature._per_probe(np.abs)
    whole = float(total.sum())
    if whole == 0:
        raise ZeroDivisionError("the operator is zero: there is no curvature to share out")
    value = float(below.sum() / whole)
    count = len(below)
    # Without the only probe that saw curvature 0/0 remains; such a sample says nothing and keeps the whole's value.
    rest = whole - total
    left_out = np.where(rest > 0, (below.sum() - below) / np.where(rest > 0, rest, 1.0), value)
    spread = (count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum())
    return value, float(np.sqrt(spread))


def _gauss_rule(diagonal: Floats, off: Floats, mass: float) -> tuple[Floats, Floats]:
    """Nodes (ascending) and weights (sum ``mass``) of the quadrature of a tridiagonal matrix (Golub & Welsch 1969)."""
    nodes, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1))
    return nodes, mass * vectors[0] ** 2


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
    spaces = []
    for _ in range(probes if count < operator.n else 0):
        krylov = probe_space(operator, steps, generator, values, exact_vectors)
        while krylov.step() and not krylov.full:
            pass
        krylov.release()
        spaces.append(krylov)
    return quadrature_of(operator, spaces, values, operator.products - before)


def probe_space(
    operator: SymmetricOperator,
    steps: int,
    generator: torch.Generator,
    exact_values: Floats,
    exact_vectors: Tensor | None,
) -> Krylov:
    """The Krylov space of one random vector in the complement of known eigenpairs, before its first product."""
    count = len(exact_values)
    krylov = Krylov(
        operator,
        steps,
        breakdown=100 * torch.finfo(operator.dtype).eps,
        deflated=exact_vectors if count else None,
        scale=float(np.abs(exact_values).max()) if count else 0.0,
    )
    krylov.begin(generator)
    return krylov


def quadrature_of(
    operator: SymmetricOperator, spaces: Sequence[Krylov], exact_values: Floats, products: int
) -> Quadrature:
    """The quadrature behind finished Krylov spaces, one for each probe (none: all eigenvalues are known)."""
    share = (operator.n - len(exact_values)) / operator.n
    recurrences = [(np.asarray(space.alphas), np.asarray(space.betas[:-1])) for space in spaces]
    rules = [_gauss_rule(diagonal, off, share) for diagonal, off in recurrences]
    return Quadrature(
        nodes=tuple(nodes for nodes, _ in rules),
        weights=tuple(weights for _, weights in rules),
        # the space is exhausted when nothing is left beyond its last vector
        closed=tuple(space.betas[-1] == 0 for space in spaces),
        recurrences=tuple(recurrences),
        exact=exact_values,
        n=operator.n,
        products=products,
    )

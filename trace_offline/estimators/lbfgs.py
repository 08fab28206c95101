"""Limited-memory BFGS for a batch of smooth convex problems that are linear in their logits.

Every problem has its own step length, curvature memory and stopping; problems that are done leave the batch. Because
logits are linear in the parameters, a trial step costs no product: Z(θ + t d) = Z(θ) + t Z(d). One iteration is thus
one forward product (Z(d)) and one backward product (the gradient), whatever the line search does.

Reference: J. Nocedal and S. Wright (2006), Numerical Optimization, 2nd ed., algorithms 3.1 and 7.4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trace_offline.estimators.class_blocks import InverseHessian
from trace_offline.estimators.quasi_newton import Memory, Pairs

_ARMIJO = 1e-4
_TRIALS = 25
_FLAT_ITERATIONS = 8
_REFRESH = 20
_GAP = 0.03


class Objective(ABC):
    """P problems with parameters ``[P, K, R]``; the methods see the A problems still at work, ``which [A]`` ascending.

    ``noise``: relative precision to which the objective can be computed.
    """

    noise: float

    @abstractmethod
    def logits(self, theta: Tensor, which: Tensor) -> Tensor:
        """``θ [A, K, R] → Z [A, K, n]``; linear in θ."""

    @abstractmethod
    def null_logits(self, theta: Tensor, which: Tensor) -> Tensor:
        """``logits`` of the null model, ``θ [A, K, R]``, without a product."""

    @abstractmethod
    def nll(self, logits: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Data term ``[A]`` (float64) and whatever ``[A, K, n]`` the gradient is made from."""

    @abstractmethod
    def gradient(self, state: Tensor, theta: Tensor, which: Tensor) -> Tensor:
        """Full gradient ``[A, K, R]`` (float64); may overwrite ``state``."""

    @abstractmethod
    def null_gradient(self, which: Tensor) -> Tensor:
        """Gradient ``[A, K, R]`` at the null model, where progress is measured from."""

    @abstractmethod
    def ridge_terms(self, theta: Tensor, direction: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients c0, c1, c2 ``[A]`` of the penalty along the direction: c0 + c1 t + c2 t²."""

    @abstractmethod
    def bound(self, which: Tensor) -> Tensor:
        """Diagonal of the inverse of an upper bound of the Hessian ``[A, K, R]``, all positive."""

    @abstractmethod
    def inverse_hessian(self, logits: Tensor, which: Tensor) -> InverseHessian:
        """An approximate inverse Hessian at these logits ``[A, K, n]``."""


@dataclass(frozen=True)
class Minimum:
    """Where each of the A problems ended: ``parameters [A, K, R]`` and per problem ``[A]`` the rest."""

    parameters: Tensor
    value: Tensor
    iterations: Tensor
    gradient_norm: Tensor
    converged: Tensor


@dataclass
class _Working:
    """Everything held for the problems still at work; first dimension A.

    ``place``: position in the answer. ``mapped``: H₀ times ``gradient``.
    """

    place: Tensor
    which: Tensor
    theta: Tensor
    logits: Tensor
    value: Tensor
    gradient: Tensor
    mapped: Tensor
    bound: Tensor
    reference: Tensor
    flat: Tensor
    inverse: InverseHessian
    memory: Memory

    def keep(self, mask: Tensor) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            setattr(self, name, value[mask] if isinstance(value, Tensor) else value.keep(mask))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def _norm(gradient: Tensor, inverse: Tensor) -> Tensor:
    return _dot(gradient * inverse, gradient).sqrt()


class Minimisation:
    """The problems ``which [A]`` of one objective on their way from ``start [A, K, R]``, one iteration at a time.

    ``at_null``: the start is the null model, of which logits and gradient are known without a product. ``pairs``: what
    was learned of the same curvature before; ``learned``: where to put what is known of it in the end.

    A problem is done when the norm of its gradient (in the metric of the bounding preconditioner) is at most
    ``tolerance`` times the norm at the null model and its objective is estimated to be within 3 % of ``tolerance``
    (relative) of the minimum, or when the objective has stopped falling at the precision the data allow.
    """

    def __init__(
        self,
        objective: Objective,
        start: Tensor,
        tolerance: float,
        max_iterations: int,
        which: Tensor,
        at_null: bool = False,
        pairs: Pairs | None = None,
        learned: Pairs | None = None,
    ) -> None:
        self.objective, self.tolerance, self.max_iterations = objective, tolerance, max_iterations
        logits = objective.null_logits(start, which) if at_null else objective.logits(start, which)
        value, state = objective.nll(logits, which)
        value = value + objective.ridge_terms(start, start, which)[0]
        null = objective.null_gradient(which)
        gradient = null.clone() if at_null else objective.gradient(state, start, which)
        del state
        bound = objective.bound(which)
        reference = _norm(null, bound)
        self._theta, self._values, self._norms = start.clone(), value.clone(), _norm(gradient, bound)
        self._iterations = torch.zeros_like(which)
        self._converged = torch.ones_like(which, dtype=torch.bool)
        self._scale = reference.clamp_min(torch.finfo(torch.float64).tiny)
        inverse = objective.inverse_hessian(logits, which)
        memory = Memory.empty(len(which), start[0].numel(), logits.dtype, start.device)
        if pairs is not None:
            memory.recall(pairs, inverse)
        self._learned = learned
        self._work = _Working(
            torch.arange(len(which), device=start.device),
            which,
            start.clone(),
            logits,
            value,
            gradient,
            inverse.apply(gradient[:, None])[:, 0],
            bound,
            reference,
            torch.zeros_like(which),
            inverse,
            memory,
        )
        self._iteration = 0

    def advance(self) -> bool:
        """One iteration of every problem still at work; False when none is left."""
        work, objective = self._work, self.objective
        size_now = _norm(work.gradient, work.bound)
        direction, slope = _descent(work)
        # ½ gᵀH⁻¹g, with the H the method has learned so far, estimates how far F still is above its minimum.
        left = -0.5 * slope
        small = (size_now <= self.tolerance * work.reference) & (left <= _GAP * self.tolerance * work.value)
        done = small | (left <= 0.01 * objective.noise * work.value) | (work.flat >= _FLAT_ITERATIONS)
        leaving = torch.ones_like(done) if self._iteration == self.max_iterations else done
        if bool(leaving.any()):
            out = work.place[leaving]
            self._theta[out], self._values[out] = work.theta[leaving], work.value[leaving]
            self._norms[out] = size_now[leaving]
            self._iterations[out], self._converged[out] = self._iteration, done[leaving]
            if self._learned is not None:
                work.memory.store(self._learned, out, leaving)
            work.keep(~leaving)
            direction, slope = direction[~leaving], slope[~leaving]
        if len(work.which) == 0:
            return False
        _step(objective, work, direction, slope, self._iteration)
        self._iteration += 1
        return True

    def found(self) -> Minimum:
        """Where the problems ended; complete once ``advance`` has returned False."""
        return Minimum(self._theta, self._values, self._iterations, self._norms / self._scale, self._converged)


def minimise(runs: Sequence[Minimisation]) -> list[Minimum]:
    """Bring all runs to their end, in turn one iteration of each: none waits for another to be done."""
    pending = list(runs)
    while pending:
        pending = [run for run in pending if run.advance()]
    return [run.found() for run in runs]


def _descent(work: _Working) -> tuple[Tensor, Tensor]:
    """Direction ``[A, K, R]`` of every problem and its slope ``[A]``, at most 0."""
    direction = -work.memory.multiply(work.gradient.flatten(1), work.mapped.flatten(1)).view_as(work.gradient)
    slope = _dot(direction, work.gradient)
    uphill = ~(slope < 0)
    if bool(uphill.any()):
        work.memory.forget(uphill)
        safe = -(work.bound * work.gradient)
        direction = torch.where(uphill[:, None, None], safe, direction)
        slope = _dot(direction, work.gradient)
    return direction, slope


def _step(objective: Objective, work: _Working, direction: Tensor, slope: Tensor, iteration: int) -> None:
    """Move every problem along its direction and learn from what happened."""
    moved, length, value, state = _line_search(objective, work, direction, slope)
    step = length[:, None, None] * direction
    work.theta = work.theta + step
    work.logits = moved
    gradient = objective.gradient(state, work.theta, work.which)
    if (iteration + 1) % _REFRESH == 0:
        work.logits = objective.logits(work.theta, work.which)
        work.inverse = objective.inverse_hessian(work.logits, work.which)
        work.memory.remap(work.inverse, gradient.shape[1:])
        work.mapped = work.inverse.apply(work.gradient[:, None])[:, 0]
    mapped = work.inverse.apply(gradient[:, None])[:, 0]
    change = (gradient - work.gradient).flatten(1)
    work.memory.add(step.flatten(1), change, (mapped - work.mapped).flatten(1))
    # A step refused at every length came from a spoilt memory: forget it, and try the plain preconditioned gradient.
    stuck = length == 0
    if bool(stuck.any()):
        work.memory.forget(stuck)
    fell = work.value - value > 2.0 * objective.noise * work.value.abs()
    work.flat = torch.where(fell, 0, work.flat + 1)
    work.value, work.gradient, work.mapped = value, gradient, mapped


def _line_search(
    objective: Objective, work: _Working, direction: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backtracking with quadratic interpolation, each problem by itself; length 0 where no decrease was found.

    Returns the new logits, lengths, values, and the state the gradient is made from.
    """
    along = objective.logits(direction, work.which)
    c0, c1, c2 = objective.ridge_terms(work.theta, direction, work.which)
    length = torch.ones_like(slope)
    value = torch.empty_like(slope)
    moved = state = along
    pending = torch.arange(len(slope), device=slope.device)
    for trial in range(_TRIALS + 1):
        t = length[pending]
        if trial == 0:
            candidate = torch.addcmul(work.logits, t.to(along.dtype)[:, None, None], along)
        else:
            candidate = work.logits[pending] + t.to(along.dtype)[:, None, None] * along[pending]
        data, inner = objective.nll(candidate, work.which[pending])
        f = data + c0[pending] + c1[pending] * t + c2[pending] * t * t
        if trial == 0:
            moved, state = candidate, inner
        else:
            moved[pending], state[pending] = candidate, inner
        value[pending] = f
        start = work.value[pending]
        slack = objective.noise * start.abs()
        accepted = (f <= start + _ARMIJO * t * slope[pending] + slack) | (t == 0)
        refused = ~accepted
        if not bool(refused.any()):
            break
        rise = f - start - t * slope[pending]
        shorter = -slope[pending] * t * t / (2.0 * rise)
        shorter = torch.where(f.isfinite(), shorter, 0.1 * t)
        shorter = torch.minimum(torch.maximum(shorter, 0.1 * t), 0.5 * t)
        if trial == _TRIALS - 1:
            shorter = torch.zeros_like(t)
        pending, shorter = pending[refused], shorter[refused]
        length[pending] = shorter
    return moved, length, value, state

"""Limited-memory BFGS for a batch of smooth convex problems that are linear in their logits.

Every problem has its own step length, curvature memory and stopping; problems that are done leave the batch. Because
logits are linear in the parameters, a trial step costs no product: Z(θ + t d) = Z(θ) + t Z(d). One iteration is thus
one forward product (Z(d)) and one backward product (the gradient), whatever the line search does.

Reference: J. Nocedal and S. Wright (2006), Numerical Optimization, 2nd ed., algorithms 3.1 and 7.4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_MEMORY = 10
_ARMIJO = 1e-4
_TRIALS = 25
_FLAT_ITERATIONS = 8
_REFRESH = 25
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
    def nll(self, logits: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Data term ``[A]`` (float64) and whatever ``[A, K, n]`` the gradient is made from."""

    @abstractmethod
    def gradient(self, state: Tensor, theta: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Full gradient ``[A, K, R]`` (float64) and mean curvature per class ``[A, K]``; may overwrite ``state``."""

    @abstractmethod
    def ridge_terms(self, theta: Tensor, direction: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients c0, c1, c2 ``[A]`` of the penalty along the direction: c0 + c1 t + c2 t²."""

    @abstractmethod
    def preconditioner(self, curvature: Tensor | None, which: Tensor) -> Tensor:
        """Diagonal of an approximate inverse Hessian ``[A, K, R]``, all positive."""


@dataclass(frozen=True)
class Minimum:
    """Where each of the P problems ended: ``parameters [P, K, R]`` and per problem ``[P]`` the rest."""

    parameters: Tensor
    value: Tensor
    iterations: Tensor
    gradient_norm: Tensor
    converged: Tensor


@dataclass
class _Working:
    """Everything held for the problems still at work; first dimension A (second for the memory)."""

    which: Tensor
    theta: Tensor
    logits: Tensor
    value: Tensor
    gradient: Tensor
    bound: Tensor
    inverse: Tensor
    reference: Tensor
    flat: Tensor
    gamma: Tensor
    steps: Tensor
    changes: Tensor
    rho: Tensor

    def keep(self, mask: Tensor) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            setattr(self, name, value[:, mask] if name in ("steps", "changes", "rho") else value[mask])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def _norm(gradient: Tensor, inverse: Tensor) -> Tensor:
    return _dot(gradient * inverse, gradient).sqrt()


def minimise(
    objective: Objective,
    start: Tensor,
    null: Tensor,
    tolerance: float,
    max_iterations: int,
    which: Tensor,
) -> Minimum:
    """Minimise the problems ``which`` from ``start [P, K, R]``; the others stay at their start.

    A problem is done when the norm of its gradient (in the metric of the bounding preconditioner) is at most
    ``tolerance`` times the norm at ``null [P, K, R]`` and its objective is estimated to be within 3 % of ``tolerance``
    (relative) of the minimum, or when the objective has stopped falling at the precision the data allow.
    """
    theta = start.clone()
    everyone = torch.arange(theta.shape[0], device=theta.device)
    value, state = objective.nll(objective.logits(theta, everyone), everyone)
    value = value + objective.ridge_terms(theta, theta, everyone)[0]
    gradient, curvature = objective.gradient(state, theta, everyone)
    bound = objective.preconditioner(None, everyone)
    norm = _norm(gradient, bound)
    _, null_state = objective.nll(objective.logits(null, everyone), everyone)
    reference = _norm(objective.gradient(null_state, null, everyone)[0], bound)
    del state, null_state
    iterations = torch.zeros_like(everyone)
    converged = torch.ones_like(everyone, dtype=torch.bool)
    scale = reference.clamp_min(torch.finfo(torch.float64).tiny)

    a, size = len(which), theta[0].numel()
    work = _Working(
        which,
        theta[which],
        objective.logits(theta[which], which),
        value[which],
        gradient[which],
        bound[which],
        objective.preconditioner(curvature[which], which),
        reference[which],
        torch.zeros_like(which),
        torch.ones(a, dtype=torch.float64, device=theta.device),
        torch.zeros(_MEMORY, a, size, dtype=torch.float64, device=theta.device),
        torch.zeros(_MEMORY, a, size, dtype=torch.float64, device=theta.device),
        torch.zeros(_MEMORY, a, dtype=torch.float64, device=theta.device),
    )
    for iteration in range(max_iterations + 1):
        size_now = _norm(work.gradient, work.bound)
        direction, slope = _descent(work, iteration)
        # ½ gᵀH⁻¹g, with the H the method has learned so far, estimates how far F still is above its minimum.
        left = -0.5 * slope
        small = (size_now <= tolerance * work.reference) & (left <= _GAP * tolerance * work.value)
        done = small | (left <= 0.01 * objective.noise * work.value) | (work.flat >= _FLAT_ITERATIONS)
        last = iteration == max_iterations
        leaving = torch.ones_like(done) if last else done
        if bool(leaving.any()):
            out = work.which[leaving]
            theta[out], value[out], norm[out] = work.theta[leaving], work.value[leaving], size_now[leaving]
            iterations[out], converged[out] = iteration, done[leaving]
            work.keep(~leaving)
            direction, slope = direction[~leaving], slope[~leaving]
        if len(work.which) == 0:
            break
        _step(objective, work, direction, slope, iteration)
    return Minimum(theta, value, iterations, norm / scale, converged)


def _descent(work: _Working, iteration: int) -> tuple[Tensor, Tensor]:
    """Direction ``[A, K, R]`` of every problem and its slope ``[A]``, at most 0."""
    direction = _direction(work, iteration)
    slope = _dot(direction, work.gradient)
    uphill = ~(slope < 0)
    if bool(uphill.any()):
        work.rho[:, uphill] = 0.0
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
    if (iteration + 1) % _REFRESH == 0:
        work.logits = objective.logits(work.theta, work.which)
    gradient, curvature = objective.gradient(state, work.theta, work.which)
    change = gradient - work.gradient
    product = _dot(step, change)
    good = product > 1e-12 * _dot(step, step).sqrt() * _dot(change, change).sqrt()
    slot = iteration % _MEMORY
    work.steps[slot], work.changes[slot] = step.flatten(1), change.flatten(1)
    work.rho[slot] = torch.where(good, 1.0 / product.where(good, 1.0), 0.0)
    work.inverse = objective.preconditioner(curvature, work.which)
    scaled = product / _dot(change * work.inverse, change).clamp_min(1e-300)
    work.gamma = torch.where(good, scaled.clamp(1e-3, 1e3), 1.0)
    stuck = length == 0
    # A step refused at every length came from a spoilt memory: forget it, and try the plain preconditioned gradient.
    work.rho[:, stuck] = 0.0
    work.gamma[stuck] = 1.0
    fell = work.value - value > 2.0 * objective.noise * work.value.abs()
    work.flat = torch.where(fell, 0, work.flat + 1)
    work.value, work.gradient = value, gradient


def _direction(work: _Working, iteration: int) -> Tensor:
    """Two-loop recursion; memory slots with ``rho`` 0 drop out by themselves."""
    q = work.gradient.flatten(1).clone()
    slots = [i % _MEMORY for i in range(max(0, iteration - _MEMORY), iteration)]
    alphas: dict[int, Tensor] = {}
    for slot in reversed(slots):
        alphas[slot] = (work.rho[slot] * torch.linalg.vecdot(work.steps[slot], q))[:, None]
        q.addcmul_(alphas[slot], work.changes[slot], value=-1.0)
    r = work.gamma[:, None] * work.inverse.flatten(1) * q
    for slot in slots:
        beta = (work.rho[slot] * torch.linalg.vecdot(work.changes[slot], r))[:, None]
        r.addcmul_(alphas[slot] - beta, work.steps[slot])
    return -r.view_as(work.gradient)


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

"""The memory of a limited-memory BFGS method, for many problems at once, and what of it outlives a minimisation.

A pair (step s, change of the gradient y) says H s ≈ y. Where only the penalty changes, it stays true with y + Δλ s, so
a path of penalties need not learn the same curvature again at each.

References: J. Nocedal (1980), Updating quasi-Newton matrices with limited storage, Math. Comp. 35, 773–782; R. Byrd,
J. Nocedal and R. Schnabel (1994), Representations of quasi-Newton matrices, Math. Programming 63, theorem 2.2 (the
compact form).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trace_offline.estimators.class_blocks import InverseHessian

MEMORY = 10
"""Pairs kept of each problem."""


@dataclass(frozen=True)
class Pairs:
    """Curvature that a minimisation has learned: ``steps`` and ``changes`` of the gradient ``[A, m, K, R]`` in float32,
    the oldest first; zeros where there are fewer.
    """

    steps: Tensor
    changes: Tensor

    @classmethod
    def empty(cls, shape: torch.Size, device: torch.device) -> Pairs:
        """For problems with parameters of ``shape`` [A, K, R]."""
        both = torch.zeros(2, shape[0], MEMORY, *shape[1:], device=device)
        return cls(both[0], both[1])


@dataclass
class Memory:
    """Pairs s (step) and y (change of gradient) ``[A, m, K·R]``, H₀y likewise, in the number type of the wide products
    (they make directions, nothing that is reported); their products ``[A, m, m]`` in float64.

    An unused or refused slot holds zeros, and drops out by itself. ``order``: slots from the oldest to the newest.
    """

    steps: Tensor
    changes: Tensor
    mapped: Tensor
    step_change: Tensor
    change_mapped: Tensor
    gamma: Tensor
    order: list[int]

    @classmethod
    def empty(cls, problems: int, size: int, dtype: torch.dtype, device: torch.device) -> Memory:
        """Of problems that have ``size`` parameters each."""
        vectors = torch.zeros(3, problems, MEMORY, size, dtype=dtype, device=device)
        products = torch.zeros(2, problems, MEMORY, MEMORY, dtype=torch.float64, device=device)
        ones = torch.ones(problems, dtype=torch.float64, device=device)
        return cls(vectors[0], vectors[1], vectors[2], products[0], products[1], ones, [])

    def recall(self, pairs: Pairs, inverse: InverseHessian) -> None:
        """Begin with ``pairs``, with ``inverse`` as H₀."""
        kind = self.steps.dtype
        steps, changes = pairs.steps.to(kind).flatten(2), pairs.changes.to(kind).flatten(2)
        product = torch.linalg.vecdot(steps, changes)
        floor = 1e-12 * torch.linalg.vector_norm(steps, dim=2) * torch.linalg.vector_norm(changes, dim=2)
        use = (product > floor)[..., None]
        self.steps, self.changes, self.order = steps * use, changes * use, list(range(MEMORY))
        self.step_change = (self.steps @ self.changes.transpose(1, 2)).double()
        self.remap(inverse, pairs.steps.shape[2:])
        scaled = product[:, -1].double() / self.change_mapped[:, -1, -1].clamp_min(1e-300)
        self.gamma = torch.where(use[:, -1, 0], scaled.clamp(1e-3, 1e3), 1.0)

    def store(self, where: Pairs, places: Tensor, mask: Tensor) -> None:
        """Put the pairs of the problems ``mask [A]`` to ``places``."""
        used = len(self.order)
        if used:
            order = torch.tensor(self.order, device=mask.device)
            for mine, kept in ((self.steps, where.steps), (self.changes, where.changes)):
                kept[places, -used:] = mine[mask][:, order].float().view(-1, used, *kept.shape[2:])

    def keep(self, mask: Tensor) -> Memory:
        """Of the problems ``mask [A]``."""
        return Memory(
            self.steps[mask],
            self.changes[mask],
            self.mapped[mask],
            self.step_change[mask],
            self.change_mapped[mask],
            self.gamma[mask],
            self.order,
        )

    def forget(self, which: Tensor) -> None:
        """Begin anew with the problems ``which [A]``."""
        for part in (self.steps, self.changes, self.mapped, self.step_change, self.change_mapped):
            part[which] = 0.0
        self.gamma[which] = 1.0

    def add(self, step: Tensor, change: Tensor, mapped: Tensor) -> None:
        """Remember one pair ``[A, K·R]`` of every problem; pairs without positive curvature are refused."""
        product = torch.linalg.vecdot(step, change)
        floor = 1e-12 * torch.linalg.vector_norm(step, dim=1) * torch.linalg.vector_norm(change, dim=1)
        good = product > floor
        slot = self.order.pop(0) if len(self.order) == MEMORY else len(self.order)
        self.order.append(slot)
        use = good.to(step.dtype)[:, None]
        kind = self.steps.dtype
        step, change, mapped = (step * use).to(kind), (change * use).to(kind), (mapped * use).to(kind)
        self.steps[:, slot], self.changes[:, slot], self.mapped[:, slot] = step, change, mapped
        used = len(self.order)
        self.step_change[:, slot, :used] = (self.changes[:, :used] @ step[..., None])[..., 0]
        self.step_change[:, :used, slot] = (self.steps[:, :used] @ change[..., None])[..., 0]
        row = (self.mapped[:, :used] @ change[..., None])[..., 0]
        self.change_mapped[:, slot, :used] = self.change_mapped[:, :used, slot] = row
        scaled = product / row[:, slot].clamp_min(1e-300)
        self.gamma = torch.where(good, scaled.clamp(1e-3, 1e3), 1.0)

    def remap(self, inverse: InverseHessian, shape: torch.Size) -> None:
        """Take another H₀."""
        problems = len(self.changes)
        mapped = inverse.apply(self.changes.double().view(problems, MEMORY, *shape)).flatten(2)
        self.mapped = mapped.to(self.changes.dtype)
        self.change_mapped = (self.changes @ self.mapped.transpose(1, 2)).double()

    def multiply(self, gradient: Tensor, mapped: Tensor) -> Tensor:
        """The learned inverse Hessian times ``gradient [A, K·R]``; ``mapped`` is H₀ times the same."""
        base = self.gamma[:, None] * mapped
        used = len(self.order)
        if not used:
            return base
        # Slots are taken in order, so the first ``used`` are those that hold something.
        steps, changes, mapped_changes = self.steps[:, :used], self.changes[:, :used], self.mapped[:, :used]
        order = torch.tensor(self.order, device=gradient.device)
        small = self.step_change[:, order][:, :, order]
        curvature = small.diagonal(dim1=1, dim2=2).clone()
        upper = small.triu()
        upper.diagonal(dim1=1, dim2=2).add_((curvature == 0).to(upper.dtype))
        kind = steps.dtype
        along = (steps @ gradient[..., None].to(kind))[:, order].double()
        across = self.gamma[:, None, None] * (changes @ mapped[..., None].to(kind))[:, order]
        inner = torch.linalg.solve_triangular(upper, along, upper=True)
        middle = curvature[..., None] * inner + self.gamma[:, None, None] * (
            self.change_mapped[:, order][:, :, order] @ inner
        )
        outer = torch.linalg.solve_triangular(upper.transpose(1, 2), middle - across, upper=False)
        weights_s, weights_y = torch.zeros_like(steps[..., :1]), torch.zeros_like(steps[..., :1])
        weights_s[:, order], weights_y[:, order] = outer.to(kind), inner.to(kind)
        out = base + (steps.transpose(1, 2) @ weights_s)[..., 0]
        return out - self.gamma[:, None] * (mapped_changes.transpose(1, 2) @ weights_y)[..., 0]

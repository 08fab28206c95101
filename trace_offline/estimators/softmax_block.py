"""Softmax regressions of like shape as one dense block: the objective that the batched solver minimises.

Problems may differ in rows n, classes K and directions R. A block pads labels and logits to the largest n and K and
parameters to the largest R of its problems. A padded class is a class without rows, a padded row has weight 0, a padded
direction has no data: none changes an optimum. Products are never padded: problems on the same feature matrix are one
product, classes side by side.

Why not one product for all problems of a layer, rows of no part in a problem with weight 0? It costs rows(layer) × ΣK
where separate feature matrices cost Σ rows(problem) × K, which is never more; what blocks save is the number of
operations that are started, which padding bounds by ``waste``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trace_offline.estimators.class_blocks import (
    COUPLED_NUMBERS,
    DENSE_NUMBERS,
    MAX_COUPLED,
    MAX_DENSE,
    InverseHessian,
    class_blocks,
    coupled,
    couples,
    dense_width,
    kronecker,
    rows_for,
)
from trace_offline.estimators.lbfgs import Objective
from trace_offline.estimators.rotation import Rotated

ABSENT = -40.0
"""Intercept of a class without training rows: its maximum-likelihood value is −∞, this gives it probability < 1e-16."""


@dataclass(frozen=True, eq=False)
class Problem:
    """``labels [n]`` (int64, 0…K−1) of the rows of feature matrix number ``design``, and the number of classes K.

    Problems that hold the same tensor of labels share it.
    """

    design: int
    labels: Tensor
    n_classes: int


def blocks_of(shapes: Sequence[tuple[int, int, int]], waste: float) -> list[list[int]]:
    """Places of the problems with ``shapes`` (n, K, R) in blocks whose padded numbers exceed the real ones by at most
    the share ``waste``; no block grows so large that its preconditioner would have to be coarser.
    """
    blocks: list[list[int]] = []
    rooms: list[_Room] = []
    for place in sorted(range(len(shapes)), key=lambda p: shapes[p], reverse=True):
        for number, room in enumerate(rooms):
            wider = room.with_(shapes[place])
            if wider.fits(waste):
                blocks[number].append(place)
                rooms[number] = wider
                break
        else:
            blocks.append([place])
            rooms.append(_Room().with_(shapes[place]))
    return blocks


@dataclass(frozen=True)
class _Room:
    """Largest n, K, R of the problems of a block, their number, and how many numbers they really need."""

    rows: int = 0
    classes: int = 0
    width: int = 0
    count: int = 0
    data: int = 0
    parameters: int = 0

    def with_(self, shape: tuple[int, int, int]) -> _Room:
        n, k, r = shape
        return _Room(
            max(self.rows, n),
            max(self.classes, k),
            max(self.width, r),
            self.count + 1,
            self.data + n * k,
            self.parameters + k * r,
        )

    def fits(self, waste: float) -> bool:
        size = self.classes * self.width
        coarse = size > MAX_COUPLED
        block = self.width**2 if self.width <= MAX_DENSE else self.width
        numbers = self.count * (self.classes * block if coarse else size * size)
        return (
            numbers <= (DENSE_NUMBERS if coarse else COUPLED_NUMBERS)
            and self.count * self.classes * self.rows <= (1.0 + waste) * self.data
            and self.count * size <= (1.0 + waste) * self.parameters
        )


class SoftmaxBlock(Objective):
    """B problems, sorted by feature matrix; parameters ``[A, K, R]``, the intercept last.

    Problem p: (1/n) Σ −log softmax + (λ/2)‖W‖² over the rotated features. ``penalty [B]`` and ``exact`` are set before
    each solve.
    """

    def __init__(self, designs: Sequence[Rotated], problems: Sequence[Problem], places: Sequence[int]) -> None:
        self.places = sorted(places, key=lambda place: problems[place].design)
        chosen = [problems[place] for place in self.places]
        self.problems, self.designs = chosen, designs
        used = [designs[problem.design] for problem in chosen]
        device, self.dtype = used[0].data.device, used[0].data.dtype
        self.n_rows = max(design.n for design in used)
        self.n_classes = max(problem.n_classes for problem in chosen)
        self.width = max(design.size for design in used)
        self.design = torch.tensor([problem.design for problem in chosen], device=device)
        self.rows = torch.tensor([design.n for design in used], dtype=torch.float64, device=device)
        sets: dict[int, int] = {}
        distinct: list[Tensor] = []
        for problem in chosen:
            if sets.setdefault(id(problem.labels), len(distinct)) == len(distinct):
                distinct.append(problem.labels)
        self.label_set = torch.tensor([sets[id(problem.labels)] for problem in chosen], device=device)
        self.labels = torch.zeros(len(distinct), self.n_rows, dtype=torch.int64, device=device)
        for row, labels in zip(self.labels, distinct, strict=True):
            row[: len(labels)] = labels
        ragged = any(len(labels) < self.n_rows for labels in distinct)
        self.weight: Tensor | None = None
        if ragged:
            self.weight = torch.zeros(len(distinct), 1, self.n_rows, dtype=self.dtype, device=device)
            for row, labels in zip(self.weight, distinct, strict=True):
                row[:, : len(labels)] = 1.0
        counts = torch.stack([torch.bincount(labels, minlength=self.n_classes) for labels in distinct]).double()
        self.shares = (counts / counts.sum(1, keepdim=True))[self.label_set]
        self.spectrum = torch.zeros(len(chosen), self.width, dtype=torch.float64, device=device)
        for row, design in zip(self.spectrum, used, strict=True):
            row[: design.size - 1] = design.spectrum[:-1]
        self.spectrum[:, -1] = 1.0
        self.ridge = torch.ones(self.width, dtype=torch.float64, device=device)
        self.ridge[-1] = 0.0
        self.noise = 1e-7 if self.dtype == torch.float32 else 1e-15
        self.penalty = torch.ones(len(chosen), dtype=torch.float64, device=device)
        self.exact = True
        self._null: Tensor | None = None
        self._last: tuple[Tensor, list[tuple[Rotated, int, int]]] | None = None

    def slices(self, which: Tensor) -> list[tuple[Rotated, int, int]]:
        """(feature matrix, first, last) for the runs of ``which`` (ascending) that share one."""
        if self._last is None or self._last[0] is not which:
            designs, counts = torch.unique_consecutive(self.design[which], return_counts=True)
            ends = counts.cumsum(0).tolist()
            runs = zip((self.designs[place] for place in designs.tolist()), [0, *ends[:-1]], ends, strict=True)
            self._last = which, list(runs)
        return self._last[1]

    def cut(self, theta: Tensor, design: Rotated) -> Tensor:
        """``[…, R]`` of the block → ``[…, R]`` of one feature matrix."""
        if design.size == self.width:
            return theta
        return torch.cat([theta[..., : design.size - 1], theta[..., -1:]], -1)

    def pad(self, theta: Tensor) -> Tensor:
        """``[…, R]`` of one feature matrix → ``[…, R]`` of the block."""
        if theta.shape[-1] == self.width:
            return theta
        out = theta.new_zeros(*theta.shape[:-1], self.width)
        out[..., : theta.shape[-1] - 1], out[..., -1] = theta[..., :-1], theta[..., -1]
        return out

    def logits(self, theta: Tensor, which: Tensor) -> Tensor:
        """``θ [A, K, R]`` → ``[A, K, n]``, 0 for padded rows; one product for each feature matrix."""
        out = torch.empty(len(which), self.n_classes, self.n_rows, dtype=self.dtype, device=theta.device)
        for design, first, last in self.slices(which):
            target = out[first:last].flatten(0, 1)
            left = self.cut(theta[first:last], design).flatten(0, 1)
            if design.n == self.n_rows:
                design.forward(left, out=target)
            else:
                target[:, : design.n] = design.forward(left)
                target[:, design.n :] = 0.0
        return out

    def null_logits(self, theta: Tensor, which: Tensor) -> Tensor:
        """The same where all weights are 0."""
        out = theta[..., -1:].to(self.dtype).repeat(1, 1, self.n_rows)
        return out if self.weight is None else out * self.weight[self.label_set[which]]

    def nll(self, logits: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Mean NLL ``[A]`` in float64 and probabilities ``[A, K, n]``."""
        labels = self.labels[self.label_set[which]][:, None]
        probabilities = logits.softmax(1)
        right = probabilities.gather(1, labels)
        # One exponential for value and gradient; a right class that has underflowed needs the long way.
        log_p = right.log() if bool((right > 1e-30).all()) else logits.log_softmax(1).gather(1, labels)
        if self.weight is not None:
            log_p = log_p * self.weight[self.label_set[which]]
        return -log_p.sum((1, 2), dtype=torch.float64) / self.rows[which], probabilities

    def gradient(self, state: Tensor, theta: Tensor, which: Tensor) -> Tensor:
        """``[A, K, R]`` from the probabilities ``state``, which are overwritten."""
        labels = self.labels[self.label_set[which]]
        state.scatter_add_(1, labels[:, None], state.new_full((1, 1, 1), -1.0).expand(len(which), 1, self.n_rows))
        gradient = self._back(state, which)
        gradient += self.penalty[which][:, None, None] * self.ridge * theta
        gradient[..., -1] *= self.shares[which] > 0
        return gradient

    def _back(self, state: Tensor, which: Tensor) -> Tensor:
        """``[A, K, n]`` times the data of each problem, over its rows: ``[A, K, R]``."""
        out = torch.empty(len(which), self.n_classes, self.width, dtype=torch.float64, device=state.device)
        for design, first, last in self.slices(which):
            product = design.backward(state[first:last].flatten(0, 1)[:, : design.n])
            out[first:last] = self.pad(product.view(last - first, self.n_classes, -1))
        return out.div_(self.rows[which][:, None, None])

    def null_gradient(self, which: Tensor) -> Tensor:
        """At W = 0 and the intercepts of the class shares: −Σ_{i of class k} x_i / n, as features are centred."""
        if self._null is None:
            everything = torch.arange(len(self.problems), device=which.device)
            onehot = torch.zeros(
                len(everything), self.n_classes, self.n_rows, dtype=self.dtype, device=self.labels.device
            )
            onehot.scatter_(1, self.labels[self.label_set][:, None], -1.0)
            self._null = self._back(onehot, everything)
            self._null[..., -1] = 0.0
        return self._null[which]

    def ridge_terms(self, theta: Tensor, direction: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients ``[A]`` of the penalty along the direction."""
        w, d = theta[..., :-1], direction[..., :-1]
        lam = self.penalty[which]
        return (
            0.5 * lam * w.square().sum((1, 2)),
            lam * (w * d).sum((1, 2)),
            0.5 * lam * d.square().sum((1, 2)),
        )

    def bound(self, which: Tensor) -> Tensor:
        """Inverse of Böhning's bound, ``[A, K, R]``."""
        inverse = 1.0 / (0.5 * self.spectrum[which] + self.penalty[which][:, None] * self.ridge)
        return inverse[:, None].expand(-1, self.n_classes, -1)

    def inverse_hessian(self, logits: Tensor, which: Tensor) -> InverseHessian:
        """From evenly spaced rows of each problem, or all."""
        width = self.width
        ridge = self.penalty[which][:, None] * self.ridge
        whole = self.exact and couples(width, len(which), self.n_classes)
        if not whole and width > MAX_DENSE:
            probabilities = logits.softmax(1)
            if self.weight is not None:
                probabilities *= self.weight[self.label_set[which]]
            return kronecker(probabilities, self.rows[which], self.spectrum[which], ridge)
        if not whole:
            width = dense_width(width, len(which), self.n_classes)
        wanted = len(rows_for(self.n_rows, width * self.n_classes if whole else width))
        evenly = torch.arange(wanted, device=logits.device)
        columns = torch.zeros(len(which), width, wanted, dtype=self.dtype, device=logits.device)
        sample = torch.empty(len(which), self.n_classes, wanted, dtype=self.dtype, device=logits.device)
        for design, first, last in self.slices(which):
            rows = evenly * design.n // wanted
            leading = min(width, design.size) - 1
            columns[first:last, :leading] = design.leading(leading, rows)
            columns[first:last, -1] = 1.0
            sample[first:last] = logits[first:last][:, :, rows]
        build = coupled if whole else class_blocks
        return build(sample.softmax(1), columns, self.spectrum[which], ridge)

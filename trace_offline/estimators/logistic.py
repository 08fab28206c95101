"""L2-regularised multinomial logistic regression, many problems at once.

One problem is one pair of (feature matrix, label set): a layer of a network, the rows of one task and one split, and
the real labels or those of a control task. Problems may differ in everything: rows, features, classes, penalty. They
advance together by a limited-memory BFGS method: problems of like shape in dense blocks, problems on the same feature
matrix in one wide product, blocks one iteration each in turn; a problem that has converged leaves the batch.

Objective of one problem, W [K, D] and an intercept b [K] that is not penalised:

    F(W, b) = (1/n) Σ_i −log softmax(W x_i + b)[y_i]  +  (λ/2) ‖W‖²

Relation to scikit-learn's ``LogisticRegression``, whose loss is a sum and whose two-class model has a single weight
vector: C = 1/(n λ) for K > 2 classes, and C = 2/(n λ) for K = 2.

The features are centred (absorbed by the intercept) and rotated into the eigenbasis of XᵀX/n (which leaves ‖W‖²
unchanged), where Böhning's bound on the Hessian, H ⪯ ½ (XᵀX/n) ⊗ (I − 11ᵀ/K) + λI, is diagonal: one
eigendecomposition per feature matrix, shared by all label sets, penalties and restarts. Gradients are measured in the
metric of that bound; the preconditioner is an approximation of the Hessian itself (``class_blocks``).

References: D. Böhning (1992), Multinomial logistic regression algorithm, Ann. Inst. Statist. Math. 44, 197–200;
J. Nocedal (1980), Updating quasi-Newton matrices with limited storage, Math. Comp. 35, 773–782.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor

from trace_offline.core.errors import UsageError
from trace_offline.estimators.lbfgs import Minimisation, Pairs, minimise
from trace_offline.estimators.rotation import Directions, design_of
from trace_offline.estimators.softmax_block import ABSENT, Problem, SoftmaxBlock, blocks_of

__all__ = ["ABSENT", "LogisticFit", "LogisticProblems", "Problem", "fit_logistic", "fit_path"]

WASTE = 0.1
"""Share of padded numbers accepted on a CPU, where arithmetic is what takes time."""

WASTE_DEVICE = 3.0
"""The same on an accelerator, where small problems spend their time on starting operations."""


@dataclass(frozen=True, eq=False)
class Learned:
    """Curvature of one problem, found on the way to its optimum: pairs ``[m, K, R]`` along the columns of ``basis``."""

    steps: Tensor
    changes: Tensor
    basis: Tensor


@dataclass(frozen=True)
class LogisticFit:
    """Solutions of P problems with K_p classes and D features.

    ``weights`` P tensors ``[K_p, D]``, ``intercepts`` P tensors ``[K_p]`` (sum 0 over the classes that occur when
    features are centred), in the dtype of the solve; ``nll [P]`` mean training NLL in nats; ``objective [P]`` =
    nll + (λ/2)‖W‖²; ``penalty [P]``; ``iterations [P]``; ``gradient_norm [P]`` relative to the gradient of the
    intercept-only model; ``converged [P]``. ``learned``: of each problem, if it was asked for.
    """

    weights: tuple[Tensor, ...]
    intercepts: tuple[Tensor, ...]
    nll: Tensor
    objective: Tensor
    penalty: Tensor
    iterations: Tensor
    gradient_norm: Tensor
    converged: Tensor
    learned: tuple[Learned | None, ...] = ()

    def log_probabilities(self, features: Tensor, problem: int) -> Tensor:
        """``features [m, D]`` → ``log p [m, K]`` of one problem."""
        weights = self.weights[problem]
        return (features.to(weights.dtype) @ weights.T + self.intercepts[problem]).log_softmax(-1)


class LogisticProblems:
    """A list of problems made ready once (centred, rotated, blocked) and solvable at any penalty from any start.

    ``features``: matrices ``[n, D]`` of any float dtype on one device. ``problems``: see ``Problem``. ``dtype`` of the
    wide products; parameters are always kept in float64. ``waste``: share of padded numbers that blocks may hold.
    ``like``: ``directions`` of problems on other rows of the same feature matrices, which save finding them again.
    Memory beyond the input: about n·D numbers for each matrix and 5·n·K for each problem.

    Raises UsageError for no problem, fewer than two classes, no rows, labels out of range, features that are not
    finite.
    """

    def __init__(
        self,
        features: Sequence[Tensor],
        problems: Sequence[Problem],
        dtype: torch.dtype = torch.float32,
        waste: float | None = None,
        like: Sequence[Directions] | None = None,
    ) -> None:
        _check(features, problems)
        self.problems, self.dtype, self.device = tuple(problems), dtype, features[0].device
        classes = [0] * len(features)
        for problem in problems:
            classes[problem.design] += problem.n_classes
        self.designs = [
            design_of(matrix, dtype, count, known)
            for matrix, count, known in zip(features, classes, like or repeat(None, len(features)), strict=True)
        ]
        used = [self.designs[problem.design] for problem in problems]
        shapes = [(design.n, p.n_classes, design.size) for design, p in zip(used, problems, strict=True)]
        if waste is None:
            waste = WASTE if self.device.type == "cpu" else WASTE_DEVICE
        self.blocks = [SoftmaxBlock(self.designs, problems, places) for places in blocks_of(shapes, waste)]

    @property
    def directions(self) -> list[Directions]:
        """In which each feature matrix is seen."""
        return [design.directions for design in self.designs]

    def solve(
        self,
        penalty: float | Tensor,
        start: LogisticFit | None = None,
        tolerance: float = 1e-4,
        max_iterations: int = 500,
        active: Tensor | None = None,
        exact: bool = True,
        learn: bool = False,
    ) -> LogisticFit:
        """Minimise every problem at ``penalty`` λ (a number, or ``[P]``), warm from ``start`` when given.

        Stops a problem when its gradient, in the norm of the preconditioner, is ``tolerance`` times that of the
        intercept-only model, or when the objective no longer falls at this precision. ``active [P]`` (bool) leaves the
        other problems at their start. ``exact``: spend more on the curvature of small problems, which pays at tight
        tolerances. ``learn``: keep what was learned of the curvature, for solves that start from this one, at another
        penalty or on other rows: it does not change what they find. Deterministic. Raises UsageError unless every λ >
        0.
        """
        count = len(self.problems)
        lam = torch.as_tensor(penalty, dtype=torch.float64, device=self.device).expand(count).clone()
        if not bool((lam > 0).all() and lam.isfinite().all()):
            raise UsageError(f"logistic regression: every penalty must be a positive number, found {penalty}.")
        mask = torch.ones(count, dtype=torch.bool) if active is None or start is None else active.cpu()
        runs, ran = [], []
        for block in self.blocks:
            which = mask[block.places].nonzero().flatten().to(self.device)
            if len(which):
                block.penalty, block.exact = lam[block.places], exact
                first = self._start(block, which, start)
                known = None if start is None else self._recalled(block, which, start)
                kept = Pairs.empty(first.shape, self.device) if learn else None
                runs.append(Minimisation(block, first, tolerance, max_iterations, which, start is None, known, kept))
                ran.append((block, which, kept))
        found = minimise(runs)
        whole = torch.zeros(count, dtype=torch.float64, device=self.device)
        fit = start or LogisticFit(
            (whole,) * count, (whole,) * count, whole, whole, whole, whole.long(), whole, whole.bool()
        )
        weights, intercepts = list(fit.weights), list(fit.intercepts)
        learned = list(fit.learned or (None,) * count)
        numbers = {name: getattr(fit, name).clone() for name in _PER_PROBLEM}
        for (block, which, kept), minimum in zip(ran, found, strict=True):
            places = torch.tensor(block.places, device=self.device)[which]
            theta = minimum.parameters
            ridge = 0.5 * lam[places] * theta[..., :-1].square().sum((-1, -2))
            numbers["nll"][places] = minimum.value - ridge
            numbers["objective"][places], numbers["penalty"][places] = minimum.value, lam[places]
            numbers["iterations"][places], numbers["gradient_norm"][places] = minimum.iterations, minimum.gradient_norm
            numbers["converged"][places] = minimum.converged
            for place, w, b in zip(places.tolist(), *self._back(block, which, theta), strict=True):
                weights[place], intercepts[place] = w.to(self.dtype), b.to(self.dtype)
            for row, place in enumerate(places.tolist()):
                learned[place] = None if kept is None else self._cut(block, place, kept, row)
        return LogisticFit(tuple(weights), tuple(intercepts), **numbers, learned=tuple(learned))

    def _cut(self, block: SoftmaxBlock, place: int, pairs: Pairs, row: int) -> Learned:
        """What was learned of one problem, without the padding of its block."""
        problem = self.problems[place]
        design = self.designs[problem.design]
        steps, changes = (block.cut(part[row, :, : problem.n_classes], design) for part in (pairs.steps, pairs.changes))
        return Learned(steps, changes, design.basis)

    def _recalled(self, block: SoftmaxBlock, which: Tensor, start: LogisticFit) -> Pairs | None:
        """What ``start`` learned, at the penalties of now: the gradient of (λ/2)‖W‖² changes by λ times the step."""
        found = None
        for row, inside in enumerate(which.tolist()):
            place, problem = block.places[inside], block.problems[inside]
            learned = start.learned[place] if start.learned else None
            if learned is None or learned.basis is not self.designs[problem.design].basis:
                continue
            if found is None:
                shape = torch.Size((len(which), block.n_classes, block.width))
                found = Pairs.empty(shape, self.device)
            steps = found.steps[row, :, : problem.n_classes] = block.pad(learned.steps)
            more = float(block.penalty[inside] - start.penalty[place]) * block.ridge.to(steps.dtype)
            found.changes[row, :, : problem.n_classes] = block.pad(learned.changes) + more * steps
        return found

    def _start(self, block: SoftmaxBlock, which: Tensor, start: LogisticFit | None) -> Tensor:
        """Parameters ``[A, K, R]`` in the rotated space."""
        shape = (len(which), block.n_classes, block.width)
        theta = torch.zeros(shape, dtype=torch.float64, device=self.device)
        shares = block.shares[which]
        known = shares.clamp_min(1e-300).log()
        if start is not None:
            for row, place in enumerate(which.tolist()):
                problem = block.problems[place]
                design, number = self.designs[problem.design], block.places[place]
                weights = start.weights[number].double()
                shifted = start.intercepts[number].double() + weights @ design.mean
                theta[row, : problem.n_classes, : design.size - 1] = weights @ design.basis
                # A class may have been absent where the start was fit: then its share is the start.
                first = known[row, : problem.n_classes]
                known[row, : problem.n_classes] = shifted.where(shifted > 0.5 * ABSENT, first)
        theta[..., -1] = torch.where(shares > 0, known, ABSENT)
        return theta

    def _back(self, block: SoftmaxBlock, which: Tensor, theta: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Weights ``[K, D]`` and intercepts ``[K]`` for the features as given, of each of the problems ``which``."""
        present = block.shares[which] > 0
        centre = (theta[..., -1] * present).sum(-1, keepdim=True) / present.sum(-1, keepdim=True)
        offset = theta[..., -1] - torch.where(present, centre, 0.0)
        weights, intercepts = [], []
        for design, first, last in block.slices(which):
            turned = theta[first:last, :, : design.size - 1] @ design.basis.T
            moved = offset[first:last] - turned @ design.mean
            for w, b, place in zip(turned, moved, which[first:last].tolist(), strict=True):
                classes = block.problems[place].n_classes
                weights.append(w[:classes])
                intercepts.append(b[:classes])
        return weights, intercepts


_PER_PROBLEM = ("nll", "objective", "penalty", "iterations", "gradient_norm", "converged")


def fit_logistic(
    features: Sequence[Tensor],
    problems: Sequence[Problem],
    penalty: float | Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> LogisticFit:
    """Solve ``problems`` at one penalty (or one for each); see ``LogisticProblems`` for the details."""
    ready = LogisticProblems(features, problems, dtype)
    return ready.solve(penalty, tolerance=tolerance, max_iterations=max_iterations)


def fit_path(
    problems: LogisticProblems,
    validation: Sequence[Tensor],
    validation_labels: Sequence[Tensor],
    penalties: Sequence[float],
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 500,
    patience: int = 2,
) -> tuple[LogisticFit, Tensor]:
    """Choose a penalty for every problem by the mean NLL of held-out rows.

    Penalties are tried from the largest down, each solve starting from the last; the path of one problem ends once
    its validation NLL has risen ``patience`` times in a row. ``validation``: ``[m, D]`` for each feature matrix;
    ``validation_labels``: ``[m]`` for each problem. Returns the fit at the best penalty of each problem and the
    validation NLL ``[penalties, P]`` (largest penalty first; infinite where the path had ended). Ties go to the larger
    penalty.
    """
    count = len(problems.problems)
    history: list[Tensor] = []
    best = torch.full((count,), math.inf, dtype=torch.float64)
    risen = torch.zeros(count, dtype=torch.int64)
    running: LogisticFit | None = None
    chosen: LogisticFit | None = None
    last = best.clone()
    for penalty in sorted(penalties, reverse=True):
        active = risen < patience
        if not bool(active.any()):
            break
        running = problems.solve(penalty, running, tolerance, max_iterations, active, exact=False, learn=True)
        score = _heldout_nll(problems, running, active, validation, validation_labels)
        better = score < best
        chosen = running if chosen is None else _choose(better, running, chosen)
        best = torch.where(better, score, best)
        risen = torch.where(active, torch.where(score > last, risen + 1, 0), risen)
        last = torch.where(active, score, last)
        history.append(score)
    if chosen is None:
        raise UsageError("logistic regression: expected at least one penalty to choose from, found none.")
    return chosen, torch.stack(history)


def _heldout_nll(
    problems: LogisticProblems, fit: LogisticFit, active: Tensor, features: Sequence[Tensor], labels: Sequence[Tensor]
) -> Tensor:
    """``[P]`` in float64 on the CPU, infinite for problems that are not ``active``."""
    out = torch.full((len(labels),), math.inf, dtype=torch.float64, device=problems.device)
    by_design: dict[int, list[int]] = {}
    for place in active.nonzero().flatten().tolist():
        by_design.setdefault(problems.problems[place].design, []).append(place)
    for design, places in by_design.items():
        weights = torch.cat([fit.weights[place] for place in places])
        intercepts = torch.cat([fit.intercepts[place] for place in places])
        logits = features[design].to(weights.dtype) @ weights.T + intercepts
        parts = logits.split([problems.problems[place].n_classes for place in places], dim=1)
        for place, part in zip(places, parts, strict=True):
            right = part.log_softmax(1).gather(1, labels[place][:, None])
            out[place] = -right.mean(dtype=torch.float64)
    return out.cpu()


def _choose(mask: Tensor, new: LogisticFit, old: LogisticFit) -> LogisticFit:
    """Field by field: ``new`` where ``mask [P]``, else ``old``."""
    better = mask.tolist()
    weights, intercepts = (
        tuple(a if use else b for use, a, b in zip(better, getattr(new, name), getattr(old, name), strict=True))
        for name in ("weights", "intercepts")
    )
    numbers = {
        name: torch.where(mask.to(getattr(new, name).device), getattr(new, name), getattr(old, name))
        for name in _PER_PROBLEM
    }
    learned = tuple(a if use else b for use, a, b in zip(better, new.learned, old.learned, strict=True))
    return replace(new, weights=weights, intercepts=intercepts, learned=learned, **numbers)


def _check(features: Sequence[Tensor], problems: Sequence[Problem]) -> None:
    if not problems:
        raise UsageError("logistic regression: expected at least one problem, found none.")
    for problem in problems:
        matrix, labels = features[problem.design], problem.labels
        if matrix.dim() != 2 or labels.dim() != 1 or matrix.shape[0] != len(labels):
            raise UsageError(
                "logistic regression: expected features [n, D] and labels [n] with the same n, "
                f"found {tuple(matrix.shape)} and {tuple(labels.shape)}."
            )
        if not len(labels):
            raise UsageError("logistic regression: expected at least one row to fit, found none.")
        if problem.n_classes < 2:
            raise UsageError(
                f"logistic regression: expected two or more classes, found {problem.n_classes}; with one class there "
                "is nothing to tell apart."
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= problem.n_classes:
            raise UsageError(f"logistic regression: expected labels 0…{problem.n_classes - 1}, found {low}…{high}.")
    for matrix in features:
        # one sum tells, unless it overflows; looking at every number takes several times as long
        if not bool(matrix.sum().isfinite()) and not bool(matrix.isfinite().all()):
            raise UsageError("logistic regression: features must be finite, found NaN or infinity.")

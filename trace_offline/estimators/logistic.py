"""L2-regularised multinomial logistic regression, many problems at once.

One problem is one pair of (feature matrix, label set): typically every layer of a network times the real labels and
the labels of a control task. All problems of a call share the number of rows n, of features D and of classes K; they
are solved together by a limited-memory BFGS method whose every step is one wide product per feature matrix.

Objective of one problem, W [K, D] and an intercept b [K] that is not penalised:

    F(W, b) = (1/n) Σ_i −log softmax(W x_i + b)[y_i]  +  (λ/2) ‖W‖²

Relation to scikit-learn's ``LogisticRegression``, whose loss is a sum and whose two-class model has a single weight
vector: C = 1/(n λ) for K > 2 classes, and C = 2/(n λ) for K = 2.

The features are centred (absorbed by the intercept) and rotated into the eigenbasis of XᵀX/n (which leaves ‖W‖²
unchanged), where Böhning's bound on the Hessian, H ⪯ ½ (XᵀX/n) ⊗ (I − 11ᵀ/K) + λI, is diagonal: one
eigendecomposition per feature matrix, shared by all label sets, penalties and restarts. Gradients are measured in the
metric of that bound; the preconditioner is the Hessian on a sample of the rows (``class_blocks``).

References: D. Böhning (1992), Multinomial logistic regression algorithm, Ann. Inst. Statist. Math. 44, 197–200;
J. Nocedal (1980), Updating quasi-Newton matrices with limited storage, Math. Comp. 35, 773–782.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trace_offline.core.errors import UsageError
from trace_offline.estimators.class_blocks import (
    InverseHessian,
    class_blocks,
    coupled,
    couples,
    dense_width,
    rows_for,
)
from trace_offline.estimators.lbfgs import Minimum, Objective, minimise

ABSENT = -40.0
"""Intercept of a class without training rows: its maximum-likelihood value is −∞, this gives it probability < 1e-16."""

_GRAM_ROWS = 8192


@dataclass(frozen=True)
class LogisticFit:
    """Solutions of a batch: L feature matrices × S label sets, K classes, D features.

    ``weights [L, S, K, D]``, ``intercepts [L, S, K]`` (sum 0 over the classes that occur), both in the dtype of the
    solve; ``nll [L, S]`` mean training NLL in nats; ``objective [L, S]`` = nll + (λ/2)‖W‖²; ``penalty [L, S]``;
    ``iterations [L, S]``; ``gradient_norm [L, S]`` relative to the gradient of the intercept-only model;
    ``converged [L, S]``.
    """

    weights: Tensor
    intercepts: Tensor
    nll: Tensor
    objective: Tensor
    penalty: Tensor
    iterations: Tensor
    gradient_norm: Tensor
    converged: Tensor

    def log_probabilities(self, features: Tensor, layer: int) -> Tensor:
        """``features [m, D]`` of one layer → ``log p [S, m, K]`` for every label set."""
        weights = self.weights[layer]
        logits = torch.einsum("md,skd->smk", features.to(weights.dtype), weights) + self.intercepts[layer][:, None, :]
        return logits.log_softmax(-1)


class LogisticProblems:
    """A batch of problems made ready once (centred, rotated) and solvable at any penalty from any start.

    ``features [L, n, D]`` (any float dtype), ``labels [S, n]`` int64 codes in 0…K−1, the same for all L feature
    matrices. ``dtype`` of the wide products; parameters are always kept in float64. Memory beyond the input:
    about L·n·(D + 5·S·K) numbers.

    Raises UsageError for fewer than two classes, no rows, labels out of range, or features that are not finite.
    """

    def __init__(self, features: Tensor, labels: Tensor, n_classes: int, dtype: torch.dtype = torch.float32) -> None:
        _check(features, labels, n_classes)
        n_layers, n, width = features.shape
        self.n_rows, self.n_layers, self.n_sets, self.n_classes, self.width = (
            n,
            n_layers,
            labels.shape[0],
            n_classes,
            width,
        )
        self.dtype, self.device = dtype, features.device
        self.labels = labels
        self.mean = torch.stack([matrix.double().mean(0) for matrix in features])
        counts = torch.stack([torch.bincount(row, minlength=n_classes) for row in labels]).double()
        self.shares = counts / n
        self.null: Tensor | None = None
        self._rotate(features)

    def _rotate(self, features: Tensor) -> None:
        values, vectors = [], []
        for matrix, mean in zip(features, self.mean, strict=True):
            gram = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.device)
            for rows in matrix.split(_GRAM_ROWS):
                centred = rows.double() - mean
                gram += centred.T @ centred
            value, vector = torch.linalg.eigh(gram / self.n_rows)
            values.append(value.flip(0).clamp_min(0))
            vectors.append(vector.flip(1))
        spectrum, basis = torch.stack(values), torch.stack(vectors)
        # Directions without variance (collinear or constant features, n < D) get weight 0 at any λ > 0: leave them out.
        floor = spectrum[:, :1] * (1e-13 if self.dtype == torch.float32 else self.width * 2.3e-16)
        rank = max(1, int((spectrum > floor).sum(1).max())) if self.width else 0
        self.basis = basis[:, :, :rank]
        ones = torch.ones(self.n_layers, 1, dtype=torch.float64, device=self.device)
        self.spectrum = torch.cat([spectrum[:, :rank], ones], 1)
        self.data = torch.ones(self.n_layers, rank + 1, self.n_rows, dtype=self.dtype, device=self.device)
        for layer, matrix in enumerate(features):
            for start in range(0, self.n_rows, _GRAM_ROWS):
                rows = matrix[start : start + _GRAM_ROWS].double() - self.mean[layer]
                self.data[layer, :rank, start : start + rows.shape[0]] = (rows @ self.basis[layer]).T.to(self.dtype)

    def solve(
        self,
        penalty: float | Tensor,
        start: LogisticFit | None = None,
        tolerance: float = 1e-4,
        max_iterations: int = 500,
        active: Tensor | None = None,
        exact: bool = True,
    ) -> LogisticFit:
        """Minimise every problem at ``penalty`` λ (a number, or ``[L, S]``), warm from ``start`` when given.

        Stops a problem when its gradient, in the norm of the preconditioner, is ``tolerance`` times that of the
        intercept-only model, or when the objective no longer falls at this precision. ``active [L, S]`` (bool)
        leaves the other problems at their start. ``exact``: spend more on the curvature of small problems, which pays
        at tight tolerances. Deterministic. Raises UsageError unless every λ > 0.
        """
        lam = torch.as_tensor(penalty, dtype=torch.float64, device=self.device)
        lam = lam.expand(self.n_layers, self.n_sets).reshape(-1).clone()
        if not bool((lam > 0).all() and lam.isfinite().all()):
            raise UsageError(f"logistic regression: every penalty must be a positive number, found {penalty}.")
        mask = torch.ones_like(lam, dtype=torch.bool) if active is None or start is None else active.reshape(-1)
        which = mask.nonzero().flatten()
        theta = self._start(start)
        found = minimise(_SoftmaxObjective(self, lam, exact), theta[which], tolerance, max_iterations, which)
        fit = self._fit(found, which, lam)
        return fit if start is None or bool(mask.all()) else _choose(mask.view(self.n_layers, -1), fit, start)

    def _start(self, start: LogisticFit | None) -> Tensor:
        """Parameters ``[L·S, K, r+1]`` in the rotated space."""
        if start is None:
            shape = (self.n_layers, self.n_sets, self.n_classes, self.data.shape[1])
            theta = torch.zeros(shape, dtype=torch.float64, device=self.device)
            theta[..., -1] = torch.where(self.shares > 0, self.shares.clamp_min(1e-300).log(), ABSENT)
            return theta.flatten(0, 1)
        weights = start.weights.double()
        rotated = torch.einsum("lskd,ldr->lskr", weights, self.basis)
        shifted = start.intercepts.double() + torch.einsum("lskd,ld->lsk", weights, self.mean)
        # A class may be absent here or may have been absent where the start was fit: then its share is the start.
        known = shifted.where(shifted > 0.5 * ABSENT, self.shares[None].clamp_min(1e-300).log())
        shifted = torch.where(self.shares[None] > 0, known, ABSENT)
        return torch.cat([rotated, shifted[..., None]], -1).flatten(0, 1)

    def _fit(self, found: Minimum, which: Tensor, lam: Tensor) -> LogisticFit:
        """Back to the features as given; problems that are not in ``which`` hold zeros."""
        shape = (self.n_layers, self.n_sets)

        def spread(values: Tensor) -> Tensor:
            out = values.new_zeros(self.n_layers * self.n_sets, *values.shape[1:])
            out[which] = values
            return out.view(*shape, *values.shape[1:])

        theta, value = spread(found.parameters), spread(found.value)
        weights = torch.einsum("lskr,ldr->lskd", theta[..., :-1], self.basis)
        present = (self.shares > 0)[None]
        centre = (theta[..., -1] * present).sum(-1, keepdim=True) / present.sum(-1, keepdim=True)
        intercepts = theta[..., -1] - torch.where(present, centre, 0.0)
        intercepts = intercepts - torch.einsum("lskd,ld->lsk", weights, self.mean)
        ridge = 0.5 * lam.view(shape) * theta[..., :-1].square().sum((-1, -2))
        return LogisticFit(
            weights=weights.to(self.dtype),
            intercepts=intercepts.to(self.dtype),
            nll=value - ridge,
            objective=value,
            penalty=lam.view(shape),
            iterations=spread(found.iterations),
            gradient_norm=spread(found.gradient_norm),
            converged=spread(found.converged),
        )


class _SoftmaxObjective(Objective):
    """The objective over rotated features; one problem p = layer · S + label set, parameters ``[K, r+1]``."""

    def __init__(self, problems: LogisticProblems, penalty: Tensor, exact: bool) -> None:
        self.p, self.exact = problems, exact
        self.penalty = penalty
        self.noise = 1e-7 if problems.dtype == torch.float32 else 1e-15
        ridge = torch.ones(problems.data.shape[1], dtype=torch.float64, device=problems.device)
        ridge[-1] = 0.0
        self.ridge = ridge
        self._last: tuple[Tensor, list[tuple[int, int, int]]] | None = None

    def _slices(self, which: Tensor) -> list[tuple[int, int, int]]:
        """(layer, first, last) for the runs of ``which`` (ascending) that belong to one layer."""
        if self._last is None or self._last[0] is not which:
            layers, counts = torch.unique_consecutive(which // self.p.n_sets, return_counts=True)
            ends = counts.cumsum(0).tolist()
            self._last = which, list(zip(layers.tolist(), [0, *ends[:-1]], ends, strict=True))
        return self._last[1]

    def logits(self, theta: Tensor, which: Tensor) -> Tensor:
        p = self.p
        out = torch.empty(len(which), p.n_classes, p.n_rows, dtype=p.dtype, device=p.device)
        narrow = theta.to(p.dtype)
        for layer, first, last in self._slices(which):
            torch.mm(narrow[first:last].flatten(0, 1), p.data[layer], out=out[first:last].flatten(0, 1))
        return out

    def nll(self, logits: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Mean NLL ``[A]`` in float64 and probabilities ``[A, K, n]``."""
        labels = self.p.labels[which % self.p.n_sets][:, None]
        probabilities = logits.softmax(1)
        right = probabilities.gather(1, labels)
        # One exponential for value and gradient; a right class that has underflowed needs the long way.
        log_p = right.log() if bool((right > 1e-30).all()) else logits.log_softmax(1).gather(1, labels)
        return -log_p.sum((1, 2), dtype=torch.float64) / self.p.n_rows, probabilities

    def gradient(self, state: Tensor, theta: Tensor, which: Tensor) -> Tensor:
        p = self.p
        labels = p.labels[which % p.n_sets]
        state.scatter_add_(1, labels[:, None], state.new_full((1, 1, 1), -1.0).expand(len(which), 1, p.n_rows))
        gradient = torch.empty_like(theta)
        for layer, first, last in self._slices(which):
            product = state[first:last].flatten(0, 1) @ p.data[layer].T
            gradient[first:last] = product.double().view(last - first, p.n_classes, -1)
        gradient /= p.n_rows
        gradient += self.penalty[which][:, None, None] * self.ridge * theta
        gradient[..., -1] *= p.shares[which % p.n_sets] > 0
        return gradient

    def null_gradient(self, which: Tensor) -> Tensor:
        """At W = 0 and the intercepts of the class shares: −Σ_{i of class k} x_i / n, as features are centred."""
        p = self.p
        if p.null is None:
            onehot = torch.zeros(p.n_sets, p.n_classes, p.n_rows, dtype=p.dtype, device=p.device)
            onehot.scatter_(1, p.labels[:, None], 1.0)
            products = [-(onehot.flatten(0, 1) @ data.T).double() / p.n_rows for data in p.data]
            p.null = torch.stack(products).view(p.n_layers * p.n_sets, p.n_classes, -1)
            p.null[..., -1] = 0.0
        return p.null[which]

    def ridge_terms(self, theta: Tensor, direction: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, d = theta[..., :-1], direction[..., :-1]
        lam = self.penalty[which]
        return (
            0.5 * lam * w.square().sum((1, 2)),
            lam * (w * d).sum((1, 2)),
            0.5 * lam * d.square().sum((1, 2)),
        )

    def bound(self, which: Tensor) -> Tensor:
        """Inverse of Böhning's bound, ``[A, K, r+1]``."""
        spectrum = self.p.spectrum[which // self.p.n_sets]
        inverse = 1.0 / (0.5 * spectrum + self.penalty[which][:, None] * self.ridge)
        return inverse[:, None].expand(-1, self.p.n_classes, -1)

    def inverse_hessian(self, logits: Tensor, which: Tensor) -> InverseHessian:
        p = self.p
        width = p.data.shape[1]
        whole = self.exact and couples(width, len(which), p.n_classes)
        if not whole:
            width = dense_width(width, len(which), p.n_classes)
        rows = rows_for(p.n_rows, width * p.n_classes if whole else width).to(p.device)
        leading = torch.cat([p.data[:, : width - 1], p.data[:, -1:]], 1)[:, :, rows]
        layer = which // p.n_sets
        build = coupled if whole else class_blocks
        ridge = self.penalty[which][:, None] * self.ridge
        return build(logits[:, :, rows].softmax(1), leading[layer], p.spectrum[layer], ridge)


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    n_classes: int,
    penalty: float | Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> LogisticFit:
    """Fit ``features [L, n, D]`` to ``labels [S, n]`` at one penalty; see ``LogisticProblems`` for the details."""
    problems = LogisticProblems(features, labels, n_classes, dtype)
    return problems.solve(penalty, tolerance=tolerance, max_iterations=max_iterations)


def fit_path(
    problems: LogisticProblems,
    validation: Tensor,
    validation_labels: Tensor,
    penalties: Sequence[float],
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 500,
    patience: int = 2,
) -> tuple[LogisticFit, Tensor]:
    """Choose a penalty for every problem by the mean NLL of held-out rows.

    Penalties are tried from the largest down, each solve starting from the last; the path of one problem ends once
    its validation NLL has risen ``patience`` times in a row. ``validation [L, m, D]``, ``validation_labels [S, m]``.
    Returns the fit at the best penalty of each problem and the validation NLL ``[penalties, L, S]`` (largest penalty
    first; infinite where the path had ended). Ties go to the larger penalty.
    """
    shape = (problems.n_layers, problems.n_sets)
    history: list[Tensor] = []
    best = torch.full(shape, math.inf, dtype=torch.float64, device=problems.device)
    risen = torch.zeros(shape, dtype=torch.int64, device=problems.device)
    running: LogisticFit | None = None
    chosen: LogisticFit | None = None
    last = best.clone()
    for penalty in sorted(penalties, reverse=True):
        active = risen < patience
        if not bool(active.any()):
            break
        running = problems.solve(penalty, running, tolerance, max_iterations, active, exact=False)
        score = torch.where(active, _heldout_nll(running, validation, validation_labels), math.inf)
        better = score < best
        chosen = running if chosen is None else _choose(better, running, chosen)
        best = torch.where(better, score, best)
        risen = torch.where(active, torch.where(score > last, risen + 1, 0), risen)
        last = torch.where(active, score, last)
        history.append(score)
    if chosen is None:
        raise UsageError("logistic regression: expected at least one penalty to choose from, found none.")
    return chosen, torch.stack(history)


def _heldout_nll(fit: LogisticFit, features: Tensor, labels: Tensor) -> Tensor:
    rows = []
    for layer in range(features.shape[0]):
        log_p = fit.log_probabilities(features[layer], layer)
        rows.append(-log_p.gather(2, labels[:, :, None]).mean((1, 2), dtype=torch.float64))
    return torch.stack(rows)


def _choose(mask: Tensor, new: LogisticFit, old: LogisticFit) -> LogisticFit:
    """Field by field: ``new`` where ``mask [L, S]``, else ``old``."""
    values = {}
    for name in LogisticFit.__dataclass_fields__:
        first, second = getattr(new, name), getattr(old, name)
        values[name] = torch.where(mask.view(*mask.shape, *(1,) * (first.dim() - 2)), first, second)
    return LogisticFit(**values)


def _check(features: Tensor, labels: Tensor, n_classes: int) -> None:
    if features.dim() != 3 or labels.dim() != 2 or features.shape[1] != labels.shape[1]:
        raise UsageError(
            "logistic regression: expected features [L, n, D] and labels [S, n] with the same n, "
            f"found {tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if features.shape[1] == 0:
        raise UsageError("logistic regression: expected at least one row to fit, found none.")
    if n_classes < 2:
        raise UsageError(
            f"logistic regression: expected two or more classes, found {n_classes}; with one class there is "
            "nothing to tell apart."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise UsageError(f"logistic regression: expected labels 0…{n_classes - 1}, found {low}…{high}.")
    if not bool(features.isfinite().all()):
        raise UsageError("logistic regression: features must be finite, found NaN or infinity.")

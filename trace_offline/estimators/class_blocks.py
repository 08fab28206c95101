"""Approximate inverse Hessians of softmax regressions, from a sample of the rows; they precondition, nothing more.

Small problems get the whole matrix (``Coupled``): with it a few quasi-Newton steps reach a tight tolerance. Those of
few directions get one dense block per class (``ClassBlocks``), which costs far less. Of many directions a sample of the
rows says too little: those get the product of what the classes have in common and of what the directions have
(``Kronecker``), which takes Böhning's bound and puts the mean of the Hessian's class part in place of its maximum.

The Hessian of the mean NLL over the weights of class k alone is Xᵀ diag(p_k (1 − p_k)) X / n. It is estimated from
evenly spaced rows, for the leading directions of the feature spectrum (columns of X are uncorrelated and sorted by
variance) and the intercept; the other directions keep a diagonal. Couplings between classes are left to the memory of
the quasi-Newton method.

Shape letters: A problems, K classes, R parameters per class (the last one the intercept), Q of them in the dense block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 1024
"""Rows a block is estimated from, at least; three per row of the matrix if that is more."""

DENSE_NUMBERS = 1 << 25
"""Numbers of all blocks of one solve together (256 MB in float64)."""

MAX_DENSE = 128
"""Directions up to which a class gets a dense block."""

MAX_COUPLED = 768
"""Parameters K·R of a problem that gets its whole matrix."""

COUPLED_NUMBERS = 1 << 25

_FLOOR = 1e-2
_ROUNDING = 3e-6


def dense_width(width: int, problems: int, classes: int) -> int:
    """Directions Q of the dense block: all ``width`` when memory and time allow, at least 1."""
    affordable = int((DENSE_NUMBERS / max(1, problems * classes)) ** 0.5)
    return max(1, min(width, MAX_DENSE, affordable))


@dataclass
class ClassBlocks:
    """``dense [A, K, Q, Q]`` on the places ``[0…Q−2, R−1]``, ``diagonal [A, K, R]`` elsewhere; all float64."""

    dense: Tensor
    diagonal: Tensor

    def apply(self, vectors: Tensor) -> Tensor:
        """``[A, j, K, R]`` → the same, multiplied by the approximate inverse."""
        q = self.dense.shape[-1] - 1
        out = vectors * self.diagonal[:, None]
        part = torch.cat([vectors[..., :q], vectors[..., -1:]], -1).transpose(1, 2)
        solved = (part @ self.dense).transpose(1, 2)
        out[..., :q], out[..., -1] = solved[..., :q], solved[..., -1]
        return out

    def keep(self, mask: Tensor) -> ClassBlocks:
        """The problems where ``mask [A]``."""
        return ClassBlocks(self.dense[mask], self.diagonal[mask])


@dataclass
class Coupled:
    """``factor [A, K·R, K·R]``: lower Cholesky factors in float32; what they make is positive whatever was rounded."""

    factor: Tensor

    def apply(self, vectors: Tensor) -> Tensor:
        """``[A, j, K, R]`` → the same, multiplied by the approximate inverse."""
        flat = vectors.flatten(2).transpose(1, 2)
        size = flat.abs().amax((1, 2), keepdim=True).clamp_min(1e-300)
        solved = torch.cholesky_solve((flat / size).float(), self.factor)
        return (solved.double() * size).transpose(1, 2).reshape(vectors.shape)

    def keep(self, mask: Tensor) -> Coupled:
        """The problems where ``mask [A]``."""
        return Coupled(self.factor[mask])


@dataclass
class Kronecker:
    """``turn [A, K, K]`` orthonormal columns, ``diagonal [A, K, R]`` behind them; float64."""

    turn: Tensor
    diagonal: Tensor

    def apply(self, vectors: Tensor) -> Tensor:
        """``[A, j, K, R]`` → the same, multiplied by the approximate inverse."""
        turned = self.turn.transpose(1, 2)[:, None] @ vectors
        return self.turn[:, None] @ (turned * self.diagonal[:, None])

    def keep(self, mask: Tensor) -> Kronecker:
        """The problems where ``mask [A]``."""
        return Kronecker(self.turn[mask], self.diagonal[mask])


InverseHessian = ClassBlocks | Coupled | Kronecker


def couples(width: int, problems: int, classes: int) -> bool:
    """Whether the whole matrix of every problem is affordable."""
    size = classes * width
    return size <= MAX_COUPLED and problems * size * size <= COUPLED_NUMBERS


def rows_for(n: int, dense: int) -> Tensor:
    """Evenly spaced row indices to estimate a matrix of ``dense`` rows from."""
    wanted = min(n, max(ROWS, 3 * dense))
    return torch.arange(wanted) * n // wanted


def class_blocks(probabilities: Tensor, columns: Tensor, spectrum: Tensor, ridge: Tensor) -> ClassBlocks:
    """Blocks from sampled rows.

    ``probabilities [A, K, m]`` and the same rows of the features with the constant last, ``columns [A, Q, m]`` (the
    dense directions); ``spectrum [A, R]`` mean squares of all columns over all rows; ``ridge [A, R]`` second derivative
    of the penalty.
    """
    weight = probabilities * (1.0 - probabilities)
    m = weight.shape[2]
    mean = weight.double().mean(2).clamp(1e-4, 0.5)
    diagonal = 1.0 / (mean[..., None] * spectrum[:, None] + ridge[:, None])
    q = columns.shape[1] - 1
    dense = torch.empty(*weight.shape[:2], q + 1, q + 1, dtype=torch.float64, device=weight.device)
    for a in range(weight.shape[0]):
        scaled = weight[a][:, None, :] * columns[a]
        dense[a] = (scaled @ columns[a].T).double() / m
    # rows that were not sampled: a share of the mean curvature keeps every direction away from zero
    extra = _FLOOR * mean[..., None] * spectrum[:, None] + ridge[:, None]
    dense.diagonal(dim1=-2, dim2=-1).add_(torch.cat([extra[..., :q], extra[..., -1:]], -1))
    return ClassBlocks(torch.cholesky_inverse(_factor(dense)), diagonal)


def coupled(probabilities: Tensor, columns: Tensor, spectrum: Tensor, ridge: Tensor) -> Coupled:
    """The whole Hessian from sampled rows; arguments as for ``class_blocks`` with Q = R.

    Entry (k, l) is Xᵀ diag(p_k (δ_kl − p_l)) X / m.
    """
    problems, classes, m = probabilities.shape
    width = columns.shape[1]
    size = classes * width
    mean = (probabilities * (1.0 - probabilities)).double().mean(2).clamp(1e-4, 0.5)
    extra = _FLOOR * _FLOOR * mean[..., None] * spectrum[:, None] + ridge[:, None]
    hessian = torch.empty(problems, size, size, dtype=torch.float64, device=columns.device)
    for a in range(problems):
        weighted = (probabilities[a][:, None, :] * columns[a]).view(size, m)
        for k in range(classes):
            rows = slice(k * width, (k + 1) * width)
            product = -(weighted[rows] @ weighted[: (k + 1) * width].T)
            product[:, rows] += weighted[rows] @ columns[a].T
            hessian[a, rows, : (k + 1) * width] = product.double() / m
    hessian.diagonal(dim1=1, dim2=2).add_(extra.flatten(1))
    return Coupled(_factor(hessian).float())


def kronecker(probabilities: Tensor, rows: Tensor, spectrum: Tensor, ridge: Tensor) -> Kronecker:
    """M ⊗ XᵀX/n + ridge, inverted, with M the mean over the rows of diag(p) − p pᵀ.

    ``probabilities [A, K, n]``, 0 in padded rows; ``rows [A]`` how many there are; ``spectrum``, ``ridge [A, R]`` as
    for ``class_blocks``. Exact where the probabilities do not depend on the features.
    """
    count = rows.to(probabilities.dtype)[:, None]
    mean = probabilities.sum(2) / count
    pairs = probabilities @ probabilities.transpose(1, 2) / count[..., None]
    values, turn = torch.linalg.eigh((torch.diag_embed(mean) - pairs).double())
    # moving all classes alike changes nothing: a curvature of 0 there is not one to divide by
    values = values.clamp_min(_FLOOR * values.mean(1, keepdim=True).clamp_min(1e-6))
    return Kronecker(turn, 1.0 / (values[..., None] * spectrum[:, None] + ridge[:, None]))


def _factor(matrices: Tensor) -> Tensor:
    """Lower Cholesky factors; the diagonal is raised as far as rounding of the products asks for."""
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    original = diagonal.clone()
    rise = _ROUNDING
    while True:
        diagonal.copy_(original * (1.0 + rise))
        factor, failed = torch.linalg.cholesky_ex(matrices)
        if not bool(failed.any()):
            return factor
        rise *= 10.0

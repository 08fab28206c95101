"""Feature matrices centred and seen in the eigenbasis of their covariance, for penalised regressions.

The eigenbasis makes a bound of the Hessian diagonal. Turning all rows into it costs 2nD² operations, which many
problems of few rows soon earn back; a few problems of many rows are better served by turning their parameters there
and back in every product, 4KD² operations, and by a basis estimated from a part of the rows: it serves to precondition,
and an optimum does not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_ROWS = 8192

ROWS_PER_CLASS = 128
"""Rows for each class fitted on a matrix from which on its rows are not turned; some 60 products are made per class."""

LEAST_WIDTH = 128
"""Width from which on it matters."""

_SAMPLE_ROWS = 4096
_ROWS_PER_FEATURE = 8

_CONDITION = 1e6
"""Ratio of variances up to which products with rows that are not turned are precise enough in float32."""

_CONDITION_TURNED = 1e4
"""The same for rows turned in float32."""


@dataclass(frozen=True, eq=False)
class Directions:
    """``basis [D, R−1]`` orthonormal columns, ``spectrum [R]`` mean squares along them (and 1); float64."""

    basis: Tensor
    spectrum: Tensor


@dataclass(frozen=True, eq=False)
class Rotated:
    """One feature matrix ``[n, D]`` as its regressions see it: R − 1 directions of large variance, and a constant.

    ``basis [D, R−1]`` orthonormal columns, ``mean [D]``, ``spectrum [R]`` mean squares along the directions (and 1),
    all float64. ``data``: if ``turned``, ``[R, n]``: the centred features along the directions, and a row of ones;
    else ``[D, n]``: the centred features as they are. The directions may be those of a part of the rows, or of others
    like them; ``spectrum`` is an estimate then.
    """

    data: Tensor
    basis: Tensor
    mean: Tensor
    spectrum: Tensor
    turned: bool = True

    @property
    def directions(self) -> Directions:
        """Without the rows."""
        return Directions(self.basis, self.spectrum)

    @property
    def n(self) -> int:
        """Rows of the feature matrix."""
        return self.data.shape[1]

    @property
    def size(self) -> int:
        """Parameters per class, R."""
        return len(self.spectrum)

    def forward(self, parameters: Tensor, out: Tensor | None = None) -> Tensor:
        """``[m, R] → [m, n]``: linear combinations of the directions, at every row."""
        kind = self.data.dtype
        if self.turned:
            return torch.mm(parameters.to(kind), self.data, out=out)
        weights = (parameters[:, :-1] @ self.basis.T).to(kind)
        return torch.addmm(parameters[:, -1:].to(kind).expand(-1, self.n), weights, self.data, out=out)

    def backward(self, values: Tensor) -> Tensor:
        """``[m, n] → [m, R]`` in float64: sums over the rows of the values times the directions."""
        if self.turned:
            return (values @ self.data.T).double()
        product = (values @ self.data.T).double() @ self.basis
        return torch.cat([product, values.sum(1, keepdim=True, dtype=torch.float64)], 1)

    def leading(self, count: int, rows: Tensor) -> Tensor:
        """``[count, m]``: the first directions at some rows."""
        if self.turned:
            return self.data[:count, rows]
        return self.basis[:, :count].T.to(self.data.dtype) @ self.data[:, rows]


def design_of(features: Tensor, dtype: torch.dtype, classes: int, like: Directions | None = None) -> Rotated:
    """``features [n, D]`` ready for regressions with this many classes altogether, as is cheapest for them.

    ``like``: directions found for other rows of the same kind. They serve again, without another eigendecomposition,
    where none was left out.
    """
    n, width = features.shape
    wide = width >= LEAST_WIDTH
    if like is not None and (not wide or like.basis.shape != (width, width)):
        like = None
    if wide and dtype == torch.float32:
        plain = n >= ROWS_PER_CLASS * classes
        found = as_they_are(features, like, _CONDITION if plain else _CONDITION_TURNED)
        if found is not None:
            return found if plain else _turned(found)
    return rotate(features, dtype, like)


def as_they_are(features: Tensor, like: Directions | None = None, condition: float = _CONDITION) -> Rotated | None:
    """``features [n, D]`` centred in float32, and the eigenbasis of evenly spaced rows, or the directions ``like``.

    None where variances differ by more than ``condition``: small ones would drown in the rounding of large ones.
    """
    n, width = features.shape
    mean = features.mean(0, dtype=torch.float32)
    data = features.float() - mean
    if like is None:
        wanted = min(n, max(_SAMPLE_ROWS, _ROWS_PER_FEATURE * width))
        part = data[torch.arange(wanted, device=data.device) * n // wanted]
        gram = (part.T @ part).double() / wanted
        if not _within(gram, condition):
            return None
        values, vectors = torch.linalg.eigh(gram)
        like = Directions(vectors.flip(1).contiguous(), torch.cat([values.flip(0), values.new_ones(1)]))
    elif not bool(like.spectrum[-2] * condition > like.spectrum[0]):
        return None
    return Rotated(data.T, like.basis, mean.double(), like.spectrum, turned=False)


def _within(gram: Tensor, condition: float) -> bool:
    """Whether the eigenvalues of a symmetric matrix are positive and differ by less than a factor; at a tenth of the
    price of finding them. The largest is estimated from below by a few powers.
    """
    vector = gram[:, gram.diagonal().argmax()]
    for _ in range(8):
        vector = gram @ (vector / torch.linalg.vector_norm(vector))
    least = torch.linalg.vector_norm(vector) / condition
    if not bool(least > 0):
        return False
    return int(torch.linalg.cholesky_ex(gram - least * torch.eye(len(gram)).to(gram)).info) == 0


def _turned(plain: Rotated) -> Rotated:
    """The same with rows along the directions."""
    data = torch.ones(plain.size, plain.n, dtype=plain.data.dtype, device=plain.data.device)
    torch.mm(plain.basis.T.to(data.dtype), plain.data, out=data[:-1])
    return replace(plain, data=data, turned=True)


def rotate(features: Tensor, dtype: torch.dtype, like: Directions | None = None) -> Rotated:
    """``features [n, D]`` → ``Rotated`` with ``data`` in ``dtype``; one eigendecomposition, or none, in float64.

    Directions without variance (collinear or constant features, n ≤ D) are left out: at any λ > 0 their weight is 0.
    """
    n, width = features.shape
    mean = features.double().mean(0)
    if like is None:
        gram = torch.zeros(width, width, dtype=torch.float64, device=features.device)
        for rows in features.split(_ROWS):
            centred = rows.double() - mean
            gram += centred.T @ centred
        values, vectors = torch.linalg.eigh(gram / n)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        floor = values[:1] * (1e-13 if dtype == torch.float32 else width * 2.3e-16)
        rank = max(1, int((values > floor).sum())) if width else 0
        like = Directions(vectors[:, :rank].contiguous(), torch.cat([values[:rank], values.new_ones(1)]))
    data = torch.ones(len(like.spectrum), n, dtype=dtype, device=features.device)
    for start in range(0, n, _ROWS):
        rows = features[start : start + _ROWS].double() - mean
        data[:-1, start : start + len(rows)] = (rows @ like.basis).T.to(dtype)
    return Rotated(data, like.basis, mean, like.spectrum)

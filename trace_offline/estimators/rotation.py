"""Feature matrices centred and seen in the eigenbasis of their covariance, for penalised regressions.

The eigenbasis makes a bound of the Hessian diagonal. Turning all rows into it costs 2nD² operations, which many
problems of few rows soon earn back; a few problems of many rows are better served by turning their parameters there
and back in every product, 4KD² operations, and by a basis estimated from a part of the rows: it serves to precondition,
and an optimum does not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, eq=False)
class Rotated:
    """One feature matrix ``[n, D]`` as its regressions see it: R − 1 directions of large variance, and a constant.

    ``basis [D, R−1]`` orthonormal columns, ``mean [D]``, ``spectrum [R]`` mean squares along the directions (and 1),
    all float64. ``data``: if ``turned``, ``[R, n]``: the centred features along the directions, and a row of ones;
    else ``[D, n]``: the centred features as they are, and ``spectrum`` is an estimate.
    """

    data: Tensor
    basis: Tensor
    mean: Tensor
    spectrum: Tensor
    turned: bool = True

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


def design_of(features: Tensor, dtype: torch.dtype, classes: int) -> Rotated:
    """``features [n, D]`` ready for regressions with this many classes altogether, as is cheapest for them."""
    n, width = features.shape
    if dtype == torch.float32 and width >= LEAST_WIDTH and n >= ROWS_PER_CLASS * classes:
        found = as_they_are(features)
        if found is not None:
            return found
    return rotate(features, dtype)


def as_they_are(features: Tensor) -> Rotated | None:
    """``features [n, D]`` centred in float32, and the eigenbasis of evenly spaced rows.

    None where variances differ so much that small ones would drown in the rounding of large ones.
    """
    n, width = features.shape
    mean = features.mean(0, dtype=torch.float32)
    data = features.float() - mean
    wanted = min(n, max(_SAMPLE_ROWS, _ROWS_PER_FEATURE * width))
    part = data[torch.arange(wanted, device=data.device) * n // wanted]
    values, vectors = torch.linalg.eigh((part.T @ part).double() / wanted)
    if not bool(values[0] * _CONDITION > values[-1]):
        return None
    spectrum = torch.cat([values.flip(0), values.new_ones(1)])
    return Rotated(data.T, vectors.flip(1).contiguous(), mean.double(), spectrum, turned=False)


def rotate(features: Tensor, dtype: torch.dtype) -> Rotated:
    """``features [n, D]`` → ``Rotated`` with ``data`` in ``dtype``; one eigendecomposition, in float64.

    Directions without variance (collinear or constant features, n ≤ D) are left out: at any λ > 0 their weight is 0.
    """
    n, width = features.shape
    mean = features.double().mean(0)
    gram = torch.zeros(width, width, dtype=torch.float64, device=features.device)
    for rows in features.split(_ROWS):
        centred = rows.double() - mean
        gram += centred.T @ centred
    values, vectors = torch.linalg.eigh(gram / n)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    floor = values[:1] * (1e-13 if dtype == torch.float32 else width * 2.3e-16)
    rank = max(1, int((values > floor).sum())) if width else 0
    basis = vectors[:, :rank].contiguous()
    data = torch.ones(rank + 1, n, dtype=dtype, device=features.device)
    for start in range(0, n, _ROWS):
        rows = features[start : start + _ROWS].double() - mean
        data[:rank, start : start + rows.shape[0]] = (rows @ basis).T.to(dtype)
    return Rotated(data, basis, mean, torch.cat([values[:rank], values.new_ones(1)]))

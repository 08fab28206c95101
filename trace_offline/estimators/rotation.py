"""Feature matrices centred and rotated into the eigenbasis of their covariance, for penalised regressions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 8192


@dataclass(frozen=True, eq=False)
class Rotated:
    """One feature matrix ``[n, D]`` as its regressions see it.

    ``data [R, n]``: the centred features along the R−1 directions of largest variance, then a row of ones;
    ``basis [D, R−1]`` orthonormal columns, ``mean [D]``, ``spectrum [R]`` mean squares of the rows of ``data``: all
    float64 but the data.
    """

    data: Tensor
    basis: Tensor
    mean: Tensor
    spectrum: Tensor

    @property
    def n(self) -> int:
        """Rows of the feature matrix."""
        return self.data.shape[1]

    @property
    def size(self) -> int:
        """Parameters per class, R."""
        return self.data.shape[0]


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

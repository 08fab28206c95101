"""Symmetric linear operators: what Lanczos and stochastic quadrature need to know of a matrix, and nothing more.

A Hessian, a block of it, a Gauss-Newton matrix or a plain matrix in a test all enter the spectral estimators by this
door. Vectors are flat, ``[n]``, on one device and in one dtype.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class SymmetricOperator(Protocol):
    """A real symmetric matrix known only by its products. ``products`` counts how many were taken."""

    @property
    def n(self) -> int:
        """Order of the matrix."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the vectors."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the vectors live."""
        ...

    @property
    def products(self) -> int:
        """Products taken so far."""
        ...

    def product(self, vector: Tensor) -> Tensor:
        """``[n] → [n]``."""
        ...


class MatrixOperator:
    """A dense symmetric matrix as an operator: ``product(v) = A v``.

    Args:
        matrix: ``[n, n]``, floating, symmetric to rounding.

    Raises:
        ValueError: the matrix is not square, not floating or not symmetric.

    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
            raise ValueError(
                f"expected a square floating matrix [n, n], found shape {tuple(matrix.shape)} of {matrix.dtype}"
            )
        scale = float(matrix.abs().max()) if matrix.numel() else 0.0
        asymmetry = float((matrix - matrix.T).abs().max()) if matrix.numel() else 0.0
        if asymmetry > 100 * torch.finfo(matrix.dtype).eps * scale:
            raise ValueError(f"expected a symmetric matrix, found entries that differ by {asymmetry:.3g} from A^T")
        self._matrix = matrix
        self.n = int(matrix.shape[0])
        self.dtype = matrix.dtype
        self.device = matrix.device
        self.products = 0

    def product(self, vector: Tensor) -> Tensor:
        """``A v``, ``[n] → [n]``."""
        self.products += 1
        return self._matrix @ vector


class HostVectors:
    """An operator whose vectors live in host memory; only one at a time visits the device, for its product.

    A Krylov basis of it is on the host, and so is its orthogonalisation: for a device too small to hold both a network
    and a basis. Twice ``n`` numbers cross between the two for each product.
    """

    def __init__(self, operator: SymmetricOperator) -> None:
        self._operator = operator
        self.n, self.dtype, self.device = operator.n, operator.dtype, torch.device("cpu")

    @property
    def products(self) -> int:
        """Products taken so far, by whomever."""
        return self._operator.products

    def product(self, vector: Tensor) -> Tensor:
        """``A v``, ``[n] → [n]``, both on the host."""
        return self._operator.product(vector.to(self._operator.device)).to(self.device)


def standard_normal(operator: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """A vector ``[n]`` of independent standard normals in the operator's dtype and on its device.

    Drawn in float32 on the generator's device, so that one seed gives the same vector whatever dtype and device the
    operator has.
    """
    drawn = torch.randn(operator.n, generator=generator, device=generator.device, dtype=torch.float32)
    return drawn.to(device=operator.device, dtype=operator.dtype)


def orthogonalize(vector: Tensor, *bases: Tensor | None, passes: int = 2) -> Tensor:
    """Remove from ``vector [n]`` its part in the span of the rows of each basis ``[m, n]``; twice, which is enough.

    One pass of Gram-Schmidt leaves a remainder as large as rounding times the part removed; the second removes that
    (Giraud et al., Numer. Math. 101, 2005). The rows of all bases together must be orthonormal.
    """
    for _ in range(passes):
        for basis in bases:
            if basis is not None and len(basis):
                vector = torch.addmv(vector, basis.T, basis @ vector, alpha=-1.0)
    return vector

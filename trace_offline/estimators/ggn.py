"""Matrices of the form ``(1/N) Σ_t J_tᵀ S_t J_t``, and the generalised Gauss-Newton matrix among them.

``z_t = f(θ)_t`` are the logits of the t-th target and ``J_t = ∂z_t/∂θ``. With ``S_t = ∂²ℓ_t/∂z_t²`` the sum is the
generalised Gauss-Newton matrix: the Hessian without the curvature of the network itself, and for a softmax with
cross-entropy also the Fisher information of the model's own distribution. See ``fisher`` for the empirical one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from trace_offline.estimators.hvp import NonFiniteError, distinct_parameters, second_derivatives

Outputs = Callable[[], tuple[Tensor, Tensor]]
"""Returns logits ``[M, C]`` of the targets that count, and the targets ``[M]`` (int64)."""


class OutputCurvature:
    """``v → (1/N) Σ_t J_tᵀ S_t J_t v`` as a symmetric operator on flat vectors ``[n]``; positive semidefinite.

    ``J v`` comes from two backward passes: ``u(w) = Jᵀw`` is linear in a dummy w, so ``∂(u·v)/∂w = J v`` (Schraudolph,
    Neural Computation 14, 2002, has the product; the trick is Townsend's). The graphs of z and of u are kept, so a
    product is one pass to w and one back from the logits; with ``keep_graphs=False`` they are rebuilt for each.

    Args:
        outputs: one function per micro-batch; N counts the targets of all.
        parameters: as for a Hessian.
        keep_graphs: keep the graphs of all micro-batches until ``close``.

    Attributes:
        n: number of coordinates. products: how many were taken.

    Raises:
        ValueError: no outputs, parameters as for a Hessian, logits that are no matrix or have no target.
        NonFiniteError: a logit is NaN or infinite.
        TraceOfflineError: an operation has no second derivative.

    """

    def __init__(self, outputs: Sequence[Outputs], parameters: Iterable[Tensor], *, keep_graphs: bool = True) -> None:
        self._outputs = tuple(outputs)
        self._parameters = distinct_parameters(parameters)
        if not self._outputs:
            raise ValueError("expected at least one batch of outputs, found none")
        self.dtype, self.device = self._parameters[0].dtype, self._parameters[0].device
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self.n, self.products, self.kept, self._closed = sum(self._sizes), 0, keep_graphs, False
        self._graphs: list[_Jacobian] = []
        self._targets = 0
        for output in self._outputs:
            graph = _Jacobian(output, self._parameters)
            self._targets += len(graph.targets)
            if keep_graphs:
                self._graphs.append(graph)

    def inner(self, logits: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        """``S_t d_t`` for each target: ``[M, C] → [M, C]``."""
        raise NotImplementedError

    def product(self, vector: Tensor) -> Tensor:
        """``[n] → [n]``. Raises ValueError for another shape, RuntimeError after ``close``."""
        if self._closed:
            raise RuntimeError("this matrix was closed; its graph is gone")
        if vector.shape != (self.n,):
            raise ValueError(f"expected a vector [{self.n}], found shape {tuple(vector.shape)}")
        vector = vector.detach().to(device=self.device, dtype=self.dtype)
        parts = [part.view_as(p) for part, p in zip(vector.split(self._sizes), self._parameters, strict=True)]
        result = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        graphs = self._graphs if self.kept else (_Jacobian(output, self._parameters) for output in self._outputs)
        for graph in graphs:
            along = graph.forward(parts)
            weighted = self.inner(graph.logits.detach(), graph.targets, along) / self._targets
            graph.add_backward(weighted, result, self._sizes, keep=self.kept)
        self.products += 1
        return result

    def close(self) -> None:
        """Free the graphs; ``products`` stays."""
        self._graphs.clear()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class GaussNewtonOperator(OutputCurvature):
    """``G = (1/N) Σ_t J_tᵀ (diag p_t − p_t p_tᵀ) J_t`` of the mean softmax cross-entropy, p the predicted distribution.

    Equal to the Hessian where the network is linear in its parameters, and to the Fisher information matrix of the
    model's own predictions everywhere (Martens, JMLR 21, 2020, arXiv 1412.1193). It does not depend on the labels.
    """

    def inner(self, logits: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        """``(diag p − p pᵀ) d``."""
        p = logits.softmax(-1)
        scaled = p * directions
        return scaled - p * scaled.sum(-1, keepdim=True)


class _Jacobian:
    """The logits of one micro-batch, and ``Jᵀw`` for a dummy w, both with their graphs."""

    def __init__(self, output: Outputs, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        with torch.enable_grad(), second_derivatives():
            self.logits, self.targets = output()
            if self.logits.ndim != 2 or not len(self.logits) or self.targets.shape != self.logits.shape[:1]:
                raise ValueError(
                    "expected logits [M, C] and targets [M] with M >= 1, found shapes "
                    f"{tuple(self.logits.shape)} and {tuple(self.targets.shape)}"
                )
            if not math.isfinite(float(self.logits.detach().sum())):
                raise NonFiniteError("the logits are not finite")
            if not self.logits.requires_grad:
                raise ValueError("the logits do not depend on any of the parameters")
            self._dummy = torch.zeros_like(self.logits, requires_grad=True)
            self._pulled = torch.autograd.grad(
                self.logits, parameters, grad_outputs=self._dummy, create_graph=True, allow_unused=True
            )

    def forward(self, vector: Sequence[Tensor]) -> Tensor:
        """``J v``, ``[M, C]``."""
        pairs = [(u, v) for u, v in zip(self._pulled, vector, strict=True) if u is not None and u.requires_grad]
        with second_derivatives():
            found = torch.autograd.grad(
                [u for u, _ in pairs], self._dummy, grad_outputs=[v for _, v in pairs], retain_graph=True
            )
        return found[0].detach()

    def add_backward(self, weighted: Tensor, total: Tensor, sizes: Sequence[int], *, keep: bool) -> None:
        """Add ``Jᵀ w`` to ``total [n]``."""
        parts = torch.autograd.grad(
            self.logits, self._parameters, grad_outputs=weighted, retain_graph=keep, allow_unused=True
        )
        with torch.no_grad():
            for part, place in zip(parts, total.split(list(sizes)), strict=True):
                if part is not None:
                    place.add_(part.reshape(-1))

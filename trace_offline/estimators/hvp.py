"""Hessian-vector products of a scalar loss through one retained gradient graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor

from trace_offline.core.errors import TraceOfflineError

Loss = Callable[[], Tensor]

# A rebuilt loss may differ from the first by the order of float sums, never by as much as another dropout mask does.
_SAME_LOSS = 1e-4


class NonFiniteError(TraceOfflineError):
    """A loss, gradient or product that is not finite: curvature has no meaning there."""


class HessianOperator:
    """``H v`` for ``H = ∂²/∂θ² Σ_i loss_i(θ)``, as a symmetric operator on flat vectors ``[n]``.

    The gradient ``g(θ)`` is built once with its own graph; each product is then one backward pass through that graph,
    ``H v = ∂(g·v)/∂θ`` (Pearlmutter, Neural Computation 6, 1994), about twice the cost of a gradient. With
    ``keep_graphs=False`` the graph of each loss is rebuilt for each product and dropped at once: about 1.6 times the
    time, and the memory of one loss only.

    Args:
        losses: functions without argument that return a scalar each; their sum is differentiated. Give one per
            micro-batch, already weighted. They must not depend on randomness.
        parameters: tensors of one floating dtype on one device that require gradients; one that occurs twice (tied
            weights) counts once. What is not listed is held fixed. A listed one that the loss does not depend on has
            zero rows and columns.
        keep_graphs: keep the graphs of all losses until ``close``.

    Attributes:
        n: number of coordinates. losses: loss_i. loss: their sum. gradient: ``[n]``, detached. products: how many.

    Raises:
        ValueError: no losses, no parameters, mixed dtypes or devices, parameters without gradients, a loss that is
            no scalar.
        NonFiniteError: the loss or its gradient is NaN or infinite.
        TraceOfflineError: an operation of the loss has no second derivative.

    """

    def __init__(self, losses: Sequence[Loss], parameters: Iterable[Tensor], *, keep_graphs: bool = True) -> None:
        self._losses = tuple(losses)
        self._parameters = distinct_parameters(parameters)
        if not self._losses:
            raise ValueError("expected at least one loss, found none")
        first = self._parameters[0]
        self.dtype, self.device = first.dtype, first.device
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self.n = sum(self._sizes)
        self._all = range(len(self._parameters))
        self.products = 0
        self.kept = keep_graphs
        self._closed = False
        self._graphs: list[_GradientGraph] = []
        self._values: list[float] = []

        gradient = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        for loss in self._losses:
            graph = _GradientGraph(loss, self._parameters)
            self._values.append(graph.loss)
            graph.add_gradient(gradient, self._sizes)
            if keep_graphs:
                self._graphs.append(graph)
        self.gradient = gradient
        self.gradient_norm = float(torch.linalg.vector_norm(gradient))
        self.losses = tuple(self._values)
        self.loss = math.fsum(self._values)
        if not math.isfinite(self.gradient_norm):
            self.close()
            raise NonFiniteError(f"the gradient is not finite (norm {self.gradient_norm}, loss {self.loss:.6g})")

    def product(self, vector: Tensor) -> Tensor:
        """``H v``, ``[n] → [n]``. Raises ValueError for another shape, RuntimeError after ``close``."""
        result = self._product(vector, self._all)
        self.products += 1
        return result

    def forms(self, vector: Tensor) -> Tensor:
        """``vᵀ H_i v`` of each loss by itself, ``[losses]`` in float64: one product in all."""
        vector = vector.to(device=self.device, dtype=self.dtype)
        found = [torch.dot(vector, self._product(vector, self._all, only=i)) for i in range(len(self._losses))]
        self.products += 1
        return torch.stack(found).double().cpu()

    def block(self, places: Sequence[int]) -> HessianBlock:
        """The diagonal block of the parameters at these places of the list given (tied ones counted once)."""
        return HessianBlock(self, places)

    def block_products(self, blocks: Sequence[HessianBlock], vectors: Sequence[Tensor]) -> list[Tensor]:
        """``H_bb v_b`` of several blocks. Where graphs are rebuilt, each is built once for all of these products."""
        results = self._products([(block._places, v) for block, v in zip(blocks, vectors, strict=True)])
        for block in blocks:
            block.products += 1
        return results

    def _product(self, vector: Tensor, places: Sequence[int], only: int | None = None) -> Tensor:
        return self._products([(places, vector)], only)[0]

    def _products(self, asked: Sequence[tuple[Sequence[int], Tensor]], only: int | None = None) -> list[Tensor]:
        chosen = slice(None) if only is None else slice(only, only + 1)
        if self._closed:
            raise RuntimeError("this Hessian was closed; its graph is gone")
        results, parts = [], []
        for places, vector in asked:
            sizes = [self._sizes[i] for i in places]
            if vector.shape != (sum(sizes),):
                raise ValueError(f"expected a vector [{sum(sizes)}], found shape {tuple(vector.shape)}")
            moved = vector.detach().to(device=self.device, dtype=self.dtype)
            pieces = zip(moved.split(sizes), places, strict=True)
            parts.append([piece.view_as(self._parameters[i]) for piece, i in pieces])
            results.append(torch.zeros(sum(sizes), dtype=self.dtype, device=self.device))
        if self.kept:
            for graph in self._graphs[chosen]:
                for (places, _), part, result in zip(asked, parts, results, strict=True):
                    graph.add_product(part, result, [self._sizes[i] for i in places], places, keep=True)
            return results
        # only what lies between the loss and these parameters
        used = list(dict.fromkeys(i for places, _ in asked for i in places))
        where = {place: index for index, place in enumerate(used)}
        for loss, expected in zip(self._losses[chosen], self._values[chosen], strict=True):
            graph = _GradientGraph(loss, [self._parameters[i] for i in used])
            if abs(graph.loss - expected) > _SAME_LOSS * max(1.0, abs(expected)):
                raise TraceOfflineError(
                    f"the loss changed from {expected:.6g} to {graph.loss:.6g} between two evaluations at the same "
                    "weights; curvature needs a loss without randomness (is dropout on?)"
                )
            for index, ((places, _), part, result) in enumerate(zip(asked, parts, results, strict=True)):
                own = [where[i] for i in places]
                last = index == len(asked) - 1
                graph.add_product(part, result, [self._sizes[i] for i in places], own, keep=not last)
        return results

    def close(self) -> None:
        """Free the graphs; ``gradient``, ``loss`` and ``products`` stay. Closing twice is allowed."""
        self._graphs.clear()
        self._closed = True

    def __enter__(self) -> HessianOperator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class HessianBlock:
    """A diagonal block ``H_bb`` of a Hessian as a symmetric operator: products through that block's parameters only.

    The backward pass visits only what lies between the block's gradient and its parameters, which costs less than a
    full product. Lives as long as the Hessian it is a block of.

    Attributes:
        n: coordinates of the block. ranges: where they lie in the whole, ``(start, stop)``. products: how many.

    """

    def __init__(self, whole: HessianOperator, places: Sequence[int]) -> None:
        count = len(whole._sizes)
        if not places or len(set(places)) != len(places) or not all(0 <= i < count for i in places):
            raise ValueError(f"expected distinct places between 0 and {count - 1}, found {list(places)}")
        self._whole, self._places = whole, tuple(places)
        starts = [sum(whole._sizes[:i]) for i in places]
        self.ranges = tuple((start, start + whole._sizes[i]) for start, i in zip(starts, places, strict=True))
        self.n = sum(stop - start for start, stop in self.ranges)
        self.dtype, self.device = whole.dtype, whole.device
        self.products = 0

    @property
    def gradient(self) -> Tensor:
        """The block's part of the gradient, ``[n]``."""
        return self.part(self._whole.gradient)

    def part(self, vector: Tensor) -> Tensor:
        """The block's coordinates of a vector of the whole."""
        return torch.cat([vector[start:stop] for start, stop in self.ranges])

    def product(self, vector: Tensor) -> Tensor:
        """``H_bb v``, ``[n] → [n]``."""
        self.products += 1
        return self._whole._product(vector, self._places)


class _GradientGraph:
    """One loss, its gradient, and the graph from the gradient back to the parameters."""

    def __init__(self, loss: Loss, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        with torch.enable_grad(), second_derivatives():
            value = loss()
            if value.numel() != 1:
                raise ValueError(f"expected a scalar loss, found shape {tuple(value.shape)}")
            self.loss = float(value.detach())
            if not math.isfinite(self.loss):
                raise NonFiniteError(f"the loss is not finite ({self.loss})")
            if not value.requires_grad:
                raise ValueError("the loss does not depend on any of the parameters")
            self._gradients = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)

    def add_gradient(self, total: Tensor, sizes: Sequence[int]) -> None:
        _add(self._gradients, total, sizes)

    def add_product(
        self, vector: Sequence[Tensor], total: Tensor, sizes: Sequence[int], places: Sequence[int], *, keep: bool
    ) -> None:
        # A gradient without history is constant: the loss is linear in that parameter, which adds nothing to H.
        gradients = [self._gradients[i] for i in places]
        pairs = [(g, v) for g, v in zip(gradients, vector, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return
        with torch.enable_grad(), second_derivatives():
            parts = torch.autograd.grad(
                [gradient for gradient, _ in pairs],
                [self._parameters[i] for i in places],
                grad_outputs=[part for _, part in pairs],
                retain_graph=keep,
                allow_unused=True,
            )
        _add(parts, total, sizes)


def _add(parts: Sequence[Tensor | None], total: Tensor, sizes: Sequence[int]) -> None:
    with torch.no_grad():
        for part, place in zip(parts, total.split(list(sizes)), strict=True):
            if part is not None:
                place.add_(part.detach().reshape(-1))


def distinct_parameters(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parameters, each once. Raises ValueError as ``HessianOperator`` does."""
    found = list({id(parameter): parameter for parameter in parameters}.values())
    if not found:
        raise ValueError("expected at least one parameter, found none")
    kinds = {(str(parameter.dtype), str(parameter.device)) for parameter in found}
    if len(kinds) > 1 or not found[0].is_floating_point():
        listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"expected parameters of one floating dtype on one device, found {listed}")
    frozen = sum(not parameter.requires_grad for parameter in found)
    if frozen:
        raise ValueError(f"{frozen} of {len(found)} parameters do not require gradients; see require_gradients")
    return found


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Say plainly which operation stops the second derivative; torch's own message names only the kernel."""
    try:
        yield
    except RuntimeError as error:
        if "derivative for" in str(error) and "not implemented" in str(error):
            raise TraceOfflineError(
                "the loss cannot be differentiated twice; use an attention without fused kernels (eager, or "
                f"torch's math backend). torch says: {error}"
            ) from error
        raise


@contextmanager
def require_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Switch gradients on for ``parameters`` and put every flag back afterwards, whatever happens."""
    states = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in states:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, state in states:
            parameter.requires_grad_(state)


def graph_bytes(loss: Loss, parameters: Iterable[Tensor]) -> int:
    """Bytes of the tensors that the gradient graph of ``loss`` keeps alive, parameters themselves not counted.

    Builds the graph once (a loss, a gradient) and drops it. Storages shared by several tensors count once.
    """
    distinct = distinct_parameters(parameters)
    own = {parameter.untyped_storage().data_ptr() for parameter in distinct}
    kept: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # The tensor is held so that its address cannot be given to another one while we count.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor.detach())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _GradientGraph(loss, distinct)
    return sum(size for size, _ in kept.values())

"""The part of the evaluation set whose loss is differentiated twice, and how much of it at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trace_offline.activations.batch import IGNORED
from trace_offline.activations.forward import trimmed
from trace_offline.activations.losses import summed_loss
from trace_offline.activations.memory import free_memory, is_halved
from trace_offline.analyzers._measurements import check_targets
from trace_offline.core.errors import NotApplicable
from trace_offline.estimators.hvp import graph_bytes

if TYPE_CHECKING:
    from trace_offline.activations.model import ModelView
    from trace_offline.evaluation.evaluation_set import EvaluationSet

GIB = 1 << 30


@dataclass(frozen=True)
class Rows:
    """Token rows as the loss wants them: ``input_ids``, ``attention_mask``, ``targets``, each ``[B, T]``.

    ``places [B]``: which rows of the evaluation set they are.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    places: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_targets(self) -> int:
        """Predictions that count."""
        return int((self.targets != IGNORED).sum())

    def take(self, index: list[int]) -> Rows:
        """These rows, in this order."""
        places = tuple(self.places[i] for i in index) if self.places else ()
        return Rows(self.input_ids[index], self.attention_mask[index], self.targets[index], places)


def choose_rows(
    evaluation: EvaluationSet,
    max_sequences: int,
    max_tokens: int,
    seed: int,
    among: NDArray[np.bool_] | None = None,
) -> Rows:
    """A random part of the evaluation set, the same for every checkpoint: it depends on the set and the seed only.

    Rows are drawn without replacement, rows without a target passed over, until ``max_sequences`` are found or the
    next would exceed ``max_tokens`` attended tokens (the first always enters); then put back in their order.
    ``among [N]``: the rows to draw from; None: all.

    Raises:
        NotApplicable: no row has a target.

    """
    order = np.random.default_rng(seed).permutation(evaluation.n_examples)
    found: list[tuple[int, Rows]] = []
    tokens = 0
    for row in order.tolist():
        if among is not None and not among[row]:
            continue
        batch = evaluation.tokens(row, row + 1)
        part = Rows(batch.input_ids, batch.attention_mask, batch.targets)
        if part.n_targets == 0:
            continue
        length = int(part.attention_mask.sum())
        if found and tokens + length > max_tokens:
            break
        found.append((row, part))
        tokens += length
        if len(found) == max_sequences:
            break
    if not found:
        raise NotApplicable("not applicable because no position of the evaluation set has a target: there is no loss")
    parts = [part for _, part in sorted(found, key=lambda item: item[0])]
    return Rows(
        torch.cat([part.input_ids for part in parts]),
        torch.cat([part.attention_mask for part in parts]),
        torch.cat([part.targets for part in parts]),
        tuple(row for row, _ in sorted(found, key=lambda item: item[0])),
    )


def in_dtype(model: ModelView, dtype: str) -> ModelView:
    """The model itself when all its floating parameters have this dtype, else a converted copy; never changes it."""
    wanted = getattr(torch, dtype)
    if all(p.dtype == wanted for p in model.module.parameters() if p.is_floating_point()):
        return model
    # A network in half precision is widened exactly; its own buffers would not survive the way back, hence a copy.
    return replace(model, module=copy.deepcopy(model.module).to(wanted), blocks=None, dtype=dtype)


def weights_of(model: ModelView) -> list[Tensor]:
    """All floating parameters, tied ones once, whether or not loading left their gradients switched on.

    Raises:
        NotApplicable: the network has none.

    """
    found: list[Tensor] = [p for p in model.module.parameters() if p.is_floating_point() and p.numel()]
    if not found:
        raise NotApplicable("not applicable because the network has no floating-point parameters to differentiate by")
    return found


@dataclass(frozen=True)
class Plan:
    """How the rows are cut into micro-batches, whether all their graphs are kept, and the bytes of one such graph."""

    micro_batches: tuple[list[int], ...]
    keep_graphs: bool
    graph_bytes: int = 0


def check_labels(model: ModelView, rows: Rows) -> None:
    """Raise EvaluationSetError when a target is no class of the output (on a GPU the loss itself would only crash)."""
    with torch.no_grad():
        logits = model.logits(rows.input_ids[:1].to(model.device), rows.attention_mask[:1].to(model.device))
    check_targets(rows.targets, logits.shape[-1])


def losses_of(model: ModelView, rows: Rows, micro_batches: tuple[list[int], ...]) -> list[Callable[[], Tensor]]:
    """One function per micro-batch; their sum is the mean cross-entropy over all targets of ``rows``, in nats."""
    total = rows.n_targets

    def loss(part: Rows) -> Callable[[], Tensor]:
        return lambda: summed_loss(model, part)[0] / total

    return [loss(rows.take(index)) for index in micro_batches]


def outputs_of(
    model: ModelView, rows: Rows, micro_batches: tuple[list[int], ...]
) -> list[Callable[[], tuple[Tensor, Tensor]]]:
    """One function per micro-batch: logits ``[M, C]`` and labels ``[M]`` of its targets that count."""

    def outputs(part: Rows) -> tuple[Tensor, Tensor]:
        input_ids, attention_mask, targets = (tensor.to(model.device) for tensor in trimmed(part))
        counted = targets != IGNORED
        return model.logits(input_ids, attention_mask)[counted], targets[counted]

    return [partial(outputs, rows.take(index)) for index in micro_batches]


def plan_batches(
    model: ModelView, parameters: list[Tensor], rows: Rows, micro_batch: int | None, max_graph_gb: float
) -> Plan:
    """Cut the rows so that the kept graphs stay within ``max_graph_gb`` GiB.

    The graph of a batch costs a fixed part and one part per row. Both are measured, on the longest row alone and on
    the two longest. All graphs are kept when they fit together (a product then costs two gradients); else one
    micro-batch at a time is built for each product (about three and a half). On a GPU they also stay within half of
    what is free there, the rest being for the vectors; inside ``halved`` the micro-batch is half as large and no graph
    is kept. None of this changes a number by more than rounding.

    Raises:
        NotApplicable: the graph of one micro-batch alone is too large.

    """
    count = len(rows)
    lengths = rows.attention_mask.sum(-1)
    longest = [int(i) for i in torch.argsort(lengths, descending=True, stable=True)[:2]]
    one = graph_bytes(losses_of(model, rows, (longest[:1],))[0], parameters)
    two = graph_bytes(losses_of(model, rows, (longest,))[0], parameters) if count > 1 else one
    per_row = max(two - one, 1)
    fixed = max(one - per_row, 0)
    bound = int(max_graph_gb * GIB)
    free = free_memory(parameters[0].device).device
    scarce = free is not None and free // 2 < bound
    if free is not None:
        bound = min(bound, free // 2)
    size = micro_batch
    if size is None:
        size = count if fixed + per_row * count <= bound else (bound - fixed) // per_row
    size = min(size, count)
    if size < 1 or fixed + per_row * size > bound:
        smallest = (fixed + per_row * max(size, 1)) / GIB
        advice = f"max_graph_gb to at least {smallest:.2g}"
        advice += " or shorten the sequences of the evaluation set" if size <= 1 else f", or micro_batch below {size}"
        limit = f"max_graph_gb is {max_graph_gb:g}: set {advice}"
        if scarce:
            less = "shorten the sequences of the evaluation set" if size <= 1 else f"set micro_batch below {size}"
            limit = f"the GPU has {(free or 0) / GIB:.3g} GiB free, half of it for graphs: take a larger one, or {less}"
        raise NotApplicable(
            f"not applicable because the gradient graph of {max(size, 1)} of {count} sequences needs about "
            f"{smallest:.3g} GiB and {limit}"
        )
    half = is_halved()
    size = (size + 1) // 2 if half else size
    pieces = math.ceil(count / size)
    parts = tuple(list(range(start, min(start + size, count))) for start in range(0, count, size))
    keep = fixed * pieces + per_row * count <= bound and not half
    return Plan(parts, keep_graphs=keep, graph_bytes=fixed + per_row * size)

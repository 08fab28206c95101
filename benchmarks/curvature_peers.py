"""One Hessian, as each of the three makes it from the same network and batch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from trace_offline.activations.losses import double_backward_attention
from trace_offline.activations.model import ModelView
from trace_offline.analyzers._curvature_batch import choose_rows, losses_of, weights_of
from trace_offline.estimators.hvp import HessianOperator
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.recording import save_evaluation_set


class Wrapped(nn.Module):
    """Token ids → logits ``[targets, classes]``, as peers want their models."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T] → [B (T − 1), V]``."""
        logits: Tensor = self.network(input_ids=ids).logits
        return logits[:, :-1].flatten(0, 1)


def peer_hessian(network: Any, ids: Tensor, *, loader: bool = False) -> Any:
    """PyHessian of one batch, or of a data loader with that one batch."""
    import pyhessian

    data = (ids, ids[:, 1:].flatten())
    more = {"dataloader": [data]} if loader else {"data": data}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pyhessian.hessian(Wrapped(network), functional.cross_entropy, cuda=False, **more)


def peer_operator(network: Any, ids: Tensor) -> Any:
    """The Hessian of curvlinops."""
    import curvlinops

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return curvlinops.HessianLinearOperator(
            Wrapped(network), nn.CrossEntropyLoss(), list(network.parameters()), [(ids, ids[:, 1:].flatten())],
            check_deterministic=False, batch_size_fn=lambda ids: ids[:, 1:].numel(),
        )  # fmt: skip


@contextlib.contextmanager
def our_hessian(network: Any, folder: Path, ids: Tensor) -> Iterator[HessianOperator]:
    """The operator as the analyzer makes it."""
    evaluation, model = evaluation_of(folder, ids), ModelView(network, None, "cpu", "float32")
    rows = choose_rows(evaluation, len(ids), ids.numel(), 0)
    with double_backward_attention():
        operator = HessianOperator(losses_of(model, rows, (list(range(len(ids))),)), weights_of(model))
        with operator:
            yield operator


def evaluation_of(folder: Path, ids: Tensor) -> EvaluationSet:
    if not (folder / "set").exists():
        save_evaluation_set(folder / "set", ids)
    return EvaluationSet.load(folder / "set")

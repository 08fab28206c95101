"""Stand-ins for the evaluation set and the network, so that analyzers are tested by themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from trace_offline.activations.batch import ForwardBatch
from trace_offline.analyzers.base import Analyzer, Context
from trace_offline.core.params import parse_params
from trace_offline.core.types import Array, Measurement

IGNORED = -100


class FakeEvaluation:
    """The interface of an evaluation set, held in memory. ``spans``: task → list of (row, start, end, label)."""

    def __init__(
        self,
        input_ids: torch.Tensor,
        annotations: dict[str, list[tuple[int, int, int, str]]] | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        labels_shifted: bool = True,
        objective: str = "causal_lm",
        alignment: str = "last",
        split: np.ndarray | None = None,
        group: np.ndarray | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.attention_mask = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask
        self.labels = input_ids if labels is None else labels
        self.labels_shifted, self.objective, self.alignment = labels_shifted, objective, alignment
        self.n_examples, self.max_length = input_ids.shape
        self.special_token_ids: tuple[int, ...] = ()
        self.annotations = annotations or {}
        self.tasks = tuple(sorted(self.annotations))
        self.split = split
        self.group = np.arange(self.n_examples) if group is None else group

    def tokens(self, start: int, stop: int) -> Any:
        ids, mask = self.input_ids[start:stop], self.attention_mask[start:stop]
        labels = torch.where(mask, self.labels[start:stop], IGNORED)
        targets = labels
        if self.labels_shifted:
            targets = torch.full_like(labels, IGNORED)
            targets[:, :-1] = labels[:, 1:]
        return SimpleNamespace(input_ids=ids, attention_mask=mask, targets=targets)

    def spans(self, task: str) -> Any:
        rows = sorted(self.annotations[task])
        classes = tuple(sorted({row[3] for row in rows}))
        numbers = np.array([row[:3] for row in rows], dtype=np.int64).reshape(-1, 3)
        label = np.array([classes.index(row[3]) for row in rows], dtype=np.int64)
        return SimpleNamespace(row=numbers[:, 0], start=numbers[:, 1], end=numbers[:, 2], label=label, classes=classes)


def run(
    analyzer: Analyzer,
    evaluation: Any,
    *,
    logits: torch.Tensor | None = None,
    hidden: tuple[torch.Tensor, ...] | None = None,
    batch: int = 7,
    seed: int = 0,
    n_layers: int | None = -1,
    **params: Any,
) -> tuple[list[Measurement], list[Array]]:
    """The whole way of one analyzer over ready-made outputs of a network ``[N, T, …]``."""
    layers = (None if hidden is None else len(hidden) - 1) if n_layers == -1 else n_layers
    model = SimpleNamespace(n_layers=layers, device="cpu", dtype="float32")
    chosen = parse_params(type(analyzer).Params, analyzer.name, params)
    context = Context(model, evaluation, chosen, seed)  # type: ignore[arg-type]
    collectors = dict(analyzer.collectors(context))
    for start in range(0, evaluation.n_examples, batch):
        stop = min(start + batch, evaluation.n_examples)
        tokens = evaluation.tokens(start, stop)
        seen = ForwardBatch(
            torch.arange(start, stop),
            tokens.input_ids,
            tokens.attention_mask,
            tokens.targets,
            None if hidden is None else tuple(layer[start:stop] for layer in hidden),
            None if logits is None else logits[start:stop],
        )
        for collector in collectors.values():
            collector.update(seen)
    collected = {name: collector.finish() for name, collector in collectors.items()}
    context = Context(model, evaluation, chosen, seed, collected)  # type: ignore[arg-type]
    results = list(analyzer.measure(context))
    measured = [item for item in results if isinstance(item, Measurement)]
    for item in measured:
        assert item.metric in {spec.name for spec in analyzer.metrics}, item
        assert (item.value is None) == (item.reason is not None), item
        assert item.value is None or np.isfinite(item.value), item
        assert item.stderr is None or np.isfinite(item.stderr), item
    return measured, [item for item in results if isinstance(item, Array)]


def one(results: list[Measurement], metric: str, **where: Any) -> Measurement:
    """The single measurement with this metric and these fields; a field that is not named must be None."""
    fields = {"layer": None, "task": None, "label": None} | where
    found = [m for m in results if m.metric == metric and all(getattr(m, k) == v for k, v in fields.items())]
    assert len(found) == 1, found
    return found[0]

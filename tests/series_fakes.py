"""Series of checkpoints for analyzers that compare them: extracts in a folder, without the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trace_offline.activations.forward import run_pass
from trace_offline.activations.model import ModelView
from trace_offline.analyzers.base import Context, Extract, SeriesAnalyzer, SeriesContext
from trace_offline.checkpoints.blocks import find_blocks
from trace_offline.core.params import parse_params
from trace_offline.core.types import Measurement


def view_of(module: torch.nn.Module, dtype: str = "float32") -> ModelView:
    """The network as analyzers see it."""
    return ModelView(module, find_blocks(module), "cpu", dtype)


def extract_of(analyzer: SeriesAnalyzer, view: Any, evaluation: Any, seed: int = 0, **params: Any) -> dict[str, Any]:
    """What the analyzer keeps of one checkpoint, after a real forward pass when it listens to one."""
    chosen = parse_params(type(analyzer).Params, analyzer.name, params)
    collectors = dict(analyzer.collectors(Context(view, evaluation, chosen, seed)))
    if collectors:
        assert run_pass(view, evaluation, collectors) == {}
    collected = {name: collector.finish() for name, collector in collectors.items()}
    return dict(analyzer.extract(Context(view, evaluation, chosen, seed, collected)))


def compare(
    analyzer: SeriesAnalyzer,
    extracts: Sequence[dict[str, Any]],
    evaluation: Any,
    folder: Path,
    seed: int = 0,
    steps: Sequence[int | None] | None = None,
    **params: Any,
) -> list[tuple[int, Measurement]]:
    """All measurements of a series, checked for form."""
    chosen = parse_params(type(analyzer).Params, analyzer.name, params)
    kept = []
    for position, arrays in enumerate(extracts):
        path = folder / f"{position}.safetensors"
        save_file(arrays, path)
        kept.append(Extract(position, position if steps is None else steps[position], str(path)))
    found = list(analyzer.compare(SeriesContext(tuple(kept), evaluation, chosen, seed)))
    known = {spec.name for spec in analyzer.metrics}
    keys = set()
    for position, item in found:
        assert isinstance(item, Measurement)
        assert 0 <= position < len(extracts)
        assert item.metric in known
        assert (item.value is None) == (item.reason is not None), item
        assert item.value is None or math.isfinite(item.value), item
        assert item.stderr is None or math.isfinite(item.stderr), item
        key = (position, item.metric, item.layer, item.component, item.task, item.label)
        assert key not in keys, key
        keys.add(key)
    return found  # type: ignore[return-value]


def pick(found: Sequence[tuple[int, Measurement]], position: int, metric: str, **where: Any) -> Measurement:
    """The one measurement of a position with these fields."""
    here = [m for p, m in found if p == position and m.metric == metric]
    chosen = [m for m in here if all(getattr(m, key) == value for key, value in where.items())]
    assert len(chosen) == 1, chosen
    return chosen[0]

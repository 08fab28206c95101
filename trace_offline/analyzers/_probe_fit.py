"""Fit and score the probes of one task: all layers and label sets in one batch of problems.

Shape letters: L+1 layers, M words of the task, D width, K classes, S label sets (real, control).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trace_offline.analyzers._probe_data import Prepared
from trace_offline.estimators.classification import ClassificationScores, score
from trace_offline.estimators.logistic import LogisticProblems, fit_path
from trace_offline.estimators.splits import Part

MEMORY_NUMBERS = 1 << 27
"""Numbers held for the layers that are solved together (512 MB in float32)."""

PATH_TOLERANCE = 20.0
"""Times the tolerance while penalties are compared on validation words: their NLL differs by far more than that."""

_CONSTANT = 1e-6


@dataclass(frozen=True)
class LayerScores:
    """Scores of one layer; ``control`` None when no control task was asked for. ``penalty`` of the real probe."""

    layer: int
    real: ClassificationScores
    control: ClassificationScores | None
    penalty: float
    converged: bool


def standardise(table: Tensor, train: Tensor) -> Tensor:
    """``[L, M, D]`` → zero mean and unit variance over the rows ``train`` of every layer, computed in float64.

    A feature that is constant over the training rows (relative spread below 1e-6, the noise of float32) becomes 0.
    """
    out = torch.empty_like(table)
    for layer, matrix in enumerate(table):
        rows = matrix[train].double()
        mean, deviation = rows.mean(0), rows.std(0, correction=0)
        varies = deviation > _CONSTANT * rows.abs().amax(0)
        scale = torch.where(varies, 1.0 / deviation.where(varies, 1.0), 0.0)
        out[layer] = ((matrix.double() - mean) * scale).to(out.dtype)
    return out


def _layer_batches(layers: Sequence[int], prepared: Prepared, width: int, sets: int) -> Iterator[list[int]]:
    """Consecutive layers whose problems fit into memory together; at least one."""
    words = len(prepared.label)
    per_layer = words * (4 * width + 6 * sets * len(prepared.kept))
    step = max(1, MEMORY_NUMBERS // max(1, per_layer))
    for start in range(0, len(layers), step):
        yield list(layers[start : start + step])


def fit_layers(
    table: Tensor,
    layers: Sequence[int],
    prepared: Prepared,
    penalties: Sequence[float],
    tolerance: float,
    max_iterations: int,
) -> Iterator[LayerScores]:
    """Probe the given layers of ``table [L+1, U, D]`` (finite there); yields scores in the order of ``layers``.

    The penalty of each probe is the one with the lowest validation NLL; the probe is then refit at it on training and
    validation words together, and scored on the test words.
    """
    labels = [prepared.label] if prepared.control is None else [prepared.label, prepared.control]
    y = torch.from_numpy(np.stack(labels))
    train, validation, test = (torch.from_numpy(prepared.at(part)) for part in Part)
    where = torch.from_numpy(prepared.words.where)
    classes = len(prepared.kept)
    for batch in _layer_batches(layers, prepared, table.shape[2], len(labels)):
        features = standardise(torch.stack([table[layer][where] for layer in batch]), train)
        problems = LogisticProblems(features[:, train], y[:, train], classes)
        chosen, _ = fit_path(
            problems,
            features[:, validation],
            y[:, validation],
            penalties,
            tolerance=PATH_TOLERANCE * tolerance,
            max_iterations=max_iterations,
        )
        del problems
        both = torch.cat([train, validation])
        fit = LogisticProblems(features[:, both], y[:, both], classes).solve(
            chosen.penalty, chosen, tolerance, max_iterations
        )
        groups = prepared.words.group[prepared.at(Part.TEST)]
        for i, layer in enumerate(batch):
            log_p = fit.log_probabilities(features[i, test], i).numpy()
            scores = [score(log_p[s], label[test.numpy()], groups) for s, label in enumerate(labels)]
            yield LayerScores(
                layer,
                scores[0],
                scores[1] if len(scores) > 1 else None,
                float(fit.penalty[i, 0]),
                bool(fit.converged[i].all()),
            )

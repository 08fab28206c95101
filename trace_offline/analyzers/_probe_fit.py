"""Fit and score the probes of one task: all layers and label sets in one batch of problems.

Shape letters: L+1 layers, M words of the task, D width, K classes, S label sets (real, control).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trace_offline.analyzers._probe_data import Prepared
from trace_offline.analyzers.probe_weights import Probe, scaling
from trace_offline.estimators.calibration import CalibrationBins
from trace_offline.estimators.classification import ClassificationScores, mean_by_cluster, score
from trace_offline.estimators.clustered import JACKKNIFE_GROUPS, Codes, Estimate, cluster_codes
from trace_offline.estimators.description_length import block_ends, online_code
from trace_offline.estimators.logistic import LogisticProblems, fit_path
from trace_offline.estimators.mlp_probe import fit_mlp
from trace_offline.estimators.splits import Part

MEMORY_NUMBERS = 1 << 27
"""Numbers held for the layers that are solved together (512 MB in float32)."""

PATH_TOLERANCE = 20.0
"""Times the tolerance while penalties are compared on validation words: their NLL differs by far more than that."""


@dataclass(frozen=True)
class FitOptions:
    """How probes are fitted. ``fractions``: ends of the blocks of the online code, or None for no code."""

    penalties: Sequence[float]
    tolerance: float = 5e-4
    max_iterations: int = 500
    kind: str = "linear"
    hidden_width: int = 64
    max_passes: int = 100
    patience: int = 5
    seed: int = 0
    fractions: Sequence[float] | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class CodeLength:
    """Bits of all training labels with their standard error, and the uniform code's bits divided by them."""

    bits: Estimate
    compression: Estimate
    n: int


@dataclass(frozen=True)
class LayerScores:
    """Scores of one layer; ``control`` None when no control task was asked for. ``penalty`` of the real probe, None
    for a probe with a hidden layer. ``probe``: the real one.
    """

    layer: int
    real: ClassificationScores
    control: ClassificationScores | None
    calibration: Estimate
    penalty: float | None
    converged: bool
    code: CodeLength | None
    control_code: CodeLength | None
    probe: Probe


@dataclass(frozen=True)
class _Fitted:
    """``probes[layer][set]``, ``penalties[layer][set]``, and whether all fits of a layer converged."""

    probes: list[list[Probe]]
    penalties: list[list[float | None]]
    converged: list[bool]
    code_bits: NDArray[np.float64] | None


def standardise(table: Tensor, train: Tensor) -> Tensor:
    """``[L, M, D]`` → zero mean and unit variance over the rows ``train`` of every layer, computed in float64.

    A feature that is constant over the training rows (relative spread below 1e-6, the noise of float32) becomes 0.
    """
    return torch.stack([Probe(*scaling(matrix[train]), {}).standardised(matrix) for matrix in table])


def _layer_batches(layers: Sequence[int], prepared: Prepared, width: int, sets: int) -> Iterator[list[int]]:
    """Consecutive layers whose problems fit into memory together; at least one."""
    words = len(prepared.label)
    per_layer = words * (4 * width + 6 * sets * len(prepared.kept))
    step = max(1, MEMORY_NUMBERS // max(1, per_layer))
    for start in range(0, len(layers), step):
        yield list(layers[start : start + step])


def fit_layers(table: Tensor, layers: Sequence[int], prepared: Prepared, options: FitOptions) -> Iterator[LayerScores]:
    """Probe the given layers of ``table [L+1, U, D]`` (finite there); yields scores in the order of ``layers``.

    Linear: the penalty of each probe is the one with the lowest validation NLL; the probe is then refit at it on
    training and validation words together. With a hidden layer: fitted to the training words, ended by validation NLL.
    Scored on the test words.
    """
    labels = [prepared.label] if prepared.control is None else [prepared.label, prepared.control]
    test = torch.from_numpy(prepared.at(Part.TEST))
    where = torch.from_numpy(prepared.words.where)
    groups = prepared.words.group[prepared.at(Part.TEST)]
    fit = _fit_mlp if options.kind == "mlp" else _fit_linear
    for batch in _layer_batches(layers, prepared, table.shape[2], len(labels)):
        raw = [table[layer][where] for layer in batch]
        found = fit(raw, labels, prepared, options)
        for i, layer in enumerate(batch):
            scores, calibration = [], Estimate(None, None)
            for s, label in enumerate(labels):
                log_p = found.probes[i][s].log_probabilities(raw[i][test]).numpy()
                scores.append(score(log_p, label[test.numpy()], groups))
                if s == 0:
                    calibration = calibration_of(log_p, scores[0].correct, groups)
            codes = [None, None] if found.code_bits is None else _codes(found.code_bits[i], prepared)
            yield LayerScores(
                layer=layer,
                real=scores[0],
                control=scores[1] if len(scores) > 1 else None,
                calibration=calibration,
                penalty=found.penalties[i][0],
                converged=found.converged[i],
                code=codes[0],
                control_code=codes[1],
                probe=found.probes[i][0],
            )


def fit_sets(
    table: Tensor, layers: Sequence[int], labels: list[Codes], prepared: Prepared, options: FitOptions
) -> Iterator[tuple[list[Probe], list[float | None], bool]]:
    """Probes for label sets of one's own, ``labels [S][M]`` in 0…K−1: for each layer the probes and penalties of all
    sets, and whether all converged.
    """
    where = torch.from_numpy(prepared.words.where)
    fit = _fit_mlp if options.kind == "mlp" else _fit_linear
    for batch in _layer_batches(layers, prepared, table.shape[2], len(labels)):
        found = fit([table[layer][where] for layer in batch], labels, prepared, replace(options, fractions=None))
        yield from zip(found.probes, found.penalties, found.converged, strict=True)


def calibration_of(log_p: NDArray[np.floating], correct: NDArray[np.bool_], groups: Codes) -> Estimate:
    """Expected calibration error of the most likely class of ``log p [n, K]``."""
    coarse = cluster_codes(groups, JACKKNIFE_GROUPS)
    bins = CalibrationBins(int(coarse.max()) + 1)
    bins.add(np.exp(log_p.max(1).astype(np.float64)).clip(max=1.0), correct, coarse)
    return bins.error()


def _fit_linear(raw: list[Tensor], labels: list[Codes], prepared: Prepared, options: FitOptions) -> _Fitted:
    train, validation, _ = (torch.from_numpy(prepared.at(part)) for part in Part)
    both = torch.cat([train, validation])
    classes = len(prepared.kept)
    scales = [scaling(matrix[train]) for matrix in raw]
    device = options.device
    features = torch.stack([Probe(*s, {}).standardised(matrix) for s, matrix in zip(scales, raw, strict=True)])
    features = features.to(device)
    y = torch.from_numpy(np.stack(labels)).to(device)
    chosen, _ = fit_path(
        LogisticProblems(features[:, train], y[:, train], classes),
        features[:, validation],
        y[:, validation],
        options.penalties,
        tolerance=PATH_TOLERANCE * options.tolerance,
        max_iterations=options.max_iterations,
    )
    fit = LogisticProblems(features[:, both], y[:, both], classes).solve(
        chosen.penalty, chosen, options.tolerance, options.max_iterations
    )
    bits = None
    if options.fractions is not None:
        order, ends = _sending_order(prepared, options)
        sent = torch.from_numpy(order)
        sent_bits = online_code(features[:, sent], y[:, sent], classes, chosen.penalty, ends)
        bits = np.empty_like(sent_bits)
        bits[:, :, np.searchsorted(prepared.at(Part.TRAIN), order)] = sent_bits
    probes = [
        [
            Probe(*scale, {"weight": fit.weights[i, s].cpu(), "bias": fit.intercepts[i, s].cpu()})
            for s in range(len(labels))
        ]
        for i, scale in enumerate(scales)
    ]
    penalties: list[list[float | None]] = [[float(value) for value in row] for row in fit.penalty]
    return _Fitted(probes, penalties, [bool(fit.converged[i].all()) for i in range(len(raw))], bits)


def _fit_mlp(raw: list[Tensor], labels: list[Codes], prepared: Prepared, options: FitOptions) -> _Fitted:
    train, validation, _ = (torch.from_numpy(prepared.at(part)) for part in Part)
    scales = [scaling(matrix[train]) for matrix in raw]
    device = options.device
    features = torch.stack([Probe(*s, {}).standardised(matrix) for s, matrix in zip(scales, raw, strict=True)])
    features = features.to(device)
    y = torch.from_numpy(np.stack(labels)).to(device)
    fit = fit_mlp(
        features[:, train],
        y[:, train],
        features[:, validation],
        y[:, validation],
        len(prepared.kept),
        width=options.hidden_width,
        max_passes=options.max_passes,
        patience=options.patience,
        seed=options.seed,
    )
    names = ("hidden_weight", "hidden_bias", "weight", "bias")
    parts = [part.cpu() for part in (fit.w1, fit.b1, fit.w2, fit.b2)]
    probes = [
        [Probe(*scale, {name: part[i, s] for name, part in zip(names, parts, strict=True)}) for s in range(len(labels))]
        for i, scale in enumerate(scales)
    ]
    nothing: list[list[float | None]] = [[None] * len(labels) for _ in raw]
    return _Fitted(probes, nothing, [bool(fit.converged[i].all()) for i in range(len(raw))], None)


def _sending_order(prepared: Prepared, options: FitOptions) -> tuple[Codes, list[int]]:
    """Training words in a random order of whole sentences, and where blocks end."""
    train = prepared.at(Part.TRAIN)
    groups = prepared.words.group[train]
    distinct, which = np.unique(groups, return_inverse=True)
    keys = np.random.default_rng([options.seed, len(distinct)]).random(len(distinct))
    order = train[np.lexsort((np.arange(len(train)), which, keys[which]))]
    assert options.fractions is not None
    return order, block_ends(prepared.words.group[order], options.fractions)


def _codes(bits: NDArray[np.float64], prepared: Prepared) -> list[CodeLength | None]:
    """Sums of the bits ``[S, n]`` of the training words; the standard error takes sentences as independent."""
    train = prepared.at(Part.TRAIN)
    n, uniform = len(train), float(np.log2(len(prepared.kept)))
    found: list[CodeLength | None] = []
    for row in bits:
        mean = mean_by_cluster(row, prepared.words.group[train])
        assert mean.value is not None
        spread = mean.stderr
        ratio = uniform / mean.value
        found.append(
            CodeLength(
                Estimate(n * mean.value, None if spread is None else n * spread),
                Estimate(ratio, None if spread is None else ratio * spread / mean.value),
                n,
            )
        )
    return [*found, None][:2]

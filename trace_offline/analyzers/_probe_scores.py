"""Scores of the probes of tasks whose words carry one label each: real and control task, calibration, code length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trace_offline.analyzers._probe_data import Prepared
from trace_offline.analyzers._probe_fit import FitOptions, Fitted, Request, fit_requests
from trace_offline.analyzers.probe_weights import Probe
from trace_offline.estimators.calibration import CalibrationBins
from trace_offline.estimators.classification import ClassificationScores, mean_by_cluster, score
from trace_offline.estimators.clustered import JACKKNIFE_GROUPS, Codes, Estimate, cluster_codes
from trace_offline.estimators.splits import Part


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


def requests_of(states: Sequence[Tensor], layers: Sequence[int], ready: Prepared, seed: int) -> list[Request]:
    """Real and control labels of one task at these layers of ``states`` (``[U, D]`` each, finite there)."""
    labels = [ready.label] if ready.control is None else [ready.label, ready.control]
    return [Request(states[layer], ready, labels, len(ready.kept), seed) for layer in layers]


def layer_scores(layer: int, matrix: Tensor, ready: Prepared, fitted: Fitted) -> LayerScores:
    """Score on the test words what was fitted to one layer, ``matrix [U, D]``."""
    test = ready.at(Part.TEST)
    groups = ready.words.group[test]
    states = matrix[torch.from_numpy(ready.words.where[test])]
    labels = [ready.label] if ready.control is None else [ready.label, ready.control]
    scores, calibration = [], Estimate(None, None)
    for s, label in enumerate(labels):
        log_p = fitted.probes[s].log_probabilities(states).numpy()
        scores.append(score(log_p, label[test], groups))
        if s == 0:
            calibration = calibration_of(log_p, scores[0].correct, groups)
    codes: list[CodeLength | None] = [None, None]
    if fitted.bits is not None:
        training = ready.words.group[ready.at(Part.TRAIN)]
        uniform = float(np.log2(len(ready.kept)))
        codes = [*(code_length(row, uniform, training) for row in fitted.bits), None]
    return LayerScores(
        layer=layer,
        real=scores[0],
        control=scores[1] if len(scores) > 1 else None,
        calibration=calibration,
        penalty=fitted.penalties[0],
        converged=fitted.converged,
        code=codes[0],
        control_code=codes[1],
        probe=fitted.probes[0],
    )


def fit_tasks(
    states: Sequence[Tensor], layers: Sequence[int], prepared: Sequence[Prepared], options: FitOptions
) -> list[list[LayerScores]]:
    """Fit and score all tasks at these layers of ``states`` (``[U, D]`` each, finite there): for each its layers."""
    requests = [request for ready in prepared for request in requests_of(states, layers, ready, options.seed)]
    fitted = iter(fit_requests(requests, options))
    return [[layer_scores(layer, states[layer], ready, next(fitted)) for layer in layers] for ready in prepared]


def calibration_of(log_p: NDArray[np.floating], correct: NDArray[np.bool_], groups: Codes) -> Estimate:
    """Expected calibration error of the most likely class of ``log p [n, K]``."""
    coarse = cluster_codes(groups, JACKKNIFE_GROUPS)
    bins = CalibrationBins(int(coarse.max()) + 1)
    bins.add(np.exp(log_p.max(1).astype(np.float64)).clip(max=1.0), correct, coarse)
    return bins.error()


def code_length(bits: NDArray[np.float64], uniform: float, groups: Codes) -> CodeLength:
    """Sum of the bits ``[n]`` of the training words of the sentences ``groups [n]``, which are taken as independent.

    ``uniform``: bits of the uniform code for each word.
    """
    n = len(bits)
    mean = mean_by_cluster(bits, groups)
    assert mean.value is not None
    spread = mean.stderr
    ratio = uniform / mean.value
    return CodeLength(
        Estimate(n * mean.value, None if spread is None else n * spread),
        Estimate(ratio, None if spread is None else ratio * spread / mean.value),
        n,
    )

"""Scores of a classifier on a test set, each with a standard error over clusters (sentences).

n test rows, K classes. A class counts in macro-F1 when the reference labels of the test set contain it; a class that
only occurs among the predictions costs precision elsewhere but has no F1 of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trace_offline.estimators.clustered import (
    JACKKNIFE_GROUPS,
    Codes,
    Estimate,
    Floats,
    cluster_codes,
    cluster_sums,
    jackknife,
    ratio,
)


def confusion_matrix(predicted: Codes, truth: Codes, n_classes: int) -> NDArray[np.int64]:
    """Counts ``[K, K]``: row = true class, column = predicted class."""
    flat = np.bincount(truth * n_classes + predicted, minlength=n_classes * n_classes)
    return flat.reshape(n_classes, n_classes).astype(np.int64)


def f1_per_class(counts: Floats) -> Floats:
    """F1 = 2 tp / (predicted + true) per class, ``[…, 3, K] → […, K]``; NaN for a class without true rows.

    ``counts``: true positives, rows predicted, rows true.
    """
    hits, predicted, true = counts[..., 0, :], counts[..., 1, :], counts[..., 2, :]
    return np.where(true > 0, 2.0 * hits / np.maximum(predicted + true, 1.0), np.nan)


def macro_f1(counts: Floats) -> Floats:
    """Mean F1 over the classes with true rows, ``[…, 3, K] → […]``; NaN when there is none."""
    present = counts[..., 2, :] > 0
    total = np.where(present, f1_per_class(counts), 0.0).sum(-1)
    classes = present.sum(-1)
    return np.where(classes > 0, total / np.maximum(classes, 1), np.nan)


def f1_counts(predicted: Codes, truth: Codes, n_classes: int, groups: Codes, n_groups: int) -> Floats:
    """True positives, rows predicted, rows true of each class within each group: ``[G, 3, K]``."""

    def count(mask: NDArray[np.bool_], classes: Codes) -> Floats:
        flat = np.bincount(groups[mask] * n_classes + classes[mask], minlength=n_groups * n_classes)
        return flat.reshape(n_groups, n_classes).astype(np.float64)

    everything = np.ones(len(truth), dtype=np.bool_)
    return np.stack([count(predicted == truth, truth), count(everything, predicted), count(everything, truth)], axis=1)


@dataclass(frozen=True)
class ClassificationScores:
    """``accuracy``, ``macro_f1``, ``nll`` (nats), ``confidence`` (mean probability of the right class).

    Per class ``[K]``: ``class_f1``, ``class_confidence``, ``support`` (test rows). ``correct [n]`` for paired
    comparisons, ``confusion [K, K]``.
    """

    accuracy: Estimate
    macro_f1: Estimate
    nll: Estimate
    confidence: Estimate
    class_f1: tuple[Estimate, ...]
    class_confidence: tuple[Estimate, ...]
    support: tuple[int, ...]
    correct: NDArray[np.bool_]
    confusion: NDArray[np.int64]


def score(log_probabilities: NDArray[np.floating], truth: Codes, groups: Codes) -> ClassificationScores:
    """Score ``log p [n, K]`` against ``truth [n]``; ``groups [n]``: the sentence of each row."""
    log_p = np.asarray(log_probabilities, dtype=np.float64)
    n_classes = log_p.shape[1]
    codes = cluster_codes(groups)
    clusters = int(codes.max()) + 1 if len(codes) else 0
    predicted = log_p.argmax(1).astype(np.int64)
    correct = predicted == truth
    nll = -log_p[np.arange(len(truth)), truth]
    confidence = np.exp(-nll)
    ones = cluster_sums(np.ones(len(truth)), codes, clusters)

    def mean(values: NDArray[Any]) -> Estimate:
        return ratio(cluster_sums(values, codes, clusters), ones)

    coarse = cluster_codes(groups, JACKKNIFE_GROUPS)
    counts = f1_counts(predicted, truth, n_classes, coarse, int(coarse.max()) + 1 if len(coarse) else 0)
    class_f1, class_confidence = [], []
    for k in range(n_classes):
        of_class = (truth == k).astype(np.float64)
        class_f1.append(jackknife(counts[:, :, k : k + 1], lambda c: f1_per_class(c)[..., 0]))
        sums = cluster_sums(confidence * of_class, codes, clusters)
        class_confidence.append(ratio(sums, cluster_sums(of_class, codes, clusters)))
    return ClassificationScores(
        accuracy=mean(correct),
        macro_f1=jackknife(counts, macro_f1),
        nll=mean(nll),
        confidence=mean(confidence),
        class_f1=tuple(class_f1),
        class_confidence=tuple(class_confidence),
        support=tuple(int(c) for c in np.bincount(truth, minlength=n_classes)),
        correct=correct,
        confusion=confusion_matrix(predicted, truth, n_classes),
    )


def mean_by_cluster(values: NDArray[Any], groups: Codes) -> Estimate:
    """Mean of ``values [n]`` with the standard error over ``groups [n]``; give differences for a paired comparison."""
    codes = cluster_codes(groups)
    clusters = int(codes.max()) + 1 if len(codes) else 0
    ones = cluster_sums(np.ones(len(codes)), codes, clusters)
    return ratio(cluster_sums(np.asarray(values, dtype=np.float64), codes, clusters), ones)

"""Classification scores against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from trace_offline.estimators.classification import (
    confusion_matrix,
    f1_counts,
    f1_per_class,
    macro_f1,
    mean_by_cluster,
    score,
)


def sample(seed: int, n: int = 400, classes: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.choice(classes, size=n, p=np.array([8, 4, 2, 1, 1]) / 16)
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[truth]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return log_p, truth, np.repeat(np.arange(n // 4), 4)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_sklearn(seed: int) -> None:
    log_p, truth, groups = sample(seed)
    found = score(log_p, truth, groups)
    predicted = log_p.argmax(1)
    assert found.accuracy.value == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert found.macro_f1.value == pytest.approx(metrics.f1_score(truth, predicted, average="macro"))
    assert found.nll.value == pytest.approx(metrics.log_loss(truth, np.exp(log_p), labels=range(5)))
    assert found.confidence.value == pytest.approx(np.exp(log_p)[np.arange(len(truth)), truth].mean())
    np.testing.assert_allclose(
        [item.value for item in found.class_f1], metrics.f1_score(truth, predicted, average=None)
    )
    for k, item in enumerate(found.class_confidence):
        assert item.value == pytest.approx(np.exp(log_p)[truth == k, k].mean())
    np.testing.assert_array_equal(found.confusion, metrics.confusion_matrix(truth, predicted))
    assert found.support == tuple(np.bincount(truth))
    errors = [found.accuracy, found.macro_f1, found.nll, found.confidence, *found.class_f1, *found.class_confidence]
    assert all(item.stderr is not None and item.stderr > 0 for item in errors)


def test_classes_absent_from_the_reference_labels_do_not_count() -> None:
    truth, predicted = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1])
    counts = f1_counts(predicted, truth, 4, np.zeros(4, dtype=np.int64), 1)[0]
    np.testing.assert_allclose(f1_per_class(counts), [2 / 3, 1.0, np.nan, np.nan])
    assert float(macro_f1(counts)) == pytest.approx(5 / 6)
    assert float(macro_f1(counts)) == pytest.approx(metrics.f1_score(truth, predicted, labels=[0, 1], average="macro"))
    found = score(np.log(np.eye(4)[predicted] * 0.7 + 0.075), truth, np.arange(4))
    assert found.class_f1[2].value is None
    assert found.class_confidence[3].value is None
    assert found.support == (2, 2, 0, 0)


def test_class_in_one_group_only_has_no_standard_error() -> None:
    truth = np.array([0, 0, 0, 0, 1, 1])
    found = score(np.log(np.eye(2)[truth] * 0.8 + 0.1), truth, np.array([0, 1, 2, 3, 4, 4]))
    assert found.class_f1[1].value == 1.0
    assert found.class_f1[1].stderr is None
    assert found.class_confidence[1].stderr is None
    assert found.class_f1[0].stderr == 0.0


def test_confusion_rows_are_the_truth() -> None:
    np.testing.assert_array_equal(confusion_matrix(np.array([1, 1, 0]), np.array([0, 0, 0]), 2), [[1, 2], [0, 0]])


def test_paired_difference_is_sharper_than_two_accuracies() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 5)
    hard = (rng.random(100) < 0.5)[groups]
    first = rng.random(500) < np.where(hard, 0.2, 0.9)
    second = first & (rng.random(500) < 0.95)
    difference = mean_by_cluster(first.astype(float) - second, groups)
    assert difference.value == pytest.approx(first.mean() - second.mean())
    assert difference.stderr < 0.5 * mean_by_cluster(first, groups).stderr

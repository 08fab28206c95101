"""Expected calibration error: the definition, streaming, and its standard error."""

from __future__ import annotations

import numpy as np
import pytest

from trace_offline.estimators.calibration import CalibrationBins


def by_definition(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    total = 0.0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_equals_the_definition_however_it_is_fed(bins: int) -> None:
    rng = np.random.default_rng(bins)
    confidence = np.concatenate([rng.random(500), np.arange(1, 16) / 15, [1.0, 1e-9]])
    correct = rng.random(len(confidence)) < confidence**2
    groups = np.arange(len(confidence)) % 7
    found = CalibrationBins(7, bins)
    for part in np.array_split(rng.permutation(len(confidence)), 6):
        found.add(confidence[part], correct[part], groups[part])
    assert found.error().value == pytest.approx(by_definition(confidence, correct, bins))


def test_known_values() -> None:
    always = CalibrationBins(2)
    always.add(np.full(100, 0.9), np.arange(100) % 2 == 0, np.arange(100) % 2)
    assert always.error().value == pytest.approx(0.4)
    sure = CalibrationBins(2)
    sure.add(np.ones(10), np.ones(10, dtype=bool), np.arange(10) % 2)
    assert sure.error().value == 0.0
    assert CalibrationBins(3).error().value is None


def test_small_for_calibrated_predictions_and_biased_upwards() -> None:
    rng = np.random.default_rng(0)

    def draw(n: int) -> float:
        found = CalibrationBins(50)
        confidence = rng.uniform(0.2, 1.0, n)
        found.add(confidence, rng.random(n) < confidence, np.arange(n) % 50)
        return found.error().value

    small, large = np.mean([draw(300) for _ in range(50)]), np.mean([draw(30_000) for _ in range(20)])
    assert 0.0 < large < 0.02 < small < np.sqrt(15 / 300)


def test_standard_error_matches_the_spread() -> None:
    rng = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(200):
        found = CalibrationBins(50)
        confidence = rng.uniform(0.5, 1.0, 2000)
        shared = (rng.random(200) < 0.7)[np.arange(2000) % 200]
        found.add(confidence, shared & (rng.random(2000) < confidence), np.arange(2000) % 200 % 50)
        estimate = found.error()
        values.append(estimate.value)
        errors.append(estimate.stderr)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)

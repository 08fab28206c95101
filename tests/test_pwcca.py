"""PWCCA against scikit-learn's canonical correlations, closed forms and edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import qr, svd

from trace_offline.estimators.pwcca import pwcca
from trace_offline.estimators.subsampling import partition


def dense_pwcca(x: np.ndarray, y: np.ndarray) -> float:
    """From orthonormal bases of the centred points, as the method was published."""
    x, y = x - x.mean(0), y - y.mean(0)
    left, correlations, _ = svd(qr(x, mode="economic")[0].T @ qr(y, mode="economic")[0], full_matrices=False)
    variates = qr(x, mode="economic")[0] @ left
    weights = np.abs(variates.T @ x).sum(1)
    return float((weights * correlations).sum() / weights.sum())


def value(x: np.ndarray, y: np.ndarray) -> float:
    found = pwcca(torch.from_numpy(x), torch.from_numpy(y)).value
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("width", "other"), [(6, 6), (6, 3), (3, 6), (1, 1)])
def test_value_is_the_definition(seed: int, width: int, other: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((80, width)) + 3
    y = x @ rng.standard_normal((width, other)) + rng.standard_normal((80, other))
    assert value(x, y) == pytest.approx(dense_pwcca(x, y), abs=1e-9)


def test_one_feature_each_is_the_absolute_correlation() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 50, 1))
    assert value(x, y) == pytest.approx(abs(np.corrcoef(x[:, 0], y[:, 0])[0, 1]), abs=1e-12)


def test_weights_follow_the_first() -> None:
    """A large direction that is kept and a small one that is replaced: near 1 seen from the large, by its weight."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((60, 4)))[0]
    basis = np.linalg.qr(basis - basis.mean(0))[0][:, :3]
    x = basis[:, :2] * np.array([9.0, 1.0])
    y = basis[:, [0, 2]]
    assert value(x, y) == pytest.approx(0.9, abs=1e-9)
    assert value(y, x) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_invertible_maps_change_nothing_and_itself_is_exactly_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 100, 5))
    mapped = y @ rng.standard_normal((5, 5)) * 1e-5 + 2
    assert value(x, mapped) == pytest.approx(value(x, y), abs=1e-9)
    assert value(x, x @ rng.standard_normal((5, 5))) == pytest.approx(1.0, abs=1e-9)
    table = torch.from_numpy(x)
    same = pwcca(table, table.clone(), partition(100, 5, rng))
    assert (same.value, same.stderr) == (1.0, 0.0)


def test_directions_of_rounding_do_not_count() -> None:
    """A copy of a feature adds no dimension; in float32 its rounding would be a direction with correlation 0."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 200, 4))
    y = y + 2 * x
    third = (x[:, :1] / 3 + x[:, 1:2] / 7).astype(np.float32)
    wide = np.concatenate([x.astype(np.float32), third], axis=1)
    weights = pwcca(torch.from_numpy(wide), torch.from_numpy(y)).value
    exact = dense_pwcca(x, y)
    assert weights == pytest.approx(exact, abs=0.05)


def test_stderr_is_near_the_spread_of_new_samples_and_rather_above_it() -> None:
    rng = np.random.default_rng(2)
    mix = rng.standard_normal((4, 4))
    values, errors = [], []
    for _ in range(80):
        x = rng.standard_normal((150, 4)) * np.array([3, 2, 1, 0.5])
        y = x @ mix + 2 * rng.standard_normal((150, 4))
        found = pwcca(torch.from_numpy(x), torch.from_numpy(y), partition(150, 10, rng))
        values.append(found.value)
        errors.append(found.stderr)
    # Leaving out parts errs on the large side: the weights are absolute values, which have a kink at 0.
    assert 0.85 < np.sqrt(np.mean(np.square(errors))) / np.std(values) < 1.6  # type: ignore[arg-type]


def test_too_few_points_say_so() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 20, 10))
    with pytest.raises(ValueError, match="20 points fill 10 and 10 dimensions"):
        value(x, y)
    with pytest.raises(ValueError, match="8 points of 10 features"):
        value(x[:8], y[:8])
    with pytest.raises(ValueError, match="all points coincide"):
        value(np.ones((20, 3)), y)
    with pytest.raises(ValueError, match="found NaN"):
        value(np.full((20, 3), np.nan), y)
    with pytest.raises(ValueError, match="same points"):
        pwcca(torch.zeros(3, 1), torch.zeros(4, 1))

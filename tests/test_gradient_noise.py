"""Norm, signal-to-noise and cosine of gradients against vectors kept whole, and against planted noise."""

from __future__ import annotations

import numpy as np
import pytest

from trace_offline.estimators.gradient_noise import Parts, gradient_cosine, gradient_norm, signal_to_noise
from trace_offline.estimators.subsampling import jackknife_stderr


def parts_of(vectors: np.ndarray, targets: np.ndarray, sequences: np.ndarray) -> Parts:
    """From gradients of summed losses ``[G, P]``."""
    total, weighted = vectors.sum(0), targets @ vectors
    return Parts(targets, sequences, (vectors**2).sum(1), vectors @ total, vectors @ weighted)


def norm_of(vectors: np.ndarray, targets: np.ndarray) -> float:
    return float(np.linalg.norm(vectors.sum(0) / targets.sum()))


def ratio_of(vectors: np.ndarray, targets: np.ndarray, sequences: np.ndarray) -> float:
    """The definition, written out."""
    count = len(targets)
    mean = vectors.sum(0) / targets.sum()
    residual = vectors - targets[:, None] * mean
    variance = count / (count - 1) * (residual**2).sum() / targets.sum() ** 2
    return float((mean @ mean - variance) / (variance * sequences.sum()))


def random_parts(seed: int, count: int = 9, size: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets, sequences = rng.integers(5, 30, count).astype(float), rng.integers(1, 5, count).astype(float)
    return targets[:, None] * (1 + 0.5 * rng.standard_normal((count, size))), targets, sequences


@pytest.mark.parametrize("seed", range(5))
def test_values_and_errors_are_those_of_the_vectors(seed: int) -> None:
    vectors, targets, sequences = random_parts(seed)
    parts = parts_of(vectors, targets, sequences)
    norm, ratio = gradient_norm(parts), signal_to_noise(parts)
    assert norm.value == pytest.approx(norm_of(vectors, targets), rel=1e-12)
    assert ratio.value == pytest.approx(ratio_of(vectors, targets, sequences), rel=1e-10)
    rest = [np.arange(9) != part for part in range(9)]
    left = np.array([norm_of(vectors[keep], targets[keep]) for keep in rest])
    assert norm.stderr == pytest.approx(float(jackknife_stderr(left)), rel=1e-8)
    left = np.array([ratio_of(vectors[keep], targets[keep], sequences[keep]) for keep in rest])
    assert ratio.stderr == pytest.approx(float(jackknife_stderr(left)), rel=1e-8)


def test_blocks_of_parameters_add_up() -> None:
    vectors, targets, sequences = random_parts(0)
    first, second = (parts_of(part, targets, sequences) for part in (vectors[:, :7], vectors[:, 7:]))
    both = Parts(
        targets,
        sequences,
        first.own + second.own,
        first.with_sum + second.with_sum,
        first.with_weighted + second.with_weighted,
    )
    assert signal_to_noise(both).value == pytest.approx(signal_to_noise(parts_of(vectors, targets, sequences)).value)


def test_planted_signal_and_noise() -> None:
    """One sequence's gradient is g + noise with trace v: ‖g‖²/v whatever the number of sequences; 0 without signal."""
    rng = np.random.default_rng(0)
    size, noise = 50, 0.7
    signal = rng.standard_normal(size)
    truth = float(signal @ signal) / (size * noise**2)
    for per_part, count in ((1, 24), (8, 12)):
        values, errors, norms = [], [], []
        for _ in range(200):
            single = signal + noise * rng.standard_normal((count, per_part, size))
            sequences = np.full(count, float(per_part))
            parts = parts_of(10 * single.sum(1), 10 * sequences, sequences)
            found = signal_to_noise(parts)
            values.append(found.value)
            errors.append(found.stderr)
            norms.append(gradient_norm(parts).value)
        spread = float(np.std(values))  # type: ignore[arg-type]
        assert np.mean(values) == pytest.approx(truth, abs=0.03 * truth + 4 * spread / 200**0.5)  # type: ignore[arg-type]
        assert 0.7 < np.mean(errors) / spread < 1.6  # type: ignore[arg-type]
        assert np.mean(norms) == pytest.approx(np.linalg.norm(signal), rel=0.05)  # type: ignore[arg-type]
    nothing = [
        signal_to_noise(parts_of(rng.standard_normal((12, size)), np.ones(12), np.ones(12))).value for _ in range(200)
    ]
    assert abs(np.mean(nothing)) < 4 * np.std(nothing) / 200**0.5  # type: ignore[arg-type]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    first, second = a.sum(0), b.sum(0)
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def of_vectors(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, ...]:
    first, second = a.sum(0), b.sum(0)
    own = np.stack([(a * a).sum(1), (b * b).sum(1), (a * b).sum(1)])
    return a @ first, b @ second, a @ second, b @ first, own


@pytest.mark.parametrize("seed", range(5))
def test_cosine_and_its_error_are_those_of_the_vectors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((8, 30)) + 0.3
    b = 0.5 * a + rng.standard_normal((8, 30))
    found = gradient_cosine(*of_vectors(a, b))
    assert found.value == pytest.approx(cosine(a, b), abs=1e-12)
    left = np.array([cosine(np.delete(a, part, 0), np.delete(b, part, 0)) for part in range(8)])
    assert found.stderr == pytest.approx(float(jackknife_stderr(left)), rel=1e-8)


def test_cosine_with_itself_and_its_opposite() -> None:
    a = np.random.default_rng(0).standard_normal((6, 12))
    assert gradient_cosine(*of_vectors(a, a)).value == 1.0
    assert gradient_cosine(*of_vectors(a, a)).stderr == pytest.approx(0, abs=1e-12)
    assert gradient_cosine(*of_vectors(a, -a)).value == -1.0


def test_what_is_not_defined() -> None:
    vectors, targets, sequences = random_parts(0)
    with pytest.raises(ValueError, match="at least 2 independent parts of the data, found 1"):
        signal_to_noise(parts_of(vectors[:1], targets[:1], sequences[:1]))
    assert gradient_norm(parts_of(vectors[:1], targets[:1], sequences[:1])).stderr is None
    assert signal_to_noise(parts_of(vectors[:2], targets[:2], sequences[:2])).stderr is None
    same = targets[:, None] * np.ones((9, 4))
    with pytest.raises(ValueError, match="all parts of the data agree"):
        signal_to_noise(parts_of(same, targets, sequences))
    zero = np.zeros((9, 4))
    assert gradient_norm(parts_of(zero, targets, sequences)).value == 0.0
    with pytest.raises(ValueError, match="agree"):
        signal_to_noise(parts_of(zero, targets, sequences))
    with pytest.raises(ValueError, match="one of the two gradients is 0"):
        gradient_cosine(*of_vectors(zero, same))

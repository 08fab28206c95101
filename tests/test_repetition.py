"""Repetition within texts and divergence between collections: closed forms, brute force over pairs, simulations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trace_offline.estimators.repetition import ngram_divergence, repeated_share


def test_repeated_share_by_hand() -> None:
    assert repeated_share([1, 2, 1, 2, 1, 2], 1) == pytest.approx(4 / 6)
    assert repeated_share([1, 2, 1, 2, 1, 2], 2) == pytest.approx(3 / 5)
    assert repeated_share([7] * 10, 4) == pytest.approx(6 / 7)
    assert repeated_share(np.arange(10), 3) == 0.0
    assert repeated_share([1, 2], 3) is None


def grams(text: np.ndarray, n: int) -> list[tuple[int, ...]]:
    return [tuple(text[i : i + n].tolist()) for i in range(len(text) - n + 1)]


def brute_force(first: list[np.ndarray], second: list[np.ndarray], n: int) -> float:
    """By comparing every n-gram with every n-gram of another text."""

    def chance(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
        hits = total = 0
        for a, b in pairs:
            for x, y in itertools.product(grams(a, n), grams(b, n)):
                hits += x == y
                total += 1
        return hits / total

    within = [chance([(a, b) for a, b in itertools.permutations(texts, 2)]) for texts in (first, second)]
    return 1 - 2 * chance(list(itertools.product(first, second))) / sum(within)


def draw(rng: np.random.Generator, count: int, law: np.ndarray, longest: int = 8) -> list[np.ndarray]:
    return [rng.choice(len(law), size=rng.integers(1, longest), p=law) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [1, 2])
def test_equals_comparing_all_pairs(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = draw(rng, 7, rng.dirichlet(np.ones(4))), draw(rng, 6, rng.dirichlet(np.ones(4)))
    found = ngram_divergence(first, second, n)
    assert found.value == pytest.approx(brute_force(first, second, n))
    usable = [[text for text in texts if len(text) >= n] for texts in (first, second)]
    variance = 0.0
    for side in (0, 1):
        left = []
        for i in range(len(usable[side])):
            parts = list(usable)
            parts[side] = usable[side][:i] + usable[side][i + 1 :]
            left.append(brute_force(parts[0], parts[1], n))
        variance += (len(left) - 1) / len(left) * ((np.asarray(left) - np.mean(left)) ** 2).sum()
    assert found.stderr == pytest.approx(np.sqrt(variance))


def test_closed_form_for_large_collections() -> None:
    """1 − 2 Σpq / (Σp² + Σq²)."""
    rng = np.random.default_rng(0)
    p, q = np.array([0.5, 0.3, 0.2, 0]), np.array([0.1, 0.2, 0.3, 0.4])
    found = ngram_divergence(draw(rng, 1500, p), draw(rng, 1500, q), 1)
    expected = 1 - 2 * p @ q / (p @ p + q @ q)
    assert found.stderr is not None
    assert abs(found.value - expected) < 4 * found.stderr
    assert found.stderr < 0.03


def test_no_n_gram_in_common_and_copies() -> None:
    far = ngram_divergence([[1, 2], [1, 2]], [[3, 4], [3, 4]], 2)
    assert (far.value, far.stderr) == (1.0, None)  # leaving out one of two texts leaves no pair
    same = ngram_divergence([[1, 2]] * 5, [[1, 2]] * 5, 2)
    assert (same.value, same.stderr) == (0.0, 0.0)


def test_samples_of_one_law_are_no_farther_than_the_error_says() -> None:
    """Small samples: the mean over repetitions is 0, and two standard errors hold about 95 % of them."""
    rng = np.random.default_rng(1)
    law = rng.dirichlet(np.full(12, 0.5))
    found = [ngram_divergence(draw(rng, 25, law), draw(rng, 25, law), 1) for _ in range(200)]
    values = np.asarray([item.value for item in found])
    errors = np.asarray([item.stderr for item in found])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(200)
    assert values.min() < 0
    assert values.std() == pytest.approx(errors.mean(), rel=0.25)
    assert 0.9 < (np.abs(values) < 2 * errors).mean() < 0.99


def test_texts_of_one_group_are_one() -> None:
    texts = [np.array([1, 2, 3]), np.array([1, 2, 3]), np.array([2, 3, 4])]
    first = [np.array([1, 2]), np.array([3, 2])]
    found = ngram_divergence(first, texts, 1, second_groups=[0, 0, 1])
    joined = ngram_divergence(first, [np.array([1, 2, 3, 1, 2, 3]), texts[2]], 1)
    assert found.value == pytest.approx(joined.value)
    assert ngram_divergence(texts, first, 1, first_groups=[0, 0, 1]).stderr == pytest.approx(found.stderr)
    assert ngram_divergence(first, texts, 1, second_groups=[0, 0, 0]).value is None


def test_too_little_text() -> None:
    assert ngram_divergence([[1, 2]], [[1, 2], [1, 2]], 1).value is None
    assert ngram_divergence([[1], [2]], [[1, 2], [1, 2]], 2).value is None
    assert ngram_divergence([], [], 1).value is None
    # no n-gram occurs in two texts of a collection: nothing to measure distances with
    assert ngram_divergence([[1], [2]], [[3], [4]], 1).value is None

"""n-gram models: by hand, against a brute-force version over dictionaries, and against dense tables."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from trace_offline.estimators.ngram import WittenBell
from trace_offline.estimators.ngram_counts import TrainingMatches, match_training_text


def texts(seed: int, count: int, vocabulary: int, longest: int = 9) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(vocabulary, 0.3))
    return [rng.choice(vocabulary, size=rng.integers(1, longest), p=shares) for _ in range(count)]


def brute_force(training: list[np.ndarray], context: tuple[int, ...], token: int, vocabulary: int) -> float:
    """Witten–Bell straight from the definition, by scanning the training texts."""
    followers = Counter(
        int(text[place])
        for text in training
        for place in range(max(1, len(context)), len(text))
        if tuple(text[place - len(context) : place]) == context
    )
    lower = 1 / vocabulary if not context else brute_force(training, context[1:], token, vocabulary)
    if not followers:
        return lower
    return (followers[token] + len(followers) * lower) / (followers.total() + len(followers))


def positions(rows: list[np.ndarray]) -> list[tuple[int, int]]:
    return [(row, place) for row, tokens in enumerate(rows) for place in range(len(tokens))]


def test_by_hand() -> None:
    """0 1 0 1 2 with 4 tokens: after 0 always 1, after 1 once 0 and once 2."""
    training = [np.array([0, 1, 0, 1, 2])]
    found = match_training_text([np.array([0, 1, 3])], training, order=2)
    model = WittenBell(found.levels, 4)
    # unigram: continuations 1 0 1 2, so 3 types of 4 tokens: (c + 3/4) / 7
    unigram = (np.array([1, 2, 1, 0]) + 3 / 4) / 7
    assert WittenBell(found.levels[:1], 4).distribution(found.context[:1, :1])[0] == pytest.approx(unigram)
    after_0 = (np.array([0, 2, 0, 0]) + 1 * unigram) / 3
    after_1 = (np.array([1, 0, 1, 0]) + 2 * unigram) / 4
    dense = model.distribution(found.context)
    assert dense[1] == pytest.approx(after_0)
    assert dense[2] == pytest.approx(after_1)
    assert found.matched.tolist() == [1, 2, 0]
    assert model.most_likely(found.context)[:, 1:].tolist() == [[1, 1], [1, 0]]
    assert model.entropy(found.context)[1, 2] == pytest.approx(-(after_1 * np.log(after_1)).sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_equal_brute_force(seed: int, order: int) -> None:
    vocabulary = 7
    training, rows = texts(seed, 25, vocabulary), texts(seed + 100, 8, vocabulary)
    found = match_training_text(rows, training, order)
    model = WittenBell(found.levels, vocabulary)
    where = positions(rows)
    for token in range(vocabulary):
        p = model.probability(found.context, np.full(len(where), token))
        for k in range(order):
            for index, (row, place) in enumerate(where):
                context = tuple(rows[row][max(0, place - k) : place].tolist())
                assert p[k, index] == pytest.approx(brute_force(training, context, token, vocabulary)), (k, context)


@pytest.mark.parametrize("seed", range(3))
def test_sparse_summaries_equal_dense_tables(seed: int) -> None:
    vocabulary, order = 11, 3
    found = match_training_text(texts(seed, 6, vocabulary), texts(seed + 50, 40, vocabulary), order)
    model = WittenBell(found.levels, vocabulary)
    log_q = torch.randn(found.context.shape[1], vocabulary, generator=torch.Generator().manual_seed(seed)).log_softmax(
        1
    )
    entropy, best = model.entropy(found.context), model.most_likely(found.context)
    expected = model.expectation(found.context, log_q).numpy()
    for k in range(order):
        dense = WittenBell(found.levels[: k + 1], vocabulary).distribution(found.context[: k + 1])
        assert dense.sum(1) == pytest.approx(np.ones(len(dense)))
        assert (dense > 0).all()
        assert entropy[k] == pytest.approx(-(dense * np.log(dense)).sum(1))
        assert expected[k] == pytest.approx((dense * log_q.double().numpy()).sum(1))
        assert np.take_along_axis(dense, best[k][:, None], 1)[:, 0] == pytest.approx(dense.max(1))


def test_impossible_tokens_make_the_expectation_infinite() -> None:
    found = match_training_text([np.array([0, 1])], [np.array([0, 1])], 2)
    log_q = torch.log(torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.25, 0.25]]))
    assert WittenBell(found.levels, 3).expectation(found.context, log_q).isinf().tolist() == [[True, False]] * 2


def longest_match(tokens: np.ndarray, place: int, training: list[np.ndarray]) -> int:
    for n in range(place + 1, 0, -1):
        piece = tokens[place - n + 1 : place + 1].tolist()
        if any(text[i : i + n].tolist() == piece for text in training for i in range(len(text))):
            return n
    return 0


@pytest.mark.parametrize("seed", range(5))
def test_longest_matches_equal_a_search_for_every_piece(seed: int) -> None:
    training, rows = texts(seed, 12, 5), texts(seed + 10, 9, 6, longest=12)
    rows.append(training[3])
    found = match_training_text(rows, training, 3)
    expected = [longest_match(rows[row], place, training) for row, place in positions(rows)]
    assert found.matched.tolist() == expected
    assert found.matched[-1] == len(training[3])


def test_nothing_in_common() -> None:
    found = match_training_text([np.array([5, 6])], [np.array([1, 2, 3])], 3)
    assert found.matched.tolist() == [0, 0]
    model = WittenBell(found.levels, 8)
    p = model.probability(found.context, np.array([6, 2]))
    assert p[:, 0] == pytest.approx(np.full(3, (2 / 8) / 4))
    assert p[:, 1] == pytest.approx(np.full(3, (1 + 2 / 8) / 4))


def test_texts_of_one_token_have_no_continuation() -> None:
    found = match_training_text([np.array([1, 1])], [np.array([1])], 2)
    assert WittenBell(found.levels, 4).distribution(found.context) == pytest.approx(np.full((2, 4), 0.25))
    assert found.matched.tolist() == [1, 1]


def test_n_grams_do_not_cross_texts() -> None:
    found = match_training_text([np.array([1, 2])], [np.array([3, 1]), np.array([2, 3])], 2)
    assert found.matched.tolist() == [1, 1]
    apart = WittenBell(found.levels, 4).distribution(found.context)[1]
    assert apart == pytest.approx((np.array([0, 1, 0, 1]) + 2 / 4) / 4)


def test_a_vocabulary_that_is_too_small() -> None:
    found: TrainingMatches = match_training_text([np.array([1])], [np.array([1, 9])], 1)
    with pytest.raises(ValueError, match="the counts hold token 9, beyond a vocabulary of 9"):
        WittenBell(found.levels, 9)


def test_more_training_text_of_a_chain_brings_the_bigram_model_to_it() -> None:
    """A chain of order 1: the cross-entropy of the bigram model falls to the entropy rate of the chain."""
    rng = np.random.default_rng(0)
    law = rng.dirichlet(np.full(6, 0.5), 6)

    def walk(length: int) -> np.ndarray:
        states = [0]
        for u in rng.random(length):
            states.append(int(np.searchsorted(law[states[-1]].cumsum(), u)))
        return np.minimum(states, 5)

    row = walk(3000)
    losses = []
    for length in (30, 300, 30_000):
        found = match_training_text([row], [walk(length)], 2)
        p = WittenBell(found.levels, 6).probability(found.context, row)
        losses.append(-np.log(p[1, 1:]).mean())
    truth = -np.log(law[row[:-1], row[1:]]).mean()
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] == pytest.approx(truth, abs=0.01)

"""The Zipf exponent: estimator against planted exponents and scipy, corpus against what was asked."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from trace_offline.core.errors import UsageError
from trace_offline.corpus import CorpusParams, build_lexicon, fit_zipf, generate, log_log_slope
from trace_offline.corpus.sampling import index_stream, zipf_probabilities


def test_estimator_is_exact_on_exact_frequencies() -> None:
    for alpha in (-0.5, 0.0, 0.8, 1.0, 1.5, 3.0):
        p = zipf_probabilities(200, alpha)
        assert fit_zipf(p * 1e12).alpha == pytest.approx(alpha, abs=1e-6)
        assert log_log_slope(p) == pytest.approx(-alpha, abs=1e-9)


def test_estimator_maximises_the_likelihood() -> None:
    counts = np.random.default_rng(0).multinomial(500, zipf_probabilities(40, 1.2))

    def negative(alpha: float) -> float:
        return -float(counts @ np.log(zipf_probabilities(40, alpha)))

    best = minimize_scalar(negative, bounds=(0, 4), method="bounded", options={"xatol": 1e-9})
    fit = fit_zipf(counts)
    assert fit.alpha == pytest.approx(best.x, abs=1e-5)
    h = 1e-3
    curvature = (negative(fit.alpha + h) - 2 * negative(fit.alpha) + negative(fit.alpha - h)) / h**2
    assert fit.stderr == pytest.approx(curvature**-0.5, rel=1e-4)
    assert fit.n == 500


def test_standard_error_covers_at_the_nominal_rate() -> None:
    rng = np.random.default_rng(1)
    p = zipf_probabilities(100, 1.0)
    z = []
    for _ in range(400):
        fit = fit_zipf(rng.multinomial(300, p))
        z.append((fit.alpha - 1.0) / fit.stderr)
    assert abs(np.mean(z)) < 0.2
    assert np.std(z) == pytest.approx(1.0, abs=0.12)


@pytest.mark.parametrize("counts", [[], [5], [0, 0], [3, 0, 0], [0, 0, 4], [1, -1]])
def test_counts_without_an_exponent_are_refused(counts: list[int]) -> None:
    with pytest.raises(UsageError):
        fit_zipf(counts)
    with pytest.raises(UsageError, match="at least two ranks that occur"):
        log_log_slope([max(c, 0) for c in counts[:1]])


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.3])
def test_corpus_has_the_asked_exponent(alpha: float) -> None:
    lexicon = build_lexicon()
    counts: dict[str, Counter[str]] = {tag: Counter() for tag in ("NOUN", "ADJ", "ADV", "VERB")}
    for sentence in islice(generate(11, CorpusParams(alpha=alpha)), 25_000):
        for lemma, tag in zip(sentence.lemmas, sentence.pos, strict=True):
            if tag in counts:
                counts[tag][lemma] += 1
    for tag, stems in (("NOUN", lexicon.nouns), ("ADJ", lexicon.adjectives), ("ADV", lexicon.adverbs)):
        ranked = [counts[tag][stem] for stem in stems]
        fit = fit_zipf(ranked)
        assert abs(fit.alpha - alpha) < min(0.05, 4 * fit.stderr)
        assert abs(log_log_slope(ranked) + alpha) < 0.05
    pooled = np.sum([[counts["VERB"][stem] for stem in stems] for stems in lexicon.verbs.values()], axis=0)
    assert abs(fit_zipf(pooled).alpha - alpha) < 0.05


def test_streams_are_the_same_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from trace_offline.corpus import sampling

    def draw(name: str) -> list[int]:
        return list(islice(index_stream(3, name, [0.5, 0.3, 0.2]), 1000))

    whole = draw("a")
    monkeypatch.setattr(sampling, "BLOCK", 7)
    assert draw("a") == whole
    assert draw("b") != whole


def test_impossible_items_are_never_drawn() -> None:
    drawn = set(islice(index_stream(0, "x", [0.0, 1.0, 0.0, 1.0, 0.0]), 5000))
    assert drawn == {1, 3}

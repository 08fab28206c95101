"""Whether intervals of probes cover what they should, over 200 simulated repetitions each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one, run
from scipy.stats import norm

from trace_offline.analyzers._probe_data import TaskWords, prepare
from trace_offline.analyzers._probe_fit import FitOptions
from trace_offline.analyzers._probe_scores import LayerScores, fit_tasks
from trace_offline.analyzers.probe import ProbeAnalyzer
from trace_offline.estimators.splits import split_groups

REPETITIONS = 200
DISTANCE = 1.6
WIDTH = 4


def simulate(correlation: float, rows: int = 300, length: int = 5, seed: int = 0) -> list[LayerScores]:
    """One probe for each of 200 independent draws of hidden states (they stand where layers would).

    Two classes, means ``DISTANCE`` apart, unit covariance of which the share ``correlation`` is common to the words of
    a sentence: words of a sentence tend to be misjudged together.
    """
    rng = np.random.default_rng(seed)
    label = rng.permuted(np.tile([0, 1], rows * length // 2)).reshape(rows, length)
    row = np.repeat(np.arange(rows), length)
    span = np.stack([row, np.tile(np.arange(length), rows), np.tile(np.arange(length), rows) + 1], axis=1)
    words = TaskWords(
        "tag", ("a", "b"), np.arange(len(row)), label.reshape(-1), row, split_groups(row, seed, test=0.4), span
    )
    ready = prepare(words, FakeEvaluation(torch.zeros(rows, length).long()), 5, False, seed)
    shape = (REPETITIONS, rows, length, WIDTH)
    common = rng.standard_normal((REPETITIONS, rows, 1, WIDTH))
    states = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * rng.standard_normal(shape)
    states[..., 0] += DISTANCE * (label - 0.5)
    table = torch.from_numpy(states.reshape(REPETITIONS, -1, WIDTH).astype(np.float32))
    return fit_tasks(list(table), range(REPETITIONS), [ready], FitOptions((1.0, 0.1, 0.01)))[0]


def true_accuracy(found: LayerScores) -> float:
    """Share of all words there could be that this probe gets right, from its weights."""
    parts = found.probe.tensors
    weight = (parts["weight"][1] - parts["weight"][0]).double() * found.probe.scale
    offset = float(parts["bias"][1] - parts["bias"][0]) - float(weight @ found.probe.mean)
    size, along = float(weight.norm()), float(weight[0]) * DISTANCE / 2
    return float(norm.cdf((along + offset) / size) + norm.cdf((along - offset) / size)) / 2


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_accuracy_intervals_cover(correlation: float) -> None:
    """Of the accuracy of the very probe, and of the Bayes accuracy that a probe on 900 words all but reaches."""
    found = simulate(correlation)
    bayes = norm.cdf(DISTANCE / 2)
    own = sum(abs(f.real.accuracy.value - true_accuracy(f)) <= 1.96 * f.real.accuracy.stderr for f in found)
    best = sum(abs(f.real.accuracy.value - bayes) <= 1.96 * f.real.accuracy.stderr for f in found)
    assert 180 <= own <= 196, own
    assert 180 <= best <= 196, best
    assert np.mean([true_accuracy(f) for f in found]) == pytest.approx(bayes, abs=0.005)


def test_stderr_that_ignored_sentences_would_not_cover() -> None:
    """The test above can fail: with words taken as independent the same intervals are too short."""
    found = simulate(0.5)
    n = len(found[0].real.correct)
    short = [np.sqrt(f.real.accuracy.value * (1 - f.real.accuracy.value) / n) for f in found]
    covered = sum(
        abs(f.real.accuracy.value - true_accuracy(f)) <= 1.96 * error for f, error in zip(found, short, strict=True)
    )
    assert covered < 180


@pytest.mark.slow
def test_selectivity_of_what_cannot_know_is_zero() -> None:
    """Hidden states drawn without looking at words or labels: two standard errors hold zero 90 to 98 % of the time."""
    held = 0
    for seed in range(REPETITIONS):
        rng = np.random.default_rng(seed)
        rows, length = 100, 6
        evaluation = FakeEvaluation(
            torch.from_numpy(rng.integers(0, 50_000, (rows, length))),
            {"tag": [(r, t, t + 1, "ab"[rng.integers(2)]) for r in range(rows) for t in range(length)]},
        )
        states = torch.from_numpy(rng.standard_normal((rows, length, 8)).astype(np.float32))
        found, _ = run(ProbeAnalyzer(), evaluation, hidden=(states,), penalties=[1.0, 0.01], batch=100, seed=seed)
        selectivity = one(found, "selectivity", layer=0, task="tag")
        held += abs(selectivity.value) <= 2.0 * selectivity.stderr
    assert 180 <= held <= 197, held

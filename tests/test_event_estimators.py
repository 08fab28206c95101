"""Estimators of events on planted histories: intervals cover at the nominal rate, noise gives none above it."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from planted_histories import EVEN, GRIDS, LOG_SPACED, PYTHIA, Floats, noise, sigmoid
from scipy import stats

from trace_offline.estimators import change_points as segments
from trace_offline.estimators.change_points import find_change_points
from trace_offline.estimators.convergence import find_convergence
from trace_offline.estimators.emergence import NoEvent, find_emergence
from trace_offline.estimators.event_order import order_of_events
from trace_offline.estimators.history_levels import shortfall
from trace_offline.estimators.history_noise import Noise, NoiseUnknown, correlated_noise, estimate_noise
from trace_offline.estimators.last_improvement import last_improvement
from trace_offline.estimators.peak import find_peak
from trace_offline.estimators.regress import find_regress

LEVEL = 0.0125


def test_the_reason_names_the_test_that_failed() -> None:
    """Whatever is printed as found lies below what is printed as needed."""
    generator = np.random.default_rng(5)
    seen = Counter()
    for _ in range(300):
        n = int(generator.integers(6, 30))
        bump = np.exp(-0.5 * ((np.arange(n) - n / 2) / 1.5) ** 2)
        shapes = (bump, np.linspace(0, 1, n) ** 2, -np.linspace(0, 1, n))
        values = 5 * generator.random() * shapes[int(generator.integers(3))] + generator.normal(size=n)
        known = estimate_noise(np.arange(n, dtype=float), values, np.ones(n))
        for look, more in ((find_emergence, {"share": 0.25}), (find_regress, {"share": 0.25}), (find_peak, {})):
            try:
                look(np.arange(n, dtype=float), values, known, level=LEVEL, **more)
                continue
            except NoEvent as reason:
                said = str(reason)
            found = re.search(r"noise: (.*?)(-?[\d.]+) standard errors, ([\d.]+) are needed", said)
            if found:
                assert float(found[2]) < float(found[3]), said
                seen[found[1]] += 1
    assert seen["the largest is "] > 50
    assert seen["distance beyond the nearer end is "] > 50


def test_a_shortfall_shows_the_digits_that_differ() -> None:
    assert shortfall(2.0, 3.3) == "2.0 standard errors, 3.3 are needed"
    assert shortfall(3.28, 3.31) == "3.28 standard errors, 3.31 are needed"


@pytest.mark.parametrize(("kind", "words"), [("emergence", "from the first level to the best one it is 1.0"),
                                             ("regress", "from the best level to the last one it is 1.0"),
                                             ("peak", "of the levels beyond the first one is 1.0")])  # fmt: skip
def test_the_second_test_has_numbers_of_its_own(kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = np.arange(61.0)
    values = 100 * np.exp(-(((steps - 30) / 12) ** 2)) + np.random.default_rng(1).normal(size=61)
    known = estimate_noise(steps, values, np.ones(61))
    look = {
        "emergence": lambda: find_emergence(steps, values, known, share=0.25, level=LEVEL),
        "regress": lambda: find_regress(steps, values, known, share=0.25, level=LEVEL),
        "peak": lambda: find_peak(steps, values, known, level=LEVEL),
    }[kind]
    monkeypatch.setattr(f"trace_offline.estimators.{kind}.exceeds", lambda *_: (1.0, 4.5))
    with pytest.raises(NoEvent, match=f"{words} standard errors, 4.5 are needed"):
        look()


def all_events(steps: Floats, values: Floats, known: Noise) -> list[str]:
    """Kinds found, as ``trace-offline events`` looks for them when the direction is not known."""
    found = []
    for kind, look in (
        ("emergence", lambda: find_emergence(steps, values, known, share=0.25, level=LEVEL, tails=2)),
        ("regress", lambda: find_regress(steps, values, known, share=0.25, level=LEVEL, tails=2)),
        ("convergence", lambda: find_convergence(steps, values, known, level=LEVEL)),
        ("maximum", lambda: find_peak(steps, values, known, level=LEVEL, tails=2)),
        ("minimum", lambda: find_peak(steps, -values, known, level=LEVEL, tails=2)),
        ("change_point", lambda: find_change_points(steps, values, known, level=LEVEL)),
    ):
        try:
            if look():
                found.append(kind)
        except NoEvent:
            pass
    return found


def false_events(runs: int, steps: Floats, correlation: float, *, stderr: bool, seed: int) -> int:
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(runs):
        values = noise(len(steps), rng, correlation)
        known = estimate_noise(steps, values, np.ones(len(steps)) if stderr else None)
        hits += bool(all_events(steps, values, known))
    return hits


def too_many(hits: int, runs: int, rate: float = 0.05) -> bool:
    """Whether more hits than the rate explains (one-sided, 0.1 %)."""
    return stats.binom.sf(hits - 1, runs, rate) < 1e-3


@pytest.mark.parametrize("stderr", [True, False])
@pytest.mark.parametrize("correlation", [0.0, 0.3])
def test_pure_noise_gives_no_event_beyond_the_nominal_rate(correlation: float, stderr: bool) -> None:
    assert not too_many(false_events(60, LOG_SPACED, correlation, stderr=stderr, seed=7), 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("stderr", [True, False])
@pytest.mark.parametrize("correlation", [0.0, 0.3])
def test_pure_noise_at_length(name: str, correlation: float, stderr: bool) -> None:
    assert not too_many(false_events(300, GRIDS[name], correlation, stderr=stderr, seed=11), 300)


def test_the_rate_test_itself_notices_noise_that_is_larger_than_said() -> None:
    rng = np.random.default_rng(0)
    values = [4 * noise(len(EVEN), rng) for _ in range(12)]
    found = [all_events(EVEN, one, Noise(np.ones(len(EVEN)), "stderr")) for one in values]
    assert too_many(sum(map(bool, found)), 12)


def true_crossing(grid: Floats, curve: Floats, steps: Floats, share: float) -> float:
    """First place where the noise-free curve has gained the share of what it gains at the checkpoints."""
    start, best = curve[0], np.interp(np.log1p(steps), np.log1p(grid), curve).max()
    return float(grid[np.argmax(curve >= start + share * (best - start))])


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("width", [0.02, 0.4])
@pytest.mark.parametrize("stderr", [True, False])
def test_emergence_of_planted_steps_and_sigmoids_lies_within_the_interval(
    name: str, width: float, stderr: bool
) -> None:
    steps, rng, size = GRIDS[name], np.random.default_rng(3), 0.04
    grid = np.expm1(np.linspace(0, np.log1p(steps[-1]), 20001))
    hits = found = 0
    for _ in range(25):
        centre = float(np.expm1(rng.uniform(0.4, 0.75) * np.log1p(steps[-1])))
        values = sigmoid(steps, centre, width) + size * noise(len(steps), rng)
        known = estimate_noise(steps, values, np.full(len(steps), size) if stderr else None)
        try:
            one = find_emergence(steps, values, known, share=0.25, level=LEVEL)
        except NoEvent:
            continue
        found += 1
        hits += one.low <= true_crossing(grid, sigmoid(grid, centre, width), steps, 0.25) <= one.high
        assert one.low <= one.step <= one.high
    assert found >= 22
    assert not too_many(found - hits, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("correlation", [0.0, 0.3])
@pytest.mark.parametrize("size", [0.02, 0.1])
def test_emergence_covers_at_length_with_missing_checkpoints(name: str, correlation: float, size: float) -> None:
    rng = np.random.default_rng(5)
    hits = found = 0
    for _ in range(150):
        steps = GRIDS[name]
        steps = steps[np.sort(rng.permutation(len(steps))[: len(steps) - 3])]  # three checkpoints are missing
        grid = np.expm1(np.linspace(np.log1p(steps[0]), np.log1p(steps[-1]), 20001))
        centre, width = float(np.expm1(rng.uniform(0.4, 0.75) * np.log1p(steps[-1]))), float(rng.choice([0.02, 0.3]))
        values = sigmoid(steps, centre, width) + size * noise(len(steps), rng, correlation)
        known = estimate_noise(steps, values, np.full(len(steps), size))
        try:
            one = find_emergence(steps, values, known, share=0.25, level=LEVEL)
        except NoEvent:
            continue
        found += 1
        hits += one.low <= true_crossing(grid, sigmoid(grid, centre, width), steps, 0.25) <= one.high
    assert found >= 100
    assert not too_many(found - hits, found)


def test_a_step_without_noise_is_bracketed_by_its_checkpoints() -> None:
    values = np.where(LOG_SPACED >= 256, 1.0, 0.0)
    known = estimate_noise(LOG_SPACED, values, np.full(14, 0.01))
    one = find_emergence(LOG_SPACED, values, known, share=0.5, level=LEVEL)
    assert (one.low, one.high) == (128, 256)
    assert one.step == round(np.expm1((np.log1p(128) + np.log1p(256)) / 2))  # half way in log(step + 1)
    assert (one.start, one.best, one.threshold) == (0.0, 1.0, 0.5)
    assert find_convergence(LOG_SPACED, values, known, level=LEVEL).step == 256


def test_a_return_from_a_dip_is_no_emergence() -> None:
    """An untrained model's perplexity that first gets worse and then returns has learned nothing yet."""
    values = np.array([0, 0, 0, 0, -4, -2, -1, 0, 0, 0, 0, 0, 0, 0], float)
    known = Noise(np.full(14, 0.1), "stderr")
    with pytest.raises(NoEvent, match="no rise beyond noise"):
        find_emergence(LOG_SPACED, values, known, share=0.25, level=LEVEL)
    learned = values + 3 * (LOG_SPACED >= 256)
    one = find_emergence(LOG_SPACED, learned, known, share=0.25, level=LEVEL)
    assert (one.low, one.high) == (128, 256)


def test_an_early_bump_is_no_lasting_crossing() -> None:
    values = np.array([0, 0, 0, 0.6, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1], float)
    one = find_emergence(LOG_SPACED, values, Noise(np.full(14, 0.05), "stderr"), share=0.25, level=LEVEL)
    assert (one.low, one.high) == (128, 256)


def test_a_rise_at_the_last_checkpoint_only_is_not_called_lasting() -> None:
    values = np.r_[np.zeros(13), 1.0]
    with pytest.raises(NoEvent, match="at the last checkpoint only"):
        find_emergence(LOG_SPACED, values, Noise(np.full(14, 0.05), "stderr"), share=0.25, level=LEVEL)


def test_late_regress_and_its_peak_are_found_where_they_were_planted() -> None:
    rng, hits, tops, found = np.random.default_rng(1), 0, 0, 0
    for _ in range(40):
        top = int(rng.integers(16, 20))
        curve = sigmoid(PYTHIA, 2000, 0.5) - 0.35 * np.clip((PYTHIA - PYTHIA[top]) / (PYTHIA[-1] - PYTHIA[top]), 0, 1)
        values = curve + 0.02 * noise(len(PYTHIA), rng)
        known = estimate_noise(PYTHIA, values, np.full(len(PYTHIA), 0.02))
        try:
            one = find_regress(PYTHIA, values, known, share=0.25, level=LEVEL)
            peak = find_peak(PYTHIA, values, known, level=LEVEL)
        except NoEvent:
            continue
        found += 1
        after = np.linspace(PYTHIA[np.argmax(curve)], PYTHIA[-1], 5001)
        level = curve.max() - 0.25 * (curve.max() - curve[-1])
        hits += one.low <= after[np.argmax(np.interp(after, PYTHIA, curve) <= level)] <= one.high
        tops += peak.low <= PYTHIA[np.argmax(curve)] <= peak.high
    assert found >= 36
    assert not too_many(found - hits, found)
    assert not too_many(found - tops, found)


def test_a_plateau_after_the_rise_has_no_regress_and_no_peak() -> None:
    rng, found = np.random.default_rng(2), Counter[str]()
    for _ in range(30):
        values = sigmoid(PYTHIA, 300, 0.3) + 0.02 * noise(len(PYTHIA), rng)
        found.update(all_events(PYTHIA, values, estimate_noise(PYTHIA, values, np.full(len(PYTHIA), 0.02))))
    assert found["emergence"] == 30
    assert not too_many(found["regress"] + found["maximum"] + found["minimum"], 30)


def test_convergence_of_a_planted_plateau() -> None:
    rng, hits = np.random.default_rng(4), 0
    for _ in range(40):
        curve = np.minimum(np.log1p(EVEN) / np.log1p(1500), 1.0)
        values = curve + 0.005 * noise(len(EVEN), rng)
        one = find_convergence(EVEN, values, estimate_noise(EVEN, values, np.full(30, 0.005)), level=LEVEL)
        hits += one.low <= np.expm1(0.95 * np.log1p(1500)) <= one.high  # 95 % of the rise, 5 % from the plateau
    assert not too_many(40 - hits, 40)


def test_what_still_moves_has_not_converged() -> None:
    values = EVEN / EVEN[-1]
    with pytest.raises(NoEvent, match="still changing"):
        find_convergence(EVEN, values, Noise(np.full(30, 0.001), "stderr"), level=LEVEL)


def test_change_points_of_slope_and_mean_lie_within_their_intervals() -> None:
    rng, hits, bends = np.random.default_rng(6), 0, 0
    places = np.log1p(PYTHIA)
    for _ in range(40):
        known = Noise(np.full(len(PYTHIA), 0.1), "stderr")
        (one,) = find_change_points(
            PYTHIA, 1.0 * (PYTHIA >= 1000) + 0.1 * noise(27, rng), known, level=LEVEL, model="mean", most=1
        )
        hits += one.low < 1000 <= one.high
        (bend,) = find_change_points(
            PYTHIA, np.clip(places - places[10], 0, None) + 0.1 * noise(27, rng), known, level=LEVEL, most=1
        )
        bends += bend.low <= PYTHIA[10] <= bend.high
    assert not too_many(40 - hits, 40)
    assert not too_many(40 - bends, 40)


@pytest.mark.parametrize("model", ["slope", "mean"])
def test_the_segmentation_is_the_best_of_all(model: str) -> None:
    """Dynamic programming against trying every pair of change points with numpy's own least squares."""
    rng, least = np.random.default_rng(8), 3 if model == "slope" else 2
    steps, values, sigma = LOG_SPACED, rng.standard_normal(14).cumsum(), rng.uniform(0.5, 2, 14)
    places = np.log1p(steps)
    cost = segments._segment_costs(places, values[None], 1 / sigma**2, least, model)
    totals, parents = segments._segmentations(cost, 2)

    def residual(a: int, b: int) -> float:
        fit = np.polyfit(places[a:b], values[a:b], 1 if model == "slope" else 0, w=1 / sigma[a:b])
        return float((((values[a:b] - np.polyval(fit, places[a:b])) / sigma[a:b]) ** 2).sum())

    options = {
        (a, b): residual(0, a) + residual(a, b) + residual(b, 14)
        for a, b in combinations(range(least, 15 - least), 2)
        if b - a >= least
    }
    best = min(options, key=lambda pair: options[pair])
    assert totals[0, 2] == pytest.approx(options[best])
    assert segments._bounds(parents[0], 2, 14) == [0, *best, 14]
    assert totals[0, 0] == pytest.approx(residual(0, 14))


def test_correlated_noise_has_the_variance_and_correlation_it_says() -> None:
    values = correlated_noise(20000, 6, 0.3, np.random.default_rng(0))
    np.testing.assert_allclose(np.cov(values.T), 0.3 ** np.abs(np.subtract.outer(range(6), range(6))), atol=0.04)


def test_errors_of_means_and_contrasts_against_the_covariance() -> None:
    sigma = np.linspace(1, 2, 8)
    known = Noise(sigma, "stderr")
    covariance = np.outer(sigma, sigma) * 0.3 ** np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
    weights = np.array([[0.5, 0.5, 0, 0, 0, 0, -1, 0], [1, -1, 0, 0, 0, 0, 0, 0]], float)
    correlated, white = np.diag(weights @ covariance @ weights.T), (weights**2) @ sigma**2
    np.testing.assert_allclose(known.contrast(weights), np.sqrt(np.maximum(correlated, white)))
    even = Noise(np.ones(8), "stderr")
    row = np.zeros(8)
    row[2:7] = 0.2
    assert even.means(np.array([2]), np.array([7]))[0] == pytest.approx(even.contrast(row)[0])
    assert known.limit(0.05, 10) == pytest.approx(stats.norm.isf(0.005))


def test_noise_is_the_stderr_unless_the_points_scatter_more() -> None:
    rng = np.random.default_rng(9)
    curve = sigmoid(PYTHIA, 1000, 1.0)
    said = estimate_noise(PYTHIA, curve + 0.02 * noise(27, rng), np.full(27, 0.02))
    assert (said.source, said.sigma[0]) == ("stderr", 0.02)
    jitter = estimate_noise(PYTHIA, curve + 0.2 * noise(27, rng), np.full(27, 0.02))
    assert jitter.source == "stderr and scatter"
    assert 0.1 < jitter.sigma[0] < 0.4
    scales = [estimate_noise(EVEN, noise(30, rng), None).sigma[0] for _ in range(100)]
    assert 0.75 < np.mean(scales) < 1.1


def test_a_stderr_of_zero_is_not_taken_for_certainty() -> None:
    errors = np.array([0, 0, 0, 0, 0.01, 0.02, np.nan, 0.02])
    assert estimate_noise(np.arange(8.0), np.arange(8.0), errors).sigma.min() >= 0.01


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_points_give_a_reason(n: int) -> None:
    steps, values, known = np.arange(n, dtype=float), np.arange(n, dtype=float), Noise(np.ones(n), "stderr")
    for look in (
        lambda: find_emergence(steps, values, known, share=0.25, level=LEVEL),
        lambda: find_regress(steps, values, known, share=0.25, level=LEVEL),
        lambda: find_convergence(steps, values, known, level=LEVEL),
        lambda: find_peak(steps, values, known, level=LEVEL),
        lambda: find_change_points(steps, values, known, level=LEVEL),
    ):
        with pytest.raises(NoEvent, match=f"{n} checkpoints with a number: at least"):
            look()


def test_few_points_without_stderr_give_a_reason() -> None:
    with pytest.raises(NoiseUnknown, match="5 checkpoints without standard errors: at least 6"):
        estimate_noise(np.arange(5.0), np.arange(5.0), None)


@pytest.mark.parametrize("n", [4, 5, 6, 7, 14])
def test_a_constant_history_has_no_event(n: int) -> None:
    steps = np.arange(n, dtype=float)
    for errors in (np.full(n, 0.1), None) if n >= 6 else (np.full(n, 0.1),):
        assert all_events(steps, np.full(n, 0.5), estimate_noise(steps, np.full(n, 0.5), errors)) == []


def test_last_improvement() -> None:
    values = np.array([0.0, 0.5, 0.8, 0.79, 0.81, 0.80])
    known = Noise(np.full(6, 0.02), "stderr")
    assert last_improvement(values, known).k == 2  # 0.81 is within two stderr of 0.80
    assert last_improvement(values, known, stderrs=0).k == 4
    assert last_improvement(values, None, absolute=0.005).k == 4
    assert last_improvement(values, None, absolute=0.4).k == 1
    one = last_improvement(values, known)
    assert (one.best, one.improved) == (0.8, True)
    assert one.missed == pytest.approx(0.01)
    assert last_improvement(-values, known).k == 0
    assert not last_improvement(-values, known).improved
    with pytest.raises(ValueError, match="no values"):
        last_improvement(np.zeros(0), known)
    with pytest.raises(ValueError, match="give an absolute one"):
        last_improvement(values, None)


def test_order_over_runs_against_scipy() -> None:
    first = np.array([10, 20, 15, 12, 30, 11, 9, 14], float)
    second = np.array([40, 35, 60, 50, 28, 70, 45, 66], float)
    one = order_of_events(first, second)
    apart = np.log1p(first) - np.log1p(second)
    assert (one.n, one.first, one.second, one.ties) == (8, 7, 1, 0)
    assert one.p_sign == pytest.approx(stats.binomtest(7, 8).pvalue)
    peer = stats.permutation_test((apart,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert one.p_permutation == pytest.approx(peer.pvalue)
    interval = stats.ttest_1samp(apart, 0).confidence_interval()
    assert (one.ratio_low, one.ratio_high) == pytest.approx((np.exp(interval.low), np.exp(interval.high)))
    assert one.ratio == pytest.approx(np.exp(apart.mean()))


def test_order_of_one_run_ties_and_nonsense() -> None:
    one = order_of_events(np.array([3.0]), np.array([7.0]))
    assert one.ratio == pytest.approx(0.5)
    assert (one.ratio_low, one.p_sign, one.p_permutation) == (None, 1.0, 1.0)
    tied = order_of_events(np.array([3.0, 3.0]), np.array([3.0, 3.0]))
    assert (tied.ties, tied.p_sign, tied.ratio) == (2, None, 1.0)
    with pytest.raises(ValueError, match="got 0 and 0"):
        order_of_events(np.zeros(0), np.zeros(0))


def test_order_of_equal_events_is_significant_at_the_nominal_rate_only() -> None:
    rng = np.random.default_rng(0)
    draws = np.exp(rng.normal(5, 1, (400, 2, 7)))
    low = [order_of_events(a, b).p_permutation <= 0.05 for a, b in draws]
    assert not too_many(sum(low), 400)
    assert sum(low) > 4
    clear = order_of_events(draws[0, 0], draws[0, 0] * 3)
    assert clear.p_permutation == pytest.approx(2**-6)

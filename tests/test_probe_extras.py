"""What ``probe`` measures beyond accuracy: depth, code length, repetitions, baselines, hidden layers, kept weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one, run
from scipy.stats import norm

from trace_offline.analyzers._probe_data import choose_words, word_types
from trace_offline.analyzers._probe_summary import combine
from trace_offline.analyzers.base import Context
from trace_offline.analyzers.probe import ProbeAnalyzer
from trace_offline.analyzers.probe_weights import load_probe
from trace_offline.core.errors import UsageError
from trace_offline.core.types import Array, Artifact, Measurement, Result
from trace_offline.estimators.centre_of_gravity import centre_of_gravity, expected_layer
from trace_offline.estimators.description_length import block_ends, linear_fit, online_code
from trace_offline.estimators.logistic import Problem
from trace_offline.estimators.mlp_probe import fit_mlp
from trace_offline.estimators.splits import Part

WIDTH = 12


class Keeping(ProbeAnalyzer):
    """The analyzer, with everything it yielded."""

    kept: list[Result]

    def measure(self, context: Context):
        self.kept = list(super().measure(context))
        yield from self.kept


def case(rows: int = 200, length: int = 5, seed: int = 0, vocabulary: int = 5000, distance: float = 3.0):
    """Two classes; layer 0 is noise, layer 1 holds the label, layer 2 a copy of layer 1."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, vocabulary, (rows, length)))
    label = rng.integers(0, 2, (rows, length))
    words = [(r, t, t + 1, "ab"[label[r, t]]) for r in range(rows) for t in range(length)]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, length, WIDTH, generator=generator)
    clear = torch.randn(rows, length, WIDTH, generator=generator)
    clear[..., 0] += torch.from_numpy((label - 0.5) * distance).float()
    return FakeEvaluation(ids, {"tag": words}), (noise, clear, clear.clone()), label


# depth ------------------------------------------------------------------------------------------------------------


def sums_of(hits: np.ndarray, chance: np.ndarray, groups: int = 20) -> np.ndarray:
    """``hits [n, F]``, ``chance [n]`` → sums per group."""
    columns = np.column_stack([np.ones(len(chance)), chance, hits]).astype(float)
    return columns.reshape(groups, -1, columns.shape[1]).sum(1)


def test_depth_equals_the_formulas() -> None:
    rng = np.random.default_rng(0)
    shares, chance = np.array([0.4, 0.4, 0.7, 0.6, 0.9]), 0.3
    hits = rng.random((4000, 5)) < shares
    base = rng.random(4000) < chance
    s, c = hits.mean(0), base.mean()
    layers = np.arange(5.0)
    found = centre_of_gravity(sums_of(hits, base), layers)
    gains = np.maximum(0, s - c)
    assert found.value == pytest.approx(gains @ layers / gains.sum())
    best = np.maximum.accumulate(s)
    steps = np.diff(best)
    assert expected_layer(sums_of(hits, base), layers).value == pytest.approx(steps @ layers[1:] / steps.sum())


def test_depth_of_a_label_that_appears_at_one_layer_is_that_layer() -> None:
    hits = np.zeros((200, 4))
    hits[:, 2:] = 1.0
    found = expected_layer(sums_of(hits, np.zeros(200)), np.arange(4.0))
    assert (found.value, found.stderr) == (2.0, 0.0)
    assert centre_of_gravity(sums_of(hits, np.zeros(200)), np.arange(4.0)).value == 2.5


def test_depth_is_refused_when_nothing_is_gained() -> None:
    rng = np.random.default_rng(1)
    hits, base = rng.random((400, 4)) < 0.5, rng.random(400) < 0.5
    assert expected_layer(sums_of(np.repeat(hits[:, :1], 4, 1), base), np.arange(4.0)).value is None
    assert centre_of_gravity(sums_of(np.repeat(base[:, None], 4, 1), base), np.arange(4.0)).value is None
    assert centre_of_gravity(np.zeros((0, 6)), np.arange(4.0)).value is None


def test_depth_interval_covers() -> None:
    """Independent hits of known probability: 95 % intervals of both depths over 200 draws."""
    rng = np.random.default_rng(2)
    shares, chance = np.array([0.4, 0.55, 0.75, 0.7]), 0.3
    layers = np.arange(4.0)
    gains, steps = shares - chance, np.diff(np.maximum.accumulate(shares))
    truth = {centre_of_gravity: gains @ layers / gains.sum(), expected_layer: steps @ layers[1:] / steps.sum()}
    covered = dict.fromkeys(truth, 0)
    for _ in range(200):
        sums = sums_of(rng.random((1000, 4)) < shares, rng.random(1000) < chance, groups=50)
        for measure, value in truth.items():
            found = measure(sums, layers)
            covered[measure] += abs(found.value - value) <= 1.96 * found.stderr
    assert all(180 <= count <= 197 for count in covered.values()), covered


def test_depth_in_the_analyzer() -> None:
    evaluation, hidden, _ = case()
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden)
    layer = one(found, "expected_layer", task="tag")
    assert layer.value == pytest.approx(1.0, abs=0.15)
    assert layer.stderr < 0.2
    assert 1.0 < one(found, "centre_of_gravity", task="tag").value < 1.7
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=(hidden[0], hidden[0]))
    assert one(found, "expected_layer", task="tag").reason == "no layer gains two standard errors on the first"
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=(hidden[1],))
    assert one(found, "expected_layer", task="tag").reason == "fewer than two layers have finite hidden states"


# code length ------------------------------------------------------------------------------------------------------


def test_blocks_end_with_their_groups() -> None:
    groups = np.repeat(np.arange(10), 4)
    assert block_ends(groups, (0.001, 0.1, 0.13, 0.5, 1.0)) == [4, 8, 20, 40]
    assert block_ends(np.arange(4), (1.0,)) == [4]


def test_labels_that_nothing_foretells_cost_their_entropy() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((2000, 4))).float()
    y = torch.from_numpy((rng.random(2000) < 0.2).astype(np.int64))
    ends = block_ends(np.arange(2000), (0.05, 0.1, 0.2, 0.4, 1.0))
    (bits,) = online_code([x], [Problem(0, y, 2)], [ends], linear_fit(torch.ones(1), [2000]))
    assert bits.shape == (2000,)
    np.testing.assert_allclose(bits[:100], 1.0)
    share = float(y.double().mean())
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    assert bits[100:].mean() == pytest.approx(entropy, rel=0.03)


def test_code_is_that_of_the_classifiers_themselves() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(3)
    x = rng.standard_normal((400, 5))
    y = (x @ rng.standard_normal((5, 3)) + rng.gumbel(size=(400, 3))).argmax(1)
    ends, penalty, expected = [50, 120, 400], 0.01, 50 * np.log2(3)
    for begin, end in ((50, 120), (120, 400)):
        model = LogisticRegression(C=1 / (400 * penalty), tol=1e-10, max_iter=2000).fit(x[:begin], y[:begin])
        p = model.predict_proba(x[begin:end])[np.arange(end - begin), y[begin:end]]
        expected += -np.log2(p * begin / (begin + 1) + 1 / (begin + 1) / 3).sum()
    fit = linear_fit(torch.tensor([penalty]), [400], tolerance=1e-6)
    (bits,) = online_code([torch.from_numpy(x).float()], [Problem(0, torch.from_numpy(y), 3)], [ends], fit)
    assert bits.sum() == pytest.approx(expected, rel=1e-4)


def test_a_class_never_seen_before_costs_a_finite_number_of_bits() -> None:
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1] * 5 + [2] * 10)
    (bits,) = online_code([x], [Problem(0, y, 3)], [[10, 20]], linear_fit(torch.tensor([0.1]), [20]))
    np.testing.assert_allclose(bits[10:], np.log2(3 * 11), rtol=1e-6)


def test_code_length_in_the_analyzer() -> None:
    evaluation, hidden, _ = case(300, distance=8.0)
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden, codelength=True)
    n = one(found, "codelength", layer=0, task="tag").n
    assert n == 900
    noise, clear = (one(found, "codelength", layer=layer, task="tag") for layer in (0, 1))
    assert noise.value == pytest.approx(900, rel=0.1)
    assert clear.value < 150
    assert one(found, "compression", layer=1, task="tag").value == pytest.approx(900 / clear.value)
    assert one(found, "control_codelength", layer=1, task="tag").value > 850
    assert clear.stderr > 0
    quiet, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden)
    assert "codelength" not in {m.metric for m in quiet}
    assert [m for m in found if "code" not in m.metric and m.metric != "compression"] == quiet


# hidden layer -----------------------------------------------------------------------------------------------------


def test_a_hidden_layer_learns_what_no_line_can() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1500, 2, generator=generator)
    y = ((x[0, :, 0] * x[0, :, 1]) > 0).long()
    held = y[1000:1250]
    problems = [Problem(layer, y[:1000], 2) for layer in (0, 1)]
    fit = fit_mlp(list(x[:, :1000]), problems, list(x[:, 1000:1250]), [held, held], width=32)
    correct = [(fit.log_probabilities(x[i, 1250:], i).argmax(1) == y[1250:]).float().mean() for i in (0, 1)]
    assert correct[0] > 0.93
    assert 0.35 < correct[1] < 0.65
    assert float(fit.nll[1]) == pytest.approx(np.log(2), abs=0.03)
    assert bool(fit.converged[1])


def test_problems_of_a_batch_do_not_touch_each_other() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 300, 4, generator=generator), torch.randint(0, 3, (2, 300), generator=generator)
    few, two = torch.arange(90), torch.randint(0, 2, (300,), generator=generator)
    features, held = [x[0, :200], x[1, :200], x[0, few]], [x[0, 200:], x[1, 200:], x[1, 200:]]
    problems = [Problem(layer, labels[:200], 3) for layer in (0, 1) for labels in y] + [Problem(2, two[few], 2)]
    labels = [y[0, 200:], y[1, 200:], y[0, 200:], y[1, 200:], two[200:]]
    options = {"width": 8, "max_passes": 30, "patience": 2}
    together = fit_mlp(features, problems, held, labels, seeds=[0, 0, 0, 0, 5], **options)
    for number, seed in ((3, 0), (4, 5)):
        problem = problems[number]
        one = Problem(0, problem.labels, problem.n_classes)
        design = problem.design
        alone = fit_mlp([features[design]], [one], [held[design]], [labels[number]], seeds=seed, **options)
        for part in ("w1", "b1", "w2", "b2"):
            torch.testing.assert_close(getattr(together, part)[number], getattr(alone, part)[0], atol=1e-5, rtol=1e-4)
        assert int(together.passes[number]) == int(alone.passes[0])
    assert len(set(together.passes.tolist())) > 1


@pytest.mark.slow
def test_a_hidden_layer_does_as_well_as_sklearns() -> None:
    """Same width, steps and data: accuracy within 0.03 and held-out NLL within 0.05 nats of MLPClassifier."""
    from sklearn.neural_network import MLPClassifier

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3000, 6, generator=generator)
    score = torch.stack([x[:, 0] * x[:, 1], x[:, 2].square() - 1, x[:, 3]], 1) * 2
    y = (score - torch.log(-torch.log(torch.rand(3000, 3, generator=generator)))).argmax(1)
    parts = slice(0, 1800), slice(1800, 2300), slice(2300, 3000)
    ours = fit_mlp(
        [x[parts[0]]], [Problem(0, y[parts[0]], 3)], [x[parts[1]]], [y[parts[1]]], width=32, patience=5, max_passes=100
    )
    theirs = MLPClassifier((32,), alpha=0.0, batch_size=256, max_iter=int(ours.passes), tol=0.0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged: it gets as many passes as ours
        theirs.fit(x[parts[0]].numpy(), y[parts[0]].numpy())
    p = ours.log_probabilities(x[parts[2]], 0).double().exp().numpy()
    q = theirs.predict_proba(x[parts[2]].numpy())
    truth = y[parts[2]].numpy()
    assert (p.argmax(1) == truth).mean() == pytest.approx((q.argmax(1) == truth).mean(), abs=0.03)
    nll = [-np.log(found[np.arange(len(truth)), truth]).mean() for found in (p, q)]
    assert nll[0] == pytest.approx(nll[1], abs=0.05)
    assert (p.argmax(1) == truth).mean() > 0.6  # classes by their shares: 0.4


def test_kind_mlp_in_the_analyzer() -> None:
    evaluation, hidden, _ = case(250, distance=4.0)
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden, kind="mlp", hidden_width=16, codelength=True)
    accuracy = one(found, "accuracy", layer=1, task="tag")
    assert abs(accuracy.value - norm.cdf(2.0)) <= 3 * accuracy.stderr
    assert one(found, "penalty", layer=1, task="tag").reason == "a probe with a hidden layer has no penalty"
    n = one(found, "codelength", layer=1, task="tag").n
    noise, clear = (one(found, "codelength", layer=layer, task="tag").value for layer in (0, 1))
    assert noise == pytest.approx(n, rel=0.1)
    assert clear < 0.7 * n
    assert one(found, "control_codelength", layer=1, task="tag").value > 0.9 * n
    again, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden, kind="mlp", hidden_width=16, codelength=True)
    assert found == again


# repetitions ------------------------------------------------------------------------------------------------------


def test_combining_repetitions() -> None:
    first = [Measurement("m", 0.5, 0.1, 100, layer=1), Array("c", (1.0, 2.0)), Measurement("x", None, reason="why")]
    second = [Measurement("m", 0.7, 0.2, 102, layer=1), Array("c", (3.0, 0.0)), Measurement("x", None, reason="why")]
    mean, missing, array = combine([first, second])
    assert mean.value == pytest.approx(0.6)
    assert mean.stderr == pytest.approx(np.sqrt((0.01 + 0.04) / 2 + 0.02 / 2))
    assert mean.n == 101
    assert (missing.value, missing.reason) == (None, "why")
    assert array.values == (4.0, 2.0)
    assert list(combine([first])) == first


def test_repeats_in_the_analyzer() -> None:
    evaluation, hidden, _ = case(distance=2.0)
    single, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden)
    several, arrays = run(ProbeAnalyzer(), evaluation, hidden=hidden, repeats=3)
    assert len(several) == len(single)
    where = {"layer": 1, "task": "tag"}
    assert one(several, "accuracy", **where).value != one(single, "accuracy", **where).value
    assert abs(one(several, "accuracy", **where).value - norm.cdf(1.0)) < 3 * one(several, "accuracy", **where).stderr
    assert sum(arrays[0].values) == pytest.approx(3 * one(single, "accuracy", **where).n)


# splits, views, baselines -----------------------------------------------------------------------------------------


def test_no_word_type_on_both_sides() -> None:
    evaluation, _, _ = case(vocabulary=40)
    _, (words,) = choose_words(evaluation, ("tag",), 20_000, 0, split_by="word_type")
    types = word_types(evaluation, words.span)
    for part in Part:
        here = set(types[words.part == part])
        assert here
        assert not here & set(types[words.part != part])


def test_word_type_split_keeps_the_evaluation_sets_own_split() -> None:
    evaluation, _, _ = case(vocabulary=40)
    evaluation.split = (np.arange(200) >= 150).astype(np.int8)
    _, (words,) = choose_words(evaluation, ("tag",), 20_000, 0, split_by="word_type")
    np.testing.assert_array_equal(words.part == Part.TEST, evaluation.split[words.span[:, 0]] == 1)
    types = word_types(evaluation, words.span)
    assert not set(types[words.part == Part.TEST]) & set(types[words.part != Part.TEST])


def test_words_known_by_heart_are_worth_nothing_when_split_by_type() -> None:
    evaluation, _, _ = case(400, vocabulary=30)
    ids = evaluation.input_ids
    tag = np.random.default_rng(5).integers(0, 2, 30)
    evaluation.annotations["tag"] = [(r, t, t + 1, "ab"[tag[int(ids[r, t])]]) for r in range(400) for t in range(5)]
    table = torch.eye(30)
    hidden = (table[ids],)
    heart, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden)
    assert one(heart, "accuracy", layer=0, task="tag").value == 1.0
    split, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden, split_by="word_type")
    assert one(split, "accuracy", layer=0, task="tag").value < 0.9


def test_random_vectors_know_the_words_and_nothing_else() -> None:
    evaluation, hidden, _ = case(400, vocabulary=10)
    ids = evaluation.input_ids
    evaluation.annotations["tag"] = [
        (r, t, t + 1, "ab"[int(ids[r, t]) % 2]) for r in range(400) for t in range(5)
    ]  # the word decides
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden, random_baseline=True)
    assert one(found, "random_accuracy", task="tag").value > 0.97
    evaluation, hidden, _ = case(400)
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden, random_baseline=True)
    random = one(found, "random_accuracy", task="tag")
    assert abs(random.value - 0.5) < 3 * random.stderr


def test_sentence_view_reads_the_whole_row() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 300)
    evaluation = FakeEvaluation(torch.from_numpy(rng.integers(0, 99, (300, 4))), {})
    evaluation.annotations = {"kind": [(r, 0, 1, "ab"[label[r]]) for r in range(300)]}
    evaluation.tasks = ("kind",)
    hidden = torch.randn(300, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    hidden[:, 3, 0] += torch.from_numpy(label * 24.0 - 12.0).float()
    word, _ = run(ProbeAnalyzer(), evaluation, hidden=(hidden,))
    row, _ = run(ProbeAnalyzer(), evaluation, hidden=(hidden,), view="sentence")
    assert one(word, "accuracy", layer=0, task="kind").value < 0.75
    assert one(row, "accuracy", layer=0, task="kind").value > 0.97


def test_calibration_of_a_probe_that_knows_the_truth_is_small() -> None:
    evaluation, hidden, _ = case(2000, distance=2.0)
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden[1:2], control=False)
    error = one(found, "calibration_error", layer=0, task="tag")
    assert 0 < error.value < 0.05
    assert 0 < error.stderr < 0.03


# kept weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_kept_probes_predict_as_they_did(kind: str, tmp_path: Path) -> None:
    evaluation, hidden, label = case(distance=3.0)
    analyzer = Keeping()
    found, _ = run(analyzer, evaluation, hidden=hidden, kind=kind, weights=True)
    (artifact,) = (item for item in analyzer.kept if isinstance(item, Artifact))
    path = tmp_path / f"{artifact.name}{artifact.suffix}"
    path.write_bytes(artifact.content)
    loaded = load_probe(path)
    assert (loaded.kind, loaded.alignment, loaded.view, loaded.tasks) == (kind, "last", "word", ("tag",))
    assert loaded.layers("tag") == (0, 1, 2)
    assert loaded.classes["tag"] == ("a", "b")
    _, (words,) = choose_words(evaluation, ("tag",), 20_000, 0)
    test = words.part == Part.TEST
    states = hidden[1].flatten(0, 1)[test]
    truth = ["ab"[k] for k in label.reshape(-1)[test]]
    right = np.mean([a == b for a, b in zip(loaded.predict("tag", 1, states), truth, strict=True)])
    assert right == one(found, "accuracy", layer=1, task="tag").value
    log_p = loaded.log_probabilities("tag", 1, states)
    nll = -log_p[torch.arange(len(truth)), torch.tensor(["ab".index(t) for t in truth])].double().mean()
    assert float(nll) == pytest.approx(one(found, "nll", layer=1, task="tag").value, rel=1e-6)


def test_refusals_of_load_probe(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(UsageError, match="no such file"):
        load_probe(tmp_path / "absent")
    (tmp_path / "text").write_text("not tensors at all, but long enough to hold a header")
    with pytest.raises(UsageError, match="not a safetensors file"):
        load_probe(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(UsageError, match='expected probes in the format "trace-offline probes 1", found "none"'):
        load_probe(tmp_path / "other")
    evaluation, hidden, _ = case(50)
    analyzer = Keeping()
    run(analyzer, evaluation, hidden=hidden[:1], weights=True)
    (tmp_path / "probes").write_bytes(next(i.content for i in analyzer.kept if isinstance(i, Artifact)))
    loaded = load_probe(tmp_path / "probes")
    with pytest.raises(UsageError, match=r'no probe of task "tga" in this file\. Did you mean "tag"'):
        loaded.predict("tga", 0, hidden[0][0])
    with pytest.raises(UsageError, match='no probe of task "tag" at layer 3 in this file; its layers: 0'):
        loaded.predict("tag", 3, hidden[0][0])
    with pytest.raises(UsageError, match=r"expected hidden states \[words, 12\] for this probe, found \(5, 3\)"):
        loaded.predict("tag", 0, torch.zeros(5, 3))

"""The analyzer ``probe`` on representations whose answer is known, against scikit-learn, and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one, run
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss

from trace_offline.analyzers._probe_data import choose_words, prepare, word_types
from trace_offline.analyzers._probe_fit import standardise
from trace_offline.analyzers.probe import ProbeAnalyzer
from trace_offline.core.errors import NotApplicable, UsageError
from trace_offline.estimators.splits import Part

WIDTH = 16
Case = tuple[FakeEvaluation, tuple[torch.Tensor, ...], np.ndarray]


def make(
    rows: int = 300,
    length: int = 6,
    *,
    seed: int = 0,
    vocabulary: int = 5000,
    shares: tuple[float, ...] = (0.5, 0.3, 0.2),
    **options: object,
) -> Case:
    """Sentences of one-token words with labels independent of the tokens; layers 0 and 1 are noise."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, vocabulary, (rows, length)))
    labels = rng.choice(len(shares), size=(rows, length), p=shares)
    words = [(r, t, t + 1, "abcdefgh"[labels[r, t]]) for r in range(rows) for t in range(length)]
    generator = torch.Generator().manual_seed(seed)
    hidden = tuple(torch.randn(rows, length, WIDTH, generator=generator) for _ in range(2))
    return FakeEvaluation(ids, {"tag": words}, **options), hidden, labels


def plant(noise: torch.Tensor, labels: np.ndarray, distance: float) -> torch.Tensor:
    """Two classes of unit covariance whose means lie this far apart: the best possible accuracy is Φ(distance/2)."""
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(99))
    direction = distance * direction / direction.norm()
    return noise + torch.from_numpy(labels - 0.5).float()[..., None] * direction


def within(found, expected: float, errors: float = 3.0) -> bool:
    return abs(found.value - expected) <= errors * found.stderr


@pytest.mark.parametrize("seed", range(3))
def test_planted_linear_classes_reach_the_bayes_accuracy(seed: int) -> None:
    evaluation, hidden, labels = make(500, seed=seed, shares=(0.5, 0.5))
    layers = (hidden[0], plant(hidden[0], labels, 2.0), plant(hidden[1], labels, 4.0))
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=layers, batch=64)
    for layer, distance in enumerate((0.0, 2.0, 4.0)):
        where = {"layer": layer, "task": "tag"}
        assert within(one(found, "accuracy", **where), norm.cdf(distance / 2))
        assert one(found, "converged", **where).value == 1.0
        assert one(found, "accuracy", **where).n == 600
    assert one(found, "selectivity", layer=2, task="tag").value > 0.3
    assert one(found, "penalty", layer=0, task="tag").value >= one(found, "penalty", layer=2, task="tag").value


@pytest.mark.parametrize("seed", range(3))
def test_noise_tells_nothing(seed: int) -> None:
    evaluation, hidden, _ = make(seed=seed)
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden)
    for layer in range(2):
        where = {"layer": layer, "task": "tag"}
        accuracy, majority = one(found, "accuracy", **where), one(found, "majority_accuracy", **where)
        assert within(majority, 0.5)
        assert within(accuracy, majority.value)
        assert within(one(found, "selectivity", **where), 0.0)
        assert one(found, "nll", **where).value == pytest.approx(1.03, abs=0.06)  # entropy of the shares: 1.0297
        assert one(found, "macro_f1", **where).value < 0.4


def test_shuffled_labels_lose_what_the_probe_knew() -> None:
    evaluation, hidden, labels = make(shares=(0.5, 0.5))
    layers = (plant(hidden[0], labels, 4.0),)
    known, _ = run(ProbeAnalyzer(), evaluation, hidden=layers)
    words = evaluation.annotations["tag"]
    order = np.random.default_rng(0).permutation(len(words))
    evaluation.annotations["tag"] = [(*word[:3], words[other][3]) for word, other in zip(words, order, strict=True)]
    lost, _ = run(ProbeAnalyzer(), evaluation, hidden=layers)
    assert one(known, "accuracy", layer=0, task="tag").value > 0.95
    assert one(lost, "accuracy", layer=0, task="tag").value < 0.58


def test_word_identity_is_memorised_by_the_control_probe() -> None:
    """Representations that only tell words apart do as well on random labels: selectivity near 0."""
    evaluation, _, _ = make(400, vocabulary=12)
    table = 4.0 * torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(1))
    hidden = (table[evaluation.input_ids],)
    evaluation.annotations["tag"] = [
        (r, s, e, "abc"[int(evaluation.input_ids[r, s]) % 3]) for r, s, e, _ in evaluation.annotations["tag"]
    ]
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden)
    assert one(found, "accuracy", layer=0, task="tag").value == 1.0
    assert one(found, "control_accuracy", layer=0, task="tag").value == 1.0
    assert one(found, "selectivity", layer=0, task="tag").value == 0.0


def test_every_number_equals_the_same_steps_with_sklearn() -> None:
    evaluation, hidden, labels = make(300, shares=(0.4, 0.4, 0.2))
    layer = plant(hidden[0], np.minimum(labels, 1), 2.0)
    grid = (1e-1, 1e-2, 1e-3)
    found, arrays = run(ProbeAnalyzer(), evaluation, hidden=(layer,), penalties=grid, tolerance=1e-6)
    _, (words,) = choose_words(evaluation, ("tag",), 20_000, seed=0)
    x, y = layer.reshape(-1, WIDTH).double().numpy(), labels.reshape(-1)
    train, validation, test = (words.part == part for part in Part)
    x = (x - x[train].mean(0)) / x[train].std(0)

    def fit(penalty: float, rows: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=1 / (rows.sum() * penalty), solver="newton-cg", tol=1e-9, max_iter=2000).fit(
            x[rows], y[rows]
        )

    scores = {p: log_loss(y[validation], fit(p, train).predict_proba(x[validation])) for p in grid}
    best = min(scores, key=scores.__getitem__)
    model = fit(best, train | validation)
    p, predicted = model.predict_proba(x[test]), model.predict(x[test])
    where = {"layer": 0, "task": "tag"}
    assert one(found, "penalty", **where).value == pytest.approx(best)
    assert one(found, "accuracy", **where).value == pytest.approx((predicted == y[test]).mean())
    assert one(found, "macro_f1", **where).value == pytest.approx(f1_score(y[test], predicted, average="macro"))
    assert one(found, "nll", **where).value == pytest.approx(log_loss(y[test], p), rel=1e-4)
    right = p[np.arange(len(p)), y[test]]
    assert one(found, "confidence", **where).value == pytest.approx(right.mean(), rel=1e-4)
    for k, label in enumerate("abc"):
        f1 = f1_score(y[test] == k, predicted == k)
        assert one(found, "f1", label=label, **where).value == pytest.approx(f1)
        assert one(found, "confidence", label=label, **where).value == pytest.approx(
            right[y[test] == k].mean(), rel=1e-4
        )
        assert one(found, "support", label=label, **where).value == (y[test] == k).sum()
    confusion = np.reshape(arrays[0].values, (3, 3))
    np.testing.assert_array_equal(confusion.sum(1), np.bincount(y[test]))
    assert np.trace(confusion) == (predicted == y[test]).sum()
    assert (arrays[0].name, arrays[0].layer, arrays[0].task, arrays[0].component) == ("confusion", 0, "tag", "residual")


def test_sentences_are_never_cut_and_documents_neither() -> None:
    group = np.repeat(np.arange(100), 3)
    evaluation, _, _ = make(300, group=group)
    _, (words,) = choose_words(evaluation, ("tag",), 600, seed=1)
    assert len(words.label) <= 600
    for document in np.unique(words.group):
        assert len(set(words.part[words.group == document])) == 1
        assert (words.group == document).sum() == 18
    np.testing.assert_array_equal(words.group, group[words.span[:, 0]])


def test_a_probe_that_could_cheat_across_sentences_does_not() -> None:
    """Each sentence repeats one vector and one label: with sentences cut, a probe would know the answers."""
    evaluation, _, _ = make(200, shares=(0.5, 0.5))
    rng = np.random.default_rng(7)
    label = rng.integers(0, 2, 200)
    evaluation.annotations["tag"] = [(r, t, t + 1, "ab"[label[r]]) for r in range(200) for t in range(6)]
    wide = torch.randn(200, 1, 100, generator=torch.Generator().manual_seed(0)).expand(200, 6, 100)
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=(wide,))
    accuracy = one(found, "accuracy", layer=0, task="tag")
    assert within(accuracy, 0.5)
    assert accuracy.stderr == pytest.approx(np.sqrt(accuracy.value * (1 - accuracy.value) / 40), rel=0.05)


def test_own_split_of_the_evaluation_set() -> None:
    split = (np.arange(300) >= 240).astype(np.int8)
    evaluation, hidden, labels = make(300, split=split, shares=(0.5, 0.5))
    layer = plant(hidden[0], labels, 3.0)
    layer[240:] = -layer[240:]  # the sentences to score are turned around, so nothing else can have been scored
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=(layer,))
    accuracy = one(found, "accuracy", layer=0, task="tag")
    assert accuracy.n == 360
    assert within(accuracy, 1 - norm.cdf(1.5))
    assert one(found, "penalty", layer=0, task="tag").n == 360


def test_same_numbers_twice_and_other_sentences_with_another_seed() -> None:
    evaluation, hidden, labels = make(shares=(0.5, 0.5))
    layers = (plant(hidden[0], labels, 1.0),)
    first, again = (run(ProbeAnalyzer(), evaluation, hidden=layers)[0] for _ in range(2))
    assert first == again
    assert run(ProbeAnalyzer(), evaluation, hidden=layers, batch=50)[0] == first
    other, _ = run(ProbeAnalyzer(), evaluation, hidden=layers, seed=1)
    assert one(other, "nll", layer=0, task="tag").value != one(first, "nll", layer=0, task="tag").value


def test_rare_classes_are_left_out_with_the_reason() -> None:
    evaluation, hidden, _ = make(shares=(0.5, 0.499, 0.001), seed=4)
    found, arrays = run(ProbeAnalyzer(), evaluation, hidden=hidden)
    total = sum(1 for word in evaluation.annotations["tag"] if word[3] == "c")
    assert 0 < total < 5
    for metric in ("f1", "confidence", "support"):
        reason = one(found, metric, layer=0, task="tag", label="c").reason
        assert "training words, fewer than min_class_count = 5: left out of the task" in reason
        assert one(found, metric, layer=0, task="tag", label="a").value is not None
    confusion = np.reshape(arrays[0].values, (3, 3))
    assert confusion[2].sum() == confusion[:, 2].sum() == 0
    assert confusion.sum() == one(found, "accuracy", layer=0, task="tag").n


def test_a_task_that_cannot_be_probed_stops_no_other() -> None:
    evaluation, hidden, _ = make()
    evaluation.annotations["same"] = [(r, 0, 1, "only") for r in range(300)]
    evaluation.annotations["tiny"] = [(0, 0, 1, "a"), (0, 1, 2, "b")]
    evaluation.annotations["rare"] = [(r, 0, 1, f"class {r}") for r in range(30)]
    evaluation.tasks = tuple(sorted(evaluation.annotations))
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden)
    assert one(found, "accuracy", layer=1, task="tag").value is not None
    assert "fewer than two classes have min_class_count = 5 training words (found: only 180)" in (
        one(found, "accuracy", layer=0, task="same").reason
    )
    assert "1 sentences with this task: none left for validation or test" in (
        one(found, "selectivity", layer=1, task="tiny").reason
    )
    assert "fewer than two classes" in one(found, "macro_f1", layer=0, task="rare").reason
    assert "left out of the task" in one(found, "f1", layer=0, task="rare", label="class 3").reason


def test_layers_that_are_not_finite_say_so_and_stop_no_other() -> None:
    evaluation, hidden, labels = make(shares=(0.5, 0.5))
    broken = hidden[1].clone()
    broken[5, 2, 3] = torch.inf
    layers = (hidden[0], broken, plant(hidden[0], labels, 4.0))
    found, arrays = run(ProbeAnalyzer(), evaluation, hidden=layers)
    clean, _ = run(ProbeAnalyzer(), evaluation, hidden=(layers[0], layers[2]))
    assert one(found, "accuracy", layer=1, task="tag").reason == "hidden states of layer 1 are not finite"
    assert one(found, "f1", layer=1, task="tag", label="a").reason == "hidden states of layer 1 are not finite"
    for metric in ("accuracy", "control_accuracy"):
        assert one(found, metric, layer=2, task="tag").value == one(clean, metric, layer=1, task="tag").value
    assert [array.layer for array in arrays] == [0, 2]


def test_control_can_be_left_out_and_tasks_chosen() -> None:
    evaluation, hidden, _ = make()
    evaluation.annotations["other"] = [(*word[:3], "xy"[word[1] % 2]) for word in evaluation.annotations["tag"]]
    evaluation.tasks = ("other", "tag")
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden, control=False, tasks=["other"])
    assert {m.task for m in found} == {"other"}
    assert not {"control_accuracy", "selectivity"} & {m.metric for m in found}
    with pytest.raises(UsageError, match=r'no task "othr"\. Did you mean "other"\? Its tasks: other, tag'):
        run(ProbeAnalyzer(), evaluation, hidden=hidden, tasks=["othr"])


@pytest.mark.parametrize(("alignment", "informative"), [("last", 1), ("first", 0), ("mean", 1), ("auto", 0)])
def test_alignment(alignment: str, informative: int) -> None:
    """Words of two tokens; only one of them carries the label."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 300)
    ids = torch.from_numpy(rng.integers(0, 999, (300, 4)))
    evaluation = FakeEvaluation(ids, {"tag": [(r, 1, 3, "ab"[label[r]]) for r in range(300)]}, alignment="first")
    hidden = torch.randn(300, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    hidden[:, 1 + informative, 0] += torch.from_numpy(label * 20.0 - 10.0).float()
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=(hidden,), alignment=alignment)
    assert one(found, "accuracy", layer=0, task="tag").value > 0.98
    if alignment in ("last", "first"):
        other = {"last": "first", "first": "last"}[alignment]
        found, _ = run(ProbeAnalyzer(), evaluation, hidden=(hidden,), alignment=other)
        assert one(found, "accuracy", layer=0, task="tag").value < 0.75


def test_word_types_are_tuples_of_tokens() -> None:
    ids = torch.tensor([[1, 2, 3, 1], [1, 2, 1, 3]])
    evaluation = FakeEvaluation(ids)
    span = np.array([[0, 0, 2], [1, 0, 2], [0, 0, 1], [0, 3, 4], [1, 2, 4]])
    types = word_types(evaluation, span)
    assert types[0] == types[1] != types[2]
    assert types[2] == types[3] != types[4]
    labels = torch.tensor([[-100, 7, -100, -100], [-100, 7, -100, -100]])
    hidden = FakeEvaluation(
        torch.tensor([[1, 0, 3, 1], [1, 0, 1, 3]]), labels=labels, labels_shifted=False, objective="masked_lm"
    )
    assert word_types(hidden, np.array([[0, 1, 2], [1, 1, 2]])).tolist() == [0, 0]
    assert len(set(word_types(hidden, np.array([[0, 1, 2], [0, 0, 1]])).tolist())) == 2


def test_control_labels_have_the_same_split_and_distribution() -> None:
    evaluation, _, _ = make()
    _, (words,) = choose_words(evaluation, ("tag",), 20_000, seed=0)
    ready = prepare(words, evaluation, 5, True, seed=0)
    assert ready.control is not None
    types = word_types(evaluation, ready.words.span)
    for kind in np.unique(types)[:200]:
        assert len(set(ready.control[types == kind])) == 1
    np.testing.assert_allclose(np.bincount(ready.control) / len(ready.control), [0.5, 0.3, 0.2], atol=0.06)
    assert prepare(words, evaluation, 5, False, seed=0).control is None


def test_standardise_is_safe_for_constant_features() -> None:
    table = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0)) * 5 + 3
    table[:, :, 1] = 1e4
    table[:, :, 2] = 1e4 + 1e-3 * torch.arange(50) % 2
    train = torch.arange(30)
    out = standardise(table, train)
    torch.testing.assert_close(out[:, train].mean(1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    deviation = out[:, train].std(1, correction=0)
    torch.testing.assert_close(deviation, torch.tensor([[1.0, 0.0, 0.0, 1.0]] * 2), atol=1e-5, rtol=0)
    assert bool((out[:, :, 1:3] == 0).all())


def test_layers_in_several_batches_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from trace_offline.analyzers import _probe_fit

    evaluation, hidden, labels = make(shares=(0.5, 0.5))
    layers = (hidden[0], plant(hidden[0], labels, 2.0), plant(hidden[1], labels, 1.0))
    whole, _ = run(ProbeAnalyzer(), evaluation, hidden=layers)
    monkeypatch.setattr(_probe_fit, "MEMORY_NUMBERS", 1)
    parts, _ = run(ProbeAnalyzer(), evaluation, hidden=layers)
    for a, b in zip(whole, parts, strict=True):
        assert (a.metric, a.layer, a.label) == (b.metric, b.layer, b.label)
        assert b.value == pytest.approx(a.value, rel=1e-5)


def test_not_applicable() -> None:
    evaluation, hidden, _ = make(10)
    with pytest.raises(NotApplicable, match="blocks of this network are not known"):
        run(ProbeAnalyzer(), evaluation, hidden=hidden, n_layers=None)
    with pytest.raises(NotApplicable, match="no annotated task"):
        run(ProbeAnalyzer(), FakeEvaluation(torch.zeros(4, 3).long()), hidden=hidden)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"penalties": [0.0]}, "probe.penalties.0: Input should be greater than 0"),
        ({"penalties": []}, "probe.penalties"),
        ({"max_words": 3}, "probe.max_words: Input should be greater than or equal to 50"),
        ({"alignment": "middle"}, "probe.alignment"),
        ({"max_word": 100}, 'probe has no parameter "max_word". Did you mean "max_words"?'),
    ],
)
def test_bad_parameters(params: dict[str, object], text: str) -> None:
    evaluation, hidden, _ = make(10)
    with pytest.raises(UsageError) as caught:
        run(ProbeAnalyzer(), evaluation, hidden=hidden, **params)
    assert text in str(caught.value)

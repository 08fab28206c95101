"""The analyzer ``output`` against a plain loop over words, and against predictors whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one, run

from trace_offline.analyzers import _measurements
from trace_offline.analyzers.output import OutputAnalyzer
from trace_offline.core.errors import EvaluationSetError, NotApplicable

VOCABULARY = 12
METRICS = ("accuracy", "loss", "class_probability", "target_probability", "class_mass")


def make(
    rows: int = 30, length: int = 9, *, shifted: bool = True, seed: int = 0, masked: float = 0.0
) -> tuple[FakeEvaluation, torch.Tensor]:
    """Words of one or two tokens, some without annotation, classes that depend on the token (mostly) and two tasks."""
    generator = np.random.default_rng(seed)
    ids = torch.from_numpy(generator.integers(0, VOCABULARY, (rows, length)))
    mask = torch.arange(length)[None] < torch.from_numpy(generator.integers(3, length + 1, rows))[:, None]
    annotations: dict[str, list[tuple[int, int, int, str]]] = {"pos": [], "half": []}
    for row in range(rows):
        at = 0
        while at < int(mask[row].sum()):
            end = min(at + int(generator.integers(1, 3)), int(mask[row].sum()))
            label = "abc"[int(ids[row, at]) % 3] if generator.random() < 0.8 else "d"
            annotations["pos"].append((row, at, end, label))
            if generator.random() < 0.5:
                annotations["half"].append((row, at, end, "x" if int(ids[row, at]) < 5 else "y"))
            at = end
    logits = torch.from_numpy(generator.normal(size=(rows, length, VOCABULARY))).float() * 2
    labels = ids
    objective = "causal_lm"
    if masked:
        hidden = torch.from_numpy(generator.random((rows, length)) < masked)
        labels, ids, objective = ids.masked_fill(~hidden, -100), ids.masked_fill(hidden, 0), "masked_lm"
    evaluation = FakeEvaluation(
        ids, annotations, attention_mask=mask, labels=labels, labels_shifted=shifted, objective=objective
    )
    return evaluation, logits


def plain_loop(evaluation: FakeEvaluation, logits: torch.Tensor, task: str) -> dict[str, np.ndarray]:
    """(label, nll, correct, mass on the right class) of every scored word, in the order of the rows."""
    shift = 1 if evaluation.labels_shifted else 0
    tokens = evaluation.tokens(0, evaluation.n_examples)
    words = sorted(evaluation.annotations[task])
    first = []
    for row, start, _, _ in words:
        known = start >= shift and int(tokens.targets[row, start - shift]) != -100
        first.append(int(tokens.targets[row, start - shift] if known else tokens.input_ids[row, start]))
    out: dict[str, list] = {"label": [], "row": [], "loss": [], "accuracy": [], "class_probability": []}
    out |= {"target_probability": [], "class_mass": [], "target": [], "confidence": [], "masses": []}
    names = sorted({w[3] for w in words})
    begins = {c: {token for w, token in zip(words, first, strict=True) if w[3] == c} for c in names}
    for row, start, _, label in words:
        if start - shift < 0 or int(tokens.targets[row, start - shift]) == -100:
            continue
        p = logits[row, start - shift].double().softmax(-1)
        target = int(tokens.targets[row, start - shift])
        mass = 0.0
        for v in range(VOCABULARY):
            classes = [w[3] for w, token in zip(words, first, strict=True) if token == v]
            if classes:
                mass += float(p[v]) * classes.count(label) / len(classes)
        out["label"].append(label)
        out["row"].append(row)
        out["loss"].append(-float(p[target].log()))
        out["accuracy"].append(float(int(p.argmax()) == target))
        out["class_probability"].append(mass)
        out["target_probability"].append(float(p[target]))
        out["class_mass"].append(sum(float(p[v]) for v in range(VOCABULARY) if v in begins[label]))
        out["target"].append(target)
        out["confidence"].append(float(p.max()))
        shared = dict.fromkeys(names, 0.0)
        for w, token in zip(words, first, strict=True):
            shared[w[3]] += float(p[token]) / first.count(token) if 0 <= token < VOCABULARY else 0.0
        out["masses"].append([shared[c] for c in names])
    return {name: np.array(values) for name, values in out.items()}


def starters(evaluation: FakeEvaluation, task: str, label: str) -> set[int]:
    """First tokens of the words of a class (masked ones are known by their labels)."""
    own = evaluation.labels if evaluation.objective == "masked_lm" else evaluation.input_ids
    found = set()
    for row, start, _, name in evaluation.annotations[task]:
        token = int(own[row, start])
        if name == label:
            found.add(int(evaluation.input_ids[row, start]) if token == -100 else token)
    return found


def binned(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error by a loop over the bins."""
    total = 0.0
    for low in range(15):
        inside = [i for i, c in enumerate(confidence) if low / 15 < c <= (low + 1) / 15 or (low == 0 and c == 0)]
        if inside:
            total += abs(float(np.mean(correct[inside])) - float(np.mean(confidence[inside]))) * len(inside)
    return total / len(confidence)


@pytest.mark.parametrize(("shifted", "masked"), [(True, 0.0), (False, 0.0), (False, 0.4)])
def test_equals_a_plain_loop(shifted: bool, masked: float) -> None:
    evaluation, logits = make(shifted=shifted, masked=masked)
    found, _ = run(OutputAnalyzer(), evaluation, logits=logits)
    for task, classes in (("pos", "abcd"), ("half", "xy")):
        words = plain_loop(evaluation, logits, task)
        for label in (*classes, None):
            chosen = np.ones(len(words["row"]), dtype=bool) if label is None else words["label"] == label
            for metric in METRICS:
                result = one(found, metric, task=task, label=label)
                values, rows = words[metric][chosen], words["row"][chosen]
                assert result.value == pytest.approx(values.mean(), rel=1e-5)
                assert result.n == len(values)
                sums = np.array([(values[rows == row] - values.mean()).sum() for row in np.unique(rows)])
                expected = np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(values)
                assert result.stderr == pytest.approx(expected, rel=1e-4)
            share = one(found, "class_share", task=task, label=label)
            shares = {c: (words["label"] == c).mean() for c in classes}
            assert share.value == pytest.approx(sum(s * s for s in shares.values()) if label is None else shares[label])
            assert share.n == len(words["row"])
            chance = one(found, "class_mass_chance", task=task, label=label)
            members = {c: np.mean([t in starters(evaluation, task, c) for t in words["target"]]) for c in classes}
            expected = sum(shares[c] * members[c] for c in classes) if label is None else members[label]
            assert chance.value == pytest.approx(expected)
            error = one(found, "calibration_error", task=task, label=label)
            assert error.value == pytest.approx(
                binned(words["confidence"][chosen], words["accuracy"][chosen]), abs=1e-6
            )
            if label is not None:
                error = one(found, "class_calibration_error", task=task, label=label)
                mine = words["masses"][:, classes.index(label)]
                assert error.value == pytest.approx(binned(mine, words["label"] == label), abs=1e-6)
                assert error.n == len(words["row"])


def test_batches_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation, logits = make()
    whole, _ = run(OutputAnalyzer(), evaluation, logits=logits, batch=30)
    monkeypatch.setattr(_measurements, "CHUNK_NUMBERS", 2 * VOCABULARY)
    parts, _ = run(OutputAnalyzer(), evaluation, logits=logits, batch=4)
    for a, b in zip(whole, parts, strict=True):
        assert (a.metric, a.task, a.label, a.n) == (b.metric, b.task, b.label, b.n)
        assert b.value == pytest.approx(a.value, rel=1e-6)


def test_a_unigram_predictor_reaches_exactly_the_class_share() -> None:
    """Every sentence opens with a token of its own, so that every annotated word has a prediction."""
    evaluation, _ = make(60)
    ids = torch.cat([torch.full((60, 1), VOCABULARY), evaluation.input_ids], 1)
    mask = torch.cat([torch.ones(60, 1, dtype=torch.bool), evaluation.attention_mask], 1)
    words = [(row, start + 1, end + 1, label) for row, start, end, label in evaluation.annotations["pos"]]
    counts = torch.zeros(VOCABULARY + 1)
    for row, start, _, _ in words:
        counts[ids[row, start]] += 1
    logits = counts.log().expand(*ids.shape, VOCABULARY + 1)
    found, _ = run(OutputAnalyzer(), FakeEvaluation(ids, {"pos": words}, attention_mask=mask), logits=logits)
    for label in (*"abcd", None):
        mass = one(found, "class_probability", task="pos", label=label)
        assert mass.value == pytest.approx(one(found, "class_share", task="pos", label=label).value, rel=1e-5)


def test_a_perfect_predictor() -> None:
    evaluation, logits = make()
    evaluation.annotations["pos"] = [
        (row, start, end, "abc"[int(evaluation.input_ids[row, start]) % 3])
        for row, start, end, _ in evaluation.annotations["pos"]
    ]
    logits = torch.zeros_like(logits)
    logits[:, :-1].scatter_(2, evaluation.input_ids[:, 1:, None], 40.0)
    found, _ = run(OutputAnalyzer(), evaluation, logits=logits)
    for label in (*"abc", None):
        values = [one(found, metric, task="pos", label=label).value for metric in METRICS]
        assert values == pytest.approx([1.0, 0.0, 1.0, 1.0, 1.0], abs=1e-6)
        assert one(found, "calibration_error", task="pos", label=label).value == pytest.approx(0, abs=1e-6)
        if label is not None:
            assert one(found, "class_calibration_error", task="pos", label=label).value == pytest.approx(0, abs=1e-6)


def test_a_token_of_two_classes_counts_for_both_masses() -> None:
    """Token 1 begins words of both classes, token 2 of b only; the network is sure of token 1."""
    ids = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1]])
    words = [(0, 1, 2, "a"), (1, 1, 2, "a"), (2, 1, 2, "b"), (3, 1, 2, "b")]
    logits = torch.tensor([0.0, 3.0, 1.0]).expand(4, 2, 3)
    p = torch.tensor([0.0, 3.0, 1.0]).softmax(0).tolist()
    found, _ = run(OutputAnalyzer(), FakeEvaluation(ids, {"pos": words}), logits=logits)
    assert one(found, "class_mass", task="pos", label="a").value == pytest.approx(p[1])
    assert one(found, "class_mass", task="pos", label="b").value == pytest.approx(p[1] + p[2])
    assert one(found, "class_probability", task="pos", label="b").value == pytest.approx(p[1] / 3 + p[2])
    assert one(found, "class_mass_chance", task="pos", label="a").value == pytest.approx(3 / 4)
    assert one(found, "class_mass_chance", task="pos", label="b").value == pytest.approx(1)
    assert one(found, "class_mass_chance", task="pos").value == pytest.approx(7 / 8)


def test_words_of_several_labels_have_no_classwise_calibration() -> None:
    ids = torch.randint(0, 5, (6, 4), generator=torch.Generator().manual_seed(0))
    words = [(row, 1, 2, label) for row in range(6) for label in "ab"]
    found, _ = run(OutputAnalyzer(), FakeEvaluation(ids, {"pos": words}), logits=torch.zeros(6, 4, 5))
    assert "carry several labels" in one(found, "class_calibration_error", task="pos", label="a").reason
    assert one(found, "calibration_error", task="pos", label="a").value is not None


def test_labels_that_are_no_tokens_define_the_classes_themselves() -> None:
    """A network with 3 outputs and token ids up to 50: what counts is the label predicted, not the token shown."""
    ids = torch.randint(3, 50, (20, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, 3] = ids.sum(1) % 3
    words = [(row, 3, 4, f"r{int(labels[row, 3])}") for row in range(20)]
    logits = torch.zeros(20, 4, 3)
    logits[..., 1] = 2.0
    evaluation = FakeEvaluation(ids, {"rest": words}, labels=labels, labels_shifted=False, objective="algorithmic")
    found, _ = run(OutputAnalyzer(), evaluation, logits=logits)
    p = torch.tensor([0.0, 2.0, 0.0]).softmax(0)
    assert one(found, "accuracy", task="rest", label="r1").value == 1.0
    assert one(found, "accuracy", task="rest", label="r0").value == 0.0
    for k in range(3):
        assert one(found, "class_probability", task="rest", label=f"r{k}").value == pytest.approx(float(p[k]))


def test_words_without_a_prediction_say_so() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    annotations = {"pos": [(0, 0, 1, "start"), (1, 0, 1, "start"), (0, 1, 2, "rest")], "none": [(0, 0, 1, "start")]}
    found, _ = run(OutputAnalyzer(), FakeEvaluation(ids, annotations), logits=torch.zeros(2, 3, 8))
    reason = "no prediction of the evaluation set has such a word as its target"
    assert one(found, "accuracy", task="pos", label="start").reason == reason
    assert one(found, "class_share", task="pos", label="start").value == 0.0
    assert one(found, "loss", task="pos", label="rest").value == pytest.approx(np.log(8))
    assert one(found, "class_share", task="none").reason == reason


def test_not_numbers_and_impossible_targets() -> None:
    evaluation, logits = make()
    row, start = next((r, s) for r, s, _, _ in evaluation.annotations["half"] if s > 0)
    broken = logits.clone()
    broken[row, start - 1] = torch.nan
    found, _ = run(OutputAnalyzer(), evaluation, logits=broken)
    assert "are not numbers" in one(found, "accuracy", task="half").reason
    logits[row, start - 1, evaluation.input_ids[row, start]] = -torch.inf
    found, _ = run(OutputAnalyzer(), evaluation, logits=logits)
    assert "probability 0" in one(found, "loss", task="half").reason
    assert one(found, "accuracy", task="half").value is not None


def test_nothing_annotated() -> None:
    with pytest.raises(NotApplicable, match="no annotated task"):
        run(OutputAnalyzer(), FakeEvaluation(torch.zeros(2, 3).long()), logits=torch.zeros(2, 3, 4))


def test_tokens_outside_the_output() -> None:
    ids = torch.tensor([[1, 2, 3]])
    labels = torch.tensor([[1, 2, -100]])
    evaluation = FakeEvaluation(ids, {"pos": [(0, 1, 2, "a"), (0, 2, 3, "b")]}, labels=labels)
    with pytest.raises(EvaluationSetError, match="begins with token 3, but the network predicts the classes 0 to 2"):
        run(OutputAnalyzer(), evaluation, logits=torch.zeros(1, 3, 3))

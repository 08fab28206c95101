"""The right form against the wrong one: plain loops, networks of known preference, and what cannot be measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from analyzer_fakes import one, run

from trace_offline.analyzers.agreement import AgreementAnalyzer
from trace_offline.core.errors import EvaluationSetError, NotApplicable
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.recording import save_evaluation_set

V, T = 10, 8
SINGULAR, PLURAL = (4, 6), (5, 7)  # 4 and 5 are one lemma, 6 and 7 another


def build(tmp_path: Path, rows: int = 50) -> tuple[EvaluationSet, list[tuple[int, int, int, str, str]]]:
    """Rows <1> … with one or two verbs; ``verbs``: (row, position, other form, number, attractors)."""
    rng = np.random.default_rng(0)
    ids = rng.integers(8, V, (rows, T))
    ids[:, 0] = 1
    verbs = []
    for row in range(rows):
        for position in rng.choice(np.arange(1, T), size=rng.integers(0, 3), replace=False).tolist():
            lemma, plural = int(rng.random() < 0.4), bool(rng.random() < 0.3)
            ids[row, position] = (PLURAL if plural else SINGULAR)[lemma]
            other = (SINGULAR if plural else PLURAL)[lemma]
            verbs.append((row, position, other, "plural" if plural else "singular", str(int(rng.integers(3)))))
    annotations = [
        (row, task, position, position + 1, label)
        for row, position, _, *labels in verbs
        for task, label in zip(("agreement", "attractors"), labels, strict=True)
    ]
    folder = save_evaluation_set(
        tmp_path / "e",
        ids,
        annotations=annotations,
        special_token_ids=[1],
        alternatives=[(row, position, other) for row, position, other, _, _ in verbs],
    )
    return EvaluationSet.load(folder), verbs


def test_equals_a_plain_loop(tmp_path: Path) -> None:
    evaluation, verbs = build(tmp_path)
    logits = torch.randn(50, T, V, generator=torch.Generator().manual_seed(1)) * 2
    found, _ = run(AgreementAnalyzer(), evaluation, logits=logits)
    log_p = logits.double().log_softmax(-1)
    ids = evaluation.tokens(0, 50).input_ids
    counts = np.bincount(ids[:, 1:].reshape(-1).numpy(), minlength=V)
    groups: dict[tuple[str | None, str | None], list[tuple[int, list[float]]]] = {}
    for row, position, other, number, attractors in verbs:
        right = int(ids[row, position])
        margin = float(log_p[row, position - 1, right] - log_p[row, position - 1, other])
        more = counts[right] - 1 - counts[other]
        values = [float(margin > 0), 1 / (1 + np.exp(-margin)), margin, 0.5 + 0.5 * np.sign(more)]
        for key in ((None, None), ("agreement", number), ("attractors", attractors)):
            groups.setdefault(key, []).append((row, values))
    names = ("accuracy", "relative_probability", "margin", "frequency_accuracy")
    assert len(groups) == 1 + 2 + 3
    for (task, label), members in groups.items():
        rows = np.asarray([row for row, _ in members])
        for metric, column in zip(names, np.asarray([values for _, values in members]).T, strict=True):
            result = one(found, metric, task=task, label=label)
            assert result.value == pytest.approx(column.mean(), rel=1e-5), (task, label, metric)
            assert result.n == len(members)
            sums = np.array([(column[rows == row] - column.mean()).sum() for row in set(rows.tolist())])
            expected = np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(column)
            assert result.stderr == pytest.approx(expected, rel=1e-4)
    accuracies = [one(found, "accuracy", task="agreement", label=n).value for n in ("singular", "plural")]
    balanced = one(found, "balanced_accuracy", task="agreement")
    assert balanced.value == pytest.approx(np.mean(accuracies))
    assert balanced.stderr is not None


def test_batches_do_not_change_the_numbers(tmp_path: Path) -> None:
    evaluation, _ = build(tmp_path)
    logits = torch.randn(50, T, V, generator=torch.Generator().manual_seed(1))
    whole, _ = run(AgreementAnalyzer(), evaluation, logits=logits, batch=50)
    assert whole == run(AgreementAnalyzer(), evaluation, logits=logits, batch=3)[0]


def test_a_network_that_always_says_singular_is_at_chance_when_balanced(tmp_path: Path) -> None:
    evaluation, verbs = build(tmp_path)
    logits = torch.zeros(50, T, V)
    logits[..., list(SINGULAR)] = 1.0
    found, _ = run(AgreementAnalyzer(), evaluation, logits=logits)
    share = np.mean([number == "singular" for *_, number, _ in verbs])
    assert one(found, "accuracy").value == pytest.approx(share)
    balanced = one(found, "balanced_accuracy", task="agreement")
    assert (balanced.value, balanced.stderr) == (pytest.approx(0.5), pytest.approx(0))
    assert one(found, "margin", task="agreement", label="singular").value == pytest.approx(1, rel=1e-5)


def test_no_preference_counts_one_half(tmp_path: Path) -> None:
    evaluation, _ = build(tmp_path)
    found, _ = run(AgreementAnalyzer(), evaluation, logits=torch.zeros(50, T, V))
    assert one(found, "accuracy").value == 0.5
    assert one(found, "relative_probability").value == 0.5


def test_a_network_that_knows(tmp_path: Path) -> None:
    evaluation, _ = build(tmp_path)
    logits = torch.zeros(50, T, V)
    logits[:, :-1].scatter_(2, evaluation.tokens(0, 50).input_ids[:, 1:, None], 5.0)
    found, _ = run(AgreementAnalyzer(), evaluation, logits=logits)
    assert one(found, "accuracy").value == 1.0
    assert one(found, "margin").value == pytest.approx(5, rel=1e-5)
    assert one(found, "balanced_accuracy", task="agreement").value == 1.0
    assert one(found, "frequency_accuracy").value < 1.0


def test_other_tasks_may_break_the_places_down(tmp_path: Path) -> None:
    evaluation, verbs = build(tmp_path)
    found, _ = run(AgreementAnalyzer(), evaluation, logits=torch.zeros(50, T, V), tasks=("attractors", "none"))
    assert {item.task for item in found} == {None, "attractors"}
    assert sum(item.n for item in found if item.metric == "margin" and item.task) == len(verbs)


def test_a_label_of_a_whole_sentence_covers_its_places(tmp_path: Path) -> None:
    folder = save_evaluation_set(
        tmp_path / "e",
        [[1, 4, 8], [1, 5, 8], [1, 8, 4]],
        annotations=[(0, "frame", 0, 3, "x"), (1, "frame", 0, 3, "y"), (2, "frame", 0, 2, "y")],
        alternatives=[(0, 1, 5), (1, 1, 4), (2, 2, 5)],
    )
    found, _ = run(AgreementAnalyzer(), EvaluationSet.load(folder), logits=torch.zeros(3, 3, V), tasks=("frame",))
    assert one(found, "accuracy").n == 3
    assert one(found, "accuracy", task="frame", label="x").n == 1
    assert one(found, "accuracy", task="frame", label="y").n == 1  # the third place lies outside its label


def test_impossible_forms_and_undefined_logits(tmp_path: Path) -> None:
    evaluation, verbs = build(tmp_path)
    row, position, other, number, _ = verbs[0]
    logits = torch.zeros(50, T, V)
    logits[row, position - 1, other] = -torch.inf
    found, _ = run(AgreementAnalyzer(), evaluation, logits=logits)
    assert one(found, "margin").reason == f"1 of {len(verbs)} places have a form of probability 0"
    assert one(found, "accuracy").value > 0.5
    logits[row, position - 1] = torch.nan
    found, _ = run(AgreementAnalyzer(), evaluation, logits=logits)
    assert "are not numbers" in one(found, "accuracy").reason
    assert "are not numbers" in one(found, "balanced_accuracy", task="agreement").reason
    other_number = "plural" if number == "singular" else "singular"
    assert one(found, "accuracy", task="agreement", label=other_number).value == 0.5


def test_sets_without_alternatives_and_places_that_are_not_predicted(tmp_path: Path) -> None:
    plain = EvaluationSet.load(save_evaluation_set(tmp_path / "p", [[1, 2, 3]]))
    with pytest.raises(NotApplicable, match="names no other form of any word"):
        run(AgreementAnalyzer(), plain, logits=torch.zeros(1, 3, 5))
    first = EvaluationSet.load(save_evaluation_set(tmp_path / "f", [[1, 2, 3]], alternatives=[(0, 0, 4)]))
    with pytest.raises(NotApplicable, match="no place that has an alternative is predicted"):
        run(AgreementAnalyzer(), first, logits=torch.zeros(1, 3, 5))
    beyond = EvaluationSet.load(save_evaluation_set(tmp_path / "b", [[1, 2, 3]], alternatives=[(0, 2, 7)]))
    with pytest.raises(EvaluationSetError, match="has the label 7, but the network predicts the classes 0 to 4"):
        run(AgreementAnalyzer(), beyond, logits=torch.zeros(1, 3, 5))

"""The analyzers that know the training text: against networks that are n-gram models, dense tables and plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one, run

from trace_offline.analyzers import _measurements
from trace_offline.analyzers.memorization import MemorizationAnalyzer
from trace_offline.analyzers.ngram import NgramAnalyzer
from trace_offline.core.errors import EvaluationSetError, NotApplicable
from trace_offline.estimators.ngram import WittenBell
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.recording import save_evaluation_set

V = 12


def chain(seed: int, count: int) -> list[list[int]]:
    """Sentences <1> … <2> of a chain over tokens 3 to V − 1, some of them often."""
    rng = np.random.default_rng(seed)
    law = np.random.default_rng(99).dirichlet(np.full(V - 3, 0.3), V - 3)
    found = []
    for _ in range(count):
        states = [int(rng.integers(3))]
        while rng.random() > 0.2 and len(states) < 9:
            states.append(int(rng.choice(V - 3, p=law[states[-1]])))
        found.append([1, *(state + 3 for state in states), 2])
    return found


def build(tmp_path: Path, rows: int = 60, training: int = 80) -> EvaluationSet:
    return EvaluationSet.load(
        save_evaluation_set(
            tmp_path / "e", chain(0, rows), special_token_ids=[0, 1, 2], training_ids=chain(1, training)
        )
    )


def dense(evaluation: EvaluationSet, order: int, classes: int = V) -> torch.Tensor:
    """The n-gram distribution after every token, ``[N, T, V]``; uniform at the last position."""
    training = evaluation.training_text()
    model = WittenBell(training.levels[:order], classes)
    n, t = training.matched.shape
    found = np.full((n, t, classes), 1 / classes)
    for row in range(n):
        found[row, : t - 1] = model.distribution(training.context[:order, row, 1:].astype(np.int64))
    return torch.from_numpy(found)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_network_that_is_the_n_gram_model(order: int, tmp_path: Path) -> None:
    evaluation = build(tmp_path)
    found, _ = run(NgramAnalyzer(), evaluation, logits=dense(evaluation, order).log())
    label = str(order)
    assert one(found, "divergence", label=label).value == pytest.approx(0, abs=1e-6)
    assert one(found, "loss_difference", label=label).value == pytest.approx(0, abs=1e-6)
    assert one(found, "loss_difference", label=label).stderr == pytest.approx(0, abs=1e-6)
    assert one(found, "same_prediction", label=label).value == 1.0
    assert one(found, "loss").value == pytest.approx(one(found, "ngram_loss", label=label).value, abs=1e-6)
    for other in {1, 2, 3} - {order}:
        assert one(found, "divergence", label=str(other)).value > 0.05


def test_equals_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = build(tmp_path)
    logits = torch.randn(*evaluation.training_text().matched.shape, V, generator=torch.Generator().manual_seed(0))
    found, _ = run(NgramAnalyzer(), evaluation, logits=logits)
    targets = evaluation.tokens(0, evaluation.n_examples).targets
    log_q = logits.double().log_softmax(-1)
    for order in (1, 2, 3):
        p = dense(evaluation, order)
        rows, values = [], []
        for row, place in (targets != -100).nonzero().tolist():
            target = int(targets[row, place])
            here, q = p[row, place], log_q[row, place]
            loss, own = -float(here[target].log()), -float(q[target])
            values.append(
                [
                    loss,
                    float(here.argmax() == target),
                    own - loss,
                    float((here * (here.log() - q)).sum()),
                    float(here.argmax() == q.argmax()),
                ]
            )
            rows.append(row)
        table = np.asarray(values)
        names = ("ngram_loss", "ngram_accuracy", "loss_difference", "divergence", "same_prediction")
        for metric, column in zip(names, table.T, strict=True):
            result = one(found, metric, label=str(order))
            assert result.value == pytest.approx(column.mean(), rel=1e-5)
            assert result.n == len(rows)
            sums = np.array([(column[np.equal(rows, row)] - column.mean()).sum() for row in set(rows)])
            expected = np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(rows)
            assert result.stderr == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(_measurements, "CHUNK_NUMBERS", 5 * V)
    parts, _ = run(NgramAnalyzer(), evaluation, logits=logits, batch=3)
    for a, b in zip(found, parts, strict=True):
        assert (a.metric, a.label, a.n) == (b.metric, b.label, b.n)
        assert b.value == pytest.approx(a.value, rel=1e-6)


def test_impossible_and_undefined(tmp_path: Path) -> None:
    evaluation = build(tmp_path)
    logits = torch.zeros(*evaluation.training_text().matched.shape, V)
    row, place = (evaluation.tokens(0, evaluation.n_examples).targets != -100).nonzero()[0].tolist()
    logits[row, place, 0] = -torch.inf
    found, _ = run(NgramAnalyzer(), evaluation, logits=logits)
    assert "some token has probability 0: the divergence is infinite" in one(found, "divergence", label="2").reason
    assert one(found, "loss").value is not None
    logits[row, place] = torch.nan
    found, _ = run(NgramAnalyzer(), evaluation, logits=logits)
    assert "are not numbers" in one(found, "same_prediction", label="1").reason
    assert one(found, "ngram_loss", label="1").value is not None


def test_a_network_with_too_few_outputs(tmp_path: Path) -> None:
    folder = save_evaluation_set(tmp_path / "e", [[1, 2, 3]], training_ids=[[1, 2, 9]])
    with pytest.raises(EvaluationSetError, match=r"classes 0 to 4, but the counts hold token 9.*another tokenizer"):
        run(NgramAnalyzer(), EvaluationSet.load(folder), logits=torch.zeros(1, 3, 5))


@pytest.mark.parametrize("analyzer", [NgramAnalyzer(), MemorizationAnalyzer()])
def test_sets_that_know_no_training_text(analyzer: NgramAnalyzer, tmp_path: Path) -> None:
    evaluation = EvaluationSet.load(save_evaluation_set(tmp_path / "e", [[1, 2, 3]]))
    with pytest.raises(NotApplicable, match=r"knows no training text\. Build the set with it: .*--training-text FILE"):
        run(analyzer, evaluation, logits=torch.zeros(1, 3, 5))
    with pytest.raises(NotApplicable, match="knows no training text"):
        run(analyzer, FakeEvaluation(torch.zeros(1, 3).long()), logits=torch.zeros(1, 3, 5))


def test_memorization_equals_a_plain_loop(tmp_path: Path) -> None:
    evaluation = build(tmp_path)
    training = evaluation.training_text()
    logits = torch.randn(*training.matched.shape, V, generator=torch.Generator().manual_seed(0))
    found, _ = run(MemorizationAnalyzer(), evaluation, logits=logits, ngram=3, max_context=3)
    targets = evaluation.tokens(0, evaluation.n_examples).targets
    log_q, log_p = logits.double().log_softmax(-1), dense(evaluation, 3).log()
    texts = {tuple(text) for text in chain(1, 80)}
    rows = chain(0, 60)
    sides: dict[tuple[str, str], list[list[float]]] = {}
    for row, place in (targets != -100).nonzero().tolist():
        target = int(targets[row, place])
        loss, ngram = -float(log_q[row, place, target]), -float(log_p[row, place, target])
        numbers = [loss, float(log_q[row, place].argmax() == target), ngram]
        sides.setdefault(("text", "seen" if tuple(rows[row]) in texts else "novel"), []).append(numbers)
        context = tuple(rows[row][max(0, place - 1) : place + 1])
        grams = {text[i : i + 3] for text in texts for i in range(len(text) - 2)}
        known = {text[i : i + 2] for text in texts for i in range(len(text) - 1)}
        if len(context) == 2 and context in known:
            sides.setdefault(("ngram", "seen" if (*context, target) in grams else "novel"), []).append(numbers)
        sides.setdefault(("context", str(min(3, int(training.matched[row, place])))), []).append(numbers)
    for (task, side), values in sides.items():
        label = "3+" if side == "3" else side
        for metric, column in zip(("loss", "accuracy", "ngram_loss"), np.asarray(values).T, strict=True):
            result = one(found, metric, task=task, label=label)
            assert result.value == pytest.approx(column.mean(), rel=1e-5), (task, side, metric)
            assert result.n == len(values)
    for task in ("text", "ngram"):
        seen, novel = (np.asarray(sides[task, side]).mean(0) for side in ("seen", "novel"))
        assert one(found, "loss_gap", task=task).value == pytest.approx(novel[0] - seen[0], rel=1e-5)
        assert one(found, "accuracy_gap", task=task).value == pytest.approx(seen[1] - novel[1], abs=1e-9)
        assert one(found, "ngram_loss_gap", task=task).value == pytest.approx(novel[2] - seen[2], rel=1e-5)
        excess = novel[0] - seen[0] - novel[2] + seen[2]
        assert one(found, "excess_loss_gap", task=task).value == pytest.approx(excess, rel=1e-4)
        n = len(sides[task, "seen"])
        share = one(found, "share_seen", task=task)
        assert share.value == pytest.approx(n / (n + len(sides[task, "novel"])))
        assert share.stderr is not None


def test_a_trigram_network_has_no_gap_of_its_own(tmp_path: Path) -> None:
    """It finds the known side easier, as the trigram model does, and nothing beyond that."""
    evaluation = build(tmp_path, rows=150)
    found, _ = run(MemorizationAnalyzer(), evaluation, logits=dense(evaluation, 3).log())
    assert one(found, "loss_gap", task="text").value > 0.1
    excess = one(found, "excess_loss_gap", task="text")
    assert excess.value == pytest.approx(0, abs=1e-6)
    assert excess.stderr == pytest.approx(0, abs=1e-6)


def test_a_network_that_knows_its_training_texts_by_heart(tmp_path: Path) -> None:
    """Right wherever the whole sentence so far continues as in training, else as unsure as the trigram model."""
    evaluation = build(tmp_path, rows=150)
    training = evaluation.training_text()
    p = dense(evaluation, 3)
    tokens = evaluation.tokens(0, evaluation.n_examples)
    for row in np.flatnonzero(training.seen):
        for place in range(int(tokens.attention_mask[row].sum()) - 1):
            p[row, place] = 0.01 / (V - 1)
            p[row, place, tokens.input_ids[row, place + 1]] = 0.99
    found, _ = run(MemorizationAnalyzer(), evaluation, logits=p.log())
    excess = one(found, "excess_loss_gap", task="text")
    assert excess.value > 5 * excess.stderr
    assert one(found, "accuracy", task="text", label="seen").value == 1.0


def test_one_side_only(tmp_path: Path) -> None:
    folder = save_evaluation_set(tmp_path / "e", [[1, 4, 5], [1, 4, 4]], training_ids=[[1, 4, 5], [1, 4, 4]])
    found, _ = run(MemorizationAnalyzer(), EvaluationSet.load(folder), logits=torch.zeros(2, 3, 8))
    assert one(found, "loss_gap", task="text").reason == "no prediction is novel"
    assert one(found, "loss", task="text", label="seen").value == pytest.approx(np.log(8))
    assert one(found, "loss", task="text", label="novel").reason == "there is no such prediction in the evaluation set"
    assert "no prediction follows a known context" in one(found, "share_seen", task="ngram").reason

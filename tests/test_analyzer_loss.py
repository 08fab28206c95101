"""The analyzer ``loss`` against transformers' own loss and against the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny_models
import torch
from analyzer_fakes import FakeEvaluation, one, run

from trace_offline.analyzers import _measurements
from trace_offline.analyzers.loss import LossAnalyzer
from trace_offline.core.errors import EvaluationSetError, NotApplicable

METRICS = ("loss", "perplexity", "accuracy", "entropy", "calibration_error")


def text(rows: int = 12, length: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny_models.VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    return ids, torch.arange(length)[None] < lengths[:, None]


@pytest.mark.parametrize("build", [tiny_models.gpt2, tiny_models.gpt_neox, tiny_models.llama_gqa])
def test_equals_transformers_causal_loss(build) -> None:
    model = build()
    ids, mask = text()
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~mask, -100))
    found, _ = run(LossAnalyzer(), FakeEvaluation(ids, attention_mask=mask), logits=output.logits, batch=5)
    loss = one(found, "loss")
    assert loss.value == pytest.approx(float(output.loss), rel=1e-5)
    assert loss.n == int(mask[:, 1:].sum())
    assert one(found, "perplexity").value == pytest.approx(math.exp(loss.value))
    assert one(found, "perplexity").stderr == pytest.approx(math.exp(loss.value) * loss.stderr)


def test_equals_transformers_masked_loss() -> None:
    model = tiny_models.bert()
    ids, mask = text()
    hidden = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3) & mask
    labels = ids.masked_fill(~hidden, -100)
    shown = ids.masked_fill(hidden, 2)
    with torch.no_grad():
        output = model(input_ids=shown, attention_mask=mask, labels=labels)
    evaluation = FakeEvaluation(shown, attention_mask=mask, labels=labels, labels_shifted=False, objective="masked_lm")
    found, _ = run(LossAnalyzer(), evaluation, logits=output.logits, batch=5)
    assert one(found, "loss").value == pytest.approx(float(output.loss), rel=1e-5)
    assert one(found, "loss").n == int(hidden.sum())


def test_a_network_in_float64_keeps_its_precision() -> None:
    evaluation, logits = random_case()
    wide = logits.double() + 1e-9 * torch.arange(logits.shape[-1])
    scored = evaluation.tokens(0, 40).targets != -100
    nll = torch.nn.functional.cross_entropy(wide[scored], evaluation.tokens(0, 40).targets[scored])
    found, _ = run(LossAnalyzer(), evaluation, logits=wide)
    assert one(found, "loss").value == pytest.approx(float(nll), rel=1e-13)
    half, _ = run(LossAnalyzer(), evaluation, logits=logits.bfloat16())
    same, _ = run(LossAnalyzer(), evaluation, logits=logits.bfloat16().float())
    assert one(half, "loss").value == one(same, "loss").value


def random_case(seed: int = 0, rows: int = 40) -> tuple[FakeEvaluation, torch.Tensor]:
    ids, mask = text(rows, 8, seed)
    logits = 3 * torch.randn(rows, 8, tiny_models.VOCABULARY, generator=torch.Generator().manual_seed(seed))
    logits[:, :-1].scatter_add_(2, ids[:, 1:, None], torch.full((rows, 7, 1), 6.0))
    return FakeEvaluation(ids, attention_mask=mask), logits


def test_every_metric_by_its_definition() -> None:
    evaluation, logits = random_case()
    tokens = evaluation.tokens(0, 40)
    found, _ = run(LossAnalyzer(), evaluation, logits=logits)
    scored = tokens.targets != -100
    distribution = torch.distributions.Categorical(logits=logits[scored].double())
    targets = tokens.targets[scored]
    nll = -distribution.log_prob(targets)
    correct = distribution.probs.argmax(-1) == targets
    assert one(found, "loss").value == pytest.approx(float(nll.mean()), rel=1e-6)
    assert one(found, "accuracy").value == pytest.approx(float(correct.double().mean()))
    assert one(found, "entropy").value == pytest.approx(float(distribution.entropy().mean()), rel=1e-5)
    top = distribution.probs.amax(-1)
    bins = (top * 15).ceil().long() - 1
    gaps = [abs(float((correct[bins == m].double() - top[bins == m]).sum())) for m in range(15)]
    assert one(found, "calibration_error").value == pytest.approx(sum(gaps) / len(top), rel=1e-4)
    # standard error over sequences: residuals of the ratio, one per sequence
    per_row = torch.zeros(tokens.targets.shape, dtype=torch.float64).masked_scatter_(scored, nll - nll.mean()).sum(1)
    expected = math.sqrt(40 / 39 * float(per_row.square().sum())) / len(nll)
    assert one(found, "loss").stderr == pytest.approx(expected, rel=1e-5)
    assert all(one(found, metric).stderr > 0 and one(found, metric).n == len(nll) for metric in METRICS)


def test_neither_batches_nor_chunks_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation, logits = random_case()
    whole, _ = run(LossAnalyzer(), evaluation, logits=logits, batch=40)
    monkeypatch.setattr(_measurements, "CHUNK_NUMBERS", 3 * tiny_models.VOCABULARY)
    parts, _ = run(LossAnalyzer(), evaluation, logits=logits, batch=3)
    for metric in METRICS:
        assert one(parts, metric).value == pytest.approx(one(whole, metric).value, rel=1e-9)
        assert one(parts, metric).stderr == pytest.approx(one(whole, metric).stderr, rel=1e-9)


def test_rows_of_one_document_are_one_cluster() -> None:
    evaluation, logits = random_case()
    doubled = FakeEvaluation(
        evaluation.input_ids.repeat_interleave(2, 0),
        attention_mask=evaluation.attention_mask.repeat_interleave(2, 0),
        group=np.repeat(np.arange(40), 2),
    )
    single, _ = run(LossAnalyzer(), evaluation, logits=logits)
    twice, _ = run(LossAnalyzer(), doubled, logits=logits.repeat_interleave(2, 0))
    for metric in METRICS:
        assert one(twice, metric).value == pytest.approx(one(single, metric).value)
        assert one(twice, metric).stderr == pytest.approx(one(single, metric).stderr)


def test_uniform_and_certain_predictions() -> None:
    ids, mask = text()
    uniform, _ = run(LossAnalyzer(), FakeEvaluation(ids, attention_mask=mask), logits=torch.zeros(12, 10, 80))
    assert one(uniform, "loss").value == pytest.approx(math.log(80), rel=1e-6)
    assert one(uniform, "entropy").value == pytest.approx(math.log(80), rel=1e-6)
    assert one(uniform, "perplexity").value == pytest.approx(80, rel=1e-5)
    certain = torch.full((12, 10, 80), -torch.inf)
    certain[:, :-1].scatter_(2, ids[:, 1:, None], 0.0)
    certain[:, -1, 0] = 0.0
    found, _ = run(LossAnalyzer(), FakeEvaluation(ids, attention_mask=mask), logits=certain)
    assert [one(found, metric).value for metric in METRICS] == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_not_numbers_are_missing_with_the_reason() -> None:
    evaluation, logits = random_case()
    logits[3, 0] = torch.nan
    found, _ = run(LossAnalyzer(), evaluation, logits=logits)
    total = int(evaluation.attention_mask[:, 1:].sum())
    for metric in METRICS:
        assert one(found, metric).value is None
        assert one(found, metric).reason == f"the logits of 1 of {total} predictions are not numbers"


def test_impossible_targets_leave_what_can_be_measured() -> None:
    evaluation, logits = random_case()
    logits[0, 0, evaluation.input_ids[0, 1]] = -torch.inf
    found, _ = run(LossAnalyzer(), evaluation, logits=logits)
    assert "1 of" in one(found, "loss").reason
    assert "targets have probability 0: the loss is infinite" in one(found, "perplexity").reason
    assert one(found, "accuracy").value is not None
    assert one(found, "entropy").value is not None


def test_perplexity_too_large_for_a_number() -> None:
    ids = torch.zeros(3, 4, dtype=torch.long)
    logits = torch.zeros(3, 4, 2)
    logits[..., 1] = 5000.0
    found, _ = run(LossAnalyzer(), FakeEvaluation(ids), logits=logits)
    assert one(found, "loss").value == pytest.approx(5000.0)
    assert "larger than a number can be" in one(found, "perplexity").reason


def test_one_sequence_has_no_standard_error() -> None:
    ids = torch.tensor([[5, 6, 7]])
    found, _ = run(LossAnalyzer(), FakeEvaluation(ids), logits=torch.zeros(1, 3, 80))
    assert [one(found, metric).stderr for metric in METRICS] == [None] * 5


def test_nothing_to_predict() -> None:
    ids = torch.zeros(4, 3, dtype=torch.long)
    evaluation = FakeEvaluation(ids, labels=torch.full_like(ids, -100))
    with pytest.raises(NotApplicable, match="no position of the evaluation set has a target"):
        run(LossAnalyzer(), evaluation, logits=torch.zeros(4, 3, 80))


def test_labels_outside_the_output() -> None:
    evaluation = FakeEvaluation(torch.full((2, 3), 90))
    with pytest.raises(EvaluationSetError, match=r"label 90, but the network predicts the classes 0 to 79"):
        run(LossAnalyzer(), evaluation, logits=torch.zeros(2, 3, 80))

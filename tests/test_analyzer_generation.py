"""What networks repeat and write: plain loops over predictions, chains whose texts are known, and real small models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from analyzer_fakes import FakeEvaluation, one, run
from torch import Tensor, nn

from trace_offline.activations.model import ModelView
from trace_offline.analyzers.base import Context
from trace_offline.analyzers.generation import GenerationAnalyzer
from trace_offline.analyzers.repetition import RepetitionAnalyzer
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import parse_params
from trace_offline.core.types import Measurement
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.recording import save_evaluation_set

V = 9


@pytest.mark.parametrize("window", [2, 128])
def test_repetition_equals_a_plain_loop(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (20, 10), generator=generator)
    mask = torch.arange(10)[None] < torch.randint(2, 11, (20,), generator=generator)[:, None]
    logits = torch.randn(20, 10, V, generator=generator)
    evaluation = FakeEvaluation(ids, attention_mask=mask)
    evaluation.special_token_ids = (0,)
    found, _ = run(RepetitionAnalyzer(), evaluation, logits=logits, window=window)
    targets = evaluation.tokens(0, 20).targets
    rows, values = [], []
    for row, place in (targets != -100).nonzero().tolist():
        target, top = int(targets[row, place]), int(logits[row, place].argmax())
        context = set(ids[row, max(0, place - window + 1) : place + 1].tolist()) - {0}
        mass = float(logits[row, place].double().softmax(-1)[sorted(context)].sum())
        repeats, text = float(top in context), float(target in context)
        values.append([repeats, float(top in context and top != target), text, repeats - text, mass, mass - text])
        rows.append(row)
    table = np.asarray(values)
    for metric, column in zip([spec.name for spec in RepetitionAnalyzer.metrics], table.T, strict=True):
        result = one(found, metric)
        assert result.value == pytest.approx(column.mean(), rel=1e-5)
        assert result.n == len(rows)
        sums = np.array([(column[np.equal(rows, row)] - column.mean()).sum() for row in set(rows)])
        assert result.stderr == pytest.approx(
            np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(rows), rel=1e-4
        )


def test_networks_that_always_and_never_repeat() -> None:
    ids = torch.tensor([[1, 2, 1, 2, 3]]).repeat(4, 1)
    copy = torch.full((4, 5, V), -30.0).scatter_(2, ids[..., None], 30.0)
    found, _ = run(RepetitionAnalyzer(), FakeEvaluation(ids), logits=copy)
    assert one(found, "prediction_repeats").value == 1.0
    assert one(found, "wrong_prediction_repeats").value == 1.0
    assert one(found, "text_repeats").value == 0.5
    assert one(found, "mass_excess").value == pytest.approx(0.5)
    never = torch.zeros(4, 5, V)
    never[..., 8] = 60.0
    found, _ = run(RepetitionAnalyzer(), FakeEvaluation(ids), logits=never)
    assert one(found, "prediction_repeats").value == 0.0
    assert one(found, "repeated_mass").value == pytest.approx(0, abs=1e-20)


def test_repetition_that_cannot_be_measured() -> None:
    ids = torch.tensor([[1, 2, 1]])
    broken = torch.zeros(1, 3, V)
    broken[0, 0] = torch.nan
    found, _ = run(RepetitionAnalyzer(), FakeEvaluation(ids), logits=broken)
    assert "are not numbers" in one(found, "repeated_mass").reason
    assert one(found, "text_repeats").value == 0.5
    with pytest.raises(NotApplicable, match="not of the next token"):
        run(RepetitionAnalyzer(), FakeEvaluation(ids, labels_shifted=False), logits=broken)
    with pytest.raises(NotApplicable, match="no position of the evaluation set has a target"):
        run(RepetitionAnalyzer(), FakeEvaluation(ids[:, :1]), logits=broken[:, :1])


class Chain(nn.Module):
    """The next token follows row x_t of a table."""

    def __init__(self, law: np.ndarray) -> None:
        super().__init__()
        self.table = torch.from_numpy(law).log()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.table[input_ids]


def law_of_words(seed: int = 0) -> np.ndarray:
    """Tokens 3 to 8 after one another, ended by 2 with probability 0.2; 1 begins a text, 0 pads."""
    rng = np.random.default_rng(seed)
    law = np.zeros((V, V))
    law[:, 3:] = rng.dirichlet(np.full(6, 0.5), V) * 0.8
    law[:, 2] = 0.2
    return law


def texts(law: np.ndarray, count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        row = [1]
        while row[-1] != 2 and len(row) < 40:
            row.append(int(rng.choice(V, p=law[row[-1]])))
        found.append(row)
    return found


def generate(module: Any, evaluation: Any, **params: Any) -> list[Measurement]:
    analyzer = GenerationAnalyzer()
    chosen = parse_params(GenerationAnalyzer.Params, "generation", params)
    found = list(analyzer.measure(Context(ModelView(module, None, "cpu", "float32"), evaluation, chosen, 0)))
    names = {spec.name for spec in analyzer.metrics}
    assert all(isinstance(item, Measurement) and item.metric in names for item in found)
    return [item for item in found if isinstance(item, Measurement)]


def build(tmp_path: Path, rows: list[list[int]], **given: Any) -> EvaluationSet:
    return EvaluationSet.load(save_evaluation_set(tmp_path / "e", rows, special_token_ids=[0, 1, 2], **given))


def test_texts_of_the_law_that_made_the_evaluation_set(tmp_path: Path) -> None:
    law = law_of_words()
    evaluation = build(tmp_path, texts(law, 300, 1))
    found = generate(Chain(law), evaluation, samples=300, max_n=3)
    for n in "123":
        for metric in ("divergence", "text_divergence"):
            result = one(found, metric, label=n)
            assert abs(result.value) < 4 * result.stderr, (metric, n)
            assert result.n == 300
        repetition, control = one(found, "repetition", label=n), one(found, "text_repetition", label=n)
        assert abs(repetition.value - control.value) < 4 * np.hypot(repetition.stderr, control.stderr)
    length, control = one(found, "length"), one(found, "text_length")
    assert abs(length.value - control.value) < 4 * np.hypot(length.stderr, control.stderr)
    assert abs(length.value - 4) < 4 * length.stderr  # geometric: 1 / 0.2 − 1
    assert one(found, "finished").value == pytest.approx(1.0, abs=0.01)


def test_texts_of_another_law_are_told_apart(tmp_path: Path) -> None:
    evaluation = build(tmp_path, texts(law_of_words(), 200, 1))
    found = generate(Chain(law_of_words(seed=5)), evaluation, samples=200, max_n=2)
    for n in "12":
        result = one(found, "divergence", label=n)
        assert result.value > 3 * result.stderr
        assert result.value > 2 * abs(one(found, "text_divergence", label=n).value)


def test_greedy_texts_of_one_prompt_are_one_text(tmp_path: Path) -> None:
    law = law_of_words()
    law[:, 2] = 0.0001  # never the most likely
    evaluation = build(tmp_path, texts(law_of_words(), 50, 1))
    found = generate(Chain(law), evaluation, samples=10, temperature=0, max_new_tokens=30)
    assert one(found, "distinct").value == 0.0
    assert one(found, "length").value == 30
    assert one(found, "finished").value == 0.0
    # a chain that always goes the same way is in a circle of at most its six words
    assert one(found, "repetition", label="1").value >= 1 - 6 / 30


def test_rows_without_an_end(tmp_path: Path) -> None:
    """Rows cut out of longer texts: samples are as long as what they are compared with."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, V, length).tolist() for length in (5, 9, 13, 13) * 5]
    evaluation = build(tmp_path, rows)
    law = np.zeros((V, V))
    law[:, 3:] = 1 / 6
    found = generate(Chain(law), evaluation, samples=20, prompt_tokens=2, max_n=1)
    assert one(found, "finished").reason == "rows of the evaluation set do not end with a special token"
    assert one(found, "text_length").value == pytest.approx(np.mean([3, 7, 11, 11]))
    repetition, control = one(found, "repetition", label="1"), one(found, "text_repetition", label="1")
    assert abs(repetition.value - control.value) < 4 * np.hypot(repetition.stderr, control.stderr)
    assert abs(one(found, "divergence", label="1").value) < 4 * one(found, "divergence", label="1").stderr


def test_a_model_of_transformers_within_its_context(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    evaluation = EvaluationSet.load(
        save_evaluation_set(tmp_path / "e", rng.integers(3, 80, (12, 20)), group=[i // 2 for i in range(12)])
    )
    found = generate(tiny_models.gpt2(), evaluation, samples=8, max_new_tokens=500)
    assert one(found, "length").value == tiny_models.POSITIONS - 1
    assert found == generate(tiny_models.gpt2(), evaluation, samples=8, max_new_tokens=500)


def test_what_cannot_be_generated(tmp_path: Path) -> None:
    law = law_of_words()
    evaluation = build(tmp_path, [[1, 3, 2], [1, 4, 5, 2]])
    with pytest.raises(NotApplicable, match="fewer than two rows of the evaluation set have more than 3 tokens"):
        generate(Chain(law), evaluation, prompt_tokens=3)
    found = generate(Chain(law), evaluation, samples=5, max_n=4)
    assert one(found, "text_repetition", label="4").reason == "no text is long enough for an n-gram of this length"
    assert "no n-gram of this length occurs in two texts" in one(found, "text_divergence", label="1").reason
    short = Chain(law)
    short.config = SimpleNamespace(max_position_embeddings=2)
    with pytest.raises(NotApplicable, match="prompts of 2 tokens leave nothing of the network's context of 2"):
        generate(short, evaluation, prompt_tokens=2)
    labelled = FakeEvaluation(torch.zeros(3, 3).long(), objective="masked_lm")
    with pytest.raises(NotApplicable, match="not one of next-token prediction"):
        generate(Chain(law), labelled)
    law[1] = np.nan
    with pytest.raises(NotApplicable, match="nothing can be sampled"):
        generate(Chain(law), evaluation)

"""The analyzer ``minimal_pairs`` against sums by hand, scipy, a uniform model, and BLiMP scored one by one."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one, run
from conftest import shared_data
from scipy import stats

from trace_offline.analyzers.minimal_pairs import MinimalPairsAnalyzer
from trace_offline.core.errors import NotApplicable
from trace_offline.evaluation.build import build_evaluation_set
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.evaluation.pairs import Pairs

V = 11
TASK = "violation"


def make(n: int = 12, length: int = 7, seed: int = 0, *, kinds: str = "ab") -> tuple[FakeEvaluation, torch.Tensor]:
    """``n`` pairs of rows of different lengths, kinds in turn, one word of one or two tokens marked in each."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, V, (2 * n, length)))
    lengths = rng.integers(4, length + 1, 2 * n)
    mask = torch.arange(length)[None] < torch.from_numpy(lengths)[:, None]
    marks = []
    for k in range(n):
        for row in (k, n + k):
            start = int(rng.integers(1, 3))
            marks.append((row, start, start + int(rng.integers(1, 3)), kinds[k % len(kinds)]))
    evaluation = FakeEvaluation(ids, {TASK: marks}, attention_mask=mask)
    evaluation.pairs = Pairs(np.tile(np.arange(n), 2), np.repeat([0, 1], n))  # type: ignore[attr-defined]
    evaluation.has_labels = False  # type: ignore[attr-defined]
    return evaluation, torch.from_numpy(rng.normal(size=(2 * n, length, V))).float()


def by_hand(evaluation: FakeEvaluation, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits of the marked tokens and of the whole row, and tokens predicted, of each row: one token at a time."""
    marked, whole, count = (np.zeros(len(logits)) for _ in range(3))
    inside = {(row, t) for row, start, end, _ in evaluation.annotations[TASK] for t in range(start, end)}
    for row in range(len(logits)):
        for t in range(1, int(evaluation.attention_mask[row].sum())):
            p = float(logits[row, t - 1].double().softmax(-1)[evaluation.input_ids[row, t]])
            whole[row] -= math.log2(p)
            count[row] += 1
            marked[row] -= math.log2(p) if (row, t) in inside else 0.0
    return marked, whole, count


@pytest.mark.parametrize("seed", range(4))
def test_numbers_by_hand(seed: int) -> None:
    n = 12
    evaluation, logits = make(n, seed=seed)
    found, arrays = run(MinimalPairsAnalyzer(), evaluation, logits=logits, keep_pairs=True)
    marked, whole, count = by_hand(evaluation, logits)
    for label, keep in (("a", np.arange(0, n, 2)), ("b", np.arange(1, n, 2)), (None, np.arange(n))):
        where = {"task": TASK, "label": label}
        first, second = marked[keep], marked[n + keep]
        rise = second - first
        se = rise.std(ddof=1) / math.sqrt(len(rise))
        item = one(found, "surprisal_rise", **where)
        assert (item.value, item.stderr, item.n) == (pytest.approx(rise.mean()), pytest.approx(se), len(keep))
        assert one(found, "surprisal_original", **where).value == pytest.approx(first.mean(), rel=1e-5)
        assert one(found, "surprisal_changed", **where).value == pytest.approx(second.mean(), rel=1e-5)
        assert one(found, "preferred_at_position", **where).value == pytest.approx((rise > 0).mean())
        expected = stats.wilcoxon(second, first, method="exact").pvalue
        assert one(found, "rise_p_wilcoxon", **where).value == pytest.approx(expected)
        sign = stats.binomtest(int((rise > 0).sum()), len(rise)).pvalue
        assert one(found, "rise_p_sign", **where).value == pytest.approx(sign)
        total = whole[n + keep] - whole[keep]
        assert one(found, "sentence_rise", **where).value == pytest.approx(total.mean(), rel=1e-4)
        assert one(found, "preferred_sentence", **where).value == pytest.approx((total > 0).mean())
        mean = whole[n + keep] / count[n + keep] - whole[keep] / count[keep]
        assert one(found, "preferred_per_token", **where).value == pytest.approx((mean > 0).mean())
        shorter = (np.sign(count[n + keep] - count[keep]) + 1) / 2
        assert one(found, "shorter_original", **where).value == pytest.approx(shorter.mean())
        kept = next(each for each in arrays if each.name == "surprisal_rise" and each.label == label)
        assert kept.values == pytest.approx(rise, rel=1e-4, abs=1e-5)


def test_a_model_that_cannot_tell_scores_what_length_scores() -> None:
    evaluation, logits = make(40)
    found, _ = run(MinimalPairsAnalyzer(), evaluation, logits=torch.zeros_like(logits))
    where = {"task": TASK, "label": None}
    assert one(found, "preferred_per_token", **where).value == 0.5
    shorter, whole = one(found, "shorter_original", **where), one(found, "preferred_sentence", **where)
    assert (whole.value, whole.stderr) == (shorter.value, shorter.stderr)


def test_pairs_that_share_their_original_are_one_observation() -> None:
    evaluation, logits = make(6, kinds="a")
    twice = FakeEvaluation(
        evaluation.input_ids.repeat_interleave(2, 0),
        {TASK: [(2 * row + c, *rest) for row, *rest in evaluation.annotations[TASK] for c in (0, 1)]},  # type: ignore[misc]
        attention_mask=evaluation.attention_mask.repeat_interleave(2, 0),
        group=np.tile(np.repeat(np.arange(6), 2), 2),
    )
    twice.pairs = Pairs(np.tile(np.arange(12), 2), np.repeat([0, 1], 12))  # type: ignore[attr-defined]
    twice.has_labels = False  # type: ignore[attr-defined]
    once, _ = run(MinimalPairsAnalyzer(), evaluation, logits=logits)
    double, _ = run(MinimalPairsAnalyzer(), twice, logits=logits.repeat_interleave(2, 0))
    for metric in ("surprisal_rise", "sentence_rise", "preferred_sentence", "preferred_at_position"):
        mine, theirs = (one(each, metric, task=TASK, label="a") for each in (once, double))
        assert (mine.value, mine.stderr) == pytest.approx((theirs.value, theirs.stderr))


def test_the_first_token_of_a_row_is_not_predicted() -> None:
    evaluation, logits = make(4, kinds="a")
    evaluation.annotations[TASK] = [
        (row, 0 if row % 4 == 0 else s, e, k) for row, s, e, k in evaluation.annotations[TASK]
    ]
    found, _ = run(MinimalPairsAnalyzer(), evaluation, logits=logits)
    assert one(found, "surprisal_rise", task=TASK, label="a").n == 3
    assert one(found, "preferred_sentence", task=TASK, label="a").n == 4


def test_pairs_without_marks_are_compared_as_sentences() -> None:
    evaluation, logits = make(5)
    evaluation.annotations, evaluation.tasks = {}, ()
    found, _ = run(MinimalPairsAnalyzer(), evaluation, logits=logits)
    assert {item.label for item in found} == {None}
    assert one(found, "preferred_sentence", task=TASK).value is not None
    assert "no pair has marked tokens" in str(one(found, "surprisal_rise", task=TASK).reason)


def test_equal_members_have_nothing_to_test() -> None:
    evaluation, logits = make(5)
    found, _ = run(MinimalPairsAnalyzer(), evaluation, logits=torch.zeros_like(logits))
    evaluation.annotations[TASK] = [(row, 1, 2, "a") for row in range(10)]
    found, _ = run(MinimalPairsAnalyzer(), evaluation, logits=torch.zeros_like(logits))
    assert one(found, "surprisal_rise", task=TASK, label="a").value == 0.0
    assert one(found, "preferred_at_position", task=TASK, label="a").value == 0.5
    assert one(found, "rise_p_wilcoxon", task=TASK, label="a").reason == "no pair differs: there is nothing to test"


@pytest.mark.parametrize(("value", "message"), [(math.nan, "are not numbers"), (-math.inf, "probability 0")])
def test_logits_that_are_not_numbers(value: float, message: str) -> None:
    evaluation, logits = make(6)
    logits[2, 1, int(evaluation.input_ids[2, 2])] = value
    found, _ = run(MinimalPairsAnalyzer(), evaluation, logits=logits)
    for metric in ("surprisal_rise", "rise_p_sign", "preferred_sentence", "sentence_rise"):
        assert message in str(one(found, metric, task=TASK, label="a").reason)
        assert one(found, metric, task=TASK, label="b").value is not None
    assert one(found, "shorter_original", task=TASK, label="a").value is not None


def test_where_it_is_not_applicable() -> None:
    evaluation, logits = make(4)
    evaluation.pairs = None  # type: ignore[attr-defined]
    with pytest.raises(
        NotApplicable, match=r"holds no minimal pairs\. Build one with: trace-offline evaluation-set build"
    ):
        run(MinimalPairsAnalyzer(), evaluation, logits=logits)
    evaluation, logits = make(4)
    evaluation.labels_shifted, evaluation.objective = False, "masked_lm"
    with pytest.raises(
        NotApplicable, match=r"next-token probabilities, .*\(masked_lm\) is not scored on the next token"
    ):
        run(MinimalPairsAnalyzer(), evaluation, logits=logits)


def straight(
    model: torch.nn.Module, evaluation: EvaluationSet, tokenizer: object, pairs: list[tuple[str, str]]
) -> float:
    """Share of pairs whose first sentence is more probable: each by itself, through the model's own interface."""
    score = 0.0
    for pair in pairs:
        totals = []
        for text in pair:
            ids = torch.tensor([tokenizer(text)["input_ids"]])  # type: ignore[operator]
            with torch.no_grad():
                loss = model(input_ids=ids, labels=ids).loss
            totals.append(-float(loss) * (ids.shape[1] - 1))
        score += (np.sign(totals[0] - totals[1]) + 1) / 2
    return score / len(pairs)


def blimp(tmp_path: Path, names: list[str], count: int) -> tuple[EvaluationSet, list[tuple[str, str]]]:
    """The first ``count`` pairs of each paradigm."""
    import gzip
    import json

    lines = [
        line
        for name in names
        for line in gzip.decompress(shared_data("blimp", f"{name}.jsonl.gz").read_bytes()).decode().splitlines()[:count]
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    records = [json.loads(line) for line in lines]
    built = build_evaluation_set(tmp_path / "e", [tmp_path / "p.jsonl"], tokenizer=shared_data("stories260K_hf"))
    return built, [(record["sentence_good"], record["sentence_bad"]) for record in records]


def measured(evaluation: EvaluationSet, model: torch.nn.Module) -> list:
    from trace_offline.activations.forward import run_pass
    from trace_offline.analyzers.base import Context
    from trace_offline.checkpoints.model_view import ModelView

    view = ModelView(model, None, "cpu", "float32")
    analyzer = MinimalPairsAnalyzer()
    context = Context(view, evaluation, analyzer.Params(), 0)
    collectors = dict(analyzer.collectors(context))
    assert not run_pass(view, evaluation, collectors)
    context.collected = {name: each.finish() for name, each in collectors.items()}
    return list(analyzer.measure(context))


def test_blimp_scored_straight_from_a_trained_model(tmp_path: Path, stories_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = ["irregular_plural_subject_verb_agreement_1", "drop_argument"]
    evaluation, pairs = blimp(tmp_path, names, 15)
    model = AutoModelForCausalLM.from_pretrained(stories_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    found = measured(evaluation, model)
    for index, name in enumerate(names):
        expected = straight(model, evaluation, tokenizer, pairs[15 * index : 15 * index + 15])
        assert one(found, "preferred_sentence", task=TASK, label=name).value == pytest.approx(expected, abs=1e-9)
    assert one(found, "preferred_sentence", task=TASK).n == 30


@pytest.mark.slow
def test_known_accuracy_of_the_trained_model_on_blimp(tmp_path: Path, stories_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    names = sorted(path.name.removesuffix(".jsonl.gz") for path in shared_data("blimp").glob("*.jsonl.gz"))
    assert len(names) == 67
    evaluation, _ = blimp(tmp_path, names, 200)
    found = measured(evaluation, AutoModelForCausalLM.from_pretrained(stories_model).eval())
    shares = [one(found, "preferred_sentence", task=TASK, label=name).value for name in names]
    assert float(np.mean(shares)) == pytest.approx(0.535, abs=0.0025)


def test_the_fakes_here_have_what_the_analyzer_reads() -> None:
    evaluation, _ = make(3)
    real = {"pairs", "has_labels", "labels_shifted", "objective", "tasks", "group", "n_examples"}
    assert real <= set(EvaluationSet.__dataclass_fields__)
    assert isinstance(evaluation.spans(TASK), SimpleNamespace)

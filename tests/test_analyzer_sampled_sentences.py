"""The analyzer ``sampled_sentences`` on models that write known sentences with known probabilities."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from analyzer_fakes import one
from torch import Tensor, nn

from trace_offline.analyzers.base import Context
from trace_offline.analyzers.sampled_sentences import SampledSentencesAnalyzer
from trace_offline.checkpoints.model_view import ModelView
from trace_offline.core.errors import NotApplicable
from trace_offline.core.types import Measurement
from trace_offline.corpus import CorpusParams, Origin, build_lexicon, generate
from trace_offline.corpus.checker import ERRORS
from trace_offline.estimators.proportion import proportion
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.recording import save_evaluation_set

SENTENCES = [sentence.text for sentence in islice(generate(0), 60)]
PAD, UNK, BOS, EOS = range(4)
SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>"]
WORDS = SPECIAL + sorted({word for text in SENTENCES for word in text.split()} | {"is", "are", "the", "a"})
ID = {word: index for index, word in enumerate(WORDS)}
PARAMS = CorpusParams()


class Writer(nn.Module):
    """Writes each of its sentences with its weight: the exact distribution of the next token given all before."""

    def __init__(self, texts: dict[str, float], bos: bool = True) -> None:
        super().__init__()
        self.next: dict[tuple[int, ...], Counter[int]] = {}
        for text, weight in texts.items():
            ids = ([BOS] if bos else []) + [ID.get(word, UNK) for word in text.split()]
            ids += [] if text.endswith("…") else [EOS]
            for place in range(1, len(ids)):
                self.next.setdefault(tuple(ids[:place]), Counter())[ids[place]] += weight  # type: ignore[assignment]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = torch.full((*input_ids.shape, len(WORDS)), -torch.inf)
        for row, ids in enumerate(input_ids.tolist()):
            # of a text that does not end the last word is written for ever
            following = self.next.get(tuple(ids), {ids[-1]: 1.0})
            for token, weight in following.items():
                logits[row, -1, token] = torch.tensor(float(weight)).log()
        return logits


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(SPECIAL)
    return made


def make_set(folder: Path, texts: list[str], bos: bool = True, **changes: Any) -> EvaluationSet:
    rows = [[*([BOS] if bos else []), *(ID[word] for word in text.split()), EOS] for text in texts]
    given = {"corpus": Origin(0, 60, PARAMS), "tokenizer": tokenizer(), "special_token_ids": [PAD, UNK, BOS, EOS]}
    return EvaluationSet.load(save_evaluation_set(folder, rows, **(given | changes)))


def measure(model: nn.Module, evaluation: EvaluationSet, seed: int = 0, **params: Any) -> list[Measurement]:
    analyzer = SampledSentencesAnalyzer()
    view = ModelView(model, None, "cpu", "float32")
    found = list(analyzer.measure(Context(view, evaluation, analyzer.Params(**params), seed)))
    assert {item.metric for item in found} == {spec.name for spec in analyzer.metrics}
    assert all(isinstance(item, Measurement) and (item.value is None) == bool(item.reason) for item in found)
    return found  # type: ignore[return-value]


def number(found: list[Measurement], metric: str, label: str | None = None) -> float:
    value = one(found, metric, label=label).value
    assert value is not None
    return value


def test_a_model_that_writes_the_corpus(tmp_path: Path) -> None:
    model = Writer(dict.fromkeys(SENTENCES, 1.0))
    found = measure(model, make_set(tmp_path / "e", SENTENCES[:20]), sentences=300)
    assert number(found, "well_formed") == 1.0
    assert number(found, "well_formed_low") == pytest.approx(proportion(300, 300).low)
    assert all(number(found, "error_rate", kind) == 0.0 for kind in ERRORS)
    assert number(found, "in_corpus") == 1.0
    # a third of the corpus is in the evaluation set: three standard errors of 300 draws are 0.08
    assert abs(number(found, "in_evaluation_set") - 1 / 3) < 0.08
    assert number(found, "distinct") <= 60 / 300
    assert number(found, "distinct_expected") > 0.95
    assert number(found, "in_corpus_expected") < 0.1
    lengths = [len(text.split()) for text in SENTENCES]
    mean = one(found, "sentence_length")
    assert mean.value is not None
    assert mean.stderr is not None
    assert abs(mean.value - sum(lengths) / 60) < 4 * mean.stderr


def test_errors_are_counted_at_their_rates(tmp_path: Path) -> None:
    good = next(text for text in SENTENCES if " are " not in text and " is " not in text and len(text.split()) > 4)
    noun, nouns = next((w, f"{w}s") for w in WORDS if f"{w}s" in ID and w in build_lexicon().nouns)
    texts = {
        good: 4.0,
        f"the {noun} are": 1.0,  # broken agreement, and it ends before its participle
        f"the {nouns}": 1.0,  # unfinished
        f"the quux {good.split(' ', 2)[2]}" if good.startswith("the") else "quux": 1.0,  # unknown
        "a …": 1.0,  # unknown word, then the same for ever: cut off
    }
    n = 800
    found = measure(Writer(texts), make_set(tmp_path / "e", SENTENCES[:20]), sentences=n, max_new_tokens=40)
    for kind, rate in (("broken_agreement", 1 / 8), ("unknown_word", 2 / 8), ("unfinished", 3 / 8)):
        item, expected = one(found, "error_rate", label=kind), proportion(round(rate * n), n)
        assert item.value is not None
        assert abs(item.value - rate) < 4 * expected.stderr, kind
        assert item.stderr == pytest.approx((item.value * (1 - item.value) / n) ** 0.5)
        interval = proportion(round(item.value * n), n)
        assert number(found, "error_rate_low", kind) == pytest.approx(interval.low)
        assert number(found, "error_rate_high", kind) == pytest.approx(interval.high)
    assert abs(number(found, "well_formed") - 4 / 8) < 0.08
    assert number(found, "distinct") == 5 / n


def test_without_a_token_that_begins_sentences_the_first_words_are_those_of_the_rows(tmp_path: Path) -> None:
    model = Writer(dict.fromkeys(SENTENCES, 1.0), bos=False)
    found = measure(model, make_set(tmp_path / "e", SENTENCES[:20], bos=False), sentences=100)
    assert number(found, "well_formed") == 1.0
    assert number(found, "in_corpus") == 1.0


def test_the_seed_decides(tmp_path: Path) -> None:
    model, evaluation = Writer(dict.fromkeys(SENTENCES, 1.0)), make_set(tmp_path / "e", SENTENCES[:20])
    first, again, other = (measure(model, evaluation, seed=seed, sentences=50) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_corpus_whose_file_is_not_known(tmp_path: Path) -> None:
    model = Writer(dict.fromkeys(SENTENCES, 1.0))
    found = measure(model, make_set(tmp_path / "e", SENTENCES[:5], corpus=PARAMS), sentences=20)
    assert "does not say which corpus file" in str(one(found, "in_corpus").reason)
    large = make_set(tmp_path / "f", SENTENCES[:5], corpus=Origin(0, 10_000_000, PARAMS))
    found = measure(model, large, sentences=20)
    assert "at most 200000 are generated again" in str(one(found, "in_corpus").reason)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": None}, "does not say by which grammar its text was made. Build it from a file"),
        ({"tokenizer": None}, "has no tokenizer to turn tokens into words. Give a fast tokenizer"),
        ({"corpus": PARAMS.to_record() | {"version": 99}}, "names is not one of this version: .*version 99"),
        ({"corpus": {"params": {"colour": 1}}}, 'there is no parameter "colour"'),
    ],
)  # fmt: skip
def test_where_it_is_not_applicable(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(NotApplicable, match=message):
        measure(Writer({"the": 1.0}), make_set(tmp_path / "e", SENTENCES[:5], **changes), sentences=5)

"""Sentences sampled from the model, judged by the grammar of the corpus it was trained on.

The grammar comes with the evaluation set: the parameters of the synthetic corpus, and the tokenizer that turns sampled
tokens into words. Every share has beside it what fresh sentences of the same grammar would give.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from trace_offline.analyzers._measurements import measurement, missing
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import NotApplicable, UsageError
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Measurement, Result
from trace_offline.corpus.checker import ERRORS, Parse, check
from trace_offline.corpus.generator import generate
from trace_offline.corpus.params import CorpusParams
from trace_offline.corpus.readings import Readings, readings_for
from trace_offline.estimators.clustered import Estimate
from trace_offline.estimators.proportion import proportion

if TYPE_CHECKING:
    from trace_offline.evaluation.evaluation_set import EvaluationSet

_LONGEST_CORPUS = 200_000
_ROWS = 1024


@dataclass(frozen=True)
class Grammar:
    """What judges: the words, the corpus behind the evaluation set (``seed`` and ``sentences`` None: not known)."""

    params: CorpusParams
    readings: Readings
    seed: int | None
    sentences: int | None


@lru_cache(maxsize=2)
def _grammar(record: str) -> Grammar:
    known = json.loads(record)
    params = CorpusParams.from_record(known["params"])
    return Grammar(params, readings_for(params), known.get("seed"), known.get("sentences"))


@lru_cache(maxsize=1)
def _corpus(record: str) -> frozenset[str]:
    """The sentences of the corpus file; the same for every checkpoint, so made once per process."""
    known = _grammar(record)
    assert known.seed is not None
    return frozenset(sentence.text for sentence in islice(generate(known.seed, known.params), known.sentences))


@lru_cache(maxsize=2)
def _fresh(record: str, n: int, seed: int) -> tuple[str, ...]:
    """``n`` sentences of the same grammar that are not those of the corpus file."""
    known = _grammar(record)
    other = seed if seed != known.seed else seed + 1
    return tuple(sentence.text for sentence in islice(generate(other, known.params), n))


class SampledSentencesAnalyzer(Analyzer):
    """What the model writes by itself, counted by the grammar that made its corpus."""

    name = "sampled_sentences"
    version = "1"
    summary = "structural errors of sampled sentences by the grammar of the corpus, how varied they are, and copies"
    reference = (
        "Aljaafari et al. 2025, TRACE, arXiv:2507.03668 (structural errors); Wilson 1927 (interval of a proportion); "
        "McCoy et al. 2023, arXiv:2111.09509 (copies of the training text against a baseline)"
    )
    needs = frozenset({Need.LOGITS})
    metrics = (
        MetricSpec("well_formed", "1", "share of sampled sentences that the grammar can make"),
        MetricSpec("well_formed_low", "1", "lower end of its 95 % interval (Wilson)"),
        MetricSpec("well_formed_high", "1", "upper end of its 95 % interval (Wilson)"),
        MetricSpec("error_rate", "1", "share of sampled sentences with at least one error of the kind in the label"),
        MetricSpec("error_rate_low", "1", "lower end of its 95 % interval (Wilson)"),
        MetricSpec("error_rate_high", "1", "upper end of its 95 % interval (Wilson)"),
        MetricSpec("sentence_length", "words", "mean length of the sampled sentences that were finished"),
        MetricSpec("distinct", "1", "distinct sentences among the sampled ones, as a share of them"),
        MetricSpec("distinct_expected", "1", "the same for as many fresh sentences of the grammar"),
        MetricSpec("in_evaluation_set", "1", "share of sampled sentences that are rows of the evaluation set"),
        MetricSpec("in_evaluation_set_expected", "1", "the same for fresh sentences of the grammar"),
        MetricSpec(
            "in_corpus", "1", "share of sampled sentences that are in the corpus file behind the evaluation set"
        ),
        MetricSpec("in_corpus_expected", "1", "the same for fresh sentences of the grammar"),
    )

    class Params(BaseParams):
        """Parameters."""

        sentences: int = Field(1000, ge=2, le=1_000_000, description="how many sentences to sample")
        temperature: float = Field(1.0, ge=0.0, le=10.0, description="logits are divided by it; 1: the model as it is")
        max_new_tokens: int | None = Field(
            None, ge=1, description="where a sentence is cut off; None: twice the longest row of the evaluation set"
        )

    def measure(self, context: Context) -> Iterator[Result]:
        """Sample, read, count. Raises NotApplicable when the set has no grammar or no tokenizer, or is not causal."""
        evaluation = context.evaluation
        record = _record(evaluation)
        known = _judge(record)
        texts, finished = _sampled(context)
        parses = [
            check(text.split(), known.readings, finished=done) for text, done in zip(texts, finished, strict=True)
        ]
        n = len(parses)
        yield from _share("well_formed", sum(parse.well_formed for parse in parses), n)
        for kind in ERRORS:
            yield from _share("error_rate", sum(kind in parse.kinds for parse in parses), n, label=kind)
        yield _length([parse for parse, done in zip(parses, finished, strict=True) if done])
        fresh = _fresh(record, n, context.seed)
        plain = [" ".join(parse.words) for parse in parses]
        for suffix, given in (("", plain), ("_expected", fresh)):
            # no standard error: whether a sentence is new depends on all the others
            yield measurement(f"distinct{suffix}", Estimate(len(set(given)) / n, None), n)
        rows = _rows(evaluation)
        yield from _occurring("in_evaluation_set", plain, fresh, rows)
        if known.seed is None or known.sentences is None:
            reason = "the evaluation set does not say which corpus file it comes from (seed and number of sentences)"
        elif known.sentences > _LONGEST_CORPUS:
            reason = f"the corpus file has {known.sentences} sentences; at most {_LONGEST_CORPUS} are generated again"
        else:
            yield from _occurring("in_corpus", plain, fresh, _corpus(record))
            return
        for suffix in ("", "_expected"):
            yield missing(f"in_corpus{suffix}", reason, n)


def _record(evaluation: EvaluationSet) -> str:
    """The corpus of the set as canonical text. Raises NotApplicable when something needed is missing."""
    if evaluation.corpus is None:
        raise NotApplicable(
            "not applicable because the evaluation set does not say by which grammar its text was made. Build it from "
            "a file of trace-offline corpus generate with FILE.params.json beside it, or with save_evaluation_set(…, "
            "corpus=CorpusParams(…), tokenizer=…)"
        )
    if not evaluation.has_tokenizer:
        raise NotApplicable(
            "not applicable because the evaluation set has no tokenizer to turn tokens into words. Give a fast "
            "tokenizer to save_evaluation_set(…, corpus=…, tokenizer=…)"
        )
    if evaluation.objective != "causal_lm":
        raise NotApplicable(
            f"not applicable because text is sampled from causal language models only; this set is "
            f"{evaluation.objective}"
        )
    return json.dumps(evaluation.corpus, sort_keys=True)


def _judge(record: str) -> Grammar:
    try:
        return _grammar(record)
    except UsageError as error:
        raise NotApplicable(
            f"not applicable because the grammar that the evaluation set names is not one of this version: "
            f"{error.message}"
        ) from error


def _sampled(context: Context) -> tuple[list[str], list[bool]]:
    """Texts of the samples, and whether each ended by itself."""
    from trace_offline.activations.sampling import context_length_of, sample

    evaluation, params = context.evaluation, context.params
    decoder = evaluation.decoder()
    starts = _starts(evaluation, params.sentences)
    begun = len(starts) > 1
    longest = context_length_of(context.model)
    limit = 2 * evaluation.max_length if params.max_new_tokens is None else params.max_new_tokens
    if longest is not None:
        limit = min(limit, longest - 1)
    stops = [token for token in evaluation.special_token_ids if token != decoder.unknown_id]
    samples = sample(
        context.model,
        starts,
        1 if begun else params.sentences,
        limit,
        seed=context.seed,
        temperature=params.temperature,
        stop_token_ids=stops,
    )
    rows = [[*(starts[each.prompt] if begun else ()), *each.tokens] for each in samples]
    return decoder.texts(rows), [each.finished for each in samples]


def _starts(evaluation: EvaluationSet, n: int) -> list[list[int]]:
    """The special token with which every row begins, or else the first tokens of ``n`` rows, evenly spaced."""
    first: list[int] = []
    for start in range(0, evaluation.n_examples, _ROWS):
        tokens = evaluation.tokens(start, start + _ROWS)
        place = tokens.attention_mask.int().argmax(1, keepdim=True)
        first += tokens.input_ids.gather(1, place)[:, 0].tolist()
    if len(set(first)) == 1 and first[0] in evaluation.special_token_ids:
        return [first[:1]]
    return [[first[place * len(first) // n]] for place in range(n)]


def _rows(evaluation: EvaluationSet) -> frozenset[str]:
    """The rows as text, without special tokens at their ends."""
    decoder = evaluation.decoder()
    special = np.array(sorted(set(evaluation.special_token_ids) - {decoder.unknown_id}), np.int64)
    found: set[str] = set()
    for start in range(0, evaluation.n_examples, _ROWS):
        tokens = evaluation.tokens(start, start + _ROWS)
        kept = tokens.attention_mask.numpy() & ~np.isin(tokens.input_ids.numpy(), special)
        rows = [ids[keep].tolist() for ids, keep in zip(tokens.input_ids.numpy(), kept, strict=True)]
        found |= {" ".join(text.split()) for text in decoder.texts(rows)}
    return frozenset(found)


def _share(metric: str, count: int, n: int, **where: Any) -> Iterator[Measurement]:
    found = proportion(count, n)
    yield measurement(metric, Estimate(found.value, found.stderr), n, **where)
    yield measurement(f"{metric}_low", Estimate(found.low, None), n, **where)
    yield measurement(f"{metric}_high", Estimate(found.high, None), n, **where)


def _length(parses: Sequence[Parse]) -> Measurement:
    lengths = np.array([len(parse.words) for parse in parses], np.float64)
    if not len(lengths):
        return missing("sentence_length", "no sampled sentence was finished", 0)
    stderr = float(lengths.std(ddof=1) / np.sqrt(len(lengths))) if len(lengths) > 1 else None
    return measurement("sentence_length", Estimate(float(lengths.mean()), stderr), len(lengths))


def _occurring(
    metric: str, sampled: Sequence[str], fresh: Sequence[str], known: frozenset[str]
) -> Iterator[Measurement]:
    for suffix, given in (("", sampled), ("_expected", fresh)):
        found = proportion(sum(text in known for text in given), len(given))
        yield measurement(f"{metric}{suffix}", Estimate(found.value, found.stderr), len(given))

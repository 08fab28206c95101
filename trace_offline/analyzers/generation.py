"""Texts that the network writes, beside those of the evaluation set.

Texts are drawn from the network itself, each continuing the first tokens of a row (``prompt_tokens``; the single
beginning-of-text token where rows have one), with one stream of random numbers per text that is the same at every
checkpoint. They are compared with what follows these tokens in the rows of the set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from trace_offline.analyzers._measurements import measurement, missing
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Result
from trace_offline.estimators.clustered import Codes, Estimate, cluster_codes, cluster_sums, ratio
from trace_offline.estimators.repetition import ngram_divergence, repeated_share

if TYPE_CHECKING:
    from trace_offline.activations.sampling import Sample

_ROWS = 1024
_REASON = "no text is long enough for an n-gram of this length"


@dataclass(frozen=True)
class Reference:
    """What the rows say: their beginnings ``prompts``, what follows ``texts`` (special tokens at the end left out), the
    group of each, and the special tokens that end rows.
    """

    prompts: list[list[int]]
    texts: list[list[int]]
    groups: Codes
    stops: tuple[int, ...]


class GenerationAnalyzer(Analyzer):
    """Texts drawn from the network."""

    name = "generation"
    version = "1"
    summary = "repetition, length and n-gram divergence of texts sampled from the network, against the evaluation texts"
    reference = (
        "Welleck et al. 2020, arXiv:1908.04319 (seq-rep-n); Holtzman et al. 2020, The Curious Case of Neural Text "
        "Degeneration, arXiv:1904.09751; Morisita 1959 (overlap of two collections)"
    )
    needs = frozenset({Need.LOGITS})
    metrics = (
        MetricSpec("repetition", "1", "mean share of the n-grams of a sampled text that it has had before (label: n)"),
        MetricSpec("text_repetition", "1", "the same for the texts of the evaluation set, cut at the same length"),
        MetricSpec("divergence", "1", "1 − overlap of the n-grams of samples and evaluation texts (label: n)"),
        MetricSpec("text_divergence", "1", "the same between two halves of the evaluation texts; 0 is expected"),
        MetricSpec("length", "tokens", "mean length of sampled texts, prompt and stop token left out"),
        MetricSpec("text_length", "tokens", "the same for the texts of the evaluation set, cut at the same length"),
        MetricSpec(
            "finished", "1", "share of sampled texts that end with a token that ends rows of the evaluation set"
        ),
        MetricSpec("distinct", "1", "share of sampled texts that equal no other sampled text"),
    )

    class Params(BaseParams):
        """How many texts, how long, and how they are drawn."""

        samples: int = Field(200, ge=2, description="texts drawn from the network")
        max_new_tokens: int = Field(64, ge=1, description="longest text, in tokens after the prompt")
        temperature: float = Field(1.0, ge=0.0, description="logits are divided by it; 0: always the most likely token")
        prompt_tokens: int = Field(1, ge=1, description="tokens of a row that are given, special ones included")
        max_n: int = Field(4, ge=1, le=8, description="longest n-grams looked at")
        text_rows: int = Field(2000, ge=4, description="rows of the evaluation set compared with, evenly chosen")

    def measure(self, context: Context) -> Iterator[Result]:
        """Numbers of whole texts (label None), then those of every n-gram length."""
        from trace_offline.activations.sampling import context_length_of, sample

        params, evaluation = context.params, context.evaluation
        if evaluation.objective != "causal_lm" or not evaluation.labels_shifted:
            raise NotApplicable("not applicable because the evaluation set is not one of next-token prediction")
        limit = context_length_of(context.model)
        room = params.max_new_tokens if limit is None else min(params.max_new_tokens, limit - params.prompt_tokens)
        if room < 1:
            raise NotApplicable(
                f"not applicable because prompts of {params.prompt_tokens} tokens leave nothing of the network's "
                f"context of {limit}; lower prompt_tokens"
            )
        reference = read_reference(evaluation, params.prompt_tokens, room, params.text_rows)
        n = params.samples
        count = len(reference.prompts)
        # evenly over the rows; more texts than rows go round again
        chosen = [i * count // n if n <= count else i % count for i in range(n)]
        found = sample(
            context.model,
            [reference.prompts[row] for row in chosen],
            max_new_tokens=room,
            seed=context.seed,
            temperature=params.temperature,
            stop_token_ids=reference.stops,
        )
        yield from _whole_texts(found, reference)
        texts = [list(item.tokens) for item in found]
        if not reference.stops:
            # rows that were cut out of longer texts do not end: every sample is as long as what it is compared with
            texts = [text[: len(reference.texts[row])] for text, row in zip(texts, chosen, strict=True)]
        groups = reference.groups
        even, odd = ([index for index, group in enumerate(groups.tolist()) if group % 2 == k] for k in (0, 1))
        one, other = ([reference.texts[index] for index in half] for half in (even, odd))
        for size in range(1, params.max_n + 1):
            yield _repetition("repetition", texts, np.arange(n), size)
            yield _repetition("text_repetition", reference.texts, groups, size)
            apart = ngram_divergence(texts, reference.texts, size, None, groups.tolist())
            yield _divergence("divergence", apart, n, size)
            between = ngram_divergence(one, other, size, groups[even].tolist(), groups[odd].tolist())
            yield _divergence("text_divergence", between, len(reference.texts), size)


def read_reference(evaluation: Any, prompt_tokens: int, room: int, rows: int) -> Reference:
    """Beginnings of rows and what follows, at most ``room`` tokens. Raises NotApplicable when no row is long enough."""
    total = evaluation.n_examples
    wanted = np.unique(np.arange(min(rows, total)) * total // min(rows, total))
    special = set(evaluation.special_token_ids)
    prompts, texts, groups = [], [], []
    ends: set[int] = set()
    for start in range(0, total, _ROWS):
        stop = min(start + _ROWS, total)
        batch = evaluation.tokens(start, stop)
        for row in wanted[(wanted >= start) & (wanted < stop)]:
            tokens = batch.input_ids[row - start][batch.attention_mask[row - start]].tolist()
            if len(tokens) <= prompt_tokens:
                continue
            if tokens[-1] in special:
                ends.add(tokens[-1])
            text = tokens[prompt_tokens:]
            while text and text[-1] in special:
                text.pop()
            prompts.append(tokens[:prompt_tokens])
            texts.append(text[:room])
            groups.append(int(evaluation.group[row]))
    if len(prompts) < 2:
        raise NotApplicable(
            f"not applicable because fewer than two rows of the evaluation set have more than {prompt_tokens} tokens"
        )
    return Reference(prompts, texts, cluster_codes(np.asarray(groups), len(groups)), tuple(sorted(ends)))


def _whole_texts(found: Sequence[Sample], reference: Reference) -> Iterator[Result]:
    n = len(found)
    own = np.arange(n)
    yield measurement("length", _mean([len(item.tokens) for item in found], own), n)
    lengths = [len(text) for text in reference.texts]
    yield measurement("text_length", _mean(lengths, reference.groups), len(lengths))
    if reference.stops:
        yield measurement("finished", _mean([item.finished for item in found], own), n)
    else:
        yield missing("finished", "rows of the evaluation set do not end with a special token", n)
    counts: dict[tuple[int, ...], int] = {}
    for item in found:
        counts[item.tokens] = counts.get(item.tokens, 0) + 1
    # whether one text has a twin depends on the others: no standard error of a mean applies
    yield measurement("distinct", Estimate(sum(k == 1 for k in counts.values()) / n, None), n)


def _repetition(metric: str, texts: Sequence[Sequence[int]], groups: Codes, size: int) -> Result:
    shares = [repeated_share(text, size) for text in texts]
    known = [index for index, share in enumerate(shares) if share is not None]
    if not known:
        return missing(metric, _REASON, 0, label=str(size))
    estimate = _mean([shares[index] for index in known], groups[known])
    return measurement(metric, estimate, len(known), label=str(size))


def _divergence(metric: str, estimate: Estimate, n: int, size: int) -> Result:
    if estimate.value is None:
        reason = "no n-gram of this length occurs in two texts of one side, so that there is nothing to compare with"
        return missing(metric, reason, n, label=str(size))
    return measurement(metric, estimate, n, label=str(size))


def _mean(values: Sequence[Any], groups: Codes) -> Estimate:
    """Mean over texts, with the standard error over groups of texts."""
    table = np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)
    sums = cluster_sums(table, groups, int(groups.max()) + 1)
    return ratio(sums[:, 0], sums[:, 1])

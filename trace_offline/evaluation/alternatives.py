"""The other form of a word → the other token: the first sub-word in which the text with either form differs."""

from __future__ import annotations

from collections import Counter

from trace_offline.evaluation.alignment import Outcome, SubwordMap
from trace_offline.evaluation.document import Document
from trace_offline.evaluation.tokenizing import Encoded, SourceTokenizer

NOT_COMPARABLE = "not_comparable"
"""One form begins the other, so that no single prediction decides between the two."""


def alternative_tokens(
    document: Document, encoded: Encoded, tokenizer: SourceTokenizer, room: int, tally: Counter[str]
) -> list[tuple[int, int]]:
    """``(position, token)`` of the alternatives of one text, positions counted from its first token.

    The text is tokenized again with the other form in the place of the word. Up to the first sub-word that differs both
    texts are the same, so that one prediction compares them; it must lie inside the word in both. ``tally`` counts what
    became of each alternative.
    """
    if not document.alternatives:
        return []
    before = _subwords(document.text, encoded, tokenizer)
    texts = [document.text[: given.start] + given.form + document.text[given.end :] for given in document.alternatives]
    found = []
    for given, text, other in zip(document.alternatives, texts, tokenizer.encode(texts), strict=True):
        outcome, start, end = before.align(given.start, given.end, room)
        if outcome is Outcome.ALIGNED:
            outcome, other_start, other_end = _subwords(text, other, tokenizer).align(
                given.start, given.start + len(given.form)
            )
        if outcome is not Outcome.ALIGNED:
            tally[outcome.value] += 1
            continue
        same = encoded.ids[:start] == other.ids[:other_start]
        here = next(
            (place for place in range(start, min(end, other_end)) if encoded.ids[place] != other.ids[place]), None
        )
        if not same or here is None:
            tally[NOT_COMPARABLE] += 1
            continue
        tally[Outcome.ALIGNED.value] += 1
        found.append((here, other.ids[here]))
    return found


def _subwords(text: str, encoded: Encoded, tokenizer: SourceTokenizer) -> SubwordMap:
    special = set(tokenizer.special_ids)
    return SubwordMap.build(text, encoded.tokens, encoded.offsets, [token in special for token in encoded.ids])

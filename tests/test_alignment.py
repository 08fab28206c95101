"""Words to sub-words by character offsets."""

from __future__ import annotations

import unicodedata
from functools import cache

import pytest
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from trace_offline.evaluation.alignment import Outcome, SubwordMap
from trace_offline.evaluation.document import document_from_words

TOKENIZERS = {
    "gpt2": ("tokenizers", "gpt2_tokenizer.json"),
    "gpt_neox": ("tokenizers", "gpt_neox_20B_tokenizer.json"),
    "stories": ("stories260K_hf", "tokenizer.json"),
}


@cache
def load(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(shared_data(*TOKENIZERS[name])))


def subwords(tokenizer: Tokenizer, text: str) -> tuple[SubwordMap, list[int]]:
    found = tokenizer.encode(text, add_special_tokens=False)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return SubwordMap.build(text, found.tokens, found.offsets, [i in special for i in found.ids]), found.ids


def by_hand(*pieces: tuple[str, int, int]) -> SubwordMap:
    text = "the dogs  bark."
    tokens, starts, ends = zip(*pieces, strict=True)
    offsets = list(zip(starts, ends, strict=True))
    return SubwordMap.build(text, tokens, offsets, [token == "</s>" for token in tokens])


GPT2 = by_hand(("the", 0, 3), ("Ġdog", 3, 7), ("s", 7, 8), ("Ġ", 8, 9), ("Ġbark", 9, 14), (".", 14, 15))
TRIMMED = by_hand(("the", 0, 3), ("Ġdog", 4, 7), ("s", 7, 8), ("Ġ", 9, 9), ("Ġbark", 10, 14), (".", 14, 15))
SENTENCEPIECE = by_hand(
    ("▁", 0, 1), ("the", 0, 3), ("▁dog", 3, 7), ("s", 7, 8), ("▁", 8, 9), ("▁bark", 9, 14), (".", 14, 15)
)


@pytest.mark.parametrize(("subword_map", "shift"), [(GPT2, 0), (TRIMMED, 0), (SENTENCEPIECE, 1)])
def test_the_space_before_a_word_belongs_to_no_word(subword_map: SubwordMap, shift: int) -> None:
    def place(start: int, end: int) -> tuple[int, int]:
        outcome, first, stop = subword_map.align(start, end)
        assert outcome is Outcome.ALIGNED
        return first - shift, stop - shift

    assert place(0, 3) == (0, 1)
    assert place(4, 8) == (1, 3), "a word of two sub-words has both"
    assert place(10, 14) == (4, 5)
    assert place(14, 15) == (5, 6)
    assert place(0, 15) == (0, 6), "the whole text"


def test_what_is_not_aligned_and_why() -> None:
    assert GPT2.align(4, 6)[0] is Outcome.SHARED, "part of a sub-word"
    assert GPT2.align(8, 10)[0] is Outcome.NO_SUBWORD, "nothing but space"
    assert GPT2.align(10, 14, limit=4)[0] is Outcome.TRUNCATED
    assert GPT2.align(10, 14, limit=5) == (Outcome.ALIGNED, 4, 5)
    merged = by_hand(("the", 0, 3), ("Ġdogs", 3, 8), ("Ġbark.", 9, 15))
    assert merged.align(10, 14)[0] is Outcome.SHARED
    assert merged.align(14, 15)[0] is Outcome.SHARED
    assert merged.align(10, 15) == (Outcome.ALIGNED, 2, 3)
    with_special = by_hand(("the", 0, 3), ("</s>", 4, 8), ("Ġbark", 9, 14))
    assert with_special.align(4, 8)[0] is Outcome.SHARED, "special tokens are never inside a span"
    assert with_special.align(10, 14) == (Outcome.ALIGNED, 2, 3)
    assert SubwordMap.build("", [], [], []).align(0, 0)[0] is Outcome.NO_SUBWORD


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", {"don": ["Ġdon"], "'t": ["'t"], "日本": ["Ġæ", "Ĺ", "¥", "æľ", "¬"], ".": None, '"': None}),
        ("gpt_neox", {"don": ["Ġdon"], "'t": ["'t"], "日本": ["æĹ¥æľ¬"], ".": None, '"': None}),
        ("stories", {"don": ["▁d", "on"], "'t": ["'", "t"], ".": ["."], '"': ['"']}),
    ],
)
def test_real_tokenizers_on_a_hard_sentence(name: str, expected: dict[str, list[str] | None]) -> None:
    words = ["I", "don", "'t", "see", "日本", ".", '"']
    document = document_from_words(
        words, {"w": words}, "here", space_after=[True, False, True, True, False, False, False]
    )
    assert document.text == "I don't see 日本.\""
    tokenizer = load(name)
    found, ids = subwords(tokenizer, document.text)
    tokens = [tokenizer.id_to_token(i) for i in ids]
    for span in document.spans:
        if span.label in expected:
            outcome, start, end = found.align(span.start, span.end)
            wanted = expected[span.label]
            assert (tokens[start:end] if outcome is Outcome.ALIGNED else None) == wanted, span.label


WORD = st.text(
    st.one_of(
        st.characters(categories=("Ll", "Lu", "Nd", "Po", "Sm")),
        st.sampled_from("aeiou'’.,-é日本😀\u0301\u200d"),
    ),
    min_size=1,
    max_size=8,
).filter(lambda word: not any(character.isspace() or character in "▁Ġ<" for character in word))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(words=st.lists(WORD, min_size=1, max_size=8), spaces=st.lists(st.booleans(), min_size=8, max_size=8))
@settings(max_examples=80, deadline=None)
def test_spans_are_disjoint_ordered_and_decode_to_their_word(name: str, words: list[str], spaces: list[bool]) -> None:
    tokenizer = load(name)
    document = document_from_words(words, {"w": words}, "here", space_after=spaces[: len(words)])
    found, ids = subwords(tokenizer, document.text)
    assert list(found.start) == sorted(found.start)
    assert list(found.end) == sorted(found.end)
    covered = 0
    for span in document.spans:
        outcome, start, end = found.align(span.start, span.end)
        if outcome is not Outcome.ALIGNED:
            assert (start, end) == (0, 0)
            continue
        assert covered <= start < end <= len(ids)
        covered = end
        decoded = tokenizer.decode(ids[start:end]).strip()
        normal = unicodedata.normalize("NFC", decoded)
        assert normal == unicodedata.normalize("NFC", span.label)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(words=st.lists(st.from_regex(r"[a-z]{1,9}", fullmatch=True), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_words_between_spaces_are_always_aligned(name: str, words: list[str]) -> None:
    document = document_from_words(words, {"w": words}, "here")
    found, _ = subwords(load(name), document.text)
    assert all(found.align(span.start, span.end)[0] is Outcome.ALIGNED for span in document.spans)

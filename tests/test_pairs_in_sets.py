"""Minimal pairs in evaluation sets: the folder, the files they are built from, who sees which rows."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SmallSeries, shared_data

from trace_offline import Store, analyze
from trace_offline.core.errors import EvaluationSetError, UsageError
from trace_offline.corpus import KINDS, CorpusParams, generate, generate_to_file, intervene_all, write_pairs
from trace_offline.corpus.params import Origin
from trace_offline.evaluation.build import build_evaluation_set
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.evaluation.pairs import differing_tokens
from trace_offline.evaluation.sources import guess_kind
from trace_offline.recording import save_evaluation_set

DATA = Path(__file__).parents[1] / "data"
TOKENIZER = DATA / "tiny_series" / "step4096"
ROWS = [[1, 5, 6, 7], [1, 8, 9], [1, 5, 6], [1, 5, 9, 7], [1, 5, 7]]
PAIR, VARIANT = [3, -1, 8, 3, 8], [0, 0, 0, 1, 1]
MARKS = [(0, "violation", 2, 3, "swap"), (3, "violation", 2, 3, "swap"), (0, "pos", 1, 2, "N"), (3, "pos", 1, 2, "N")]


def save(folder: Path, **changes: object) -> EvaluationSet:
    given: dict = {"pair": PAIR, "variant": VARIANT, "annotations": MARKS, "special_token_ids": [1]} | changes
    return EvaluationSet.load(save_evaluation_set(folder, ROWS, **given))


def test_what_the_reader_sees(tmp_path: Path) -> None:
    found = save(tmp_path / "e", split=[0, 1, 0, 0, 0])
    assert found.pairs is not None
    assert len(found.pairs) == 2
    assert found.pairs.members().tolist() == [[0, 3], [2, 4]]
    assert json.loads((tmp_path / "e" / "evaluation_set.json").read_text())["counts"]["pairs"] == 2
    only = found.originals()
    assert (only.n_examples, only.n_tokens, only.tasks, only.pairs) == (3, 10, ("pos",), None)
    assert torch.equal(only.tokens(0, 99).input_ids, found.tokens(0, 3).input_ids)
    assert only.spans("pos").row.tolist() == [0]
    assert only.group.tolist() == [0, 1, 2]
    assert only.split is not None
    assert only.split.tolist() == [0, 1, 0]
    assert only.originals() is only
    with pytest.raises(EvaluationSetError, match="the rows are 0 to 2"):
        only.tokens(3, 5)


def test_sets_without_pairs_are_what_they_were(tmp_path: Path) -> None:
    shipped = EvaluationSet.load(DATA / "tiny_evaluation")
    assert shipped.hash == "7c683d617c7eaf51961aca2c6a0b444c"
    assert shipped.pairs is None
    assert shipped.originals() is shipped
    plain = EvaluationSet.load(save_evaluation_set(tmp_path / "a", ROWS, special_token_ids=[1]))
    with_pairs = save(tmp_path / "b", annotations=None)
    other = save(tmp_path / "c", annotations=None, variant=[0, 0, 0, 1, 1], pair=[8, -1, 3, 8, 3])
    swapped = save(tmp_path / "d", annotations=None, pair=[3, -1, 8, 8, 3])
    assert len({plain.hash, with_pairs.hash, other.hash, swapped.hash}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair": None}, "minimal pairs need both pair and variant"),
        ({"pair": PAIR[:4]}, "pair must be 5 whole numbers, one for each row"),
        ({"variant": [0, 0, 0, 1, 2]}, "variant 0 \\(original\\) or 1 \\(changed\\)"),
        ({"pair": [3, -1, 8, 3, -1]}, "row 4 has variant 1 \\(changed\\) but no pair"),
        ({"pair": [3, 3, 8, 3, 8]}, "pair 3 has 3 rows, 1 of them changed; a pair is two rows"),
        ({"pair": [3, -1, 8, 3, 3]}, "pair 3 has 3 rows, 2 of them changed"),
        ({"variant": [0, 0, 1, 1, 0]}, "row 3 is changed \\(variant 1\\) and row 4 is not; put the changed rows after"),
        ({"split": [0, 0, 0, 1, 0]}, "pair 3 lies on both sides of the split"),
        ({"annotations": MARKS[:1]}, 'pair 3: the task "violation" must mark both members with one label.*swap in'),
        ({"annotations": [MARKS[0], (3, "violation", 2, 3, "drop")]}, "found swap in one and drop in the other"),
        ({"annotations": [*MARKS, (1, "violation", 1, 2, "swap")]}, "row 1 has an annotation .* belongs to no pair"),
    ],
)  # fmt: skip
def test_pairs_that_do_not_hold_together_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(EvaluationSetError, match=message):
        save(tmp_path / "e", **changes)


@pytest.mark.parametrize(
    ("original", "changed", "expected"),
    [
        ([1, 5, 6, 7], [1, 5, 9, 7], ((2, 3), (2, 3))),
        ([1, 5, 6, 7], [1, 9, 6, 8], ((1, 4), (1, 4))),
        ([1, 5, 6, 7], [1, 5, 7], ((3, 4), (2, 3))),  # something removed: the token after the gap
        ([1, 5, 7], [1, 5, 5, 7], ((2, 3), (3, 4))),
        ([1, 5, 6, 7, 8], [1, 5, 9, 8], ((2, 4), (2, 3))),
        ([1, 5, 6], [1, 5], None),
        ([1, 5, 6, 2], [1, 5, 2], None),  # only a special token follows
        ([1, 5], [1, 5], None),
        ([1, 6, 5, 7], [1, 5, 6, 7], ((1, 3), (1, 3))),
    ],
)
def test_the_tokens_that_differ(original: list, changed: list, expected: object) -> None:
    assert differing_tokens(np.array(original), np.array(changed), [1, 2]) == expected


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


GOOD, BAD = "the mormet lozams these snotimps", "the mormets lozams these snotimps"


def test_pairs_in_the_form_of_blimp(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "p.jsonl",
        [
            {"sentence_good": GOOD, "sentence_bad": BAD, "UID": "agr", "linguistics_term": "x"},
            {"sentence_good": GOOD, "sentence_bad": "the mormet lozam these snotimps", "linguistics_term": "number"},
            # the record names its critical word, which is the same in both
            {"sentence_good": GOOD, "sentence_bad": BAD, "UID": "late", "two_prefix_prefix_good": "the mormet",
             "two_prefix_prefix_bad": "the mormets", "two_prefix_word": "lozams"},
            {"sentence_good": GOOD, "sentence_bad": GOOD, "UID": "same"},
            {"sentence_good": GOOD, "sentence_bad": GOOD.replace("lozams", "quux"), "UID": "unknown"},
        ],
    )  # fmt: skip
    assert guess_kind(file) == "pairs"
    found = build_evaluation_set(tmp_path / "e", [file], tokenizer=TOKENIZER)
    assert found.summary["pairs"]["kinds"] == {"agr": 1, "late": 1, "number": 1}
    assert found.summary["pairs"]["dropped"] == {
        "both members have the same tokens": 1,
        "a word that the tokenizer does not know is to be compared": 1,
    }
    assert any("1 minimal pairs left out: both members" in warning for warning in found.summary["warnings"])
    spans = found.spans("violation")
    columns = (spans.row, spans.start, spans.end, spans.label)
    places = [(int(r), int(s), int(e), spans.classes[k]) for r, s, e, k in zip(*columns, strict=True)]
    # position 0 is the beginning of the sentence
    assert places == [(0, 2, 3, "agr"), (1, 3, 4, "number"), (2, 3, 4, "late"),
                      (3, 2, 3, "agr"), (4, 3, 4, "number"), (5, 3, 4, "late")]  # fmt: skip
    assert len(set(found.group.tolist())) == 1, "pairs with one original belong together"


def test_interventions_of_the_corpus(tmp_path: Path) -> None:
    sentences = list(islice(generate(7), 40))
    pairs = [pair for kind in KINDS for pair in intervene_all(sentences, kind, 0) if pair is not None]
    write_pairs(tmp_path / "p.jsonl", pairs)
    generate_to_file(tmp_path / "c.jsonl", 30, 1)
    found = build_evaluation_set(tmp_path / "e", [tmp_path / "c.jsonl", tmp_path / "p.jsonl"], tokenizer=TOKENIZER)
    counts = found.summary["pairs"]
    assert counts["pairs"] + sum(counts["dropped"].values()) == len(pairs)
    assert set(counts["kinds"]) == set(KINDS)
    assert counts["without_tokens_to_compare"] == 0
    assert found.pairs is not None
    assert found.originals().n_examples == 30 + counts["pairs"]
    decoder, tokens, spans = found.decoder(), found.tokens(0, found.n_examples), found.spans("violation")
    words = [text.split() for text in decoder.texts(tokens.input_ids.tolist())]
    marked = {int(row): int(start) for row, start in zip(spans.row, spans.start, strict=True)}
    by_text = {(pair.original.text, pair.changed.text): pair for pair in pairs}
    for original, changed in found.pairs.members():
        texts = [" ".join(w for w in words[row] if w[0] != "<" or w == "<unk>") for row in (original, changed)]
        pair = by_text.get(tuple(texts))  # type: ignore[arg-type]
        if pair is not None:  # no word unknown to the tokenizer
            assert (marked[original] - 1,) == pair.original_positions
            assert (marked[changed] - 1,) == pair.changed_positions
    assert found.corpus == {"seed": 1, "sentences": 30, "params": CorpusParams().to_record()}


def test_first_so_many_pairs(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "p.jsonl", [{"sentence_good": GOOD, "sentence_bad": BAD}] * 5)
    found = build_evaluation_set(tmp_path / "e", [file], tokenizer=TOKENIZER, max_examples=3)
    assert found.summary["pairs"]["kinds"] == {"minimal_pair": 3}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"sentence_good": GOOD, "sentence_bad": BAD}, {"words": ["a"]}], "line 2: expected a minimal pair"),
        ([{"sentence_good": GOOD, "sentence_bad": " "}], '"sentence_bad" must be a sentence'),
        ([{"sentence_good": GOOD, "sentence_bad": BAD}, {"original": {}, "changed": {}}], "pairs of two forms"),
        ([{"original": {"words": ["a"]}, "changed": {}, "kind": "x"}], '"changed" must be a record with "words"'),
        ([{"original": {"words": ["a"]}, "changed": {"words": ["b"]}}], '"kind" must name the change; found None'),
        (
            [{"kind": "x", "original": {"words": ["a"]}, "changed": {"words": ["b"]}, "original_positions": [1]}],
            '"original_positions" must be places of words, 0 to 0',
        ),
        (
            [{"kind": "x", "original": {"words": ["a"]}, "changed": {"words": ["b"]}, "original_positions": [0]}],
            "compared one by one, but they name 1 and 0 words",
        ),
        ([{"sentence_good": GOOD, "sentence_bad": GOOD}], "none of the minimal pairs can be compared"),
    ],
)
def test_what_is_no_file_of_pairs(tmp_path: Path, records: list[dict], message: str) -> None:
    with pytest.raises(EvaluationSetError, match=message):
        build_evaluation_set(tmp_path / "e", [write_lines(tmp_path / "p.jsonl", records)], tokenizer=TOKENIZER)


def test_options_that_pairs_do_not_take(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "p.jsonl", [{"sentence_good": GOOD, "sentence_bad": BAD}])
    with pytest.raises(EvaluationSetError, match="sentences of BLiMP have no annotations such as upos"):
        build_evaluation_set(tmp_path / "e", [file], tokenizer=TOKENIZER, tasks=["upos"])


def test_masked_models_have_no_sentence_probability(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {
        word: index for index, word in enumerate(["[PAD]", "[MASK]", "[UNK]", *sorted({*GOOD.split(), *BAD.split()})])
    }
    masked = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    masked.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    masked.add_special_tokens(["[PAD]", "[MASK]", "[UNK]"])
    masked.save(str(tmp_path / "tokenizer.json"))
    file = write_lines(tmp_path / "p.jsonl", [{"sentence_good": GOOD, "sentence_bad": BAD}])
    with pytest.raises(UsageError, match="minimal pairs need the objective causal_lm, found masked_lm"):
        build_evaluation_set(tmp_path / "e", [file], tokenizer=tmp_path / "tokenizer.json", objective="masked_lm")


def test_a_real_paradigm(tmp_path: Path) -> None:
    file = shared_data("blimp", "irregular_plural_subject_verb_agreement_1.jsonl.gz")
    found = build_evaluation_set(tmp_path / "e", [file], tokenizer=shared_data("stories260K_hf"), max_examples=100)
    assert found.summary["pairs"]["pairs"] == 100
    assert found.spans("violation").classes == ("irregular_plural_subject_verb_agreement_1",)
    assert len(found.spans("violation")) == 200


def test_other_analyzers_never_see_a_changed_row(small_series: SmallSeries, tmp_path: Path) -> None:
    ids = torch.randint(3, 80, (12, 9), generator=torch.Generator().manual_seed(1))
    words = [(row, "parity", t, t + 1, "odd" if ids[row, t] % 2 else "even") for row in range(12) for t in range(9)]
    marks = [(row, "violation", 4, 5, "x") for row in range(12)]
    pair = [*range(6), *range(6)]
    plain = save_evaluation_set(tmp_path / "a", ids[:6], annotations=words[: 6 * 9], name="plain")
    both = save_evaluation_set(tmp_path / "b", ids, annotations=words + marks, pair=pair, variant=[0] * 6 + [1] * 6)
    analyze(small_series.run, plain, tmp_path / "a.duckdb", analyzers=("loss", "output"), jobs=1, steps="1")
    done = analyze(
        small_series.run, both, tmp_path / "b.duckdb", analyzers=("loss", "output", "minimal_pairs"), jobs=1, steps="1"
    )
    assert done.exit_code == 0, done.problems
    query = (
        "select analyzer, task, label, metric, value, stderr, n from history where analyzer != 'minimal_pairs' "
        "order by all"
    )
    found = [Store.open(tmp_path / f"{name}.duckdb").sql(query).to_pylist() for name in "ab"]
    assert len(found[0]) > 10
    assert found[0] == found[1]
    counted = "select distinct n from history where analyzer = 'minimal_pairs' and metric = 'preferred_sentence'"
    assert Store.open(tmp_path / "b.duckdb").sql(counted).to_pylist() == [{"n": 6}]


@pytest.mark.parametrize("given", [CorpusParams(), CorpusParams().to_record(), {"params": CorpusParams().to_record()}])
def test_the_parameters_of_a_corpus(tmp_path: Path, given: object) -> None:
    folder = save_evaluation_set(tmp_path / "e", ROWS, corpus=given)
    found = EvaluationSet.load(folder)
    assert found.corpus == {"params": CorpusParams().to_record()}
    assert not found.has_tokenizer
    assert found.hash != EvaluationSet.load(save_evaluation_set(tmp_path / "p", ROWS)).hash
    with pytest.raises(EvaluationSetError, match=r"tokenizer\.json: missing"):
        found.decoder()


def test_the_tokenizer_kept_with_a_set_cannot_be_exchanged(tmp_path: Path) -> None:
    folder = save_evaluation_set(
        tmp_path / "e", ROWS, corpus=Origin(3, 10, CorpusParams()), tokenizer=TOKENIZER, special_token_ids=[1]
    )
    found = EvaluationSet.load(folder)
    assert found.corpus == {"seed": 3, "sentences": 10, "params": CorpusParams().to_record()}
    assert found.decoder().texts([[2, 3]]) == ["<bos> <eos>"]
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<bos>", "<box>"))
    with pytest.raises(EvaluationSetError, match="altered since it was written"):
        EvaluationSet.load(folder)


@pytest.mark.parametrize("given", [3, "corpus", {"params": 1}, {"params": {}, "seed": "x"}])
def test_what_is_no_corpus(tmp_path: Path, given: object) -> None:
    with pytest.raises(EvaluationSetError, match="corpus must be the parameters of a synthetic corpus"):
        save_evaluation_set(tmp_path / "e", ROWS, corpus=given)


def test_corpora_of_different_parameters_give_no_grammar(tmp_path: Path) -> None:
    generate_to_file(tmp_path / "a.jsonl", 5, 0)
    generate_to_file(tmp_path / "b.jsonl", 5, 0, CorpusParams(plural=0.1))
    found = build_evaluation_set(tmp_path / "e", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tokenizer=TOKENIZER)
    assert found.corpus is None
    assert any("different parameters" in warning for warning in found.summary["warnings"])

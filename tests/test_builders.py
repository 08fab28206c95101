"""Evaluation sets from text and annotations, through the whole builder."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shared_data
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trace_offline.core.errors import EvaluationSetError, UsageError
from trace_offline.evaluation.build import build_evaluation_set
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.evaluation.plain_text import read_plain_text
from trace_offline.evaluation.sources import guess_kind

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "##s", "bark", "cat", "sleep", "a", "cafe", "."]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a WordPiece tokenizer that lower-cases, strips accents, and frames texts with [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{name}_token": token for name, token in zip(names, WORDS[:5], strict=True)}
    folder = tmp_path_factory.mktemp("bert")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 12, "vocab_size": len(WORDS)}))
    return folder


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that adds nothing by itself but has a beginning-of-sequence token."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1} | {chr(97 + i): 2 + i for i in range(26)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("causal")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def labelled(found: EvaluationSet, task: str) -> list[tuple[int, list[int], str]]:
    """(row, token ids, label) of each annotation."""
    ids = found.tokens(0, found.n_examples).input_ids.tolist()
    spans = found.spans(task)
    places = zip(spans.row.tolist(), spans.start.tolist(), spans.end.tolist(), spans.label.tolist(), strict=True)
    return [(row, ids[row][start:end], spans.classes[label]) for row, start, end, label in places]


def letters(*names: str) -> list[int]:
    return [ord(name) - 97 + 2 for name in names]


# Plain text


def test_loss_of_the_english_model_on_five_stories(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model_folder = shared_data("stories260K_hf")
    source = shared_data("text", "tinystories_sample.txt")
    found = build_evaluation_set(tmp_path / "e", [source], tokenizer=model_folder, licence="see source")
    assert (found.n_examples, found.n_tokens) == (5, 1809)
    batch = found.tokens(0, 5)
    assert (batch.input_ids[:, 0] == 1).all(), "each text begins with <s>"
    assert int((batch.targets >= 0).sum()) == 1804
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    assert float(loss) == pytest.approx(1.2664, abs=5e-4)


def test_long_text_is_cut_into_rows_of_one_group(tmp_path: Path, causal: Path) -> None:
    source = write(tmp_path / "t.txt", "a b c d e f g", "", "h i", "", "a b c d e f g")
    found = build_evaluation_set(tmp_path / "e", [source], tokenizer=causal, max_length=4)
    batch = found.tokens(0, 99)
    bos = 0
    assert [row[mask].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)] == [
        [bos, *letters("a", "b", "c")],
        [bos, *letters("d", "e", "f")],
        [bos, *letters("g")],
        [bos, *letters("h", "i")],
        [bos, *letters("a", "b", "c")],
        [bos, *letters("d", "e", "f")],
        [bos, *letters("g")],
    ]
    assert found.group.tolist() == [0, 0, 0, 1, 0, 0, 0], "chunks of a text, and copies of it, stay together"
    targets = batch.targets[batch.targets >= 0].tolist()
    assert targets == letters(*"abcdefghiabcdefg"), "every token is predicted exactly once"
    assert found.summary["texts_in_several_rows"] == 2
    assert (found.summary["texts"], found.summary["rows"], found.summary["tokens"]) == (3, 7, found.n_tokens)
    without = build_evaluation_set(tmp_path / "f", [source], tokenizer=causal, max_length=4, add_bos=False)
    assert without.tokens(0, 1).input_ids[0].tolist() == letters("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("one\n<|endoftext|>\n\ntwo\n\nstill two<|endoftext|>\n", "auto", ["one", "two\n\nstill two"]),
        ("one\nstill one\n \n\n\ntwo\n", "auto", ["one\nstill one", "two"]),
        ("one\r\n\r\ntwo", "paragraph", ["one", "two"]),
        ("one\n\n two \n", "line", ["one", "two"]),
        ("one\n\ntwo\n", "file", ["one\n\ntwo"]),
        ("\ufeffone", "auto", ["one"]),
    ],
)
def test_units_of_plain_text(tmp_path: Path, text: str, unit: str, expected: list[str]) -> None:
    path = tmp_path / "t.txt"
    path.write_text(text, newline="")
    assert [document.text for document in read_plain_text(path, unit)] == expected
    path.with_suffix(".txt.gz").write_bytes(gzip.compress(text.encode()))
    assert [document.text for document in read_plain_text(path.with_suffix(".txt.gz"), unit)] == expected


# CoNLL-U

CONLLU = """\
# text = I don't see del "dogs".
1\tI\tI\tPRON\tPRP\tNumber=Sing|Person=1\t4\tnsubj\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\tdo\tAUX\tVBP\tMood=Ind\t4\taux:neg\t_\tNote=x
3\tn't\tnot\tPART\tRB\t_\t4\tadvmod\t_\t_
3.1\tghost\t_\tNOUN\t_\t_\t_\t_\t_\t_
4\tsee\tsee\tVERB\tVBP\t_\t0\troot\t_\t_
5-6\tdel\t_\t_\t_\t_\t_\t_\t_\t_
5\tde\tde\tADP\t_\t_\t7\tcase\t_\t_
6\tel\tel\tDET\t_\tNumber=Sing\t7\tdet\t_\t_
7\t"\t"\tPUNCT\t``\t_\t8\tpunct\t_\tSpaceAfter=No
8\tdogs\tdog\tNOUN\tNNS\tNumber=Plur\t4\tobj\t_\tSpaceAfter=No
9\t"\t"\tPUNCT\t''\t_\t8\tpunct\t_\tSpaceAfter=No
10\t.\t.\tPUNCT\t.\t_\t4\tpunct\t_\t_

# text = _ Go
1\t_\t_\tSYM\t_\t_\t2\tdep\t_\t_
2\tGo\tgo\tVERB\tVB\t_\t0\troot\t_\t_
"""


def conllu_spans(tmp_path: Path, *tasks: str, text: str = CONLLU) -> list[list[tuple[str, str]]]:
    from trace_offline.evaluation.conllu import read_conllu

    path = tmp_path / "s.conllu"
    path.write_text(text)
    documents = read_conllu(path, tasks or None)
    return [[(d.text[span.start : span.end], span.label) for span in d.spans] for d in documents]


def test_conllu_text_words_and_columns(tmp_path: Path) -> None:
    from trace_offline.evaluation.conllu import parse

    assert [sentence.text for sentence in parse(CONLLU, "s")] == ['I don\'t see del "dogs".', "_ Go"]
    assert [sentence.text for sentence in parse(CONLLU.replace("\n", "\r\n"), "s")][1] == "_ Go"
    first, second = conllu_spans(tmp_path, "upos")
    assert first == [
        ("I", "PRON"),
        ("do", "AUX"),
        ("n't", "PART"),
        ("see", "VERB"),
        ('"', "PUNCT"),
        ("dogs", "NOUN"),
        ('"', "PUNCT"),
        (".", "PUNCT"),
    ], "words of del have no characters of their own; the empty node 3.1 is no word"
    assert second == [("_", "SYM"), ("Go", "VERB")]
    assert ("do", "aux") in conllu_spans(tmp_path, "deprel")[0]
    assert ("do", "aux:neg") in conllu_spans(tmp_path, "deprel:full")[0]
    assert conllu_spans(tmp_path, "Number") == [[("I", "Sing"), ("dogs", "Plur")], []]
    assert conllu_spans(tmp_path, "feats.Person") == [[("I", "1")], []]
    assert conllu_spans(tmp_path, "misc.Note") == [[("do", "x")], []]
    assert conllu_spans(tmp_path, "XPOS")[1] == [("Go", "VB")]
    assert conllu_spans(tmp_path, "lemma")[1] == [("_", "_"), ("Go", "go")], "a literal underscore"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\tI\t_\n", "line 1: expected the ten columns of CoNLL-U separated by tabs, found 3"),
        ("1 I _ _ _ _ _ _ _ _\n", "line 1: expected the ten columns"),
        ("x\tI\t_\t_\t_\t_\t_\t_\t_\t_\n", 'expected a word number such as 3, 3-4 or 3.1; found "x"'),
        ("2\tI\t_\t_\t_\t_\t_\t_\t_\t_\n", "expected word 1, found 2"),
        ("1\t\t_\t_\t_\t_\t_\t_\t_\t_\n", "word 1 has an empty form"),
        ("1-2\tIm\t_\t_\t_\t_\t_\t_\t_\t_\n1\tI\t_\t_\t_\t_\t_\t_\t_\t_\n", "ends inside a multiword range"),
        ("2-1\tIm\t_\t_\t_\t_\t_\t_\t_\t_\n", "expected word 1, found 2-1"),
        ("# only a comment\n", "contains no sentence"),
    ],
)
def test_what_is_not_conllu(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(EvaluationSetError, match=message):
        conllu_spans(tmp_path, "upos", text=text)


def test_unknown_conllu_task_suggests(tmp_path: Path) -> None:
    with pytest.raises(EvaluationSetError, match=r'no task "Numbr".*Did you mean "Number"'):
        conllu_spans(tmp_path, "Numbr")


def test_english_treebank(tmp_path: Path) -> None:
    """Counts against an independent reading of the file; alignment nearly complete and nothing lost unseen."""
    source = shared_data("ud_english_ewt", "en_ewt-ud-dev.conllu.gz")
    lines = gzip.decompress(source.read_bytes()).decode().splitlines()
    columns = [line.split("\t") for line in lines if line[:1].isdigit()]
    words = [column for column in columns if column[0].isdigit()]
    found = build_evaluation_set(
        tmp_path / "e", [source], tokenizer=shared_data("stories260K_hf"), tasks=["upos", "deprel", "Number"]
    )
    assert found.n_examples == 2001
    assert found.tasks == ("Number", "deprel", "upos")
    counts = found.summary["tasks"]
    outcomes = ("aligned", "shared", "no_subword", "truncated", "masked", "unplaced")
    for task in found.tasks:
        assert sum(counts[task][outcome] for outcome in outcomes) == counts[task]["labels"]
        assert sum(counts[task]["classes"].values()) == counts[task]["aligned"] == len(found.spans(task))
    assert counts["upos"]["labels"] == counts["deprel"]["labels"] == len(words) == 25147
    assert counts["upos"]["aligned"] / 25147 > 0.99
    assert counts["Number"]["labels"] == sum("|Number=" in "|" + column[5] for column in words)
    expected = Counter(column[3] for column in words)
    assert Counter(counts["upos"]["classes"]) + Counter(counts["upos"]["classes_not_aligned"]) == expected
    # The text handed to the tokenizer is the text of the treebank.
    texts = [line.removeprefix("# text = ") for line in lines if line.startswith("# text = ")]
    from trace_offline.evaluation.conllu import read_conllu

    documents = read_conllu(source, ["upos"])
    same = sum(document.text == text for document, text in zip(documents, texts, strict=True))
    assert same == len(texts)


def test_two_files_become_a_split(tmp_path: Path, causal: Path) -> None:
    fit = write(tmp_path / "fit.jsonl", {"words": ["a", "b"], "pos": ["N", "V"]}, {"words": ["c"], "pos": ["N"]})
    score = write(tmp_path / "score.jsonl", {"words": ["a", "b"], "pos": ["N", "V"]}, {"words": ["d"], "pos": ["V"]})
    found = build_evaluation_set(tmp_path / "e", [fit], test_sources=[score], tokenizer=causal)
    assert found.split is not None
    assert found.split.tolist() == [0, 0, 1, 1]
    assert (found.summary["rows_to_fit"], found.summary["rows_to_score"]) == (2, 2)
    assert "1 texts occur on both sides of the split" in found.summary["warnings"][0]
    assert found.source == "fit.jsonl, score.jsonl"
    assert build_evaluation_set(tmp_path / "f", [fit], tokenizer=causal).split is None


# JSONL


def test_word_lists(tmp_path: Path, causal: Path) -> None:
    source = write(
        tmp_path / "c.jsonl",
        {
            "words": ["a", "b", "c"],
            "pos": ["N", "V", "N"],
            "roles": ["Agent", None, "Patient"],
            "lemmas": ["x", "y", "z"],
            "plural": [True, None, False],
            "frame": "hit",
            "clauses": [{"verb": 1}],
        },
        {"words": ["d"], "pos": ["V"], "roles": [None], "lemmas": ["w"], "plural": [True], "frame": "go"},
    )
    found = build_evaluation_set(tmp_path / "e", [source], tokenizer=causal)
    assert found.tasks == ("plural", "pos", "role"), "lemmas only when asked for"
    assert labelled(found, "role") == [(0, letters("a"), "Agent"), (0, letters("c"), "Patient")]
    assert [label for *_, label in labelled(found, "plural")] == ["true", "false", "true"]
    other = build_evaluation_set(tmp_path / "f", [source], tokenizer=causal, tasks=["lemmas", "frame"])
    assert other.tasks == ("frame", "lemma")
    assert labelled(other, "frame") == [(0, letters("a", "b", "c"), "hit"), (1, letters("d"), "go")]


def test_character_spans_and_labels_of_the_whole_text(tmp_path: Path, causal: Path) -> None:
    source = write(
        tmp_path / "c.jsonl",
        {"text": " a b c ", "spans": [{"start": 3, "end": 6, "label": "X"}], "labels": {"topic": "sport"}},
        {"text": "d e", "spans": [{"task": "entity", "start": 0, "end": 1, "label": 7}]},
        {"words": ["a", "b"], "text": "a  b", "space_after": [True, True], "pos": ["N", "V"]},
    )
    found = build_evaluation_set(tmp_path / "e", [source], tokenizer=causal)
    assert found.tasks == ("entity", "pos", "span", "topic")
    assert labelled(found, "span") == [(0, letters("b", "c"), "X")]
    assert labelled(found, "topic") == [(0, letters("a", "b", "c"), "sport")]
    assert labelled(found, "entity") == [(1, letters("d"), "7")]
    assert labelled(found, "pos") == [(2, letters("a"), "N"), (2, letters("b"), "V")]


@pytest.mark.parametrize(
    ("records", "tasks", "message"),
    [
        (["{"], None, "line 1: expected one JSON object a line"),
        ([[1]], None, "line 1: expected a JSON object, found list"),
        ([], None, "contains no record"),
        ([{"pos": ["N"]}], None, 'expected "text" or "words", found the fields pos'),
        ([{"words": ["a", ""]}], None, "list of words that are not empty"),
        ([{"words": ["a"], "pos": ["N"]}, {"words": ["a"], "pos": ["N", "V"]}], None, 'line 2: "pos" must have one'),
        ([{"words": ["a"], "pos": ["N"]}], ["poss"], r'no task "poss".*Did you mean "pos"'),
        ([{"text": "a", "spans": [{"start": 0, "end": 2, "label": "X"}]}], None, "span 0: characters 0 to 2"),
        ([{"text": "a", "spans": [{"start": 0, "end": 1}]}], None, "whole numbers start and end and a label"),
        ([{"text": "a", "spans": {}}], None, '"spans" must be a list'),
        ([{"words": ["a", "b"], "text": "b a", "pos": ["N", "V"]}], None, "does not occur in the text"),
    ],
)
def test_what_is_not_jsonl(tmp_path: Path, causal: Path, records: list, tasks: list[str] | None, message: str) -> None:
    source = write(tmp_path / "c.jsonl", *records)
    with pytest.raises(EvaluationSetError, match=message):
        build_evaluation_set(tmp_path / "e", [source], tokenizer=causal, tasks=tasks)
    assert not (tmp_path / "e").exists()


def test_corpus_of_this_package(tmp_path: Path) -> None:
    from trace_offline.corpus import generate_to_file, read_jsonl

    generate_to_file(tmp_path / "c.jsonl", 30, 0)
    sentences = list(read_jsonl(tmp_path / "c.jsonl"))
    tokenizer = shared_data("tokenizers", "gpt_neox_20B_tokenizer.json")
    found = build_evaluation_set(tmp_path / "e", [tmp_path / "c.jsonl"], tokenizer=tokenizer, tasks=["pos", "role"])
    counts = found.summary["tasks"]
    assert counts["pos"]["aligned"] == sum(len(sentence.words) for sentence in sentences)
    assert counts["role"]["aligned"] == sum(role is not None for sentence in sentences for role in sentence.roles)


# ABSynth

FULL = {
    "sentence": "noun4 verb9s noun4",
    "semantic_roles": {
        "arg0": {"word": "noun4", "role": "Agent", "position": 0},
        "arg1": {"word": "noun4", "role": "Patient", "position": 2},
    },
    "semantics": "∃e.transitive_action(e) ∧ Agent(e, noun4) ∧ Patient(e, noun4)",
    "linguistic_annotations": {"pos_tags": ["NN", "VB", "NN"], "semantic_roles": {"noun4": "Patient"}},
    "metadata": {"frame": "transitive_action", "entropy_profile": [1.5, 1.5, 1.5]},
}
EXPORT = {key: FULL[key] for key in ("sentence", "semantic_roles", "semantics")} | {"frame": "transitive_action"}
FIRST_VERSION = {"sentence": FULL["sentence"], "semantics": "∃e (Agent(e, noun4) ∧ Patient(e, noun4) ∧ Goal(e, noun9))"}


def absynth_spans(tmp_path: Path, content: object, tasks: list[str] | None = None) -> list[dict[str, list]]:
    from trace_offline.evaluation.absynth import read_absynth

    path = tmp_path / "corpus.json"
    path.write_text(json.dumps(content))
    result = []
    for document in read_absynth(path, tasks):
        found: dict[str, list] = dict(document.unplaced)  # type: ignore[arg-type]
        for span in document.spans:
            found.setdefault(f"{span.task} spans", []).append(
                (span.start, document.text[span.start : span.end], span.label)
            )
        result.append(found)
    return result


def test_absynth_in_all_four_forms(tmp_path: Path) -> None:
    roles = [(0, "noun4", "Agent"), (13, "noun4", "Patient")]
    frame = [(0, "noun4 verb9s noun4", "transitive_action")]
    pos = [(0, "noun4", "NN"), (6, "verb9s", "VB"), (13, "noun4", "NN")]
    full = {"corpus": [FULL], "metadata": {}, "statistics": {}}
    assert absynth_spans(tmp_path, full) == [{"pos spans": pos, "role spans": roles, "frame spans": frame}]
    assert absynth_spans(tmp_path, [EXPORT]) == [{"role spans": roles, "frame spans": frame}]
    assert absynth_spans(tmp_path, [FIRST_VERSION]) == [{"role spans": roles, "role": 1}]
    assert absynth_spans(tmp_path, ["noun4 verb9s", "noun1 verb2"]) == [{}, {}]
    assert absynth_spans(tmp_path, full, ["role"]) == [{"role spans": roles}]


def test_absynth_through_the_builder(tmp_path: Path) -> None:
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps([FIRST_VERSION, FIRST_VERSION]))
    found = build_evaluation_set(
        tmp_path / "e", [path], tokenizer=shared_data("tokenizers", "gpt2_tokenizer.json"), tasks=["role"]
    )
    assert found.summary["tasks"]["role"]["unplaced"] == 2
    assert found.spans("role").classes == ("Agent", "Patient")
    assert found.group.tolist() == [0, 0], "equal sentences never end up on both sides of a split"
    path.write_text(json.dumps(["noun4 verb9s"]))
    plain = build_evaluation_set(tmp_path / "f", [path], tokenizer=shared_data("tokenizers", "gpt2_tokenizer.json"))
    assert plain.tasks == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, 'expected a list of sentences, or an object with a list "corpus"'),
        ([], "an empty list"),
        ([1], "record 0: expected a sentence"),
        ([FULL | {"linguistic_annotations": {"pos_tags": ["NN"]}}], "one tag for each of the 3 words"),
        (
            [FULL | {"semantic_roles": {"arg0": {"word": "noun5", "role": "Agent", "position": 0}}}],
            'arg0 says that word 0 is "noun5", but the sentence has "noun4"',
        ),
        ([FULL | {"semantic_roles": {"arg0": {"role": "Agent", "position": 3}}}], "position of one of the 3 words"),
    ],
)
def test_what_is_not_absynth(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(EvaluationSetError, match=message):
        absynth_spans(tmp_path, content)


# Masked LM, truncation, special tokens


def test_masked_lm(tmp_path: Path, bert: Path) -> None:
    texts = ["the dogs bark .", "a cat sleep .", "the cat", "a"]
    source = write(tmp_path / "t.txt", *texts)

    def build(name: str, **keywords: object) -> EvaluationSet:
        return build_evaluation_set(
            tmp_path / name,
            [source],
            tokenizer=bert,
            objective="masked_lm",
            text_unit="line",
            **keywords,  # type: ignore[arg-type]
        )

    found = build("e")
    assert (found.objective, found.labels_shifted) == ("masked_lm", False)
    batch = found.tokens(0, 9)
    masked = batch.input_ids == WORDS.index("[MASK]")
    assert masked.sum(1).tolist() == [1, 1, 1, 1], "15 % of a few tokens, but at least one"
    assert torch.equal(masked, batch.targets >= 0)
    restored = torch.where(masked, batch.targets, batch.input_ids)
    tokens = [[WORDS[i] for i in row[mask]] for row, mask in zip(restored, batch.attention_mask, strict=True)]
    assert tokens == [["[CLS]", *text.replace("dogs", "dog ##s").split(), "[SEP]"] for text in texts]
    assert build("again").hash == found.hash
    assert len({build(f"seed {seed}", seed=seed).hash for seed in range(1, 6)}) > 1
    half = build("half", mask_probability=0.5).tokens(0, 9)
    assert (half.targets >= 0).sum(1).tolist() == [2, 2, 1, 1]


def test_words_behind_the_mask_lose_their_label(tmp_path: Path, bert: Path) -> None:
    record = {"words": ["the", "dogs", "bark"], "pos": ["D", "N", "V"], "labels": {"topic": "animals"}}
    source = write(tmp_path / "c.jsonl", *[record] * 30)
    found = build_evaluation_set(tmp_path / "e", [source], tokenizer=bert, objective="masked_lm")
    counts = found.summary["tasks"]
    assert counts["pos"]["masked"] == 30, "one position of each row is masked"
    assert counts["pos"]["aligned"] == 60
    assert counts["topic"]["aligned"] == 30, "a label of the whole text stays"
    ids = found.tokens(0, 30).input_ids
    assert all(WORDS.index("[MASK]") not in tokens for _, tokens, _ in labelled(found, "pos"))
    assert "only 67% of 90 labels are aligned" in found.summary["warnings"][0]
    assert ids.shape == (30, 6)


def test_truncated_words_are_counted(tmp_path: Path, bert: Path) -> None:
    words = ["the", "dogs", "bark"] * 4
    source = write(tmp_path / "c.jsonl", {"words": words, "pos": ["D", "N", "V"] * 4, "labels": {"topic": "animals"}})
    with pytest.raises(EvaluationSetError, match=r'task "topic": none of its labels could be aligned.*1 truncated'):
        build_evaluation_set(tmp_path / "e", [source], tokenizer=bert)
    found = build_evaluation_set(tmp_path / "e", [source], tokenizer=bert, tasks=["pos"])
    assert found.max_length == 12, "the model's longest row, special tokens included"
    counts = found.summary["tasks"]["pos"]
    assert (counts["labels"], counts["aligned"], counts["truncated"]) == (12, 7, 5), "10 tokens hold 7 words"
    assert found.summary["texts_truncated"] == 1
    assert found.tokens(0, 1).input_ids[0, -1] == WORDS.index("[SEP]")


def test_normalizers_and_unknown_words(tmp_path: Path, bert: Path) -> None:
    source = write(tmp_path / "c.jsonl", {"words": ["Café", "\u200b", "zzz", "Dogs"], "pos": ["N", "X", "U", "N"]})
    found = build_evaluation_set(tmp_path / "e", [source], tokenizer=bert)
    assert labelled(found, "pos") == [
        (0, [WORDS.index("cafe")], "N"),
        (0, [WORDS.index("dog"), WORDS.index("##s")], "N"),
    ]
    counts = found.summary["tasks"]["pos"]
    assert counts["no_subword"] == 1, "the normalizer removes a zero-width space"
    assert counts["shared"] == 1, "an unknown token is special and never inside a span"


# Options and errors


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"kind": "conll"}, UsageError, r'kind: expected one of text, conllu.*"conllu"'),
        ({"objective": "mlm"}, UsageError, "objective: expected one of causal_lm, masked_lm"),
        ({"objective": "masked_lm"}, EvaluationSetError, "has no mask token"),
        ({"max_length": 1}, UsageError, "leaves no room"),
        ({"max_length": 0}, UsageError, "max_length must be at least 1"),
        ({"max_examples": 0}, UsageError, "max_examples must be at least 1"),
        ({"text_unit": "page"}, UsageError, "text unit: expected one of"),
        ({"tasks": ["pos"]}, EvaluationSetError, "read as plain text, which has no annotations such as pos"),
        ({"alignment": "middle"}, EvaluationSetError, "must be one of last, first, mean"),
        ({"tasks": "pos"}, UsageError, "are lists"),
        ({"tokenizer": "nowhere"}, EvaluationSetError, "there is no such tokenizer"),
    ],
)
def test_unusable_options(tmp_path: Path, causal: Path, keywords: dict, error: type, message: str) -> None:
    source = write(tmp_path / "t.txt", "a b c")
    with pytest.raises(error, match=message):
        build_evaluation_set(tmp_path / "e", [source], **({"tokenizer": causal} | keywords))
    assert not (tmp_path / "e").exists()


def test_unusable_files(tmp_path: Path, causal: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"some text" * 99)[:-9])
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.json").write_text("[")
    (tmp_path / "plain.txt").write_text("some text")
    for name, message in {
        "missing.txt": r"there is no such file\.$",
        "cut.txt": r"there is no such file\. There is .*cut\.txt\.gz\.$",
        "plain.txt.gz": r"there is no such file\. There is .*plain\.txt\.$",
        "latin.txt": "expected UTF-8 text, found other bytes at position 3",
        "cut.txt.gz": "cannot be read",
        "empty.txt": "contains no text",
        "folder": "cannot be read",
        "bad.json": "cannot be read as JSON",
    }.items():
        with pytest.raises(EvaluationSetError, match=message):
            build_evaluation_set(tmp_path / "e", [tmp_path / name], tokenizer=causal)


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    source = write(tmp_path / "t.txt", "a b c")
    empty = tmp_path / "x" / "y" / "z"
    empty.mkdir(parents=True)
    with pytest.raises(EvaluationSetError, match="no tokenizer in this folder or above it"):
        build_evaluation_set(tmp_path / "e", [source], tokenizer=empty)


def test_tokenizer_beside_another_model_is_noticed(tmp_path: Path, bert: Path) -> None:
    import shutil

    shutil.copytree(bert, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"vocab_size": 6, "max_position_embeddings": 12}')
    with pytest.raises(EvaluationSetError, match=r"gives token id 13, but config.json beside it says .* only 6"):
        build_evaluation_set(tmp_path / "e", [write(tmp_path / "t.txt", "the dog .")], tokenizer=tmp_path / "other")


def test_first_so_many(tmp_path: Path, causal: Path) -> None:
    source = write(tmp_path / "t.txt", *"abcdef")
    found = build_evaluation_set(tmp_path / "e", [source], tokenizer=causal, text_unit="line", max_examples=2)
    assert found.tokens(0, 9).input_ids[:, 1].tolist() == letters("a", "b")
    assert np.array_equal(found.group, [0, 1])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.conllu.gz", "", "conllu"),
        ("a.jsonl", "", "jsonl"),
        ("a.json", "", "absynth"),
        ("a.txt", '{"text": "not looked at"}', "text"),
        ("data", CONLLU, "conllu"),
        ("data", '\n{"text": "a"}\n', "jsonl"),
        ("data", '[\n"a b"\n]', "absynth"),
        ("data.md", "Once upon a time", "text"),
    ],
)
def test_guessing_the_kind(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content)
    assert guess_kind(tmp_path / name) == expected

"""Evaluation sets that know their training text, and words with another form to compare them with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from typer.testing import CliRunner

from trace_offline.cli.main import app
from trace_offline.core.errors import EvaluationSetError, UsageError
from trace_offline.corpus import generate_to_file
from trace_offline.evaluation.build import build_evaluation_set
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.recording import save_evaluation_set

SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>"]


def word_tokenizer(folder: Path, words: set[str], *, frame: bool = True) -> Path:
    """One token a word, ``<bos> … <eos>`` around each text."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    if frame:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
        )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def built(tmp_path: Path) -> EvaluationSet:
    tokenizer = word_tokenizer(tmp_path / "t", {"the", "a", "dog", "cat", "sees", "barks", "and"})
    source = write(tmp_path / "e.txt", "the dog barks\n\nthe cat sees a dog\n\nthe dog and a cat\n\nthe dog barks")
    training = write(tmp_path / "train.txt", "the dog barks\n\na cat sees a dog\n\nthe dog and the dog barks")
    return build_evaluation_set(tmp_path / "set", [source], tokenizer=tokenizer, training_text=[training])


def test_what_is_kept_of_the_training_text(built: EvaluationSet) -> None:
    found = built.training_text()
    assert (found.n_texts, found.n_tokens) == (3, 5 + 7 + 8)
    assert found.seen.tolist() == [True, False, False, True]
    # <bos> the dog barks <eos>: all of it is the first training text
    assert found.matched[0].tolist() == [1, 2, 3, 4, 5, 0, 0]
    # <bos> the | cat sees a dog <eos>
    assert found.matched[1].tolist() == [1, 2, 1, 2, 3, 4, 5]
    assert found.matched[2].tolist() == [1, 2, 3, 4, 1, 2, 1]
    assert built.summary["training_text"]["rows_seen"] == 2
    assert built.has_training_text


def test_the_training_text_is_part_of_the_hash(built: EvaluationSet, tmp_path: Path) -> None:
    tokenizer = tmp_path / "t"
    again = build_evaluation_set(
        tmp_path / "again", [tmp_path / "e.txt"], tokenizer=tokenizer, training_text=[tmp_path / "train.txt"]
    )
    assert again.hash == built.hash
    without = build_evaluation_set(tmp_path / "without", [tmp_path / "e.txt"], tokenizer=tokenizer)
    assert without.hash != built.hash
    assert not without.has_training_text
    with pytest.raises(EvaluationSetError, match=r"knows no training text\. Build the set with it: .*--training-text"):
        without.training_text()
    other = write(tmp_path / "other.txt", "the dog barks\n\na cat sees a dog\n\nthe dog and the cat barks")
    third = build_evaluation_set(tmp_path / "third", [tmp_path / "e.txt"], tokenizer=tokenizer, training_text=[other])
    assert third.hash != built.hash


def test_recording_gives_the_same_as_building(built: EvaluationSet, tmp_path: Path) -> None:
    tokens = built.tokens(0, 4)
    # 4 a, 5 and, 6 barks, 7 cat, 8 dog, 9 sees, 10 the
    training = [[2, 10, 8, 6, 3], [2, 4, 7, 9, 4, 8, 3], [2, 10, 8, 5, 10, 8, 6, 3]]
    given: dict[str, Any] = {"special_token_ids": built.special_token_ids, "group": built.group}
    recorded = EvaluationSet.load(
        save_evaluation_set(
            tmp_path / "r", tokens.input_ids, tokens.attention_mask, training_ids=training, name=built.name, **given
        )
    )
    assert recorded.hash == built.hash
    padded = np.zeros((3, 8), np.int64)
    for row, text in enumerate(training):
        padded[row, : len(text)] = text
    save_evaluation_set(
        tmp_path / "r", tokens.input_ids, tokens.attention_mask, training_ids=padded, training_mask=padded != 0, **given
    )  # the same set: nothing is written, nothing refused


def test_long_texts_are_compared_as_rows_hold_them(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path / "t", set("abcdefgh"))
    source = write(tmp_path / "e.txt", "a b c d e f")
    training = write(tmp_path / "train.txt", "a b c d e f\n\ng h")
    built = build_evaluation_set(
        tmp_path / "set", [source], tokenizer=tokenizer, max_length=5, training_text=[training]
    )
    found = built.training_text()
    assert found.seen.tolist() == [True, True]
    # the second row, <bos> d e f <eos>, starts anew: its d follows c in training, not <bos>
    assert found.matched[1].tolist() == [1, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seen": np.zeros(2, np.uint8)}, r"seen must have the shape \[4\] of the set; found \[2\]"),
        ({"count_1": np.zeros(1, np.int64)}, "the contexts of 1 tokens contradict each other"),
        ({"matched": None}, "matched not found"),
        ({"count_0": "more"}, "altered since it was written"),
    ],
)
def test_a_damaged_file(built: EvaluationSet, change: dict[str, Any], message: str) -> None:
    path = built.folder / "training_text.safetensors"
    tensors = load_file(path)
    if "count_0" in change:
        change = {"count_0": tensors["count_0"] + 1}
    save_file({name: value for name, value in (tensors | change).items() if value is not None}, path)
    with pytest.raises(EvaluationSetError, match=message):
        EvaluationSet.load(built.folder)
    with pytest.raises(EvaluationSetError, match="changed while it was in use"):
        built.training_text()


def test_training_text_that_cannot_be_used(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path / "t", {"a"})
    source = write(tmp_path / "e.txt", "a a")
    with pytest.raises(UsageError, match="training_text needs the objective causal_lm; found masked_lm"):
        build_evaluation_set(
            tmp_path / "s", [source], tokenizer=tokenizer, objective="masked_lm", training_text=[source]
        )
    with pytest.raises(EvaluationSetError, match="there is no such file"):
        build_evaluation_set(tmp_path / "s", [source], tokenizer=tokenizer, training_text=[tmp_path / "none.txt"])
    with pytest.raises(EvaluationSetError, match="the training text is empty"):
        save_evaluation_set(tmp_path / "s", [[1, 2]], training_ids=[[1]], training_mask=[[0]])
    with pytest.raises(EvaluationSetError, match="training_ids holds a token id below 0"):
        save_evaluation_set(tmp_path / "s", [[1, 2]], training_ids=[[1, -100]])
    with pytest.raises(EvaluationSetError, match=r"objective causal_lm only; this one is algorithmic"):
        save_evaluation_set(
            tmp_path / "s", [[1, 2]], labels=[[-100, 2]], objective="algorithmic", training_ids=[[1, 2]]
        )


def records_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def words_of(path: Path) -> set[str]:
    return {word for record in records_of(path) for word in record["words"]}


def agreement_set(tmp_path: Path, *, sentences: int = 300, tasks: tuple[str, ...] = ()) -> EvaluationSet:
    generate_to_file(tmp_path / "corpus.jsonl", sentences, 0)
    words = words_of(tmp_path / "corpus.jsonl")
    tokenizer = word_tokenizer(tmp_path / "t", words)
    return build_evaluation_set(
        tmp_path / "set", [tmp_path / "corpus.jsonl"], tokenizer=tokenizer, tasks=["agreement", "attractors", *tasks]
    )


def test_the_corpus_becomes_an_agreement_set(tmp_path: Path) -> None:
    built = agreement_set(tmp_path, tasks=("pos",))
    assert built.tasks == ("agreement", "attractors", "pos")
    vocabulary = json.loads((tmp_path / "t" / "tokenizer.json").read_text())["model"]["vocab"]
    word = {index: form for form, index in vocabulary.items()}
    records = records_of(tmp_path / "corpus.jsonl")
    clauses = {(row, clause["verb"] + 1): clause for row, record in enumerate(records) for clause in record["clauses"]}
    spans, attractors = built.spans("agreement"), built.spans("attractors")
    assert {(r, s) for r, s in zip(spans.row.tolist(), spans.start.tolist(), strict=True)} == set(clauses)
    for index in range(len(spans)):
        clause = clauses[int(spans.row[index]), int(spans.start[index])]
        assert spans.classes[spans.label[index]] == ("plural" if clause["plural"] else "singular")
        assert attractors.classes[attractors.label[index]] == str(clause["attractors"])
    others = built.alternatives
    assert others is not None
    # most verbs occur in both numbers somewhere in the file
    assert 0.85 * len(clauses) < len(others) <= len(clauses)
    ids = built.tokens(0, built.n_examples).input_ids.numpy()
    for row, position, token in others.table().tolist():
        right, wrong = word[int(ids[row, position])], word[token]
        pair = {"is", "are"} if right in ("is", "are") else {right.rstrip("s"), right.rstrip("s") + "s"}
        assert {right, wrong} == pair
        assert (wrong in ("are",) or not wrong.endswith("s")) == (not clauses[row, position]["plural"])
    assert built.summary["alternatives"] == {"aligned": len(others)}


def test_without_the_task_the_corpus_gives_what_it_always_gave(tmp_path: Path) -> None:
    generate_to_file(tmp_path / "corpus.jsonl", 30, 0)
    words = words_of(tmp_path / "corpus.jsonl")
    built = build_evaluation_set(
        tmp_path / "set", [tmp_path / "corpus.jsonl"], tokenizer=word_tokenizer(tmp_path / "t", words)
    )
    assert built.tasks == ("plural", "pos", "role")
    assert built.alternatives is None


def subword_tokenizer(folder: Path) -> Path:
    """run, runs → run, run s; is, are are one token each."""
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, "they", "he", "run", "##s", "is", "are", "##ning", "walk"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_forms_of_several_sub_words(tmp_path: Path) -> None:
    records = [
        {"words": ["he", "runs"], "n": ["x", "y"], "alternatives": [None, "running"]},  # differ in the second sub-word
        {"words": ["he", "runs"], "n": ["x", "y"], "alternatives": [None, "run"]},  # one begins the other
        {"words": ["they", "are"], "n": ["x", "y"], "alternatives": [None, "is"]},
        {"text": "he is", "spans": [{"task": "n", "start": 3, "end": 5, "label": "y", "alternative": "are"}]},
        {"words": ["they", "running"], "n": ["x", "y"], "alternatives": ["he", "walks"]},
    ]
    source = write(tmp_path / "e.jsonl", "\n".join(map(json.dumps, records)))
    built = build_evaluation_set(
        tmp_path / "set", [source], tokenizer=subword_tokenizer(tmp_path / "t"), tasks=["n"], add_bos=False
    )
    assert built.alternatives is not None
    assert built.alternatives.table().tolist() == [[0, 2, 10], [2, 1, 8], [3, 1, 9], [4, 0, 5], [4, 1, 11]]
    assert built.summary["alternatives"] == {"aligned": 5, "not_comparable": 1}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"words": ["a", "b"], "alternatives": ["c"]}, "must have a form or null for each of the 2 words"),
        ({"words": ["a", "b"], "alternatives": [" c", None]}, "an alternative is a word, without spaces around it"),
        (
            {"text": "a b", "spans": [{"start": 0, "end": 1, "label": "x", "alternative": 3}]},
            "an alternative is a word",
        ),
    ],
)
def test_alternatives_that_are_none(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    source = write(tmp_path / "e.jsonl", json.dumps(record))
    with pytest.raises(EvaluationSetError, match=message):
        build_evaluation_set(tmp_path / "s", [source], tokenizer=word_tokenizer(tmp_path / "t", {"a", "b", "c"}))


def test_clauses_that_do_not_fit(tmp_path: Path) -> None:
    record = {"words": ["a", "b"], "lemmas": ["a", "b"], "pos": ["X", "Y"], "clauses": [{"verb": 2, "plural": True}]}
    source = write(tmp_path / "e.jsonl", json.dumps(record))
    with pytest.raises(EvaluationSetError, match="line 1: expected clauses with verb"):
        build_evaluation_set(
            tmp_path / "s", [source], tokenizer=word_tokenizer(tmp_path / "t", {"a"}), tasks=["agreement"]
        )


def test_a_corpus_without_agreement_has_none_to_measure(tmp_path: Path) -> None:
    from trace_offline.corpus import CorpusParams, generate_to_file

    source = tmp_path / "c.jsonl"
    generate_to_file(source, 5, 0, CorpusParams(agreement=False))
    with pytest.raises(EvaluationSetError, match="was made without agreement, so there is none to measure"):
        build_evaluation_set(
            tmp_path / "s", [source], tokenizer=word_tokenizer(tmp_path / "t", {"a"}), tasks=["agreement"]
        )


@pytest.mark.parametrize(
    ("alternative", "message"),
    [
        ((0, 1, 5), r"row 0, position 1 \(token 5\): it is the token that is there already"),
        ((1, 2, 7), r"row 1, position 2 \(token 7\): the place is padding"),
        ((2, 0, 7), "there is no such place in the set"),
        ((0, 1, -1), "token ids are 0 or more"),
        ((0, 1), r"alternative 0: expected \(row, position, token\)"),
    ],
)
def test_recorded_alternatives_that_cannot_be(tmp_path: Path, alternative: tuple[int, ...], message: str) -> None:
    with pytest.raises(EvaluationSetError, match=message):
        save_evaluation_set(tmp_path / "e", [[1, 5, 6], [1, 8]], alternatives=[alternative])


def test_recorded_alternatives(tmp_path: Path) -> None:
    given = [(1, 1, 9), (0, 2, 4)]
    folder = save_evaluation_set(tmp_path / "e", [[1, 5, 6], [1, 8]], alternatives=given)
    found = EvaluationSet.load(folder)
    assert found.alternatives is not None
    assert found.alternatives.table().tolist() == [[0, 2, 4], [1, 1, 9]]
    without = EvaluationSet.load(save_evaluation_set(tmp_path / "w", [[1, 5, 6], [1, 8]]))
    assert found.hash != without.hash
    with pytest.raises(EvaluationSetError, match="this place has another alternative"):
        save_evaluation_set(tmp_path / "x", [[1, 5, 6]], alternatives=[(0, 2, 4), (0, 2, 3)])


def test_the_command_says_what_it_found(tmp_path: Path) -> None:
    generate_to_file(tmp_path / "corpus.jsonl", 60, 0)
    generate_to_file(tmp_path / "training.jsonl", 200, 1)
    corpus, training = (tmp_path / name for name in ("corpus.jsonl", "training.jsonl"))
    training.write_text(training.read_text() + "".join(corpus.read_text().splitlines(keepends=True)[:20]))
    tokenizer = word_tokenizer(tmp_path / "t", words_of(training) | words_of(corpus))
    arguments = ["--from", tmp_path / "corpus.jsonl", "--tokenizer", tokenizer, "--task", "agreement"]
    arguments += ["--training-text", tmp_path / "training.jsonl"]
    result = CliRunner().invoke(app, ["evaluation-set", "build", str(tmp_path / "s"), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "alternatives: " in result.output
    assert "training text: 220 texts" in result.output
    found = EvaluationSet.load(tmp_path / "s")
    assert found.has_training_text
    assert found.training_text().seen[:20].all()
    assert not found.training_text().seen.all()
    shown = CliRunner().invoke(app, ["evaluation-set", "show", str(tmp_path / "s")])
    assert shown.exit_code == 0
    assert "compared with a training text of 220 texts" in shown.output
    assert "words have another form to compare them with" in shown.output

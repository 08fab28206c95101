"""The five file forms: round trips, files of ABSynth written by hand, evaluation sets from each."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from corpus_files import BY_HAND, FULL_RECORD, LABELS, READ, RUN, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trace_offline.cli.main import app
from trace_offline.core.errors import UsageError
from trace_offline.corpus import (
    AnnotatedSentence,
    CorpusParams,
    LexiconParams,
    generate,
    generate_to_file,
    origin_path,
    read_origin,
)
from trace_offline.corpus.forms import FORMS, carried, read_corpus, read_metadata, write_corpus
from trace_offline.evaluation.evaluation_set import EvaluationSet


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = {word for sentences in READ.values() for sentence in sentences for word in sentence.words}
    words |= {word for sentence in islice(generate(1), 200) for word in sentence.words}
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", *sorted(words)])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>").save_pretrained(folder)
    return folder


def build(out: Path, source: Path, tokenizer: Path) -> set[tuple[str, str, str]]:
    """One command; the (task, word, label) triples of the set."""
    command = ["evaluation-set", "build", str(out), "--from", str(source), "--tokenizer", str(tokenizer)]
    done = RUN.invoke(app, command)
    assert done.exit_code == 0, (done.output, done.exception)
    made = EvaluationSet.load(out)
    names = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    ids = made.tokens(0, made.n_examples).input_ids
    found = set()
    for task in made.tasks:
        spans = made.spans(task)
        for row, start, label in zip(spans.row.tolist(), spans.start.tolist(), spans.label.tolist(), strict=True):
            found.add((task, names.convert_ids_to_tokens(int(ids[row, start])), spans.classes[label]))
    return found


@pytest.mark.parametrize("form", BY_HAND)
@pytest.mark.parametrize("indent", [None, 2])
def test_files_written_by_hand_are_read(tmp_path: Path, form: str, indent: int | None) -> None:
    path = write(tmp_path / "c.json", BY_HAND[form], indent=indent)
    found, sentences = read_corpus(path)
    assert (found, list(sentences)) == (form, READ[form])


def test_a_first_version_file_may_be_an_object(tmp_path: Path) -> None:
    record = BY_HAND["v1"][0] | {"metadata": {"complexity": "simple"}}
    found, sentences = read_corpus(write(tmp_path / "c.json", {"corpus": [record], "statistics": {}}))
    assert (found, list(sentences)) == ("v1", READ["v1"])


@pytest.mark.parametrize("form", BY_HAND)
def test_files_written_by_hand_become_evaluation_sets(tmp_path: Path, form: str, tokenizer: Path) -> None:
    found = build(tmp_path / "e", write(tmp_path / "c.json", BY_HAND[form]), tokenizer)
    assert found >= LABELS[form]
    assert bool(found) == bool(LABELS[form])
    if form == "absynth":
        assert {task for task, _, _ in found} == {"pos", "role", "frame"}


@pytest.mark.parametrize("form", FORMS)
def test_our_own_files_become_evaluation_sets_with_the_same_labels(tmp_path: Path, form: str, tokenizer: Path) -> None:
    path = tmp_path / ("c.jsonl" if form == "jsonl" else "c.json")
    generate_to_file(path, 60, 1, form=form)
    found = {each for each in build(tmp_path / "e", path, tokenizer) if each[0] == "role"}
    sentences = list(islice(generate(1), 60))
    expected = {("role", s.words[i], role) for s in sentences for i, role in enumerate(s.roles) if role is not None}
    assert found == (set() if form == "sentences_only" else expected)


@pytest.mark.parametrize("form", FORMS)
def test_what_a_form_carries_comes_back_and_is_written_the_same_again(tmp_path: Path, form: str) -> None:
    sentences = list(islice(generate(2), 2000))
    path, again = tmp_path / "c", tmp_path / "again"
    assert generate_to_file(path, 2000, 2, form=form) == 2000
    found, back = read_corpus(path)
    read = list(back)
    assert found == form
    assert read == [carried(sentence, form) for sentence in sentences]
    assert [s.text for s in read] == [s.text for s in sentences]
    origin = read_origin(path)
    assert origin is not None
    assert list(islice(generate(origin.seed, origin.params), 2000)) == sentences
    write_corpus(again, read, form, origin=origin)
    assert again.read_bytes() == path.read_bytes()
    generate_to_file(again, 2000, 2, form=form)
    assert again.read_bytes() == path.read_bytes()
    generate_to_file(again, 2000, 3, form=form)
    assert again.read_bytes() != path.read_bytes()


@pytest.mark.parametrize("form", ["jsonl", "absynth"])
def test_files_are_written_in_a_stream(tmp_path: Path, form: str) -> None:
    def peak(sentences: int) -> int:
        tracemalloc.start()
        generate_to_file(tmp_path / "c", sentences, 0, form=form)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(200)  # what is loaded and cached once
    small = peak(1000)
    before = (tmp_path / "c").stat().st_size
    large = peak(3000)
    assert large - small < 0.2 * ((tmp_path / "c").stat().st_size - before)


@pytest.mark.parametrize("form", BY_HAND)
def test_reading_and_writing_a_file_by_hand_settles(tmp_path: Path, form: str) -> None:
    write_corpus(tmp_path / "a", READ[form], form)
    assert list(read_corpus(tmp_path / "a")[1]) == READ[form]
    write_corpus(tmp_path / "b", read_corpus(tmp_path / "a")[1], form)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_written_full_record_has_the_fields_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    write_corpus(path, READ["absynth"], "absynth")
    content = json.loads(path.read_text())
    assert set(content) == {"corpus", "metadata", "statistics"}
    record = content["corpus"][0]
    expected = json.loads(json.dumps(FULL_RECORD))
    # Not written: a weight and running entropies, which the sentence does not have.
    del expected["metadata"]["template"]["weight"]
    del expected["metadata"]["entropy_profile"], expected["metadata"]["avg_entropy"]
    expected["corpus_metadata"] = {"target_frame": "motion", "sentence_id": 0}
    assert record == expected


def test_the_metadata_of_a_full_file_says_what_was_asked_and_made(tmp_path: Path) -> None:
    params = CorpusParams(complexity=(0.5, 0.25, 0.25))
    generate_to_file(tmp_path / "c.json", 400, 7, params, form="absynth")
    metadata = read_metadata(tmp_path / "c.json")
    asked, made = metadata["generation_params"], metadata["actual_distributions"]
    assert asked["num_sentences"] == 400
    assert asked["complexity_distribution"] == {"simple": 0.5, "medium": 0.25, "complex": 0.25}
    assert CorpusParams.from_record(asked["corpus_params"]) == params
    levels = Counter(sentence.complexity for sentence in islice(generate(7, params), 400))
    assert made["complexity"] == {level: count / 400 for level, count in levels.items()}
    assert sum(made["semantic_frames"].values()) == pytest.approx(1.0)


def test_forms_that_would_have_to_invent_something_are_refused(tmp_path: Path) -> None:
    plain = READ["sentences_only"]
    for form, message in (
        ("jsonl", "lack lemmas, number and clauses"),
        ("absynth", "sentence 0 has no roles"),
        ("v1", "sentence 0 has no roles"),
    ):
        with pytest.raises(UsageError, match=message):
            write_corpus(tmp_path / "c", plain, form)
    with pytest.raises(UsageError, match="no frame or no positions of its roles; write it as v1"):
        write_corpus(tmp_path / "c", READ["v1"], "semantic_annotations")
    with pytest.raises(UsageError, match="no part of speech or complexity; write semantic_annotations"):
        write_corpus(tmp_path / "c", READ["semantic_annotations"], "absynth")
    with pytest.raises(UsageError, match=r'found "absynt"\. Did you mean "absynth"'):
        write_corpus(tmp_path / "c", plain, "absynt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "expected JSON"),
        ("[]", "not an empty one"),
        ("{}", 'an object with a list "corpus"'),
        ("[3]", "record 0: expected a sentence"),
        ('["a b", 3]', "record 1: expected a sentence"),
        ('[{"sentence": "a", "semantic_roles": []}]', "record 0: expected an object"),
        ('[{"sentence": "a", "semantic_roles": {"arg0": {"role": "Agent", "position": 4}}}]', "one of the 1 words"),
        (
            '[{"sentence": "a", "semantic_roles": {"arg0": {"role": "Agent", "position": 0, "word": "b"}}}]',
            'says that word 0 is "b"; the sentence has "a"',
        ),
        (
            '[{"sentence": "a b", "semantic_roles": {}, "linguistic_annotations": {"pos_tags": ["NN"]}}]',
            "one tag for each of the 2 words",
        ),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        list(read_corpus(path)[1])
    assert message in str(caught.value)
    assert "c.json" in str(caught.value)


# The commands


def test_generate_takes_its_options_to_the_corpus(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    done = RUN.invoke(
        app,
        [
            "corpus", "generate", str(path), "--sentences", "500", "--seed", "4", "--format", "absynth",
            "--vocabulary", "900", "--entropy", "4.5", "--complexity", "0.2,0.3,0.5", "--frame", "give=3",
            "--frame", "strike=1", "--collocation", "verb_noun=0.4", "--attractors", "0.5", "--no-agreement",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stdout == ""
    origin = read_origin(path)
    assert origin is not None
    assert origin.params == CorpusParams(
        entropy=4.5, complexity=(0.2, 0.3, 0.5), frames=(("give", 3.0), ("strike", 1.0)), verb_noun=0.4,
        attractors=0.5, agreement=False, lexicon=LexiconParams.for_vocabulary(900),
    )  # fmt: skip
    expected = [carried(s, "absynth") for s in islice(generate(4, origin.params), 500)]
    assert list(read_corpus(path)[1]) == expected
    # The parameters of one corpus make another; options go over them.
    other = tmp_path / "d.jsonl"
    command = ["corpus", "generate", str(other), "--sentences", "5", "--params", str(origin_path(path))]
    assert RUN.invoke(app, [*command, "--collocation", "verb_noun=0"]).exit_code == 0
    made = read_origin(other)
    assert made is not None
    assert (made.params.verb_noun, made.params.entropy, made.params.agreement) == (0.0, 4.5, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "xml"], 'found "xml"'),
        (["--frame", "give"], "expected NAME=NUMBER"),
        (["--frame", "give=much"], 'expected a number, found "much"'),
        (["--collocation", "noun_verb=1"], "expected noun_adjective, verb_noun or verb_adverb"),
        (["--complexity", "1,2"], "three shares that sum to 1"),
        (["--vocabulary", "7"], "too few"),
        (["--entropy", "20"], "at most"),
        (["--params", "none.json"], "cannot read the parameters"),
    ],
)
def test_wrong_options_are_explained(tmp_path: Path, options: list[str], message: str) -> None:
    done = RUN.invoke(app, ["corpus", "generate", str(tmp_path / "c"), "--sentences", "3", *options])
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_sentences_are_annotated_alike_in_all_forms() -> None:
    sentence = next(s for s in generate(0) if "AUX" in s.pos and "SCONJ" in s.pos)
    assert isinstance(sentence, AnnotatedSentence)
    tags = carried(sentence, "absynth").pos
    assert tags is not None
    assert {"DT", "NN", "VB", "IN"} <= set(tags)
    assert tags[sentence.pos.index("AUX")] in ("VBZ", "VBP")
    assert carried(sentence, "jsonl") is sentence

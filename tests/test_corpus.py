"""The corpus: reproducible, grammatical, Zipfian, with roles that follow from the frames and not from the words."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import time
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from trace_offline.core.errors import UsageError
from trace_offline.corpus import (
    FRAMES,
    ROLES,
    AnnotatedSentence,
    CorpusParams,
    LexiconParams,
    build_lexicon,
    generate,
    generate_to_file,
    read_jsonl,
    write_jsonl,
)
from trace_offline.corpus.grammar import COMPLEXITIES, PLURAL_DETERMINERS, POS_TAGS, SINGULAR_DETERMINERS
from trace_offline.corpus.lexicon import FUNCTION_WORDS

LEXICON = build_lexicon()
NOUN_NUMBER = {stem + ending: bool(ending) for stem in LEXICON.nouns for ending in ("", "s")}
VERB_NUMBER = {stem + ending: not ending for stems in LEXICON.verbs.values() for stem in stems for ending in ("", "s")}
VERB_FRAME = {
    stem + ending: name for name, stems in LEXICON.verbs.items() for stem in stems for ending in ("", "s", "ed")
}


@pytest.fixture(scope="module")
def corpus() -> list[AnnotatedSentence]:
    return list(islice(generate(seed=7), 25_000))


def read_off(sentence: AnnotatedSentence) -> tuple[list[tuple[int, int]], dict[int, str | None]]:
    """Parse the bare words: (subject, finite verb) pairs and the role of every noun, from the grammar's prose alone.

    A second reading of the rules: it knows the word lists and the table of frames, not how sentences are drawn.
    """
    words, pos = sentence.words, sentence.pos
    roles: dict[int, str | None] = {}
    pairs: list[tuple[int, int]] = []
    subject: int | None = None  # the noun that the next verb agrees with
    outer: int | None = None  # a subject whose verb is still to come after a relative clause
    main = 0  # the subject of the clause, which a verb after "and" shares
    frame, passive, preposition = None, False, None
    for i, (word, tag) in enumerate(zip(words, pos, strict=True)):
        if tag == "NOUN":
            if preposition in ("near", "behind"):
                roles[i] = None
            elif frame is None:
                subject = main = i
                roles[i] = "?"
            elif preposition:
                roles[i] = frame.role_of_oblique(preposition, passive=passive)
            else:
                roles[i] = frame.object
            preposition, last = None, i
        elif tag == "ADP":
            preposition = word
        elif word == "that":
            outer = subject if frame is None else None
            subject, frame = last, None
        elif word in ("and", "while"):
            shared = pos[i + 1] != "DET"
            subject, frame = (main if shared else None), None
        elif tag in ("AUX", "VERB"):
            if tag == "VERB" and passive and words[i - 1] in ("is", "are"):
                continue  # the participle belongs to its auxiliary
            if frame is not None:  # a second finite verb: the relative clause is over
                subject, outer = outer, None
            passive = tag == "AUX"
            frame = FRAMES[VERB_FRAME[words[i + 1] if passive else word]]
            assert subject is not None
            pairs.append((subject, i))
            role = frame.object if passive else frame.subject
            if roles[subject] == "?" and (outer is None or subject != outer):
                roles[subject] = role
            preposition = None
    return pairs, roles


def finite_number(word: str) -> bool:
    return {"is": False, "are": True}.get(word, VERB_NUMBER.get(word))


def test_same_seed_same_bytes_and_a_known_digest(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert generate_to_file(tmp_path / name, 2_000, seed=3) == 2_000
    first = (tmp_path / "a").read_bytes()
    assert first == (tmp_path / "b").read_bytes()
    # Another process or machine must give the same file: the digest is part of the contract.
    assert hashlib.sha256(first).hexdigest() == DIGEST
    generate_to_file(tmp_path / "c", 2_000, seed=4)
    assert first != (tmp_path / "c").read_bytes()


def test_a_stream_is_its_own_prefix_and_leaves_global_random_state_alone() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    short, long = list(islice(generate(5), 50)), list(islice(generate(5), 500))
    assert long[:50] == short
    assert np.array_equal(before, np.random.get_state()[1])


def test_two_streams_at_once_do_not_disturb_each_other() -> None:
    one, two = generate(5), generate(5)
    mixed = [next(stream) for _ in range(200) for stream in (one, two)]
    assert mixed[::2] == mixed[1::2] == list(islice(generate(5), 200))


def test_every_verb_agrees_and_attractors_are_counted(corpus: list[AnnotatedSentence]) -> None:
    attracted = 0
    for sentence in corpus:
        pairs, _ = read_off(sentence)
        assert {(c.subject, c.verb) for c in sentence.clauses} == set(pairs), sentence.text
        for clause in sentence.clauses:
            number = NOUN_NUMBER[sentence.words[clause.subject]]
            assert number == finite_number(sentence.words[clause.verb]) == clause.plural, sentence.text
            between = sentence.words[clause.subject + 1 : clause.verb]
            tags = sentence.pos[clause.subject + 1 : clause.verb]
            others = [w for w, tag in zip(between, tags, strict=True) if tag == "NOUN" and NOUN_NUMBER[w] != number]
            assert len(others) == clause.attractors
            attracted += bool(others)
    assert attracted > 0.1 * len(corpus)  # enough of them to test agreement with


def test_roles_are_those_of_the_frames(corpus: list[AnnotatedSentence]) -> None:
    for sentence in corpus:
        _, expected = read_off(sentence)
        found = {i: role for i, role in enumerate(sentence.roles) if sentence.pos[i] == "NOUN"}
        assert found == expected, sentence.text
        assert all(role is None for role, tag in zip(sentence.roles, sentence.pos, strict=True) if tag != "NOUN")


def test_lemmas_and_number_are_those_of_the_word_forms(corpus: list[AnnotatedSentence]) -> None:
    nouns, verbs = set(LEXICON.nouns), {stem for stems in LEXICON.verbs.values() for stem in stems}
    for sentence in corpus[:3000]:
        for word, tag, lemma, plural in zip(
            sentence.words, sentence.pos, sentence.lemmas, sentence.plural, strict=True
        ):
            if tag == "NOUN":
                assert lemma in nouns
                assert (word, plural) in ((lemma, False), (lemma + "s", True))
            elif tag == "VERB":
                assert lemma in verbs
                assert (word, plural) in ((lemma, True), (lemma + "s", False), (lemma + "ed", None))
            elif tag == "AUX":
                assert (word, lemma, plural) in (("is", "be", False), ("are", "be", True))
            else:
                assert (lemma, plural) == (word, None)


def test_determiners_agree_and_every_noun_has_one(corpus: list[AnnotatedSentence]) -> None:
    for sentence in corpus:
        determiner = None
        for word, tag in zip(sentence.words, sentence.pos, strict=True):
            if tag == "DET":
                determiner = word
            elif tag == "NOUN":
                assert determiner in (PLURAL_DETERMINERS if NOUN_NUMBER[word] else SINGULAR_DETERMINERS)
                determiner = None


def test_a_noun_says_nothing_about_its_role_but_its_context_does(corpus: list[AnnotatedSentence]) -> None:
    by_noun: dict[str, Counter[str]] = defaultdict(Counter)
    by_preposition: dict[str, set[str]] = defaultdict(set)
    for sentence in corpus:
        for i, role in enumerate(sentence.roles):
            if role:
                by_noun[sentence.lemmas[i]][role] += 1
                before = [j for j in range(i) if sentence.pos[j] not in ("DET", "ADJ")][-1:]
                if before and sentence.pos[before[0]] == "ADP":
                    by_preposition[sentence.words[before[0]]].add(role)
    total = sum(by_noun.values(), Counter())
    n = total.total()
    assert set(total) == set(ROLES)
    assert min(total.values()) > 0.03 * n
    entropy = -sum(k / n * math.log(k / n) for k in total.values())
    conditional = -sum(k / n * math.log(k / c.total()) for c in by_noun.values() for k in c.values())
    # The plug-in estimate of mutual information is biased up by about (R - 1)(W - 1) / 2n when the truth is zero.
    bias = (len(ROLES) - 1) * (len(by_noun) - 1) / (2 * n)
    assert entropy - conditional < 1.5 * bias
    ambiguous = {p for p, roles in by_preposition.items() if len(roles) > 1}
    assert ambiguous >= {"with", "to", "from", "by", "in", "at", "on"}


def test_all_objects_and_obliques_are_decided_by_what_precedes() -> None:
    objects = {frame.object for frame in FRAMES.values()} - {None}
    assert objects == set(ROLES) - {"Agent"}
    for frame in FRAMES.values():
        assert len({p for p, _ in frame.obliques}) == len(frame.obliques)  # one role for each preposition of a frame
    assert sum(frame.weight for frame in FRAMES.values()) == pytest.approx(1.0)
    with pytest.raises(KeyError):
        FRAMES["strike"].role_of_oblique("by")
    assert FRAMES["strike"].role_of_oblique("by", passive=True) == "Agent"
    assert FRAMES["amuse"].role_of_oblique("by", passive=True) == "Theme"


def test_frames_and_complexity_come_in_the_asked_shares(corpus: list[AnnotatedSentence]) -> None:
    n = len(corpus)
    for level, share in zip(COMPLEXITIES, CorpusParams().complexity, strict=True):
        found = sum(s.complexity == level for s in corpus)
        assert abs(found - share * n) < 4 * math.sqrt(share * (1 - share) * n)
    clauses = Counter(c.frame for s in corpus for c in s.clauses)
    m = clauses.total()
    for name, frame in FRAMES.items():
        assert abs(clauses[name] - frame.weight * m) < 4 * math.sqrt(frame.weight * m)
    simple = [s for s in corpus if s.complexity == "simple"]
    assert all(len(s.clauses) == 1 and not {"ADJ", "ADV", "AUX"} & set(s.pos) for s in simple)
    assert all(len(s.clauses) == 2 for s in corpus if s.complexity == "complex")
    mean = {level: np.mean([len(s.words) for s in corpus if s.complexity == level]) for level in COMPLEXITIES}
    assert mean["simple"] < mean["medium"] < mean["complex"]
    assert {tag for s in corpus for tag in s.pos} == set(POS_TAGS)
    assert {s.frame == s.clauses[0].frame for s in corpus} == {True}


def test_lexicon_forms_are_distinct_words() -> None:
    stems = [*LEXICON.adjectives, *LEXICON.adverbs, *LEXICON.nouns]
    verbs = [stem for group in LEXICON.verbs.values() for stem in group]
    assert len(set(stems)) == len(stems)
    assert len(set(verbs)) == len(verbs)
    shared = set(verbs) & set(LEXICON.nouns)
    assert len(shared) == round(0.2 * len(verbs))
    assert not set(verbs) & set(LEXICON.adjectives + LEXICON.adverbs)
    inflected = [*stems, *(n + "s" for n in LEXICON.nouns)]
    assert len(set(inflected)) == len(inflected)
    assert not set(inflected) & FUNCTION_WORDS
    assert all(word.isascii() and word.isalpha() and word.islower() for word in LEXICON.word_forms())
    assert build_lexicon(seed=0) == LEXICON != build_lexicon(seed=1)


def test_the_corpus_uses_exactly_the_lexicons_forms(corpus: list[AnnotatedSentence]) -> None:
    used = {word for s in corpus for word in s.words}
    assert used <= LEXICON.word_forms()
    assert len(LEXICON.word_forms() - used) < 5


def test_the_lexicon_grows_past_ten_thousand() -> None:
    lexicon = build_lexicon(LexiconParams(nouns=60_000, verbs_per_frame=100, adjectives=3_000, adverbs=1_000))
    stems = {*lexicon.nouns, *lexicon.adjectives, *lexicon.adverbs, *(v for g in lexicon.verbs.values() for v in g)}
    assert len(stems) == 60_000 + 1_400 + 4_000 - 280
    words = {
        w
        for s in islice(generate(0, CorpusParams(alpha=0.5, lexicon=LexiconParams(nouns=20_000))), 5_000)
        for w in s.words
    }
    assert len(words) > 7_000


def test_jsonl_round_trip_and_no_partial_file(tmp_path: Path) -> None:
    sentences = list(islice(generate(1), 100))
    path = tmp_path / "c.jsonl"
    assert write_jsonl(path, sentences) == 100
    assert list(read_jsonl(path)) == sentences
    record = json.loads(path.read_text().splitlines()[0])
    assert {len(record[k]) for k in ("pos", "roles", "lemmas", "plural")} == {len(record["words"])}

    def broken():
        yield sentences[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert list(read_jsonl(path)) == sentences  # the old file is untouched
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{}", "line 2: expected an annotated sentence, field 'words' is missing"),
        ("nonsense", "line 2: expected an annotated sentence"),
        ("[1]", "line 2: expected an annotated sentence"),
        ('{"words":["a"],"pos":[],"roles":[null],"lemmas":["a"],"plural":[null]}', "one annotation per word expected"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, text: str) -> None:
    path = tmp_path / "c.jsonl"
    generate_to_file(path, 1, 0)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UsageError, match=r"c\.jsonl") as caught:
        list(read_jsonl(path))
    assert text in str(caught.value)


def test_bad_parameters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1, found 0"):
        generate_to_file(tmp_path / "x", 0, 0)
    with pytest.raises(UsageError, match="from 0 on, found -1"):
        next(generate(-1))
    with pytest.raises(UsageError, match="share between 0 and 1, found 2"):
        CorpusParams(plural=2)
    with pytest.raises(UsageError, match="three shares that sum to 1"):
        CorpusParams(complexity=(0.5, 0.4, 0.2))
    with pytest.raises(UsageError, match="nouns must be at least 1"):
        LexiconParams(nouns=0)
    with pytest.raises(UsageError, match="Ask for more nouns"):
        LexiconParams(nouns=3)
    with pytest.raises(UsageError, match="cannot read the corpus"):
        list(read_jsonl(tmp_path / "absent.jsonl"))
    assert not list(tmp_path.iterdir())


def test_the_module_writes_a_file_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    command = [sys.executable, "-m", "trace_offline.corpus", "--seed", "3", "--output", str(path), "--sentences"]
    done = subprocess.run([*command, "2000"], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "2000 sentences written" in done.stderr
    assert hashlib.sha256(path.read_bytes()).hexdigest() == DIGEST
    failed = subprocess.run([*command, "0"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: corpus: the number of sentences")


def test_fast_enough_to_stream() -> None:
    stream = generate(0)
    next(stream)
    started = time.process_time()
    for sentence in islice(stream, 5_000):
        sentence.to_json()
    seconds = time.process_time() - started
    assert seconds < 2.0  # about 0.3 on one core; the margin is for busy machines


DIGEST = "df345e482c85bf3187ff8b20966ebc5f6f79d6bc632b77c40ebd7995b5604737"

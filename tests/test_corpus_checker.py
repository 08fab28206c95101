"""The recogniser of the corpus grammar: accepts what the grammar makes, names what is wrong with the rest."""

from __future__ import annotations

import random
import re
from functools import cache
from itertools import islice

import pytest

from trace_offline.corpus import (
    FRAMES,
    KINDS,
    AnnotatedSentence,
    CorpusParams,
    Frame,
    LexiconParams,
    build_lexicon,
    generate,
    intervene,
)
from trace_offline.corpus.checker import ERRORS, Parse, check
from trace_offline.corpus.grammar import MODIFIER_PREPOSITIONS, PLURAL_DETERMINERS, SINGULAR_DETERMINERS
from trace_offline.corpus.lexicon import inflect, participle
from trace_offline.corpus.readings import readings_for

LEXICON = build_lexicon()
READINGS = readings_for(CorpusParams())
NUMBERS = (False, True)

OTHERS = [
    CorpusParams(alpha=0.3, lexicon_seed=5),
    CorpusParams(complexity=(0.0, 0.0, 1.0), attractors=1.0, passive=1.0, adjectives=1.0, adverbs=1.0, plural=0.5),
    CorpusParams(complexity=(1.0, 0.0, 0.0), plural=1.0, alpha=0.0),
    CorpusParams(lexicon=LexiconParams(nouns=90, verbs_per_frame=6, homographs=1.0), lexicon_seed=2, alpha=0.0),
    CorpusParams(lexicon=LexiconParams(nouns=4000, verbs_per_frame=40, adjectives=300, adverbs=100), attractors=0.9),
    CorpusParams(agreement=False, complexity=(0.2, 0.2, 0.6)),
    CorpusParams(noun_adjective=0.5, verb_noun=0.7, verb_adverb=0.3, entropy=5.0),
    CorpusParams(frames=(("go", 1.0), ("fear", 2.0), ("give", 1.0))),
]
NAMES = ["seed", "rich", "simple", "homographs", "large", "no_agreement", "collocated", "frames"]


def read(text: str, **options: bool) -> Parse:
    return check(text.split(), READINGS, **options)


@pytest.fixture(scope="module")
def corpus() -> list[AnnotatedSentence]:
    return list(islice(generate(seed=11), 25_000))


# A second recogniser, by regular expressions over whole words, for what the module's docstring promises.


def one_of(words: object) -> str:
    return f"(?:{'|'.join(sorted(set(words), key=len, reverse=True))})"  # type: ignore[call-overload]


@cache
def phrase(plural: bool | None = None) -> str:
    if plural is None:
        return f"(?:{phrase(False)}|{phrase(True)})"
    nouns = one_of(inflect(stem) if plural else stem for stem in LEXICON.nouns)
    determiners = one_of(PLURAL_DETERMINERS if plural else SINGULAR_DETERMINERS)
    return f"{determiners} (?:{one_of(LEXICON.adjectives)} )?{nouns}"


def obliques(frame: Frame) -> str:
    """In order, each at most once, at least as many as the frame requires."""
    every = "".join(f"(?: {preposition} {phrase()})?" for preposition, _ in frame.obliques)
    if not frame.required:
        return every
    return f"(?= {one_of(p for p, _ in frame.obliques)} ){every}"


@cache
def predicate(plural: bool) -> str:
    forms = []
    for frame in FRAMES.values():
        stems = LEXICON.verbs[frame.name]
        verbs = one_of(stem if plural else inflect(stem) for stem in stems)
        forms.append(verbs + (f" {phrase()}" if frame.object else "") + obliques(frame))
        if frame.passive:
            be = "are" if plural else "is"
            forms.append(f"{be} {one_of(map(participle, stems))}(?: by {phrase()})?" + obliques(frame))
    return f"(?:{one_of(LEXICON.adverbs)} )?(?:{'|'.join(forms)})"


@cache
def clause(plural: bool) -> re.Pattern[str]:
    return re.compile(f"{phrase(plural)}(?: {one_of(MODIFIER_PREPOSITIONS)} {phrase()})? {predicate(plural)}")


@cache
def predicates(plural: bool, count: int) -> re.Pattern[str]:
    return re.compile(" ".join([predicate(plural)] * count))


@cache
def bare(plural: bool) -> re.Pattern[str]:
    return re.compile(phrase(plural))


@cache
def ends_in_noun(plural: bool) -> re.Pattern[str]:
    return re.compile(f".* {phrase(plural)}")


def matches(text: str, plural: bool | None = None) -> bool:
    return any(clause(number).fullmatch(text) for number in NUMBERS if plural in (None, number))


def grammatical(words: list[str]) -> bool:
    places = [i for i, word in enumerate(words) if word in ("and", "while", "that")]
    if not places:
        return matches(" ".join(words))
    if len(places) > 1:
        return False
    left, right = " ".join(words[: places[0]]), " ".join(words[places[0] + 1 :])
    if words[places[0]] == "while":
        return matches(left) and matches(right)
    for number in NUMBERS:
        second = predicates(number, 1).fullmatch(right)
        if words[places[0]] == "and" and matches(left, number) and (second or matches(right)):
            return True
        if words[places[0]] == "that":
            if bare(number).fullmatch(left) and predicates(number, 2).fullmatch(right):
                return True
            if second and matches(left) and ends_in_noun(number).fullmatch(left):
                return True
    return False


def test_every_sentence_is_read_as_it_was_made(corpus: list[AnnotatedSentence]) -> None:
    for sentence in corpus:
        found = check(sentence.words, READINGS)
        assert found.well_formed, (sentence.text, found.errors)
        assert found.pos == sentence.pos
        assert found.roles == sentence.roles
        assert found.plural == sentence.plural
        assert found.clauses == sentence.clauses


@pytest.mark.parametrize("params", OTHERS, ids=NAMES)
def test_no_error_in_corpora_of_other_parameters(params: CorpusParams) -> None:
    readings = readings_for(params)
    for sentence in islice(generate(1, params), 5_000):
        found = check(sentence.words, readings)
        assert found.well_formed, (sentence.text, found.errors)
        assert (found.roles, found.clauses) == (sentence.roles, sentence.clauses)


@pytest.mark.slow
@pytest.mark.parametrize("params", OTHERS, ids=NAMES)
def test_no_error_in_25000_sentences_of_other_parameters(params: CorpusParams) -> None:
    readings = readings_for(params)
    assert all(check(sentence.words, readings).well_formed for sentence in islice(generate(2, params), 25_000))


def edited(words: list[str], rng: random.Random, every: list[str]) -> list[str]:
    """One or two small changes: a word removed, doubled, replaced, or two exchanged."""
    words = list(words)
    for _ in range(rng.choice((1, 1, 2))):
        i, j = rng.randrange(len(words)), rng.randrange(len(words))
        match rng.randrange(5):
            case 0 if len(words) > 1:
                del words[i]
            case 1:
                words.insert(i, words[i])
            case 2:
                words[i] = rng.choice(every)
            case 3:
                words[i], words[j] = words[j], words[i]
            case _:
                words[i] = words[i][:-1] if words[i].endswith("s") else words[i] + "s"
    return words


def test_accepts_exactly_what_a_second_recogniser_accepts(corpus: list[AnnotatedSentence]) -> None:
    rng = random.Random(3)
    every = sorted(LEXICON.word_forms())
    accepted = 0
    for sentence in corpus[:2_500]:
        assert grammatical(list(sentence.words)), sentence.text
        words = edited(list(sentence.words), rng, every)
        found = check(words, READINGS).well_formed
        assert found == grammatical(words), (" ".join(words), found)
        accepted += found
    assert 100 < accepted < 1_500  # both answers were put to the test


def test_shuffled_words_are_found(corpus: list[AnnotatedSentence]) -> None:
    rng = random.Random(0)
    wrong = 0
    for sentence in corpus[:3_000]:
        words = list(sentence.words)
        rng.shuffle(words)
        found = check(words, READINGS)
        assert found.well_formed == grammatical(words), " ".join(words)  # some shuffles of few words are sentences
        wrong += not found.well_formed
    assert wrong > 0.97 * 3_000


def test_each_intervention_is_found_with_its_error(corpus: list[AnnotatedSentence]) -> None:
    seen = dict.fromkeys(KINDS, 0)
    for index, sentence in enumerate(corpus[:2_000]):
        for kind in KINDS:
            pair = intervene(sentence, kind, index)
            if pair is None:
                continue
            seen[kind] += 1
            found = check(pair.changed.words, READINGS)
            where = (pair.changed.text, found.errors)
            if kind == "synonym":
                assert found.well_formed, where
            elif kind == "agreement_violation":
                assert [error.kind for error in found.errors] == ["broken_agreement"], where
                assert found.errors[0].position == pair.changed_positions[0], where
            elif kind == "role_violation":
                assert found.errors[0].kind in ("unknown_frame", "missing_role"), where
                assert found.kinds <= {"unknown_frame", "missing_role"}, where
                assert "unknown_frame" in found.kinds, where
                assert pair.changed_positions[0] in {error.position for error in found.errors}, where
            else:
                assert not found.well_formed, where
                assert found.kinds & {"wrong_class", "unknown_frame", "missing_role", "repetition"}, where
    assert min(seen.values()) > 500


NOUN, NOUNS = LEXICON.nouns[1], inflect(LEXICON.nouns[1])  # the first noun is a homograph
ADJECTIVE, ADVERB = LEXICON.adjectives[0], LEXICON.adverbs[0]


def verb(frame: str) -> str:
    """A singular verb that is no noun."""
    return inflect(next(stem for stem in LEXICON.verbs[frame] if stem not in LEXICON.nouns))


STRIKE, GO, TELL = verb("strike"), verb("go"), verb("tell")
STRUCK = participle(STRIKE[:-1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"the {NOUN} {STRIKE} the {NOUN}", []),
        (f"the {NOUN} {STRIKE} the {NOUN} with a {NOUN} in the {NOUN} at the {NOUN}", []),
        (f"the {NOUN} near many {NOUNS} {ADVERB} {STRIKE} the {ADJECTIVE} {NOUN}", []),
        (f"the {NOUN} is {STRUCK} by the {NOUN}", []),
        (f"the {NOUN} that {STRIKE} the {NOUN} {STRIKE} the {NOUN}", []),
        ("", [("unfinished", 0)]),
        (f"the {NOUN} quux the {NOUN}", [("unknown_word", 2)]),
        (f"the quux {STRIKE} the {NOUN}", [("unknown_word", 1)]),
        (f"quux {NOUN} {STRIKE} the {NOUN}", [("unknown_word", 0)]),
        (f"the {NOUN} {STRIKE} the {NOUN} quux the {NOUN}", [("unknown_word", 5)]),
        (f"the {NOUN} {GO} quux the {NOUN}", [("unknown_word", 3)]),
        (f"the {NOUN} is quux", [("unknown_word", 3)]),
        (f"the {NOUN} {STRIKE} the {NOUN} to the {NOUN}", [("unknown_frame", 5)]),
        (f"the {NOUN} {STRIKE} the {NOUN} at the {NOUN} with the {NOUN}", [("unknown_frame", 8)]),
        (f"the {NOUN} {STRIKE} the {NOUN} near the {NOUN}", [("unknown_frame", 5)]),
        (f"the {NOUN} {STRIKE} the {NOUN} a {NOUN}", [("unknown_frame", 5)]),
        (f"the {NOUN} {GO} the {NOUN} to the {NOUN}", [("unknown_frame", 3)]),
        (f"the {NOUN} with the {NOUN}", [("unknown_frame", 2)]),
        (f"the {NOUN} a {NOUN} in the {NOUN}", [("unknown_frame", 2)]),
        (f"the {NOUN} {STRIKE} the {NOUN} and the {NOUN} while the {NOUN} {STRIKE} the {NOUN}",
         [("unknown_frame", 8), ("wrong_class", 8)]),
        (f"the {NOUN} {STRIKE}", [("missing_role", 3)]),
        (f"the {NOUN} {STRIKE} in the {NOUN}", [("missing_role", 3)]),
        (f"the {NOUN} {GO}", [("missing_role", 3)]),
        (f"{STRIKE} the {NOUN}", [("missing_role", 0)]),
        (f"the {NOUN} {GO} to", [("unfinished", 4)]),
        (f"the {NOUN} {STRIKE} the {NOUN} with at the {NOUN}", [("missing_role", 6)]),
        (f"the {STRIKE} the {NOUN}", [("wrong_class", 1)]),
        (f"the {NOUN} the {STRIKE} the {NOUN}", [("wrong_class", 2), ("wrong_class", 3)]),
        (f"{NOUN} {STRIKE} the {NOUN}", [("wrong_class", 0)]),
        (f"the {NOUN} {STRUCK} the {NOUN}", [("wrong_class", 2)]),
        (f"the {NOUN} is {STRIKE}", [("wrong_class", 3)]),
        (f"the {NOUN} {STRIKE} the {NOUN} {ADVERB}", [("wrong_class", 5), ("unfinished", 6)]),
        (f"the {NOUN} {STRIKE} the {NOUN} and {STRIKE} a {NOUN} while the {NOUN} {STRIKE} the {NOUN}",
         [("wrong_class", 9)]),
        (f"the {NOUNS} {STRIKE} the {NOUN}", [("broken_agreement", 2)]),
        (f"the {NOUN} near the {NOUNS} {STRIKE[:-1]} the {NOUN}", [("broken_agreement", 5)]),
        (f"the {NOUNS} that {STRIKE} the {NOUN} {STRIKE[:-1]} the {NOUN}", [("broken_agreement", 3)]),
        (f"the {NOUN} are {STRUCK}", [("broken_agreement", 2)]),
        (f"many {NOUN} {STRIKE} the {NOUN}", [("broken_agreement", 1)]),
        (f"the {NOUN} {STRIKE} a {NOUNS}", [("broken_agreement", 4)]),
        (f"the the {NOUN} {STRIKE} the {NOUN}", [("repetition", 1)]),
        (f"the {NOUN} the {NOUN} the {NOUN} {STRIKE} the {NOUN}", [("repetition", 2)]),
        (f"the {NOUN} {STRIKE} the {NOUN} in the {NOUN} in the {NOUN}", [("repetition", 8)]),
        (f"the {NOUN} {STRIKE} {STRIKE} the {NOUN}", [("repetition", 3)]),
        (f"the {NOUN} {STRIKE} the {NOUN} {STRIKE} the {NOUN} {STRIKE} the {NOUN}", [("repetition", 5)]),
        ("the", [("unfinished", 1)]),
        (f"the {NOUN}", [("unfinished", 2)]),
        (f"the {NOUN} is", [("unfinished", 3)]),
        (f"the {NOUN} {STRIKE} the {ADJECTIVE}", [("unfinished", 5)]),
        (f"the {NOUN} {STRIKE} the {NOUN} and", [("unfinished", 6)]),
        (f"the {NOUN} that {STRIKE} the {NOUN}", [("unfinished", 6)]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_sentence(text: str, expected: list[tuple[str, int]]) -> None:
    found = read(text)
    assert [(error.kind, error.position) for error in found.errors] == expected, found.errors
    assert found.well_formed == (not expected)
    assert all(error.kind in ERRORS and error.detail for error in found.errors)


def test_words_that_were_cut_off_are_unfinished_and_nothing_else(corpus: list[AnnotatedSentence]) -> None:
    rng = random.Random(1)
    for sentence in corpus[:2_000]:
        words = sentence.words[: rng.randint(0, len(sentence.words))]
        found = check(words, READINGS, finished=False)
        assert [(error.kind, error.position) for error in found.errors] == [("unfinished", len(words))], found
    assert read(f"the {NOUN} near the {NOUNS} {STRIKE[:-1]}", finished=False).kinds == {
        "broken_agreement",
        "unfinished",
    }


def test_without_agreement_no_word_shows_number() -> None:
    readings = readings_for(CorpusParams(agreement=False))
    assert check(f"the {NOUN} {STRIKE[:-1]} a {NOUN}".split(), readings).well_formed
    for text in (
        f"the {NOUNS} {STRIKE[:-1]} a {NOUN}",
        f"these {NOUN} {STRIKE[:-1]} a {NOUN}",
        f"a {NOUN} are {STRUCK}",
    ):
        assert "unknown_word" in check(text.split(), readings).kinds
    for sentence in islice(generate(3, CorpusParams(agreement=False)), 500):
        assert set(sentence.words) <= readings.keys()


def test_any_words_can_be_read() -> None:
    rng = random.Random(2)
    every = [*sorted(LEXICON.word_forms()), "quux", "", "the", "that", "and", "is"]
    for _ in range(3_000):
        words = rng.choices(every, k=rng.randrange(14))
        found = check(words, READINGS, finished=rng.random() < 0.5)
        assert len(found.pos) == len(found.roles) == len(words)
        assert all(0 <= error.position <= len(words) for error in found.errors)
        assert found.kinds <= ERRORS.keys()

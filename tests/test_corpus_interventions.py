"""Minimal pairs: what each kind changes, that violations are violations at the position compared, and the file form."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from corpus_prefixes import Prefixes
from typer.testing import CliRunner

from trace_offline.cli.main import app
from trace_offline.core.errors import UsageError
from trace_offline.corpus import (
    FRAMES,
    KINDS,
    AnnotatedSentence,
    CorpusParams,
    LexiconParams,
    Origin,
    Pair,
    build_lexicon,
    generate,
    generate_to_file,
    intervene,
    intervene_all,
    origin_path,
    read_jsonl,
    read_origin,
    read_pairs,
    write_origin,
    write_pairs,
)
from trace_offline.corpus.expectation import preposition_use
from trace_offline.corpus.lexis import field_lists
from trace_offline.corpus.sampling import zipf_probabilities

LEXICON = build_lexicon()
SENTENCES = list(islice(generate(5), 3000))
PREFIXES = Prefixes(LEXICON)
PER_WORD = ("words", "pos", "roles", "lemmas", "plural")


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[Pair | None]]:
    return {kind: list(intervene_all(SENTENCES, kind, seed=2)) for kind in KINDS}


def made(pairs: dict[str, list[Pair | None]], kind: str) -> list[Pair]:
    return [pair for pair in pairs[kind] if pair is not None]


def differences(pair: Pair) -> list[int]:
    one, two = pair.original.words, pair.changed.words
    assert len(one) == len(two)
    return [i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]


def test_the_recogniser_accepts_the_corpus_and_finds_planted_errors() -> None:
    for sentence in SENTENCES[:1000]:
        assert PREFIXES.viable(sentence.words), sentence.text
        assert len(sentence.words) in set(PREFIXES.sentence())
        assert not PREFIXES.viable((*sentence.words, "the"))
        assert not PREFIXES.viable(sentence.words[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_most_sentences_admit_every_kind_and_annotations_stay_aligned(
    pairs: dict[str, list[Pair | None]], kind: str
) -> None:
    found = made(pairs, kind)
    assert len(found) > 0.9 * len(SENTENCES)
    assert all(pair is None or pair.original == s for pair, s in zip(pairs[kind], SENTENCES, strict=True))
    for pair in found:
        assert pair.kind == kind
        lengths = {len(getattr(pair.changed, name)) for name in PER_WORD}
        assert lengths == {len(pair.original.words) - (kind == "elimination")}
        assert len(pair.original_positions) == len(pair.changed_positions) == 1
        for clause in pair.changed.clauses:
            assert pair.changed.pos[clause.subject] == "NOUN"
            assert pair.changed.pos[clause.verb] in ("VERB", "AUX")


def test_the_same_seed_gives_the_same_pair_and_another_seed_others(pairs: dict[str, list[Pair | None]]) -> None:
    again = list(intervene_all(SENTENCES[:200], "synonym", seed=2))
    assert again == pairs["synonym"][:200]
    assert list(intervene_all(SENTENCES[:200], "synonym", seed=3)) != again
    # a pair does not depend on what came before it
    assert intervene(SENTENCES[7], "elimination", np.random.default_rng([2, 2, 7])) == pairs["elimination"][7]
    assert intervene(SENTENCES[0], "synonym", 4) == intervene(SENTENCES[0], "synonym", 4)


def test_a_synonym_is_another_lemma_of_the_list_in_the_same_form(pairs: dict[str, list[Pair | None]]) -> None:
    kinds = Counter()
    for pair in made(pairs, "synonym"):
        (place,) = differences(pair)
        assert pair.original_positions == pair.changed_positions == (place,)
        one, two, tag = pair.original.lemmas[place], pair.changed.lemmas[place], pair.original.pos[place]
        assert one != two
        assert pair.original.words[place].removeprefix(one) == pair.changed.words[place].removeprefix(two)
        same = {"NOUN": [LEXICON.nouns], "ADJ": [LEXICON.adjectives], "ADV": [LEXICON.adverbs]}
        assert any({one, two} <= set(stems) for stems in same.get(tag, LEXICON.verbs.values()))
        for name in ("pos", "roles", "plural", "clauses", "frame", "complexity"):
            assert getattr(pair.changed, name) == getattr(pair.original, name)
        assert len(pair.changed.words) in set(sentence_ends(pair.changed)), pair.changed.text
        kinds[pair.detail] += 1
    assert set(kinds) == {"NOUN", "VERB", "ADJ", "ADV"}


def sentence_ends(sentence: AnnotatedSentence) -> list[int]:
    PREFIXES.words = list(sentence.words)
    return list(PREFIXES.sentence())


def test_synonyms_are_as_frequent_as_the_corpus_makes_them() -> None:
    sentence = next(s for s in SENTENCES if len(s.words) == 5 and s.pos.count("NOUN") == 2)
    lemma = sentence.lemmas[1]
    drawn: Counter[str] = Counter()
    for seed in range(3000):
        pair = intervene(sentence, "synonym", seed)
        assert pair is not None
        if pair.original_positions == (1,):
            drawn[pair.changed.lemmas[1]] += 1
    p = dict(zip(LEXICON.nouns, zipf_probabilities(len(LEXICON.nouns), 1.0), strict=True))
    n = drawn.total()
    assert abs(n - 1000) < 4 * np.sqrt(3000 * 2 / 9)  # each of the three words as often
    for stem in LEXICON.nouns[:5]:
        share = 0.0 if stem == lemma else p[stem] / (1 - p[lemma])
        assert abs(drawn[stem] - n * share) <= 4 * np.sqrt(n * share * (1 - share))


@pytest.mark.parametrize("kind", ["role_violation", "elimination", "agreement_violation"])
def test_what_is_compared_could_not_follow_in_the_changed_sentence(
    pairs: dict[str, list[Pair | None]], kind: str
) -> None:
    for pair in made(pairs, kind):
        at, before = pair.changed_positions[0], pair.original_positions[0]
        assert PREFIXES.viable(pair.original.words[: before + 1])
        assert PREFIXES.viable(pair.changed.words[:at]), (pair.detail, pair.changed.words[: at + 1])
        assert not PREFIXES.viable(pair.changed.words[: at + 1]), (pair.detail, pair.changed.words[: at + 1])


def test_role_violations_mark_roles_that_the_frame_does_not_give(pairs: dict[str, list[Pair | None]]) -> None:
    details = Counter()
    for pair in made(pairs, "role_violation"):
        (place,) = differences(pair)
        at = pair.changed_positions[0]
        assert pair.original_positions == (at,)
        details[pair.detail] += 1
        lost = [i for i, role in enumerate(pair.original.roles) if role != pair.changed.roles[i]]
        if pair.detail == "preposition":
            assert place == at
            clause = max((c for c in pair.original.clauses if c.verb < at), key=lambda c: c.verb)
            with pytest.raises(KeyError):
                FRAMES[clause.frame].role_of_oblique(pair.changed.words[at], passive=clause.passive)
            assert [pair.changed.roles[i] for i in lost] == [None]
            assert pair.changed.clauses == pair.original.clauses
        else:
            assert place == at - 1
            assert pair.original.words[at] == pair.changed.words[at]  # one and the same word, licensed and not
            old = next(c for c in pair.original.clauses if c.verb == place)
            new = next(c for c in pair.changed.clauses if c.verb == place)
            assert FRAMES[old.frame].object
            assert FRAMES[new.frame].object is None
            assert FRAMES[new.frame].subject == FRAMES[old.frame].subject
            assert pair.changed.lemmas[place] in LEXICON.verbs[new.frame]
            assert pair.changed.roles[old.subject] == pair.original.roles[old.subject]
            assert old.subject not in lost
            assert pair.changed.frame == pair.changed.clauses[0].frame
    assert min(details["object"], details["preposition"]) > 300


def uses(sentences: list[AnnotatedSentence]) -> Counter[str]:
    return Counter(w for s in sentences for w, tag in zip(s.words, s.pos, strict=True) if tag == "ADP" and w in MARKING)


MARKING = {preposition for frame in FRAMES.values() for preposition, _ in frame.obliques} | {"by"}
OTHER_CORPORA = (
    CorpusParams(),
    CorpusParams(passive=0.0),
    CorpusParams(complexity=(0.2, 0.1, 0.7), passive=0.6),
    CorpusParams(frames=(("strike", 1.0), ("give", 1.0))),
    CorpusParams(frames=(("tell", 1.0), ("work", 2.0), ("go", 1.0))),
)


@pytest.mark.parametrize("params", OTHER_CORPORA)
def test_the_expected_use_of_prepositions_is_that_of_the_corpus(params: CorpusParams) -> None:
    found, expected = uses(list(islice(generate(3, params), 4000))), preposition_use(params)
    assert {name for name, use in expected.items() if use > 0} == set(found)
    for name, count in found.items():
        # a sentence has at most a few of one preposition, so its variance is at most twice its mean
        assert abs(count - 4000 * expected[name]) <= 5 * np.sqrt(2 * count)


@pytest.mark.parametrize("params", OTHER_CORPORA)
def test_no_word_of_a_role_violation_is_new_to_the_corpus(params: CorpusParams) -> None:
    sentences = list(islice(generate(3, params), 3000))
    seen = uses(sentences)
    frames = {name for name, share in params.frame_shares.items() if share > 0}
    changed = [pair for pair in intervene_all(sentences, "role_violation", 1, params) if pair]
    wrong = Counter(pair.changed.words[pair.changed_positions[0]] for pair in changed if pair.detail == "preposition")
    assert sum(wrong.values()) > 300
    assert set(wrong) <= set(seen)
    for pair in changed:
        assert {clause.frame for clause in pair.changed.clauses} <= frames
    objects = sum(pair.detail == "object" for pair in changed)
    assert (objects > 0) == bool(frames & {"work"} or not params.frames)


def test_wrong_prepositions_are_as_frequent_as_the_corpus_makes_them() -> None:
    use = preposition_use(CorpusParams())
    counts: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    for pair in intervene_all(SENTENCES, "role_violation", 1):
        if pair is None or pair.detail != "preposition":
            continue
        at = pair.changed_positions[0]
        counts[pair.changed.words[at]] += 1
        clause = max((c for c in pair.original.clauses if c.verb < at), key=lambda c: c.verb)
        known = {name for name, _ in FRAMES[clause.frame].obliques} | ({"by"} if clause.passive else set())
        rest = sum(each for name, each in use.items() if name not in known)
        expected.update({name: each / rest for name, each in use.items() if name not in known})
    n = counts.total()
    assert n > 900
    assert counts.keys() == use.keys()
    for name, count in counts.items():
        assert abs(count - expected[name]) <= 4 * np.sqrt(expected[name])
    assert counts["by"] / n < 0.15  # by the weights of its frames it would be 0.23


def test_eliminations_drop_one_word_and_compare_the_next(pairs: dict[str, list[Pair | None]]) -> None:
    details = Counter()
    for pair in made(pairs, "elimination"):
        place = pair.changed_positions[0]
        assert pair.original_positions == (place + 1,)
        for name in PER_WORD:
            values = getattr(pair.original, name)
            assert getattr(pair.changed, name) == values[:place] + values[place + 1 :]
        assert pair.detail == pair.original.pos[place]
        details[pair.detail] += 1
        assert len(pair.changed.clauses) <= len(pair.original.clauses)
        for clause in pair.changed.clauses:
            shifted = [
                (c.subject - (c.subject > place), c.verb - (c.verb > place), c.frame) for c in pair.original.clauses
            ]
            assert (clause.subject, clause.verb, clause.frame) in shifted
            between = range(clause.subject + 1, clause.verb)
            others = [i for i in between if pair.changed.pos[i] == "NOUN" and pair.changed.plural[i] != clause.plural]
            assert clause.attractors == len(others)
    assert set(details) == {"DET", "NOUN", "VERB", "AUX", "ADP", "CCONJ", "SCONJ"}


def test_agreement_violations_change_the_number_of_one_finite_verb(pairs: dict[str, list[Pair | None]]) -> None:
    details = Counter()
    for pair in made(pairs, "agreement_violation"):
        (place,) = differences(pair)
        clause = next(c for c in pair.original.clauses if c.verb == place)
        assert pair.original.plural[place] is clause.plural
        assert pair.changed.plural[place] is not clause.plural
        assert pair.changed.lemmas == pair.original.lemmas
        assert pair.changed.clauses == pair.original.clauses
        assert pair.detail == ("attractor" if clause.attractors else "no_attractor")
        details[pair.detail] += 1
    assert min(details.values()) > 100


def test_sentences_that_do_not_admit_a_kind_give_none() -> None:
    bare = AnnotatedSentence(
        ("the", "noun", "works"),
        ("DET", "NOUN", "VERB"),
        (None, "Agent", None),
        ("the", "noun", LEXICON.verbs["work"][0]),
        (None, False, False),
        "work",
        "simple",
        (SENTENCES[0].clauses[0].__class__("work", 1, 2, False, False, 0),),
    )
    assert intervene(bare, "role_violation", 0) is None
    assert intervene(bare, "elimination", 0) is not None
    with pytest.raises(UsageError, match="not a lemma of this lexicon"):
        [intervene(bare, "synonym", seed) for seed in range(20)]
    with pytest.raises(UsageError, match=r'found "synonim"\. Did you mean "synonym"'):
        intervene(bare, "synonim", 0)


def test_synonyms_in_a_corpus_with_collocations_share_a_field() -> None:
    params = CorpusParams(noun_adjective=0.5)
    layout = field_lists(LEXICON, params)
    others = 0
    for sentence in islice(generate(1, params), 400):
        pair = intervene(sentence, "synonym", 3, params)
        if pair is None:  # a lemma may have its field for itself
            continue
        (place,) = differences(pair)
        one, two = pair.original.lemmas[place], pair.changed.lemmas[place]
        layouts = [each for each in layout.values() if {one, two} <= set(each.stems)]
        shared = [each.overlap()[each.stems.index(one)] @ each.overlap()[each.stems.index(two)] for each in layouts]
        assert max(shared) > 0
        others += 1
    assert others > 380


def test_without_agreement_there_is_none_to_violate() -> None:
    params = CorpusParams(agreement=False)
    for sentence in islice(generate(1, params), 100):
        assert intervene(sentence, "agreement_violation", 0, params) is None
        pair = intervene(sentence, "role_violation", 0, params)
        if pair is not None and pair.detail == "object":
            (place,) = differences(pair)
            assert pair.changed.words[place] == pair.changed.lemmas[place]


def test_a_list_of_one_lemma_has_no_synonym() -> None:
    params = CorpusParams(lexicon=LexiconParams(nouns=1, verbs_per_frame=1, adjectives=1, adverbs=1, homographs=0))
    for sentence in islice(generate(0, params), 20):
        assert intervene(sentence, "synonym", 0, params) is None


def test_the_file_of_pairs(tmp_path: Path, pairs: dict[str, list[Pair | None]]) -> None:
    found = [pair for kind in KINDS for pair in made(pairs, kind)[:50]]
    path = tmp_path / "pairs.jsonl"
    assert write_pairs(path, found) == 200
    assert list(read_pairs(path)) == found
    first = path.read_bytes()
    write_pairs(path, read_pairs(path))
    assert path.read_bytes() == first
    record = json.loads(first.splitlines()[0])
    assert list(record) == ["kind", "original", "changed", "original_positions", "changed_positions", "detail"]
    assert AnnotatedSentence.from_record(record["changed"]) == found[0].changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"original_positions": []}, "at least one"),
        ({"changed_positions": [99]}, "positions of words expected"),
        ({"changed": None}, "expected a pair"),
        ({"kind": ...}, "'kind'"),
    ],
)
def test_a_bad_line_of_pairs_is_named(tmp_path: Path, change: dict, message: str) -> None:
    pair = intervene(SENTENCES[0], "synonym", 0)
    assert pair is not None
    record = {k: v for k, v in (pair.to_record() | change).items() if v is not ...}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair.to_record()) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(UsageError, match=r"pairs\.jsonl, line 2: expected a pair") as caught:
        list(read_pairs(path))
    assert message in str(caught.value)
    with pytest.raises(UsageError, match="cannot read the pairs"):
        list(read_pairs(tmp_path / "none"))


def test_the_command_writes_pairs_with_the_parameters_of_the_file(tmp_path: Path) -> None:
    params = CorpusParams(lexicon=LexiconParams(nouns=40), lexicon_seed=9)
    corpus, out = tmp_path / "c.jsonl", tmp_path / "p.jsonl"
    generate_to_file(corpus, 120, 3, params)
    run = CliRunner()
    command = ["corpus", "intervene", str(corpus), str(out), "--kind", "synonym", "--kind", "role_violation"]
    done = run.invoke(app, [*command, "--seed", "6"])
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert "synonym: 120 pairs written" in done.stderr
    found = list(read_pairs(out))
    assert Counter(pair.kind for pair in found)["synonym"] == 120
    expected = [p for k in ("synonym", "role_violation") for p in intervene_all(read_jsonl(corpus), k, 6, params) if p]
    assert found == expected
    digest = hashlib.sha256(out.read_bytes()).digest()
    run.invoke(app, [*command, "--seed", "6"])
    assert hashlib.sha256(out.read_bytes()).digest() == digest
    run.invoke(app, [*command, "--sentences", "10"])
    assert Counter(pair.kind for pair in read_pairs(out))["synonym"] == 10
    origin_path(corpus).unlink()  # without the parameters the default lexicon does not fit
    failed = run.invoke(app, command)
    assert isinstance(failed.exception, UsageError)
    assert "not a lemma of this lexicon" in str(failed.exception)


def test_parameters_survive_as_a_record_and_beside_the_file(tmp_path: Path) -> None:
    params = CorpusParams(alpha=1.25, complexity=(0.2, 0.3, 0.5), lexicon=LexiconParams(nouns=50), lexicon_seed=4)
    record = params.to_record()
    assert CorpusParams.from_record(json.loads(json.dumps(record))) == params
    assert CorpusParams.from_record({}) == CorpusParams()
    path = tmp_path / "c.jsonl"
    assert read_origin(path) is None
    generate_to_file(path, 30, 8, params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "c.jsonl.params.json"]
    origin = read_origin(path)
    assert origin == Origin(8, 30, params)
    assert list(islice(generate(origin.seed, origin.params), origin.sentences)) == list(read_jsonl(path))
    assert write_origin(path, origin) == origin_path(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"version": 99}, "made by version 99 of the grammar, this is version 1"),
        ({"alfa": 1.0}, 'no parameter "alfa". Did you mean "alpha"'),
        ({"lexicon": {"noun": 3}}, 'no parameter "noun". Did you mean "nouns"'),
        ({"lexicon": 3}, "LexiconParams is an object"),
        ({"plural": "many"}, "wrong type"),
        ({"plural": 3.0}, "share between 0 and 1"),
        ([], "expected an object"),
    ],
)
def test_bad_records_are_refused(tmp_path: Path, record: object, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        CorpusParams.from_record(record)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_damaged_file_of_parameters_is_named(tmp_path: Path) -> None:
    origin_path(tmp_path / "c.jsonl").write_text('{"seed": 1}')
    with pytest.raises(UsageError, match=r"c\.jsonl\.params\.json: expected the parameters of c\.jsonl"):
        read_origin(tmp_path / "c.jsonl")

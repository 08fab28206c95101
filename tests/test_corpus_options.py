"""What a corpus is asked to be, measured on 25,000 sentences: distributions, exponents, collocations, entropy."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from scipy import stats

from trace_offline.core.errors import UsageError
from trace_offline.corpus import (
    FRAMES,
    ROLES,
    AnnotatedSentence,
    CorpusParams,
    LexiconParams,
    build_lexicon,
    fit_zipf,
    generate,
)
from trace_offline.corpus.collocation import (
    collocation_pairs,
    expected_information,
    expected_pointwise,
    pointwise,
    strength,
)
from trace_offline.corpus.entropy import entropy, mean_entropy, mutual_information
from trace_offline.corpus.expectation import entropy_per_word, exponent, list_sizes, words_per_sentence
from trace_offline.corpus.grammar import COMPLEXITIES, POS_TAGS, SINGULAR_DETERMINERS
from trace_offline.corpus.lexis import field_lists, lemma_lists
from trace_offline.corpus.sampling import zipf_probabilities

N = 25_000
COLLOCATED = CorpusParams(noun_adjective=0.5, verb_noun=0.3, verb_adverb=0.7, lexicon_seed=2)


def draw(params: CorpusParams, seed: int = 0, n: int = N) -> list[AnnotatedSentence]:
    return list(islice(generate(seed, params), n))


def by_list(sentences: list[AnnotatedSentence]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {name: Counter() for name in list_sizes(CorpusParams())}
    for sentence in sentences:
        verbs = {clause.verb + clause.passive: clause.frame for clause in sentence.clauses}
        for i, (tag, lemma) in enumerate(zip(sentence.pos, sentence.lemmas, strict=True)):
            name = {"NOUN": "noun", "ADJ": "adjective", "ADV": "adverb"}.get(tag)
            if tag == "VERB":
                name = f"verb {verbs[i]}"
            if name:
                found[name][lemma] += 1
    return found


def chi_square_p(counts: Counter[str], shares: dict[str, float]) -> float:
    names = [name for name, share in shares.items() if share > 0]
    assert set(counts) <= set(names)
    n = counts.total()
    if len(names) == 1:
        return 1.0
    return float(stats.chisquare([counts[name] for name in names], [n * shares[name] for name in names]).pvalue)


@pytest.fixture(scope="module")
def plain() -> list[AnnotatedSentence]:
    return draw(CorpusParams())


@pytest.fixture(scope="module")
def collocated() -> list[AnnotatedSentence]:
    return draw(COLLOCATED, seed=3)


# Distributions


def test_all_roles_and_parts_of_speech_occur_at_the_words_that_bear_them(plain: list[AnnotatedSentence]) -> None:
    roles, tags = Counter(), Counter()
    for sentence in plain:
        for word, tag, role in zip(sentence.words, sentence.pos, sentence.roles, strict=True):
            assert word
            tags[tag] += 1
            if role is not None:
                assert tag == "NOUN"
                roles[role] += 1
    assert set(roles) == set(ROLES)
    assert min(roles.values()) > 2000
    assert set(tags) == set(POS_TAGS)


@pytest.mark.parametrize(
    ("complexity", "frames", "seed"),
    [
        ((0.35, 0.4, 0.25), (), 0),
        ((0.1, 0.2, 0.7), (("strike", 1.0), ("go", 3.0), ("fear", 4.0)), 1),
        ((1.0, 0.0, 0.0), (("give", 0.9), ("seem", 0.1)), 2),
    ],
)
def test_complexity_and_frames_pass_a_chi_square_test(
    complexity: tuple[float, float, float], frames: tuple[tuple[str, float], ...], seed: int
) -> None:
    params = CorpusParams(complexity=complexity, frames=frames)
    levels, clauses = Counter(), Counter()
    for sentence in draw(params, seed):
        levels[sentence.complexity] += 1
        clauses.update(clause.frame for clause in sentence.clauses)
    assert levels.total() == N
    # Six tests in all: at this level one of them would fail by chance for one choice of seeds in 1,700.
    assert chi_square_p(levels, dict(zip(COMPLEXITIES, complexity, strict=True))) > 1e-4
    assert chi_square_p(clauses, params.frame_shares) > 1e-4
    assert sum(params.frame_shares.values()) == pytest.approx(1.0)


def test_the_chi_square_test_would_notice_other_shares(plain: list[AnnotatedSentence]) -> None:
    levels = Counter(sentence.complexity for sentence in plain)
    assert chi_square_p(levels, {"simple": 0.37, "medium": 0.4, "complex": 0.23}) < 1e-6


# Sentences that existed before there were options keep their bytes.
OLD = {
    "large": (
        CorpusParams(lexicon=LexiconParams(nouns=2300, verbs_per_frame=120, adjectives=600, adverbs=400)),
        "dd9ca3d75f96cef552abd4c55cbd038d8f2ea583f8bcfbdaa1b13fcb32361df4",
    ),
    "other shares": (
        CorpusParams(
            alpha=1.3, complexity=(0.1, 0.2, 0.7), attractors=0.5, plural=0.5, passive=0.4, adjectives=0.4, adverbs=0.3,
            lexicon_seed=5,
        ),
        "ac518387e844bd641828b42b479c53950835edfb61a40cf917831308816f8cc7",
    ),
    "extremes": (
        CorpusParams(
            alpha=0.0, complexity=(0, 0, 1), attractors=1, plural=0, passive=1, adjectives=1, adverbs=1,
            lexicon=LexiconParams(homographs=0),
        ),
        "d1599b5c0f4600f4bba28fc04972d4ef8a8b11fd8cc5023768fb23eb9ac51a04",
    ),
}  # fmt: skip


DIGEST_WITH_OPTIONS = "ace7c709545033466ba070e32c267062c23f08d618583d5ff29590dd1ce93c77"


@pytest.mark.parametrize("name", OLD)
def test_sentences_without_the_new_options_keep_their_bytes(name: str) -> None:
    params, digest = OLD[name]
    lines = hashlib.sha256()
    for sentence in draw(params, seed=12, n=3000):
        lines.update(sentence.to_json().encode() + b"\n")
    assert lines.hexdigest() == digest


def test_every_option_is_reproducible_by_seed() -> None:
    params = CorpusParams(
        frames=(("give", 1.0), ("strike", 1.0)), noun_adjective=0.4, verb_noun=0.2, verb_adverb=1.0, entropy=3.0,
        agreement=False, lexicon=LexiconParams.for_vocabulary(700),
    )  # fmt: skip
    one, two = draw(params, 5, 400), draw(params, 5, 400)
    assert one == two != draw(params, 6, 400)
    text = "".join(sentence.to_json() + "\n" for sentence in one)
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST_WITH_OPTIONS
    assert CorpusParams.from_record(params.to_record()) == params


# Numbers of words


@pytest.mark.parametrize("params", [CorpusParams(), OLD["other shares"][0], OLD["extremes"][0]])
def test_expected_numbers_of_words_are_those_of_the_text(params: CorpusParams) -> None:
    sentences = draw(params, seed=4, n=4_000)
    names = list(list_sizes(params))
    table = np.zeros((len(sentences), len(names)))
    for i, sentence in enumerate(sentences):
        for name, counts in by_list([sentence]).items():
            table[i, names.index(name)] = counts.total()
    expected = np.array([words_per_sentence(params)[name] for name in names])
    stderr = table.std(0) / math.sqrt(len(table))
    assert np.all(np.abs(table.mean(0) - expected) < 4.5 * stderr + 1e-9)


# Zipf


@pytest.mark.parametrize(
    "alpha", [0.5, pytest.param(0.8, marks=pytest.mark.slow), 1.0, pytest.param(1.2, marks=pytest.mark.slow), 1.5]
)
def test_fitted_slopes_are_within_five_hundredths_of_the_asked_exponent(alpha: float) -> None:
    params = CorpusParams(alpha=alpha)
    stems, counts = lemma_lists(build_lexicon()), by_list(draw(params, seed=9))
    for name in ("noun", "adjective"):
        assert abs(fit_zipf([counts[name][stem] for stem in stems[name]]).alpha - alpha) < 0.05
    verbs = np.sum([[counts[name][stem] for stem in stems[name]] for name in stems if name.startswith("verb")], axis=0)
    assert abs(fit_zipf(verbs).alpha - alpha) < 0.05
    # 2,900 adverbs leave a standard error of 0.02, so theirs is held against that as well.
    fit = fit_zipf([counts["adverb"][stem] for stem in stems["adverb"]])
    assert abs(fit.alpha - alpha) < max(0.05, 3 * fit.stderr)


def test_collocations_leave_the_exponent_alone(collocated: list[AnnotatedSentence]) -> None:
    stems = lemma_lists(build_lexicon(seed=2))
    counts = by_list(collocated)
    for name in ("noun", "adjective"):
        fit = fit_zipf([counts[name][stem] for stem in stems[name]])
        assert abs(fit.alpha - 1.0) < 0.05
        # and not only the exponent: the whole distribution is the Zipf distribution
        shares = dict(zip(stems[name], zipf_probabilities(len(stems[name]), 1.0), strict=True))
        assert chi_square_p(counts[name], shares) > 1e-4


# Collocations


@pytest.mark.parametrize("kind", ["noun_adjective", "verb_noun", "verb_adverb"])
def test_asked_strengths_are_measured_in_the_text(collocated: list[AnnotatedSentence], kind: str) -> None:
    pairs = collocation_pairs(collocated)[kind]
    fit = strength(kind, pairs, COLLOCATED)
    assert abs(fit.value - getattr(COLLOCATED, kind)) < 3 * fit.stderr
    assert fit.stderr < 0.02
    assert fit.n == pairs.total() > 2000


def test_without_collocations_the_strength_is_zero(plain: list[AnnotatedSentence]) -> None:
    for kind, pairs in collocation_pairs(plain).items():
        fit = strength(kind, pairs, CorpusParams())
        assert abs(fit.value) < 3 * fit.stderr
        assert expected_information(kind, CorpusParams()) == 0.0


def test_the_share_of_collocates_by_counting_alone(collocated: list[AnnotatedSentence]) -> None:
    """Second way: the share of adjectives out of the noun's own field, for words that lie in one field only."""
    layout = field_lists(build_lexicon(seed=2), COLLOCATED)
    fields = {}
    for name in ("noun", "adjective"):
        overlap = layout[name].overlap()
        whole = overlap > 0.999 * overlap.sum(1, keepdims=True)
        fields[name] = {
            stem: int(row.argmax()) for stem, row in zip(layout[name].stems, whole, strict=True) if row.any()
        }
    pairs = collocation_pairs(collocated)["noun_adjective"]
    inside, other = Counter(), Counter()
    for (_, noun, adjective), count in pairs.items():
        if noun in fields["noun"] and adjective in fields["adjective"]:
            same = fields["noun"][noun] == fields["adjective"][adjective]
            (inside if same else other)[fields["noun"][noun]] += count
    # P(own field) = (1 - s) m_k + s K m_k with m_k the mass of such adjectives in field k, so the odds give s.
    overlap = layout["adjective"].overlap()
    masses = np.zeros(COLLOCATED.fields)
    for stem, field in fields["adjective"].items():
        masses[field] += overlap[layout["adjective"].stems.index(stem), field]
    s, k = COLLOCATED.noun_adjective, COLLOCATED.fields
    for field in range(k):
        own = masses[field] * (1 - s + s * k)
        foreign = (1 - s) * (masses.sum() - masses[field])
        share, n = own / (own + foreign), inside[field] + other[field]
        assert abs(inside[field] - n * share) <= 4 * math.sqrt(n * share * (1 - share))


def test_shared_bits_are_those_of_the_generators_distribution(collocated: list[AnnotatedSentence]) -> None:
    for kind, pairs in collocation_pairs(collocated).items():
        parts = []
        for frame in {frame for frame, _, _ in pairs}:
            part = Counter({(a, b): count for (f, a, b), count in pairs.items() if f == frame})
            parts.append(mutual_information(part))
        n = sum(part.n for part in parts)
        bits = sum(part.n * part.value for part in parts) / n
        stderr = math.sqrt(sum((part.n * part.stderr) ** 2 for part in parts)) / n
        exact = expected_information(kind, COLLOCATED)
        assert exact > 0.1
        assert abs(bits - exact) < 4 * stderr, kind


@pytest.mark.parametrize("kind", ["noun_adjective", "verb_noun", "verb_adverb"])
def test_pointwise_information_is_that_of_the_generator(collocated: list[AnnotatedSentence], kind: str) -> None:
    pairs = collocation_pairs(collocated)[kind]
    measured, exact = pointwise(pairs), expected_pointwise(kind, COLLOCATED)
    assert set(measured) <= set(exact)
    often = [pair for pair, count in pairs.items() if count >= (40 if kind != "verb_adverb" else 15)]
    assert len(often) > 15
    # About normal with this standard error; the counts of the words themselves add a little less than they take away.
    z = [(measured[pair] - exact[pair]) * math.log(2) * math.sqrt(pairs[pair]) for pair in often]
    assert max(map(abs, z)) < 4.5
    assert np.std(z) < 1.2
    strong = [exact[pair] for pair in often if measured[pair] > 1.0]
    assert all(bits > 0.3 for bits in strong)
    assert strong or kind == "verb_noun"


def test_pairs_are_those_of_the_words() -> None:
    for sentence in draw(COLLOCATED, n=300):
        found = collocation_pairs([sentence])
        words = dict(enumerate(sentence.pos))
        assert found["noun_adjective"].total() == sum(tag == "ADJ" for tag in sentence.pos)
        assert found["verb_adverb"].total() == sum(tag == "ADV" for tag in sentence.pos)
        transitive = [c for c in sentence.clauses if FRAMES[c.frame].object]
        assert found["verb_noun"].total() == len(transitive)
        for clause in transitive:
            role = FRAMES[clause.frame].object
            heads = [
                lemma for f, verb, lemma in found["verb_noun"]
                if f == clause.frame and verb == sentence.lemmas[clause.verb + clause.passive]
            ]  # fmt: skip
            shared = clause is not sentence.clauses[0]  # a noun bears the role of the first of its clauses
            bearers = [sentence.lemmas[i] for i in words if sentence.roles[i] == role or shared]
            assert set(heads) & set(bearers)


# Entropy


@pytest.mark.parametrize(
    ("bits", "vocabulary"),
    [
        (3.0, 468),
        pytest.param(4.0, 468, marks=pytest.mark.slow),
        (5.0, 468),
        pytest.param(6.0, 2000, marks=pytest.mark.slow),
        (8.0, 10_000),
    ],
)
def test_the_asked_entropy_is_met(bits: float, vocabulary: int) -> None:
    params = CorpusParams(entropy=bits, lexicon=LexiconParams.for_vocabulary(vocabulary))
    assert entropy_per_word(params, exponent(params)) == pytest.approx(bits, abs=1e-9)
    fit = mean_entropy(by_list(draw(params, seed=1)))
    assert abs(fit.value - bits) < 0.03
    assert abs(fit.value - bits) < 4 * fit.stderr


def test_collocations_leave_the_entropy_alone(collocated: list[AnnotatedSentence]) -> None:
    fit = mean_entropy(by_list(collocated))
    assert abs(fit.value - entropy_per_word(COLLOCATED, 1.0)) < 4 * fit.stderr


def test_the_exact_entropy_is_the_mean_surprise_of_the_drawn_words(plain: list[AnnotatedSentence]) -> None:
    stems, counts = lemma_lists(build_lexicon()), by_list(plain)
    surprises = [
        (counts[name][stem], -math.log2(p))
        for name in stems
        for stem, p in zip(stems[name], zipf_probabilities(len(stems[name]), 1.0), strict=True)
    ]
    n = sum(count for count, _ in surprises)
    mean = sum(count * bits for count, bits in surprises) / n
    variance = sum(count * (bits - mean) ** 2 for count, bits in surprises) / n
    assert abs(mean - entropy_per_word(CorpusParams(), 1.0)) < 4 * math.sqrt(variance / n)


def test_an_entropy_out_of_reach_is_refused() -> None:
    with pytest.raises(UsageError, match=r"at most 5\.\d+ bits per content word .* found entropy 9"):
        exponent(CorpusParams(entropy=9))
    highest = entropy_per_word(CorpusParams(), 0.0)
    assert exponent(CorpusParams(entropy=highest)) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(UsageError, match="give entropy or alpha, not both"):
        CorpusParams(entropy=3, alpha=2)


def test_list_entropies_are_close_to_those_of_the_lists(plain: list[AnnotatedSentence]) -> None:
    for name, counts in by_list(plain).items():
        p = zipf_probabilities(list_sizes(CorpusParams())[name], 1.0)
        fit = entropy(list(counts.values()))
        assert abs(fit.value + p @ np.log2(p)) < 4 * fit.stderr


# Agreement


def test_without_agreement_the_same_sentences_show_no_number(plain: list[AnnotatedSentence]) -> None:
    bare = draw(CorpusParams(agreement=False), n=5000)
    for marked, sentence in zip(plain, bare, strict=False):
        assert sentence.pos == marked.pos
        assert sentence.roles == marked.roles
        assert set(sentence.plural) == {None}
        for word, tag, lemma in zip(sentence.words, sentence.pos, sentence.lemmas, strict=True):
            if tag == "AUX":
                assert word == "is"
            elif tag == "DET":
                assert word in SINGULAR_DETERMINERS
            else:
                assert word in (lemma, lemma + "ed")
        kept = [i for i, tag in enumerate(marked.pos) if tag != "DET"]
        assert [marked.lemmas[i] for i in kept] == [sentence.lemmas[i] for i in kept]
        for one, two in zip(marked.clauses, sentence.clauses, strict=True):
            assert (one.frame, one.subject, one.verb, one.passive) == (two.frame, two.subject, two.verb, two.passive)
            assert (two.plural, two.attractors) == (None, 0)


def test_without_agreement_determiners_tell_nothing_of_the_number(plain: list[AnnotatedSentence]) -> None:
    shares = dict(zip(SINGULAR_DETERMINERS, (0.5, 0.2, 0.15, 0.15), strict=True))
    drawn = {False: Counter(), True: Counter()}
    for marked, sentence in zip(plain, draw(CorpusParams(agreement=False)), strict=True):
        for i, tag in enumerate(sentence.pos):
            if tag == "DET":
                noun = next(j for j in range(i, len(sentence.pos)) if sentence.pos[j] == "NOUN")
                drawn[bool(marked.plural[noun])][sentence.words[i]] += 1
    assert all(chi_square_p(counts, shares) > 1e-4 for counts in drawn.values())


# Vocabulary


@pytest.mark.parametrize("size", [100, 468, 1000, 10_000, 30_001])
def test_the_vocabulary_has_exactly_the_asked_size(size: int) -> None:
    params = LexiconParams.for_vocabulary(size)
    assert params.vocabulary == size == len(build_lexicon(params).word_forms())
    default = LexiconParams()
    for name in ("nouns", "verbs_per_frame", "adjectives", "adverbs"):  # every kind of word grows alike
        share = getattr(params, name) / getattr(default, name) * default.vocabulary / size
        assert 0.6 < share < 1.6, name


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(UsageError, match="40 word forms are too few"):
        LexiconParams.for_vocabulary(40)


def test_a_large_vocabulary_is_used() -> None:
    params = CorpusParams(alpha=0.5, lexicon=LexiconParams.for_vocabulary(10_000))
    assert len({word for sentence in draw(params) for word in sentence.words}) > 9000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": (("strik", 1.0),)}, 'no frame "strik". Did you mean "strike"'),
        ({"frames": (("strike", -1.0),)}, "must not be negative"),
        ({"frames": (("strike", 0.0),)}, "at least one of them with a share above 0"),
        ({"frames": (("strike", 1.0), ("strike", 1.0))}, "name each frame once"),
        ({"noun_adjective": 1.5}, "noun_adjective is a share between 0 and 1, found 1.5"),
        ({"fields": 1}, "at least 2 fields"),
        ({"entropy": 0.0}, "positive number of bits"),
        ({"alpha": -1.0}, "between 0 and 50"),
        ({"alpha": math.nan}, "between 0 and 50"),
    ],
)
def test_bad_options_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        CorpusParams(**change)
    assert message in str(caught.value)

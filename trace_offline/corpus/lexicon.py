"""Invented, pronounceable word forms, deterministic by seed; every list is ordered by frequency rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trace_offline.core.errors import UsageError
from trace_offline.corpus.grammar import (
    FRAMES,
    MODIFIER_PREPOSITIONS,
    PLURAL_DETERMINERS,
    SINGULAR_DETERMINERS,
)
from trace_offline.corpus.sampling import uniform_stream

_SOUNDS = {
    "onset": "b bl br d dr f fl fr g gl gr k kl kr l m n p pl pr r sk sl sm sn sp st t tr v w z",
    "middle": "b d f g l m n p r t v z ld lm nd rb rd rk rm rv",
    "nucleus": "a e i o u",
    "coda": "b d f g k l m n p r t v lk lt mp nd nt rk rn rt",
}
_ONSETS, _MIDDLES, _NUCLEI, _CODAS = (tuple(sounds.split()) for sounds in _SOUNDS.values())

PREPOSITIONS = tuple(sorted({p for frame in FRAMES.values() for p, _ in frame.obliques} | {"by"}))
FUNCTION_WORDS = frozenset(
    (
        *PREPOSITIONS,
        *MODIFIER_PREPOSITIONS,
        *SINGULAR_DETERMINERS,
        *PLURAL_DETERMINERS,
        "is",
        "are",
        "that",
        "and",
        "while",
    )
)


@dataclass(frozen=True, slots=True)
class LexiconParams:
    """How many lemmas of each kind. ``homographs``: share of verb stems that are noun stems too (0 to 1)."""

    nouns: int = 110
    verbs_per_frame: int = 6
    adjectives: int = 30
    adverbs: int = 20
    homographs: float = 0.2

    def __post_init__(self) -> None:
        for name in ("nouns", "verbs_per_frame", "adjectives", "adverbs"):
            if getattr(self, name) < 1:
                raise UsageError(f"lexicon: {name} must be at least 1, found {getattr(self, name)}.")
        if not 0.0 <= self.homographs <= 1.0:
            raise UsageError(f"lexicon: homographs is a share between 0 and 1, found {self.homographs}.")
        if round(self.homographs * self.verbs_per_frame * len(FRAMES)) > self.nouns:
            raise UsageError(
                f"lexicon: {self.homographs:.0%} of {self.verbs_per_frame * len(FRAMES)} verbs cannot share "
                f"their stem with one of {self.nouns} nouns. Ask for more nouns or a smaller share of homographs."
            )

    @property
    def vocabulary(self) -> int:
        """How many distinct word forms the grammar can produce, function words included."""
        verbs = self.verbs_per_frame * len(FRAMES)
        participles = self.verbs_per_frame * sum(frame.passive for frame in FRAMES.values())
        shared = round(self.homographs * verbs)  # each shares both of its forms with a noun
        forms = 2 * self.nouns + 2 * verbs + participles - 2 * shared
        return forms + self.adjectives + self.adverbs + len(FUNCTION_WORDS)

    @classmethod
    def for_vocabulary(cls, vocabulary: int, *, homographs: float = 0.2) -> LexiconParams:
        """Every kind of word scaled alike so that there are exactly ``vocabulary`` word forms.

        Raises UsageError for fewer forms than one lemma of each kind has.
        """
        default, frames = cls(), len(FRAMES)
        scale = (vocabulary - len(FUNCTION_WORDS)) / (default.vocabulary - len(FUNCTION_WORDS))
        verbs_per_frame = max(1, round(default.verbs_per_frame * scale))
        # What the verbs leave is shared out as in the default lexicon; adjectives, with one form each, take the rest.
        bare = cls(1, verbs_per_frame, 1, 1, 0.0).vocabulary - 4
        shared = round(homographs * verbs_per_frame * frames)
        room = vocabulary - bare + 2 * shared
        parts = 2 * default.nouns + default.adjectives + default.adverbs
        nouns, adverbs = round(room * default.nouns / parts), round(room * default.adverbs / parts)
        adjectives = room - 2 * nouns - adverbs
        if min(nouns, adverbs, adjectives) < 1 or nouns < shared:
            raise UsageError(
                f"lexicon: {vocabulary} word forms are too few for every kind of word; ask for 100 or more."
            )
        return cls(nouns, verbs_per_frame, adjectives, adverbs, homographs)


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Stems by kind; index 0 is rank 1, the most frequent."""

    nouns: tuple[str, ...]
    verbs: dict[str, tuple[str, ...]]
    adjectives: tuple[str, ...]
    adverbs: tuple[str, ...]

    def word_forms(self) -> frozenset[str]:
        """Every form that the grammar can produce from these stems, function words included."""
        forms = set(FUNCTION_WORDS) | set(self.adjectives) | set(self.adverbs)
        for stem in self.nouns:
            forms |= {stem, inflect(stem)}
        for name, stems in self.verbs.items():
            for stem in stems:
                forms |= {stem, inflect(stem)}
                if FRAMES[name].passive:
                    forms.add(participle(stem))
        return frozenset(forms)


def inflect(stem: str) -> str:
    """The -s form: plural of a noun, third person singular of a verb."""
    return stem + "s"


def participle(stem: str) -> str:
    """The passive participle of a verb."""
    return stem + "ed"


def build_lexicon(params: LexiconParams | None = None, *, seed: int = 0) -> Lexicon:
    """Draw distinct stems for every kind; no two lemmas share a form, except the homographs asked for.

    ``seed`` fixes every form. Stems end in a consonant other than *s* and start with one, so that *-s*, *-ed*, *-ly*
    and the article *a* always fit.
    """
    params = params or LexiconParams()
    fresh = _stems(seed)
    nouns = tuple(next(fresh) for _ in range(params.nouns))
    places = [(name, rank) for rank in range(params.verbs_per_frame) for name in FRAMES]
    verbs: dict[str, list[str]] = {name: [] for name in FRAMES}
    shared = round(params.homographs * len(places))
    # Homographs are spread evenly over ranks and classes, each on its own noun.
    chosen = {i * len(places) // shared for i in range(shared)} if shared else set()
    borrowed = iter(nouns[i * len(nouns) // shared] for i in range(shared))
    for place, (name, _) in enumerate(places):
        verbs[name].append(next(borrowed) if place in chosen else next(fresh))
    adjectives = tuple(next(fresh) for _ in range(params.adjectives))
    adverbs = tuple(next(fresh) + "ly" for _ in range(params.adverbs))
    return Lexicon(nouns, {name: tuple(stems) for name, stems in verbs.items()}, adjectives, adverbs)


def _stems(seed: int) -> Iterator[str]:
    draw = uniform_stream(seed, "lexicon").__next__

    def pick(items: tuple[str, ...]) -> str:
        return items[int(draw() * len(items))]

    seen: set[str] = set()
    # Two syllables; three once the shorter forms are a fifth used up and fresh ones get slow to find.
    short = len(_ONSETS) * len(_MIDDLES) * len(_NUCLEI) ** 2 * len(_CODAS) // 5
    while True:
        inner = 1 if len(seen) < short else 2
        stem = pick(_ONSETS) + pick(_NUCLEI)
        stem += "".join(pick(_MIDDLES) + pick(_NUCLEI) for _ in range(inner)) + pick(_CODAS)
        # A stem in -ed could be the participle of a shorter one.
        if stem in seen or stem.endswith("ed") or {stem, inflect(stem), participle(stem), stem + "ly"} & FUNCTION_WORDS:
            continue
        seen.add(stem)
        yield stem

"""What each word form can be: its class, its number, and the frame of a verb."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from trace_offline.corpus.grammar import FRAMES, MODIFIER_PREPOSITIONS, PLURAL_DETERMINERS, SINGULAR_DETERMINERS
from trace_offline.corpus.lexicon import PREPOSITIONS, Lexicon, build_lexicon, inflect, participle
from trace_offline.corpus.params import CorpusParams


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read a word form.

    ``kind``: a part of speech of the corpus, except that ``PART`` is a participle (a VERB that is not finite).
    ``plural``: its number, None where the form does not show it. ``frame``: the frame of a verb.
    """

    kind: str
    plural: bool | None = None
    frame: str | None = None


Readings = Mapping[str, Mapping[str, Reading]]
"""Word form → kind → reading."""


def readings_of(lexicon: Lexicon, agreement: bool = True) -> Readings:
    """Every reading of every form of the lexicon.

    ``agreement=False``: words show no number, and the forms that would show the plural are no words.
    """
    numbers = (False, True) if agreement else (None,)
    found: dict[str, dict[str, Reading]] = defaultdict(dict)

    def add(word: str, reading: Reading) -> None:
        found[word].setdefault(reading.kind, reading)

    both = set(SINGULAR_DETERMINERS) & set(PLURAL_DETERMINERS)
    for number in numbers:
        for word in PLURAL_DETERMINERS if number else SINGULAR_DETERMINERS:
            add(word, Reading("DET", None if word in both else number))
        add("are" if number else "is", Reading("AUX", number))
    for word in (*PREPOSITIONS, *MODIFIER_PREPOSITIONS):
        add(word, Reading("ADP"))
    for word, kind in (("that", "PRON"), ("and", "CCONJ"), ("while", "SCONJ")):
        add(word, Reading(kind))
    for word in lexicon.adjectives:
        add(word, Reading("ADJ"))
    for word in lexicon.adverbs:
        add(word, Reading("ADV"))
    for stem in lexicon.nouns:
        for number in numbers:
            add(inflect(stem) if number else stem, Reading("NOUN", number))
    for name, stems in lexicon.verbs.items():
        for stem in stems:
            for number in numbers:
                add(inflect(stem) if number is False else stem, Reading("VERB", number, name))
            # Frames without a passive have no participle; a form made like one is still that verb's.
            if FRAMES[name].passive or participle(stem) not in found:
                add(participle(stem), Reading("PART", None, name))
    return {word: dict(kinds) for word, kinds in found.items()}


def readings_for(params: CorpusParams) -> Readings:
    """Every reading of every word form of a corpus made with ``params``."""
    return readings_of(build_lexicon(params.lexicon, seed=params.lexicon_seed), params.agreement)

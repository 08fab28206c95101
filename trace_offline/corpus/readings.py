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
    """Every reading of every form of the lexicon. ``agreement=False``: words show no number."""

    def number(plural: bool) -> bool | None:
        return plural if agreement else None

    found: dict[str, dict[str, Reading]] = defaultdict(dict)

    def add(word: str, reading: Reading) -> None:
        found[word].setdefault(reading.kind, reading)

    both = set(SINGULAR_DETERMINERS) & set(PLURAL_DETERMINERS)
    for plural, determiners in ((False, SINGULAR_DETERMINERS), (True, PLURAL_DETERMINERS)):
        for word in determiners:
            add(word, Reading("DET", None if word in both else number(plural)))
    for word in (*PREPOSITIONS, *MODIFIER_PREPOSITIONS):
        add(word, Reading("ADP"))
    for word, kind in (("that", "PRON"), ("and", "CCONJ"), ("while", "SCONJ")):
        add(word, Reading(kind))
    add("is", Reading("AUX", number(False)))
    add("are", Reading("AUX", number(True)))
    for word in lexicon.adjectives:
        add(word, Reading("ADJ"))
    for word in lexicon.adverbs:
        add(word, Reading("ADV"))
    for stem in lexicon.nouns:
        add(stem, Reading("NOUN", number(False)))
        add(inflect(stem), Reading("NOUN", number(True)))
    for name, stems in lexicon.verbs.items():
        for stem in stems:
            add(stem, Reading("VERB", number(True), name))
            add(inflect(stem), Reading("VERB", number(False), name))
            # Frames without a passive have no participle; a form made like one is still that verb's.
            if FRAMES[name].passive or participle(stem) not in found:
                add(participle(stem), Reading("PART", None, name))
    return {word: dict(kinds) for word, kinds in found.items()}


def readings_for(params: CorpusParams) -> Readings:
    """Every reading of every word form of a corpus made with ``params``."""
    return readings_of(build_lexicon(params.lexicon, seed=params.lexicon_seed))

"""Agreement of verb and subject from the clauses of an annotated corpus.

A record of ``trace_offline.corpus`` has a list ``clauses`` with, for each, the place of its finite word (``verb``), its
number (``plural``) and the nouns of the other number between it and its subject (``attractors``). From these come two
tasks over the finite words, ``agreement`` (singular or plural) and ``attractors`` (how many, as text), and the form
each would have in the other number: the one that the same lemma, as the same part of speech, has elsewhere in the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from trace_offline.core.errors import EvaluationSetError

TASKS = ("agreement", "attractors")


def add_agreement(records: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """``(where, record)`` with the lists ``agreement``, ``attractors`` and ``alternatives``, where there are clauses.

    A verb whose other form the file does not have keeps its labels and gets no alternative.
    Raises EvaluationSetError naming the record whose clauses do not fit its words.
    """
    forms: dict[tuple[str, str, bool], Counter[str]] = {}
    for where, record in records:
        for verb, plural, _ in _clauses(record, where):
            forms.setdefault((*_word(record, verb), plural), Counter())[record["words"][verb]] += 1
    # of several forms the most frequent, of equally frequent ones the first in the alphabet
    usual = {key: min(found, key=lambda form: (-found[form], form)) for key, found in forms.items()}
    result = []
    for where, record in records:
        if "clauses" in record:
            n = len(record["words"])
            agreement: list[str | None] = [None] * n
            attractors: list[str | None] = [None] * n
            alternatives: list[str | None] = [None] * n
            for verb, plural, between in _clauses(record, where):
                agreement[verb] = "plural" if plural else "singular"
                attractors[verb] = str(between)
                other = usual.get((*_word(record, verb), not plural))
                alternatives[verb] = None if other == record["words"][verb] else other
            record = record | {"agreement": agreement, "attractors": attractors, "alternatives": alternatives}
        result.append((where, record))
    return result


def _clauses(record: dict[str, Any], where: str) -> Iterator[tuple[int, bool, int]]:
    """(place of the finite word, plural, attractors) of each clause."""
    clauses = record.get("clauses", [])
    if not clauses:
        return
    words, lemmas, pos = (record.get(name) for name in ("words", "lemmas", "pos"))
    n = len(words) if isinstance(words, list) else 0
    fits = all(isinstance(values, list) and len(values) == n for values in (words, lemmas, pos))
    for clause in clauses if isinstance(clauses, list) else [clauses]:
        given = clause if isinstance(clause, dict) else {}
        verb, plural, attractors = (given.get(name) for name in ("verb", "plural", "attractors"))
        numbers = type(verb) is int and type(attractors) is int and isinstance(plural, bool)
        if fits and plural is None and "plural" in given:
            raise EvaluationSetError(
                f"{where}: the clauses of this corpus have no number: it was made without agreement, so there "
                "is none to measure. Generate one with agreement (the default), or leave out --task agreement."
            )
        if not fits or not numbers or not 0 <= verb < n:  # type: ignore[operator]
            raise EvaluationSetError(
                f"{where}: expected clauses with verb (the place of a word), plural (true or false) and attractors (a "
                f"number), and words, lemmas and pos of one length; found {clause!r:.100}."
            )
        yield verb, plural, attractors  # type: ignore[misc]


def _word(record: dict[str, Any], place: int) -> tuple[str, str]:
    return str(record["lemmas"][place]), str(record["pos"][place])

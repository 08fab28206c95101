"""The grammar as data: which role every argument has, given the class of the verb, the preposition and the voice.

All nouns come from one list, so a noun by itself says nothing about its role. The role follows from the frame:

- the object's role is fixed by the verb class (``strike`` takes a Patient, ``fill`` a Goal, ``spend`` a Time);
- a preposition alone is ambiguous (*with* marks an Instrument after ``strike`` and a Theme after ``fill``; *in* marks
  a Location after ``strike`` and a Time after ``go``), only class and preposition together decide;
- in the passive, subject and object change places and *by* marks what was the subject.

Except for the subject of a clause, the words to the left of a noun always determine its role.
"""

from __future__ import annotations

from dataclasses import dataclass

ROLES: tuple[str, ...] = (
    "Agent",
    "Experiencer",
    "Goal",
    "Instrument",
    "Location",
    "Patient",
    "Source",
    "Theme",
    "Time",
)
COMPLEXITIES: tuple[str, ...] = ("simple", "medium", "complex")
POS_TAGS: tuple[str, ...] = ("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "NOUN", "PRON", "SCONJ", "VERB")

MODIFIER_PREPOSITIONS: tuple[str, ...] = ("near", "behind")  # inside a noun phrase; their nouns have no role
SINGULAR_DETERMINERS: tuple[str, ...] = ("the", "a", "every", "this")
PLURAL_DETERMINERS: tuple[str, ...] = ("the", "some", "many", "these")
DETERMINER_SHARES: tuple[float, ...] = (0.5, 0.2, 0.15, 0.15)

OBLIQUE: dict[str, float] = {"medium": 0.35, "coordinated": 0.2, "relative": 0.3}
"""Probability of each optional oblique: in medium sentences, coordination and main clauses around a relative clause."""
AGENT_PHRASE = 0.6
"""Probability that a passive names its demoted subject."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One verb class and the roles of its arguments.

    ``obliques`` are (preposition, role) pairs in the order in which they appear; each appears at most once.
    ``required`` says how many obliques the bare clause must have. ``weight`` is the frame's share of the clauses
    (normalised over all frames).
    """

    name: str
    subject: str
    object: str | None
    obliques: tuple[tuple[str, str], ...]
    weight: float
    required: int = 0
    passive: bool = False

    @property
    def roles(self) -> frozenset[str]:
        """Every role this frame can give."""
        core = {self.subject} | ({self.object} if self.object else set())
        return frozenset(core | {role for _, role in self.obliques})

    def role_of_oblique(self, preposition: str, *, passive: bool = False) -> str:
        """Role marked by a preposition; *by* marks the demoted subject of a passive.

        Raises KeyError when the frame does not use the preposition.
        """
        if passive and preposition == "by":
            return self.subject
        return dict(self.obliques)[preposition]


def _frame(
    name: str,
    subject: str,
    obj: str | None,
    obliques: str,
    weight: float,
    *,
    required: int = 0,
    passive: bool = False,
) -> Frame:
    pairs = tuple((preposition, role) for preposition, role in (item.split(":") for item in obliques.split()))
    return Frame(name, subject, obj, pairs, weight, required, passive)


FRAMES: dict[str, Frame] = {
    frame.name: frame
    for frame in (
        _frame("strike", "Agent", "Patient", "with:Instrument in:Location at:Time", 0.15, passive=True),
        _frame("give", "Agent", "Theme", "from:Source to:Goal at:Time", 0.13, passive=True),
        _frame("tell", "Agent", "Theme", "to:Experiencer in:Location on:Time", 0.13, passive=True),
        _frame("fill", "Agent", "Goal", "from:Source with:Theme on:Time", 0.08, passive=True),
        _frame("clear", "Agent", "Source", "of:Theme with:Instrument in:Location", 0.08, passive=True),
        _frame("use", "Agent", "Instrument", "on:Patient in:Location at:Time", 0.08),
        _frame("spend", "Agent", "Time", "with:Experiencer in:Location", 0.1),
        _frame("work", "Agent", None, "with:Instrument on:Location from:Time", 0.05),
        _frame("go", "Theme", None, "from:Source to:Goal in:Time", 0.06, required=1),
        _frame("stay", "Theme", None, "at:Location from:Time", 0.04, required=1),
        _frame("enter", "Theme", "Location", "with:Instrument on:Time", 0.03),
        _frame("seem", "Theme", None, "to:Experiencer in:Time", 0.02, required=1),
        _frame("amuse", "Theme", "Experiencer", "with:Instrument at:Location on:Time", 0.035, passive=True),
        _frame("fear", "Experiencer", "Theme", "at:Location in:Time", 0.015, passive=True),
    )
}

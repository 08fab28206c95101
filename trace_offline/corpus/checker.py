"""A recogniser of the corpus grammar: words → the annotations they determine, or what is wrong with them.

It knows the table of frames, the word lists and these rules, not how sentences are drawn::

    sentence  = clause [("and" | "while") clause | "and" predicate | "that" predicate]
              | phrase "that" predicate predicate
    clause    = phrase [("near" | "behind") phrase] predicate
    predicate = [adverb] verb [object] {preposition phrase}  |  [adverb] is/are participle ["by" phrase] {…}
    phrase    = determiner [adjective] noun

After *that* the last noun does it, after *and* without a new subject the same subject. A verb's frame says whether it
takes an object, which prepositions in which order, and how many at least. Determiner and noun, subject and finite verb
agree in number. The generator leaves decoration out of some embedded clauses (adjectives, adverbs, optional
prepositional phrases, passives); the recogniser allows it there as well. There is one *and*, *while* or *that* at most.

Reading goes from left to right and never goes back: the words of this grammar leave no choice, homographs of noun and
verb included. Where a word cannot stand, the error is noted and reading goes on as if it had been mended, so that one
slip is one error wherever that is possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trace_offline.corpus.grammar import FRAMES, MODIFIER_PREPOSITIONS, Frame
from trace_offline.corpus.parse import ERRORS, Parse, StructuralError
from trace_offline.corpus.readings import Reading, Readings
from trace_offline.corpus.sentence import Clause

_FINITE = ("VERB", "AUX")
_CONNECTIVES = ("PRON", "CCONJ", "SCONJ")

__all__ = ["ERRORS", "Parse", "StructuralError", "check"]


def check(words: Sequence[str], readings: Readings, *, finished: bool = True) -> Parse:
    """Read ``words``; ``readings`` says what each can be. ``finished=False``: the words were cut off after the last.

    Of words that were cut off, nothing is said to be missing at the end: they are unfinished.
    """
    run = _Run(tuple(words), readings)
    run.sentence()
    errors = run.errors
    if not finished:
        end = len(run.words)
        errors = [error for error in errors if error.position < end]
        errors.append(StructuralError("unfinished", end, "cut off"))
    return Parse(run.words, tuple(run.pos), tuple(run.roles), tuple(run.plural), tuple(run.clauses), tuple(errors))


@dataclass(slots=True)
class _Noun:
    """Head of a noun phrase; ``position`` None when there is none."""

    position: int | None = None
    plural: bool | None = None


class _Run:
    """The words of one sentence, read once."""

    def __init__(self, words: tuple[str, ...], readings: Readings) -> None:
        self.words = words
        self.read = [readings.get(word, {}) for word in words]
        self.at = 0
        self.pos: list[str | None] = [None] * len(words)
        self.roles: list[str | None] = [None] * len(words)
        self.plural: list[bool | None] = [None] * len(words)
        self.clauses: list[Clause] = []
        self.errors: list[StructuralError] = []
        self.connected = False

    @property
    def ended(self) -> bool:
        return self.at >= len(self.words)

    def has(self, *kinds: str, ahead: int = 0) -> bool:
        """One of these can be read at the next word (or ``ahead`` words later)."""
        place = self.at + ahead
        return place < len(self.words) and any(kind in self.read[place] for kind in kinds)

    def is_unknown(self) -> bool:
        return not self.ended and not self.read[self.at]

    def take(self, kind: str) -> Reading:
        """Go past the next word, read as ``kind`` whatever it is."""
        found = self.read[self.at].get(kind, Reading(kind))
        self.pos[self.at] = "VERB" if kind == "PART" else kind
        self.plural[self.at] = found.plural if kind in ("NOUN", "VERB", "AUX") else None
        self.at += 1
        return found

    def error(self, kind: str, detail: str, position: int | None = None) -> None:
        if kind != "unfinished" or not any(error.kind == kind for error in self.errors):
            self.errors.append(StructuralError(kind, self.at if position is None else position, detail))

    def wrong(self, expected: str) -> None:
        self.error("wrong_class", f'"{self.words[self.at]}" where {expected} was expected')

    def repeats(self) -> bool:
        """Called where the next word cannot stand: if it begins a copy of the words before it, go past all copies."""
        for size in range(1, self.at + 1):
            unit = self.words[self.at - size : self.at]
            if self.words[self.at : self.at + size] == unit:
                self.error("repetition", f'"{" ".join(unit)}" again')
                while self.words[self.at : self.at + size] == unit:
                    self.at += size
                return True
        return False

    def doubled(self) -> bool:
        """If the next word is the last one again (a homograph, which might otherwise be read as something), skip it."""
        return (
            self.at > 0
            and self.at < len(self.words)
            and self.words[self.at] == self.words[self.at - 1]
            and self.repeats()
        )

    def unknown(self, kind: str) -> Reading:
        self.error("unknown_word", f'"{self.words[self.at]}"')
        return self.take(kind)

    def sentence(self) -> None:
        if not self.words:
            self.error("unfinished", "no words at all")
            return
        subject, modified = self.subject()
        if self.has("PRON") and not modified and subject.position is not None:
            self.take("PRON")
            self.connected = True
            self.predicate(subject, inner=True)
            inner, self.clauses = self.clauses, []
            last = self.predicate(subject)
            self.clauses += inner
        else:
            last = self.predicate(subject)
        while not self.ended:
            last, subject = self.rest(last, subject)

    def rest(self, last: _Noun, subject: _Noun) -> tuple[_Noun, _Noun]:
        """What may follow a clause: one connective and what it brings; returns the last noun and the subject."""
        if self.has(*_CONNECTIVES):
            relative = self.has("PRON")
            if self.connected or (relative and last.position is None):
                if self.repeats():
                    return last, subject
                self.wrong("the end")
            self.connected = True
            if relative:
                self.take("PRON")
                return self.predicate(last), last
            shared = self.has("CCONJ") and not self.has("DET", ahead=1) and self.has("ADV", *_FINITE, ahead=1)
            self.take("CCONJ" if self.has("CCONJ") else "SCONJ")
            if not shared:
                subject, _ = self.subject()
            return self.predicate(subject), subject
        if self.repeats():
            return last, subject
        self.wrong("the end")
        if not self.has("ADV", *_FINITE):
            self.at += 1
            return self.arguments(None, False), subject
        # Whose verb it is cannot be told, so nothing is said about its agreement.
        return self.predicate(_Noun()), subject

    def subject(self) -> tuple[_Noun, bool]:
        """A noun phrase and whether another modifies it."""
        found = self.phrase(None, "the subject", is_subject=True)
        while not (self.ended or self.is_unknown() or self.is_modifier() or self.has("ADV", "PRON", *_FINITE)):
            if not self.repeats():
                break
        if self.has("NOUN") and self.has(*_FINITE, ahead=1):
            self.doubled()
        modified = self.is_modifier()
        if modified:
            self.take("ADP")
            self.phrase(None, "the noun after the preposition")
        return found, modified

    def is_modifier(self) -> bool:
        return not self.ended and self.words[self.at] in MODIFIER_PREPOSITIONS

    def predicate(self, subject: _Noun, inner: bool = False) -> _Noun:
        """From adverb to last prepositional phrase; returns its last noun. ``inner``: the subject gets no role here."""
        if self.has("ADV"):
            self.take("ADV")
        found = self.finite_verb(subject)
        if found is None:
            return _Noun()
        verb, frame, passive = found
        if frame is not None and subject.position is not None:
            if not inner and self.roles[subject.position] is None:
                self.roles[subject.position] = frame.object if passive else frame.subject
            others = sum(
                self.pos[i] == "NOUN" and self.plural[i] is not subject.plural
                for i in range(subject.position + 1, verb)
            )
            self.clauses.append(Clause(frame.name, subject.position, verb, subject.plural, passive, others))
        return self.arguments(frame, passive, inner)

    def finite_verb(self, subject: _Noun) -> tuple[int, Frame | None, bool] | None:
        """Position, frame and voice of the verb that must come next; None when the clause has none."""
        while not self.has(*_FINITE):
            if self.ended:
                self.error("unfinished", "the words end before the verb")
                return None
            if self.is_unknown():
                verb = self.at
                self.unknown("VERB")
                return verb, None, False
            if self.repeats():
                continue
            if self.has("PART"):
                self.wrong("a finite verb")
                verb = self.at
                return verb, FRAMES[str(self.take("PART").frame)], False
            if self.has("CCONJ", "SCONJ") or not (self.has("ADV", "PRON") or self.verb_ahead()):
                self.error("unknown_frame", "no verb in this clause")
                if not self.has(*_CONNECTIVES):
                    self.arguments(None, False)
                return None
            self.wrong("a verb")
            if self.has("PRON"):
                self.take("PRON")
                self.predicate(subject, inner=True)
            elif self.has("ADP"):
                self.take("ADP")
                self.phrase(None, "the noun after the preposition")
            elif self.has("DET"):
                self.phrase(None, "a noun")
            else:
                self.at += 1
        verb = self.at
        passive = self.has("AUX")
        found = self.take("AUX" if passive else "VERB")
        if found.plural is not None and subject.plural is not None and found.plural is not subject.plural:
            number = {True: "plural", False: "singular"}
            detail = f'"{self.words[verb]}" is {number[found.plural]}, its subject {number[subject.plural]}'
            self.error("broken_agreement", detail, verb)
        return verb, self.participle() if passive else FRAMES[str(found.frame)], passive

    def verb_ahead(self) -> bool:
        """A word further on in this clause must be its verb."""
        for place in range(self.at + 1, len(self.words)):
            if any(kind in self.read[place] for kind in ("CCONJ", "SCONJ")):
                return False
            if any(kind in self.read[place - 1] for kind in ("DET", "ADJ")) and "NOUN" in self.read[place]:
                continue
            if any(kind in self.read[place] for kind in _FINITE):
                return True
        return False

    def participle(self) -> Frame | None:
        """The frame of the participle that must follow *is* or *are*."""
        while not self.has("PART"):
            if self.ended:
                self.error("unfinished", "the words end before the participle")
                return None
            if self.is_unknown():
                self.unknown("PART")
                return None
            if self.repeats():
                continue
            self.wrong("a participle")
            if self.has("VERB") and not self.has("NOUN"):
                return FRAMES[str(self.take("VERB").frame)]
            if not self.has("DET", "ADP", *_CONNECTIVES):
                self.at += 1
            return None
        place = self.at
        frame = FRAMES[str(self.take("PART").frame)]
        if not frame.passive:
            self.error("unknown_frame", f"the frame {frame.name} has no passive", place)
        return frame

    def arguments(self, frame: Frame | None, passive: bool, inner: bool = False) -> _Noun:
        """Object and prepositional phrases; without a frame any are accepted. Returns the last noun.

        ``inner``: another verb may follow, even the same.
        """
        last = _Noun()
        if frame is not None and passive:
            if not self.ended and self.words[self.at] == "by":
                self.take("ADP")
                last = self.phrase(frame.subject, f"the {frame.subject}")
        elif frame is not None and frame.object:
            if not self.has("NOUN") or self.has("DET", ahead=1):
                self.doubled()
            while not (self.ended or self.is_unknown() or self.has("DET", "ADJ", "NOUN")) and self.repeats():
                pass
            if self.has("DET", "ADJ", "NOUN") or self.is_unknown():
                last = self.phrase(frame.object, f"the {frame.object}")
            else:
                self.error("missing_role", f"{frame.object} of {frame.name}")
        filled, place = 0, 0
        while not self.ended:
            if self.is_unknown():
                # It may have been a preposition, and so the one that was needed.
                self.unknown("ADP")
                filled += 1
                if self.has("DET"):
                    last = self.phrase(None, "a noun")
                elif self.has("ADJ", "NOUN"):
                    last = self.noun_part(None, None, "a noun")
                continue
            if not self.has("ADP", "DET"):
                if (not inner and self.doubled()) or (not self.has("ADV", *_FINITE, *_CONNECTIVES) and self.repeats()):
                    continue
                break
            if self.has("DET"):
                if frame is not None:
                    if self.repeats():
                        continue
                    self.error("unknown_frame", f"{frame.name} takes no further object")
                last = self.phrase(None, "a noun")
                continue
            role = None
            if frame is not None:
                slots = [slot for slot, (each, _) in enumerate(frame.obliques) if each == self.words[self.at]]
                if not slots or slots[0] < place:
                    if self.repeats():
                        continue
                    what = "no" if not slots else "no second or later"
                    self.error("unknown_frame", f'{frame.name} takes {what} "{self.words[self.at]}" here')
                if slots:
                    role, filled, place = frame.obliques[slots[0]][1], filled + 1, max(place, slots[0] + 1)
            self.take("ADP")
            last = self.phrase(role, "the noun after the preposition" if role is None else f"the {role}")
        if frame is not None and filled < frame.required:
            self.error("missing_role", f"{' or '.join(role for _, role in frame.obliques)} of {frame.name}")
        return last

    def phrase(self, role: str | None, what: str, is_subject: bool = False) -> _Noun:
        """Determiner, adjective, noun; the noun bears ``role``. ``what`` names the phrase in errors."""
        number: bool | None = None
        while not self.has("DET"):
            if self.ended:
                self.error("unfinished", f"the words end before {what}")
                return _Noun()
            if self.is_unknown():
                if self.has("ADJ", "NOUN", ahead=1) and (
                    not self.has(*_FINITE, ahead=1) or self.has(*_FINITE, ahead=2)
                ):
                    self.unknown("DET")
                    break
                return self.noun(None, role)
            verb = (
                is_subject and self.has("VERB") and (self.at + 1 == len(self.words) or self.has("DET", "ADP", ahead=1))
            )
            if self.has("ADJ", "NOUN") and not verb:
                self.wrong("a determiner")
                break
            if not self.repeats():
                self.error("missing_role", f"{what} is missing")
                return _Noun()
        else:
            number = self.take("DET").plural
        return self.noun_part(number, role, what)

    def noun_part(self, number: bool | None, role: str | None, what: str) -> _Noun:
        """What follows the determiner, whose number is ``number``."""
        described = False
        while not self.has("NOUN"):
            if self.ended:
                self.error("unfinished", f"the words end before {what}")
                return _Noun()
            if self.is_unknown():
                return self.noun(None, role)
            if self.has("ADJ") and not described:
                self.take("ADJ")
                described = True
                continue
            if self.repeats():
                continue
            self.wrong("a noun")
            if self.has("DET"):
                number = self.take("DET").plural
            elif self.has("ADJ"):
                self.take("ADJ")
            elif self.has("VERB", "PART", "ADV") and not self.has("DET", "ADJ", "NOUN", "PART", ahead=1):
                return self.noun(None, role)
            else:
                return _Noun()
        return self.noun(number, role)

    def noun(self, number: bool | None, role: str | None) -> _Noun:
        """The next word as the noun, whose number must be that of its determiner."""
        place = self.at
        reading = self.unknown("NOUN") if self.is_unknown() else self.take("NOUN")
        self.roles[place] = role
        if number is not None and reading.plural is not None and number is not reading.plural:
            self.error("broken_agreement", f'"{self.words[place]}" does not agree with its determiner', place)
        return _Noun(place, reading.plural)

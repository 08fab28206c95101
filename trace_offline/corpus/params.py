"""What a corpus is drawn from, as values that can be stored beside it and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from trace_offline.core.errors import UsageError, nearest
from trace_offline.corpus.grammar import COMPLEXITIES, FRAMES
from trace_offline.corpus.lexicon import LexiconParams
from trace_offline.corpus.sentence import complete_file

GRAMMAR_VERSION = 1
"""Raised when the same parameters and seed would no longer give the same sentences."""

COLLOCATIONS: tuple[str, ...] = ("noun_adjective", "verb_noun", "verb_adverb")
DEFAULT_ALPHA = 1.0
MAX_ALPHA = 50.0


@dataclass(frozen=True, slots=True)
class CorpusParams:
    """What the corpus is drawn from. All shares are probabilities between 0 and 1.

    alpha: Zipf exponent of every list of lemmas (nouns, adjectives, adverbs, the verbs of each frame).
    complexity: shares of simple, medium and complex sentences; they sum to 1.
    attractors: share of medium and complex subjects followed by a phrase (*near the …*), whose noun has the other
    number half of the time. plural: share of plural noun phrases. passive: share of passives where the frame allows.
    frames: (name, share) of the frames to draw from, normalised; those not named do not occur. Empty: all, each with
    its ``Frame.weight``.
    noun_adjective, verb_noun, verb_adverb: collocation strengths, the share of the time that the second word (for
    verb_noun the verb's object, which is the subject of a passive) is drawn from the field of meaning of the first
    and not from its whole list; ``fields`` is the number of fields. The exponent of every list stays what it is.
    entropy: bits per content word (noun, verb, adjective, adverb) given the list it is drawn from; when it is given,
    the exponent is solved for and ``alpha`` must keep its default (``expectation.exponent`` tells it).
    agreement: False writes the same sentences without any mark of number on nouns, verbs and determiners.
    """

    alpha: float = DEFAULT_ALPHA
    complexity: tuple[float, float, float] = (0.35, 0.4, 0.25)
    attractors: float = 0.25
    plural: float = 0.4
    passive: float = 0.2
    adjectives: float = 0.25
    adverbs: float = 0.15
    lexicon: LexiconParams = field(default_factory=LexiconParams)
    lexicon_seed: int = 0
    frames: tuple[tuple[str, float], ...] = ()
    noun_adjective: float = 0.0
    verb_noun: float = 0.0
    verb_adverb: float = 0.0
    fields: int = 5
    entropy: float | None = None
    agreement: bool = True

    def __post_init__(self) -> None:
        for name in ("attractors", "plural", "passive", "adjectives", "adverbs", *COLLOCATIONS):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"corpus: {name} is a share between 0 and 1, found {getattr(self, name)}.")
        shares = self.complexity
        if len(shares) != len(COMPLEXITIES) or min(shares) < 0 or abs(sum(shares) - 1.0) > 1e-9:
            raise UsageError(
                f"corpus: complexity is three shares that sum to 1 ({', '.join(COMPLEXITIES)}), found {shares}."
            )
        if not 0.0 <= self.alpha <= MAX_ALPHA:
            raise UsageError(f"corpus: alpha, the Zipf exponent, is between 0 and {MAX_ALPHA:g}, found {self.alpha}.")
        if self.entropy is not None and self.alpha != DEFAULT_ALPHA:
            raise UsageError("corpus: entropy decides the Zipf exponent; give entropy or alpha, not both.")
        if self.entropy is not None and not self.entropy > 0:
            raise UsageError(f"corpus: entropy is a positive number of bits per content word, found {self.entropy}.")
        if self.fields < 2:
            raise UsageError(f"corpus: words fall into at least 2 fields of meaning, found {self.fields}.")
        self._check_frames()

    def _check_frames(self) -> None:
        for name, share in self.frames:
            if name not in FRAMES:
                known = ", ".join(FRAMES)
                raise UsageError(f'corpus: there is no frame "{name}".{nearest(name, FRAMES)} There are: {known}.')
            if not 0.0 <= share < float("inf"):
                raise UsageError(f"corpus: the share of frame {name} must not be negative, found {share}.")
        names = [name for name, _ in self.frames]
        if self.frames and (len(set(names)) < len(names) or sum(share for _, share in self.frames) <= 0):
            raise UsageError("corpus: name each frame once, at least one of them with a share above 0.")

    @property
    def frame_shares(self) -> dict[str, float]:
        """The share of the clauses that each frame gets; all frames, sum 1."""
        weights = dict(self.frames) or {name: frame.weight for name, frame in FRAMES.items()}
        total = sum(weights.values())
        return {name: weights.get(name, 0.0) / total for name in FRAMES}

    @property
    def collocated(self) -> bool:
        """Whether any collocation strength is above zero."""
        return any(getattr(self, name) > 0 for name in COLLOCATIONS)

    def to_record(self) -> dict[str, Any]:
        """All parameters as JSON values, with the version of the grammar; :meth:`from_record` is its inverse."""
        record: dict[str, Any] = {"version": GRAMMAR_VERSION}
        for each in fields_of(self):
            value = getattr(self, each.name)
            if isinstance(value, LexiconParams):
                value = {part.name: getattr(value, part.name) for part in fields_of(value)}
            record[each.name] = _listed(value)
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CorpusParams:
        """The parameters of a record; those that it does not name have their defaults.

        Raises UsageError for another version of the grammar, for names that no parameter has, and for bad values.
        """
        if not isinstance(record, Mapping):
            raise UsageError(f"corpus parameters: expected an object, found {record!r:.80}.")
        given = dict(record)
        version = given.pop("version", GRAMMAR_VERSION)
        if version != GRAMMAR_VERSION:
            raise UsageError(
                f"corpus parameters: made by version {version} of the grammar, this is version {GRAMMAR_VERSION}. "
                "Install the release that made the corpus, or generate the corpus again."
            )
        lexicon = given.pop("lexicon", {})
        try:
            return cls(
                **{name: _tupled(value) for name, value in _known(cls, given).items()},
                lexicon=LexiconParams(**_known(LexiconParams, lexicon)),
            )
        except TypeError as error:
            raise UsageError(f"corpus parameters: a value has the wrong type ({error}).") from None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a corpus file comes from: ``generate(seed, params)``, its first ``sentences`` sentences."""

    seed: int
    sentences: int
    params: CorpusParams


def origin_path(corpus: Path | str) -> Path:
    """The file beside ``corpus`` that holds its parameters: ``FILE.params.json``."""
    path = Path(corpus)
    return path.with_name(f"{path.name}.params.json")


def write_origin(corpus: Path | str, origin: Origin) -> Path:
    """Write the parameters of a corpus file beside it; returns the path written."""
    path = origin_path(corpus)
    record = {"seed": origin.seed, "sentences": origin.sentences, "params": origin.params.to_record()}
    with complete_file(path) as file:
        file.write(json.dumps(record, indent=1) + "\n")
    return path


def read_origin(corpus: Path | str) -> Origin | None:
    """The parameters written beside a corpus file; None when there are none.

    Raises UsageError for a file that does not hold them.
    """
    path = origin_path(corpus)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Origin(int(record["seed"]), int(record["sentences"]), CorpusParams.from_record(record["params"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: expected the parameters of {Path(corpus).name} (seed, sentences, params); {error!r:.120}. "
            "Generate the corpus again, or remove this file to do without them."
        ) from None


def _known(kind: type, given: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise UsageError(f"corpus parameters: {kind.__name__} is an object of names and values, found {given!r:.80}.")
    names = [each.name for each in fields_of(kind)]
    for name in given:
        if name not in names:
            raise UsageError(f'corpus parameters: there is no parameter "{name}".{nearest(name, names)}')
    return given


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(each) for each in value) if isinstance(value, list) else value

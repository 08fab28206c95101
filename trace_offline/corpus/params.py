"""What a corpus is drawn from, as values that can be stored beside it and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trace_offline.core.errors import UsageError, nearest
from trace_offline.corpus.grammar import COMPLEXITIES
from trace_offline.corpus.lexicon import LexiconParams
from trace_offline.corpus.sentence import complete_file

GRAMMAR_VERSION = 1
"""Raised when the same parameters and seed would no longer give the same sentences."""


@dataclass(frozen=True, slots=True)
class CorpusParams:
    """What the corpus is drawn from. All shares are probabilities between 0 and 1.

    alpha: Zipf exponent of every list of lemmas (nouns, adjectives, adverbs, the verbs of each frame).
    complexity: shares of simple, medium and complex sentences; they sum to 1.
    attractors: share of medium and complex subjects followed by a phrase (*near the …*), whose noun has the other
    number half of the time. plural: share of plural noun phrases. passive: share of passives where the frame allows.
    """

    alpha: float = 1.0
    complexity: tuple[float, float, float] = (0.35, 0.4, 0.25)
    attractors: float = 0.25
    plural: float = 0.4
    passive: float = 0.2
    adjectives: float = 0.25
    adverbs: float = 0.15
    lexicon: LexiconParams = field(default_factory=LexiconParams)
    lexicon_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("attractors", "plural", "passive", "adjectives", "adverbs"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"corpus: {name} is a share between 0 and 1, found {getattr(self, name)}.")
        shares = self.complexity
        if len(shares) != len(COMPLEXITIES) or min(shares) < 0 or abs(sum(shares) - 1.0) > 1e-9:
            raise UsageError(
                f"corpus: complexity is three shares that sum to 1 ({', '.join(COMPLEXITIES)}), found {shares}."
            )

    def to_record(self) -> dict[str, Any]:
        """All parameters as JSON values, with the version of the grammar; :meth:`from_record` is its inverse."""
        record: dict[str, Any] = {"version": GRAMMAR_VERSION}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, LexiconParams):
                value = {part.name: getattr(value, part.name) for part in fields(value)}
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
    names = [each.name for each in fields(kind)]
    for name in given:
        if name not in names:
            raise UsageError(f'corpus parameters: there is no parameter "{name}".{nearest(name, names)}')
    return given


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(each) for each in value) if isinstance(value, list) else value

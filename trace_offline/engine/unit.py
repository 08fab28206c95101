"""What travels to a worker: references and plain values only, never a model or a tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from trace_offline.core.errors import CheckpointError
from trace_offline.core.hashing import canonical_json, digest
from trace_offline.core.types import Checkpoint

HELDOUT = "heldout_set"
"""Key of the second evaluation set's hash among the stored parameters of an analysis that looked at it."""


@dataclass(frozen=True, slots=True)
class AnalysisRequest:
    """One analyzer with one set of parameters, to run on the checkpoint of the unit it belongs to.

    ``extract_to``: for a series analyzer, the file its extract goes to; nothing is measured then.
    """

    analysis_id: str
    analyzer: str
    version: str
    params: Mapping[str, Any]
    extract_to: str | None = None


@dataclass(frozen=True)
class Wanted:
    """One analyzer with its resolved parameters (defaults filled in).

    ``heldout``: hash of the second evaluation set, for an analyzer that looks at it; None where there is none.
    """

    name: str
    version: str
    params: Mapping[str, Any]
    heldout: str | None = None

    def identity(self, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The parameters as they are stored and hashed: with the second evaluation set where it is looked at."""
        own = dict(self.params if params is None else params)
        return own if self.heldout is None else {**own, HELDOUT: self.heldout}


@dataclass(frozen=True, slots=True)
class WorkSettings:
    """What all units of a run share. ``board``: the folder where workers say what they do.

    ``cache``: the folder of the activation cache, None when it is off; ``cache_bytes``: the most it may hold.
    """

    evaluation_set: str
    evaluation_hash: str
    device: str
    dtype: str
    seed: int
    threads: int
    model_factory: str | None = None
    blocks: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    factory_digest: str = ""
    heldout_set: str | None = None
    heldout_hash: str | None = None
    board: str | None = None
    cache: str | None = None
    cache_bytes: int = 0


Stamps = tuple[tuple[str, int, int], ...]
"""(path, size, mtime in ns) of the files a checkpoint is made of."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One checkpoint with all its missing analyses: one load, one forward pass.

    ``stamps``: its files as they were when the fingerprint was taken; the worker refuses others, because their numbers
    would be stored under weights they do not belong to.
    """

    checkpoint: Checkpoint
    requests: tuple[AnalysisRequest, ...]
    settings: WorkSettings
    stamps: Stamps = ()

    @property
    def key(self) -> str:
        """Identifies the unit within a run."""
        return digest(*(request.analysis_id for request in self.requests))


class Wait(Enum):
    """What a source of units gives when it has none yet but will have more: ask again soon."""

    NOT_YET = "not yet"


def analysis_id(
    fingerprint: str,
    analyzer: str,
    version: str,
    params: Mapping[str, Any],
    evaluation_hash: str,
    dtype: str,
    seed: int,
) -> str:
    """The identity of an analysis: change any part and it is a new one; change none and it is never done twice."""
    return digest(fingerprint, analyzer, version, canonical_json(dict(params)), evaluation_hash, dtype, str(seed))


def model_fingerprint(fingerprint: str, settings: WorkSettings) -> str:
    """Weights served by another factory are another model: its name and source belong to the identity."""
    if settings.model_factory is None and settings.blocks is None:
        return fingerprint
    return digest(fingerprint, settings.model_factory or "", settings.factory_digest, settings.blocks or "")


def file_stamps(checkpoint: Checkpoint) -> Stamps:
    """Size and time of every file of a checkpoint. Raises CheckpointError when one is gone."""
    names = [*checkpoint.weight_files, *([checkpoint.config] if checkpoint.config else [])]
    try:
        return tuple((name, found.st_size, found.st_mtime_ns) for name in names for found in [os.stat(name)])
    except OSError as error:
        raise CheckpointError(
            f"{checkpoint.location}: {error.filename} is gone or cannot be read ({error.strerror}). A training run "
            "that keeps only its last checkpoints may have removed it."
        ) from None

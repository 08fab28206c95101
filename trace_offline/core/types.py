"""Value types that travel between the stages. Frozen, small, picklable; no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class CheckpointState(StrEnum):
    """What discovery thinks of one find."""

    COMPLETE = "complete"
    PARTIAL = "partial"
    BEING_WRITTEN = "being_written"
    UNREADABLE = "unreadable"
    DUPLICATE = "duplicate"
    UNSUPPORTED = "unsupported"
    NOT_A_CHECKPOINT = "not_a_checkpoint"

    @property
    def analyzable(self) -> bool:
        """Duplicates stay in the series: their numbers are computed once and shown at every step."""
        return self in (CheckpointState.COMPLETE, CheckpointState.DUPLICATE)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One find of discovery: where the weights of one step live and whether they can be analyzed.

    ``location`` is the folder or file as a string, or ``hf://org/name@revision`` for a revision not yet on disk.
    ``layout`` names how it is stored (``hf_trainer``, ``hf_folder``, ``hub_cache``, ``hub``, ``raw``, ``nanogpt``,
    ``lightning``, ``accelerate``, ``peft``, ``dcp``, ``deepspeed``, ``megatron``, …).
    ``weight_files`` are absolute paths, sorted. ``tokenizer`` is the folder that holds tokenizer files, if any was
    found beside or above. ``fingerprint`` identifies the weights and configuration by content once computed.
    """

    location: str
    layout: str
    state: CheckpointState
    step: int | None = None
    tokens_seen: int | None = None
    stage: str | None = None
    epoch: float | None = None
    reason: str | None = None
    weight_files: tuple[str, ...] = ()
    config: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    size_bytes: int = 0
    duplicate_of: int | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number of one analysis. ``value`` None means "cannot be measured"; then ``reason`` must say why.

    ``layer``: 0 = embedding output, i = raw output of block i, None = whole model. ``label``: a class, a rank, or
    None for the total. ``stderr``: standard error in the unit of ``value``. ``n``: independent observations behind it.
    """

    metric: str
    value: float | None
    stderr: float | None = None
    n: int | None = None
    layer: int | None = None
    component: str | None = None
    task: str | None = None
    label: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Array:
    """A named series of numbers of one analysis: a spectrum, a curve, a confusion matrix (row-major)."""

    name: str
    values: tuple[float, ...]
    layer: int | None = None
    component: str | None = None
    task: str | None = None
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file made by an analysis (probe weights, say): raw bytes; the engine writes it and stores path and sha256."""

    name: str
    content: bytes
    suffix: str = ".bin"


Result = Measurement | Array | Artifact


class AnalysisStatus(StrEnum):
    """How an analysis ended."""

    OK = "ok"
    FAILED = "failed"
    CRASHED = "crashed"
    NOT_APPLICABLE = "not_applicable"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker returns for one analysis; only plain values, so it always survives the way home."""

    analysis_id: str
    status: AnalysisStatus
    message: str | None = None
    seconds: float = 0.0
    device: str = "cpu"
    measurements: tuple[Measurement, ...] = ()
    arrays: tuple[Array, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)

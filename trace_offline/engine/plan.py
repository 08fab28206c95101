"""From checkpoints and analyzers to what is missing in the store."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_offline.analyzers.registry import DEFAULT, Registry
from trace_offline.core.errors import UsageError
from trace_offline.core.hashing import canonical_json
from trace_offline.core.params import parse_params
from trace_offline.core.types import Checkpoint
from trace_offline.engine.unit import (
    AnalysisRequest,
    Stamps,
    Unit,
    Wanted,
    WorkSettings,
    analysis_id,
    file_stamps,
    model_fingerprint,
)
from trace_offline.store.rows import checkpoint_id


def resolve_analyzers(
    registry: Registry, names: Iterable[str], params: Mapping[str, Mapping[str, Any]]
) -> tuple[Wanted, ...]:
    """Names and overrides → analyzers with complete parameters.

    Raises UsageError for unknown names, unknown parameters, and parameters of analyzers that were not asked for.
    """
    chosen = tuple(dict.fromkeys(names)) or tuple(name for name in DEFAULT if name in registry.analyzers)
    for name in params:
        registry.get(name)
        if name not in chosen:
            raise UsageError(
                f'Parameters are given for "{name}", which is not among the analyzers of this run '
                f"({', '.join(chosen)}). Add --analyzer {name}."
            )
    wanted = []
    for name in chosen:
        kind = registry.get(name)
        values = parse_params(kind.Params, name, params.get(name, {}))
        wanted.append(Wanted(name, kind.version, values.model_dump(mode="json")))
    return tuple(wanted)


@dataclass
class Planner:
    """Knows what is done, and turns one checkpoint at a time into the unit that is missing.

    ``done``: analysis_id → status of what the store holds. Failed and crashed analyses are tried again; successful and
    not-applicable ones are not, unless ``force``. Safe to call from joblib's dispatching thread.
    """

    run: str
    wanted: tuple[Wanted, ...]
    settings: WorkSettings
    done: dict[str, str]
    force: bool = False
    stamps: Mapping[str, Stamps] = field(default_factory=dict)
    _scheduled: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def identities(self, checkpoint: Checkpoint) -> list[dict[str, Any]]:
        """The identity of every wanted analysis of a checkpoint, as rows of ``planned``."""
        assert checkpoint.fingerprint is not None  # computed before planning
        settings = self.settings
        model = model_fingerprint(checkpoint.fingerprint, settings)
        return [
            {
                "checkpoint_id": checkpoint_id(self.run, checkpoint),
                "analysis_id": analysis_id(
                    model, item.name, item.version, item.identity(), settings.evaluation_hash, settings.dtype,
                    settings.seed,
                ),
                "fingerprint": checkpoint.fingerprint,
                "analyzer": item.name,
                "analyzer_version": item.version,
                "params": canonical_json(item.identity()),
                "evaluation_set": settings.evaluation_hash,
                "dtype": settings.dtype,
                "seed": settings.seed,
            }
            for item in self.wanted
        ]  # fmt: skip

    def _is_done(self, key: str) -> bool:
        return not self.force and self.done.get(key) in ("ok", "not_applicable")

    def missing(self, checkpoint: Checkpoint) -> int:
        """How many of the wanted analyses the store lacks for these weights; all of them while they are unknown."""
        if checkpoint.fingerprint is None:
            return len(self.wanted)
        return sum(not self._is_done(row["analysis_id"]) for row in self.identities(checkpoint))

    def unit(
        self, checkpoint: Checkpoint, extracts: tuple[AnalysisRequest, ...] = (), *, measure: bool = True
    ) -> Unit | None:
        """What is still to do for this checkpoint, with what is to be extracted for series, or None.

        ``measure`` False: extracts only. The same weights are never scheduled twice.
        """
        requests = []
        with self._lock:
            wanted = self.wanted if measure else ()
            for item, row in zip(wanted, self.identities(checkpoint)[: len(wanted)], strict=True):
                key = row["analysis_id"]
                if not self._is_done(key) and key not in self._scheduled:
                    self._scheduled.add(key)
                    requests.append(AnalysisRequest(key, item.name, item.version, item.params))
        requests.extend(extracts)
        if not requests:
            return None
        stamps = self.stamps.get(checkpoint.location) or file_stamps(checkpoint)
        return Unit(checkpoint, tuple(requests), self.settings, stamps)


def default_run_name(source: str) -> str:
    """``hf://org/name`` → ``org/name``; a folder or file → its own name."""
    if source.startswith("hf://"):
        return source.removeprefix("hf://").split("@", 1)[0]
    path = Path(os.path.abspath(source))  # normalised, so that ".." has a name; links are not followed
    return path.name or str(path)


def short_names(source: str, checkpoints: Iterable[Checkpoint]) -> list[tuple[str, Checkpoint]]:
    """Checkpoints with the names shown in ``history.checkpoint``: relative to the source, or the revision."""
    base = None if source.startswith("hf://") else Path(os.path.abspath(source))
    named = []
    for checkpoint in checkpoints:
        name = checkpoint.location
        if checkpoint.location.startswith("hf://"):
            name = checkpoint.location.rsplit("@", 1)[-1]
        elif base is not None:
            path = Path(os.path.abspath(checkpoint.location))
            if path.is_relative_to(base):
                name = path.relative_to(base).as_posix()
                name = path.name if name == "." else name
        named.append((name, checkpoint))
    return named

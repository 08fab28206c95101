"""Analyzers that compare checkpoints: which extracts are missing, and the comparison once they are all there.

A series analysis belongs to one checkpoint but depends on all of them: its identity holds the fingerprints of the
whole series and the place in it. The extracts stay beside the store, so a longer series, or another way of comparing,
loads no model that was loaded before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_offline.analyzers.registry import registry
from trace_offline.core.errors import NotApplicable
from trace_offline.core.hashing import canonical_json, digest
from trace_offline.core.types import AnalysisStatus, Array, Checkpoint, Measurement, Outcome
from trace_offline.engine.board import Board, reporter
from trace_offline.engine.executors import run_alone
from trace_offline.engine.fit import evaluation_set
from trace_offline.engine.unit import AnalysisRequest, Wanted, WorkSettings, analysis_id, model_fingerprint
from trace_offline.engine.watchdog import COMPARING
from trace_offline.engine.worker import ended, library_versions, limit_threads, reasons
from trace_offline.store.rows import checkpoint_id

_SUFFIX, _NOT_APPLICABLE = ".safetensors", ".not_applicable"


@dataclass(frozen=True)
class SeriesTask:
    """One comparison, as it travels to a worker. ``places``: for each position (step, extract file or None)."""

    wanted: Wanted
    settings: WorkSettings
    analysis_ids: tuple[str, ...]
    places: tuple[tuple[int | None, str | None], ...]


@dataclass
class SeriesPlan:
    """The series analyzers of a run. ``failures``: extract file → how its extraction ended, if not well."""

    run: str
    wanted: tuple[Wanted, ...]
    settings: WorkSettings
    folder: Path
    done: Mapping[str, str]
    force: bool = False
    failures: dict[str, Outcome] = field(default_factory=dict)
    _scheduled: set[str] = field(default_factory=set)

    def _fingerprint(self, checkpoint: Checkpoint) -> str:
        assert checkpoint.fingerprint is not None  # computed before planning
        return model_fingerprint(checkpoint.fingerprint, self.settings)

    def target(self, item: Wanted, checkpoint: Checkpoint) -> Path:
        """Where the extract of a checkpoint lies."""
        kind: Any = registry().get(item.name)
        kept = kind().extract_params(kind.Params.model_validate(dict(item.params)))
        name = analysis_id(
            self._fingerprint(checkpoint), item.name, item.version, item.identity(kept), self.settings.evaluation_hash,
            self.settings.dtype, self.settings.seed,
        )  # fmt: skip
        return self.folder / item.name / f"{name}{_SUFFIX}"

    def identities(self, item: Wanted, series: Sequence[Checkpoint]) -> list[dict[str, Any]]:
        """Rows of ``planned``, one for each checkpoint of the series; all their fingerprints must be known."""
        prints = [self._fingerprint(checkpoint) for checkpoint in series]
        steps = [str(checkpoint.step) for checkpoint in series]
        settings = self.settings
        params = canonical_json(item.identity())
        whole = digest(*prints, *steps, item.name, item.version, params, settings.evaluation_hash, settings.dtype,
                       str(settings.seed))  # fmt: skip
        return [
            {
                "checkpoint_id": checkpoint_id(self.run, checkpoint),
                "analysis_id": digest(whole, str(position)),
                "fingerprint": checkpoint.fingerprint,
                "analyzer": item.name,
                "analyzer_version": item.version,
                "params": params,
                "evaluation_set": settings.evaluation_hash,
                "dtype": settings.dtype,
                "seed": settings.seed,
            }
            for position, checkpoint in enumerate(series)
        ]

    def is_done(self, item: Wanted, series: Sequence[Checkpoint]) -> bool:
        """Every place of the series is stored; one that failed makes the comparison worth repeating."""
        if self.force or any(checkpoint.fingerprint is None for checkpoint in series):
            return False
        return all(
            self.done.get(row["analysis_id"]) in ("ok", "not_applicable") for row in self.identities(item, series)
        )

    def pending(self, series: Sequence[Checkpoint]) -> tuple[Wanted, ...]:
        """The analyzers whose comparison is to be made."""
        return tuple(item for item in self.wanted if not self.is_done(item, series))

    def has_extract(self, item: Wanted, checkpoint: Checkpoint) -> bool:
        """Whether what this analyzer compares, or why there is nothing, lies there."""
        return checkpoint.fingerprint is not None and _is_there(self.target(item, checkpoint))

    def lacks(self, checkpoint: Checkpoint, pending: Iterable[Wanted]) -> bool:
        """Whether one of these needs an extract that is not there. Without a fingerprint nobody can tell: it does."""
        if checkpoint.fingerprint is None:
            return any(True for _ in pending)
        return any(self.force or not _is_there(self.target(item, checkpoint)) for item in pending)

    def extract_requests(self, checkpoint: Checkpoint, pending: Iterable[Wanted]) -> tuple[AnalysisRequest, ...]:
        """What to extract from a checkpoint; nothing that lies there already or is under way."""
        requests = []
        for item in pending:
            target = self.target(item, checkpoint)
            if (self.force or not _is_there(target)) and str(target) not in self._scheduled:
                self._scheduled.add(str(target))
                requests.append(
                    AnalysisRequest(digest("extract", str(target)), item.name, item.version, item.params, str(target))
                )
        return tuple(requests)

    def extracted(self, request: AnalysisRequest, outcome: Outcome) -> None:
        """Note how an extraction ended."""
        assert request.extract_to is not None  # only such requests come here
        if outcome.status is AnalysisStatus.NOT_APPLICABLE:
            marker = Path(request.extract_to).with_suffix(_NOT_APPLICABLE)
            with suppress(OSError):  # a full disk: this run knows it all the same, the next asks again
                marker.parent.mkdir(parents=True, exist_ok=True)
                fresh = marker.with_name(f"{marker.name}.new")
                fresh.write_text(str(outcome.message), encoding="utf-8")
                os.replace(fresh, marker)
        if outcome.status is not AnalysisStatus.OK:
            self.failures[request.extract_to] = outcome

    def compare(
        self, item: Wanted, series: Sequence[Checkpoint], jobs: int, timeout: float | None = None
    ) -> list[Outcome]:
        """Compare the extracts there are; one outcome for each checkpoint of the series, in order."""
        ids = tuple(row["analysis_id"] for row in self.identities(item, series))
        targets = [self.target(item, checkpoint) for checkpoint in series]
        places = tuple(
            (checkpoint.step, str(target) if target.exists() else None)
            for checkpoint, target in zip(series, targets, strict=True)
        )
        task = SeriesTask(item, self.settings, ids, places)
        try:
            board = None if self.settings.board is None else Board(self.settings.board)
            outcomes = run_alone(run_series, task, jobs, board, timeout)
        except BrokenProcessPool as error:
            text = f"The worker process died while {item.name} compared the series ({str(error).splitlines()[-1]})."
            outcomes = [Outcome(key, AnalysisStatus.CRASHED, text) for key in ids]
        return [
            outcome if place[1] is not None else self._lost(key, target)
            for outcome, place, key, target in zip(outcomes, places, ids, targets, strict=True)
        ]

    def _lost(self, key: str, target: Path) -> Outcome:
        marker = target.with_suffix(_NOT_APPLICABLE)
        if marker.exists():
            return Outcome(key, AnalysisStatus.NOT_APPLICABLE, marker.read_text(encoding="utf-8"))
        failure = self.failures.get(str(target))
        if failure is None:
            return Outcome(key, AnalysisStatus.FAILED, "nothing was extracted from this checkpoint")
        return Outcome(key, failure.status, failure.message)


def _is_there(target: Path) -> bool:
    return target.exists() or target.with_suffix(_NOT_APPLICABLE).exists()


def run_series(task: SeriesTask) -> list[Outcome]:
    """The comparison in a worker; never raises. Places without an extract get an outcome that nobody uses."""
    started = time.perf_counter()
    found: dict[int, list[Any]] = {position: [] for position in range(len(task.places))}
    report = reporter(task.settings.board)
    try:
        report.tell(digest(*task.analysis_ids), task.wanted.name, COMPARING, task.analysis_ids)
        limit_threads(task.settings.threads)
        _compare(task, found)
    except BaseException as error:
        seconds = time.perf_counter() - started
        return [ended(key, error, "cpu", seconds) for key in task.analysis_ids]
    finally:
        report.rest()
    seconds = (time.perf_counter() - started) / max(1, len(task.places))
    return [_outcome(key, found[position], task.wanted.name, seconds) for position, key in enumerate(task.analysis_ids)]


def _compare(task: SeriesTask, found: dict[int, list[Any]]) -> None:
    from trace_offline.analyzers.base import Extract, Need, SeriesContext

    there = [position for position, (_, path) in enumerate(task.places) if path is not None]
    if not there:
        raise NotApplicable(f"{task.wanted.name} has nothing to compare: no checkpoint gave an extract.")
    extracts = tuple(
        Extract(index, task.places[position][0], str(task.places[position][1])) for index, position in enumerate(there)
    )
    kind: Any = registry().get(task.wanted.name)
    params = kind.Params.model_validate(dict(task.wanted.params))
    evaluation = evaluation_set(task.settings.evaluation_set, task.settings.evaluation_hash)
    seen = evaluation if Need.PAIRS in kind.needs else evaluation.originals()
    context = SeriesContext(extracts, seen, params, task.settings.seed)
    for index, item in kind().compare(context):
        if not isinstance(item, Measurement | Array):
            raise TypeError(f"{task.wanted.name} yielded {type(item).__name__}; expected Measurement or Array")
        found[there[index]].append(item)


def _outcome(key: str, items: list[Any], name: str, seconds: float) -> Outcome:
    measurements = tuple(item for item in items if isinstance(item, Measurement))
    arrays = tuple(item for item in items if isinstance(item, Array))
    if not items:
        return Outcome(key, AnalysisStatus.NOT_APPLICABLE, f"{name} has nothing to compare this checkpoint with.")
    return Outcome(
        key, AnalysisStatus.OK, reasons(list(measurements)), seconds, "cpu", measurements, arrays,
        versions=library_versions(),
    )  # fmt: skip

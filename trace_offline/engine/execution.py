"""Running a plan: units over the workers, outcomes into the store, then the comparisons of series."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_offline.core.types import AnalysisStatus, Checkpoint, Outcome
from trace_offline.engine.board import Board
from trace_offline.engine.costs import Costs, earlier
from trace_offline.engine.download_rules import DownloadRules
from trace_offline.engine.downloads import Downloads
from trace_offline.engine.executors import Finished, run_inline, run_joblib
from trace_offline.engine.fingerprints import hub_entry, remember
from trace_offline.engine.interrupt import StopRequest
from trace_offline.engine.plan import Planner
from trace_offline.engine.progress import Progress, name_of
from trace_offline.engine.readahead import one_ahead
from trace_offline.engine.removed import in_order
from trace_offline.engine.series import SeriesPlan
from trace_offline.engine.unit import AnalysisRequest, Unit, Wait, Wanted
from trace_offline.engine.worker import run_unit
from trace_offline.store.writer import Writer

_SLOWEST = 5
_DONE = ("ok", "not_applicable")


@dataclass(frozen=True)
class Workforce:
    """Who does the work. ``executor``: inline, joblib or dask; ``timeout``: seconds that one task may take.

    ``gpus``: what joblib's workers are bound to, one each; empty where they compute on the CPU.
    """

    executor: str
    jobs: int
    board: Board
    timeout: float | None = None
    scheduler: str | None = None
    gpus: tuple[str, ...] = ()

    def run(
        self, units: Iterator[Unit | Wait], body: Callable[[Unit], list[Outcome]], staffed: Callable[[int], None]
    ) -> Iterator[Finished]:
        """Units as they finish. ``staffed`` is told the number of workers where that is not ``jobs``."""
        if self.executor == "inline":
            return run_inline(units, body)
        if self.executor == "dask":
            from trace_offline.engine.cluster import run_dask

            return run_dask(units, body, self.scheduler, self.timeout, staffed)
        return run_joblib(units, body, self.jobs, self.board, self.timeout, self.gpus)


@dataclass
class Summary:
    """How a run ended; counts are analyses, one for each checkpoint and analyzer.

    ``slowest``: (checkpoint, analyzer, seconds), the most expensive first. ``removed``: checkpoints that the training
    deleted before they were read. ``interrupted``: the user asked it to end early.
    """

    run: str
    store: Path
    checkpoints: int
    ok: int = 0
    not_applicable: int = 0
    failed: int = 0
    crashed: int = 0
    already_done: int = 0
    shared: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    removed: list[str] = field(default_factory=list)
    slowest: list[tuple[str, str, float]] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 all good, 1 some analyses failed, 130 ended early by the user."""
        if self.interrupted:
            return 130
        return 1 if self.failed or self.crashed else 0

    def count(self, checkpoint: Checkpoint, analyzer: str, outcome: Outcome) -> None:
        """Add one analysis."""
        self.slowest = sorted(
            [*self.slowest, (name_of(checkpoint), analyzer, outcome.seconds)], key=lambda item: -item[2]
        )[:_SLOWEST]
        if outcome.status is AnalysisStatus.OK:
            self.ok += 1
        elif outcome.status is AnalysisStatus.NOT_APPLICABLE:
            self.not_applicable += 1
        else:
            if outcome.status is AnalysisStatus.FAILED:
                self.failed += 1
            else:
                self.crashed += 1
            self.problems.append(f"{name_of(checkpoint)}: {analyzer} {outcome.status.value}: {outcome.message}")


@dataclass
class Execution:
    """One run of what is missing. ``register``: stores a checkpoint whose fingerprint became known on the way.

    ``compare`` False: extract only (a shard of a series cannot be compared). ``rotating``: the training deletes old
    checkpoints, so one that is gone before it was read is no failure; ``removed``: those that are gone since, which
    comparisons count. ``measure`` False: compare what is extracted, measure nothing. ``rules``: for revisions on the
    hub.
    """

    planner: Planner
    series: SeriesPlan
    writer: Writer
    summary: Summary
    workers: Workforce
    progress: Progress
    register: Callable[[Checkpoint], None]
    stop: StopRequest = field(default_factory=StopRequest)
    compare: bool = True
    rotating: bool = False
    measure: bool = True
    removed: list[Checkpoint] = field(default_factory=list)
    rules: DownloadRules = field(default_factory=DownloadRules)
    costs: Costs = field(default_factory=lambda: Costs(1, Counter()))
    _names: dict[str, str] = field(default_factory=dict)
    _identities: dict[str, dict[str, Any]] = field(default_factory=dict)
    _arrived: deque[Checkpoint] = field(default_factory=deque)
    _started: float = field(default_factory=time.time)

    def run(self, chosen: list[Checkpoint], whole: list[Checkpoint]) -> None:
        """Measure ``chosen`` and compare ``whole`` (the series, in order of training), as far as it is missing."""
        planner, series = self.planner, self.series
        line = in_order([*whole, *self.removed]) if self.removed else whole
        pending = tuple(item for item in series.wanted if not series.is_done(item, self._comparable(item, line)))
        if not self.measure:
            chosen, whole = [], []
        places = {id(item) for item in chosen}
        for item in chosen:
            if item.fingerprint is not None:
                self._note(item)

        def unit_of(item: Checkpoint, *, measure: bool) -> Unit | None:
            return planner.unit(item, series.extract_requests(item, pending), measure=measure)

        self._recover()
        units = [
            unit
            for item in whole
            if item.layout != "hub" and (unit := unit_of(item, measure=id(item) in places)) is not None
        ]
        # A revision whose fingerprint is remembered and whose analyses are all stored is not downloaded again.
        remote = [
            item
            for item in whole
            if item.layout == "hub" and ((id(item) in places and planner.missing(item)) or series.lacks(item, pending))
        ]
        todo = sum(len(unit.requests) for unit in units) + len(pending) * len(line) * self.compare
        todo += sum(planner.missing(item) for item in remote if id(item) in places) + len(pending) * len(remote)
        self._count_done(chosen, line, pending, units)
        gone: list[tuple[Checkpoint, str]] = []
        downloads = Downloads(
            remote,
            self.rules,
            lost=lambda item, reason: gone.append((item, reason)),
            note=self.progress.note,
            board=self.workers.board,
            jobs=self.workers.jobs,
        )
        if todo == 0:
            downloads.close()
            self.summary.warnings += downloads.warnings
            self.workers.board.clear()  # what a killed run left there is stored by now
            return
        self.progress.start(todo, len(whole) if pending else len(units) + len(remote))
        final = {id(item): item for item in line}
        self._expect(units, remote, pending, len(line))
        board = self.workers.board
        try:
            # Kept by an earlier run and not wanted by this one: must not stand in for what this run measures.
            board.clear()
            board.open()
            self.stop.armed = True
            with self.writer.patient(self.progress.note):
                self._measure(units, downloads, final, lambda item, asked: unit_of(item, measure=asked in places))
                self._count_lost(gone, downloads, pending)
                known = [final[id(item)] for item in line]
                for wanted in pending:
                    if self.compare and not self.stop.requested:
                        self._compare(wanted, known)
            self.summary.warnings += [text for text in duplicate_warnings(known) if text not in self.summary.warnings]
            board.clear()
        finally:
            self.stop.armed = False
            self.summary.interrupted = self.stop.requested
            downloads.close()
            self.summary.warnings += downloads.warnings
            self.progress.stop()
            board.leave()

    def _comparable(self, item: Wanted, line: list[Checkpoint]) -> list[Checkpoint]:
        """Those of a series that give an extract, or will; the whole series unless the training removes some of it."""
        if not self.rotating:
            return line
        return [
            checkpoint
            for checkpoint in line
            if self.series.has_extract(item, checkpoint)
            or (self.measure and (checkpoint.weight_files or checkpoint.layout == "hub") and not _is_gone(checkpoint))
        ]

    def _recover(self) -> None:
        """Store what an earlier run finished but was killed before it could store."""
        if self.planner.force:
            return
        for outcome in self.workers.board.all_kept():
            identity = self._identities.get(outcome.analysis_id)
            good = outcome.status in (AnalysisStatus.OK, AnalysisStatus.NOT_APPLICABLE)
            if identity is not None and good and self.planner.done.get(outcome.analysis_id) not in _DONE:
                self.writer.record(outcome, identity)
                self.planner.done[outcome.analysis_id] = outcome.status.value

    def _expect(self, units: list[Unit], remote: list[Checkpoint], pending: tuple[Wanted, ...], length: int) -> None:
        left = Counter(_cost_name(request) for unit in units for request in unit.requests)
        for item in self.planner.wanted:
            left[item.name] += len(remote)
        if self.compare:
            for item in pending:
                left[item.name] += length
        rows = self.writer.read("select analyzer, median(seconds) from analyses where status = 'ok' group by analyzer")
        self.costs = Costs(self.workers.jobs, left, earlier(rows))

    def _count_done(
        self, chosen: list[Checkpoint], whole: list[Checkpoint], pending: tuple[Wanted, ...], units: list[Unit]
    ) -> None:
        planner = self.planner
        missing = sum(planner.missing(item) for item in chosen)
        self.summary.already_done = len(chosen) * len(planner.wanted) - missing
        self.summary.already_done += len(whole) * (len(self.series.wanted) - len(pending))
        local = sum(planner.missing(item) for item in chosen if item.layout != "hub")
        self.summary.shared = local - sum(request.extract_to is None for unit in units for request in unit.requests)

    def _note(self, checkpoint: Checkpoint) -> None:
        for row in self.planner.identities(checkpoint):
            self._names[row["analysis_id"]] = row["analyzer"]
            self._identities.setdefault(row["analysis_id"], row)

    def _measure(
        self,
        units: list[Unit],
        downloads: Downloads,
        final: dict[int, Checkpoint],
        unit_of: Callable[[Checkpoint, int], Unit | None],
    ) -> None:
        asked = {item.location: id(item) for item in downloads.items}

        def all_units() -> Iterator[Unit | Wait]:
            for local in one_ahead(units):
                if self.stop.requested:
                    return
                yield local
            for item in downloads.arrivals():
                if self.stop.requested:
                    return
                if item is None:
                    yield Wait.NOT_YET
                    continue
                final[asked[item.location]] = item
                self._note(item)
                self._arrived.append(item)
                unit = unit_of(item, asked[item.location])
                if unit is None:
                    downloads.stored(item, ())
                else:
                    downloads.use(item, (request.analysis_id for request in unit.requests))
                    yield unit

        def staffed(workers: int) -> None:
            downloads.staffed(workers)
            self.costs.jobs = workers

        for unit, outcomes in self.workers.run(all_units(), run_unit, staffed):
            self._welcome()
            self._store(unit, outcomes)
            downloads.stored(unit.checkpoint, (outcome.analysis_id for outcome in outcomes))
        self._welcome()

    def _count_lost(
        self, gone: list[tuple[Checkpoint, str]], downloads: Downloads, pending: tuple[Wanted, ...]
    ) -> None:
        """Revisions that could not be had, and those for which there was no room."""
        for item, reason in gone:
            self.summary.failed += max(1, self.planner.missing(item) + len(pending))
            self.summary.problems.append(f"{item.location}: {reason}")
            self.register(dataclasses.replace(item, reason=reason))
        if downloads.full is not None and not self.stop.requested:
            self.summary.failed += sum(self.planner.missing(item) + len(pending) for item in downloads.skipped)
            count = len(downloads.skipped)
            self.summary.problems.append(
                f"{count} revision{'s' * (count != 1)} not downloaded, so not analyzed: {downloads.full}"
            )

    def _welcome(self) -> None:
        """Store the revisions that were fetched since; fetching itself happens in joblib's dispatching thread."""
        while self._arrived:
            checkpoint = self._arrived.popleft()
            self.register(checkpoint)
            self.writer.plan(self.planner.identities(checkpoint))
            remember(self.writer, hub_entry(checkpoint))

    def _store(self, unit: Unit, outcomes: list[Outcome]) -> None:
        checkpoint = unit.checkpoint
        requests = {request.analysis_id: request for request in unit.requests}
        names = dict(self._names)
        if self.rotating and _all_failed(outcomes) and _is_gone(checkpoint):
            self.summary.removed.append(name_of(checkpoint))
            self.writer.unplan(requests)
            self.progress.note(f"{name_of(checkpoint)} was removed by the training before it could be read")
            return
        with self.writer.together():
            for outcome in outcomes:
                request = requests[outcome.analysis_id]
                self.costs.observe(_cost_name(request), outcome.seconds)
                self.summary.warnings += [f"{name_of(checkpoint)}: {text}" for text in outcome.detail.get("notes", ())]
                if request.extract_to is not None:
                    self.series.extracted(request, outcome)
                    names[outcome.analysis_id] = _cost_name(request)
                    if not self.compare and outcome.status in (AnalysisStatus.FAILED, AnalysisStatus.CRASHED):
                        self.summary.count(checkpoint, _cost_name(request), outcome)  # no comparison will say so
                    continue
                self.writer.record(outcome, self._identities[outcome.analysis_id])
                self.summary.count(checkpoint, request.analyzer, outcome)
        self.workers.board.forget(requests)
        self._tell(checkpoint, outcomes, names)

    def _tell(self, checkpoint: Checkpoint, outcomes: list[Outcome], names: dict[str, str]) -> None:
        left = self.costs.seconds_left()
        self.progress.finished(checkpoint, outcomes, names, left)
        summary = self.summary
        self.workers.board.progress(
            run=summary.run,
            done=summary.ok + summary.not_applicable,
            failed=summary.failed + summary.crashed,
            left=sum(max(0, count) for count in self.costs.left.values()),
            seconds_left=left,
            started=self._started,
        )

    def _compare(self, item: Wanted, series: list[Checkpoint]) -> None:
        """One comparison over the checkpoints that could be had."""
        there = [checkpoint for checkpoint in self._comparable(item, series) if checkpoint.fingerprint is not None]
        rows = self.series.identities(item, there)
        self.writer.plan(rows)
        outcomes = self.series.compare(item, there, self.workers.jobs, self.workers.timeout)
        for checkpoint, row, outcome in zip(there, rows, outcomes, strict=True):
            self.writer.record(outcome, row)
            self.summary.count(checkpoint, item.name, outcome)
            self.costs.observe(item.name, outcome.seconds)
            self._tell(checkpoint, [outcome], {outcome.analysis_id: item.name})


def _cost_name(request: AnalysisRequest) -> str:
    return request.analyzer if request.extract_to is None else f"{request.analyzer} (extract)"


def _all_failed(outcomes: list[Outcome]) -> bool:
    """A checkpoint that was gone before it was read fails in everything; one that failed in part was read."""
    return all(outcome.status is AnalysisStatus.FAILED for outcome in outcomes)


def _is_gone(checkpoint: Checkpoint) -> bool:
    return any(not os.path.exists(name) for name in checkpoint.weight_files)


def duplicate_warnings(chosen: list[Checkpoint]) -> list[str]:
    """One line for each checkpoint whose weights an earlier step has already."""
    first: dict[str, Checkpoint] = {}
    warnings = []
    for item in chosen:
        if item.fingerprint is None:
            continue
        other = first.setdefault(item.fingerprint, item)
        if other is not item:
            warnings.append(
                f"step {item.step} has the same weights as step {other.step}: computed once, recorded for both. "
                "If the training went on between them, the published files are wrong."
            )
    return warnings

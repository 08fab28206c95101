"""The verb ``analyze``: find the checkpoints, plan what is missing, run it, store it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_offline.analyzers.registry import registry
from trace_offline.checkpoints.discover import discover, select
from trace_offline.core.errors import CheckpointError, UsageError
from trace_offline.core.types import AnalysisStatus, Checkpoint, Outcome
from trace_offline.engine.executors import run_inline, run_joblib
from trace_offline.engine.fingerprints import hub_entry, known_fingerprints, remember, with_fingerprints
from trace_offline.engine.options import AnalyzeOptions, choose_jobs
from trace_offline.engine.plan import Planner, default_run_name, resolve_analyzers, short_names
from trace_offline.engine.progress import Progress, Silent
from trace_offline.engine.remote import fetched
from trace_offline.engine.unit import Unit, WorkSettings, model_fingerprint
from trace_offline.engine.worker import check_tokenizer_of, resolve_device, run_unit
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.store.writer import Writer


@dataclass
class Summary:
    """How a run ended; counts are analyses, one for each checkpoint and analyzer."""

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
    set_aside: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 all good, 1 some analyses failed."""
        return 1 if self.failed or self.crashed else 0


def analyze(options: AnalyzeOptions, progress: Progress | None = None) -> Summary:
    """Bring the store up to date with the source. Doing it twice is a no-op.

    Raises TraceOfflineError (UsageError, CheckpointError, EvaluationSetError, StoreError) for input that cannot be
    used; what fails on single checkpoints is recorded in the store and counted in the summary.
    """
    started = time.monotonic()
    progress = progress or Silent()
    options.check()
    wanted = resolve_analyzers(registry(), options.analyzers, options.params)
    evaluation = EvaluationSet.load(options.evaluation_set)
    found = discover(options.source, revisions=options.revisions)
    run = options.run or default_run_name(options.source)
    chosen = _choose(found, options)

    device = resolve_device(options.device)
    jobs, threads = choose_jobs(options.jobs, device, max(item.size_bytes for item in chosen))
    settings = WorkSettings(
        evaluation_set=str(Path(options.evaluation_set).absolute()),
        evaluation_hash=evaluation.hash,
        device=device,
        dtype=options.dtype,
        seed=options.seed,
        threads=threads,
        model_factory=options.model_factory,
        blocks=options.blocks,
        tokenizer=options.tokenizer,
        trust_remote_code=options.trust_remote_code,
    )
    local = next((item for item in chosen if item.layout != "hub"), None)
    if local is not None:
        check_tokenizer_of(Unit(local, (), settings), evaluation)

    summary = Summary(run, Path(options.store), len(chosen))
    summary.set_aside = [f"{item.location}: {item.state.value}: {item.reason}" for item in found
                         if not item.state.analyzable]  # fmt: skip
    with Writer.open(Path(options.store)) as writer:
        chosen = with_fingerprints(chosen, writer, known_fingerprints(writer))
        summary.warnings = _duplicate_warnings(chosen)
        _check_same_run(writer, run, options, chosen)
        writer.register_run(run, _absolute(options.source), settings.evaluation_set, options.stored())
        writer.register_evaluation_set(_evaluation_row(evaluation, settings))
        aside = [item for item in found if not item.state.analyzable]
        writer.register_checkpoints(run, short_names(options.source, [*_with_model(chosen, options), *aside]))

        done = {str(key): str(status) for key, status in writer.read("select analysis_id, status from analyses")}
        planner = Planner(run, wanted, settings, done, options.force)
        known = [item for item in chosen if item.fingerprint is not None]
        writer.plan(row for item in known for row in planner.identities(item))
        _execute(options, chosen, planner, writer, summary, jobs, progress)
    summary.seconds = time.monotonic() - started
    return summary


def _choose(found: list[Checkpoint], options: AnalyzeOptions) -> list[Checkpoint]:
    usable = select(found)
    if not usable:
        reasons = "; ".join(f"{item.location}: {item.state.value}: {item.reason}" for item in found[:5])
        raise CheckpointError(f"No checkpoint in {options.source} can be analyzed. Found {len(found)}: {reasons}")
    if options.steps is None:
        return usable
    steps = options.steps
    chosen = [item for item in usable if item.step is not None and item.step in steps]
    if not chosen:
        there = ", ".join(str(item.step) for item in usable[:20])
        raise UsageError(f"--steps selects none of the checkpoints in {options.source}; there are steps {there}.")
    return chosen


def _with_model(chosen: list[Checkpoint], options: AnalyzeOptions) -> list[Checkpoint]:
    """Checkpoints as stored: the fingerprint includes the factory that turns the weights into a model."""
    return [
        dataclasses.replace(
            item, fingerprint=model_fingerprint(item.fingerprint, options.model_factory, options.blocks)
        )
        if item.fingerprint is not None
        else item
        for item in chosen
    ]


def _duplicate_warnings(chosen: list[Checkpoint]) -> list[str]:
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


def _absolute(source: str) -> str:
    return source if source.startswith("hf://") else str(Path(source).absolute())


def _check_same_run(writer: Writer, run: str, options: AnalyzeOptions, chosen: list[Checkpoint]) -> None:
    """Two different series must not share one run name; a moved folder may."""
    known = writer.read("select source from runs where run = ?", [run])
    if not known or known[0][0] == _absolute(options.source):
        return
    stored = dict(writer.read(
        "select step, fingerprint from checkpoints where run = ? and state in ('complete', 'duplicate')", [run]
    ))  # fmt: skip
    for item in _with_model(chosen, options):
        old = stored.get(item.step)
        if old is not None and item.fingerprint is not None and old != item.fingerprint:
            raise UsageError(
                f'The store already has a run "{run}", from {known[0][0]}, with other weights at step {item.step}. '
                "Give this series a name of its own with --run NAME."
            )


def _evaluation_row(evaluation: EvaluationSet, settings: WorkSettings) -> dict[str, Any]:
    return {
        "hash": evaluation.hash,
        "name": evaluation.name,
        "path": settings.evaluation_set,
        "n_examples": evaluation.n_examples,
        "n_tokens": evaluation.n_tokens,
        "tokenizer_hash": evaluation.tokenizer_hash,
        "objective": evaluation.objective,
        "source": getattr(evaluation, "source", None),
        "licence": getattr(evaluation, "licence", None),
    }


def _execute(
    options: AnalyzeOptions,
    chosen: list[Checkpoint],
    planner: Planner,
    writer: Writer,
    summary: Summary,
    jobs: int,
    progress: Progress,
) -> None:
    ledger = _Ledger(planner)
    local = [item for item in chosen if item.layout != "hub"]
    units = [unit for item in local if (unit := planner.unit(item)) is not None]
    # A revision whose fingerprint is remembered and whose analyses are all stored is not downloaded again.
    remote = [item for item in chosen if item.layout == "hub" and planner.missing(item)]
    todo = sum(len(unit.requests) for unit in units) + sum(planner.missing(item) for item in remote)
    summary.already_done = sum(len(planner.wanted) - planner.missing(item) for item in chosen)
    summary.shared = len(chosen) * len(planner.wanted) - summary.already_done - todo
    if todo == 0:
        return
    for item in chosen:
        if item.fingerprint is not None:
            ledger.note(item)
    progress.start(todo, len(units) + len(remote))

    def lost(item: Checkpoint, reason: str) -> None:
        summary.failed += planner.missing(item)
        summary.problems.append(f"{item.location}: {reason}")

    def all_units() -> Iterator[Unit]:
        yield from units
        for item in fetched(remote, lost):
            ledger.note(item)
            unit = planner.unit(item)
            if unit is not None:
                yield unit

    stream = run_inline(all_units(), run_unit) if jobs == 1 else run_joblib(all_units(), run_unit, jobs)
    try:
        for unit, outcomes in stream:
            if unit.checkpoint.location.startswith("hf://"):
                named = short_names(options.source, _with_model([unit.checkpoint], options))
                writer.register_checkpoints(planner.run, named)
                writer.plan(planner.identities(unit.checkpoint))
                remember(writer, hub_entry(unit.checkpoint))
            for outcome in outcomes:
                writer.record(outcome, ledger.identities[outcome.analysis_id])
                _count(summary, unit.checkpoint, outcome, ledger.names)
            progress.finished(unit.checkpoint, outcomes, ledger.names)
    finally:
        progress.stop()


class _Ledger:
    """Which analysis_id is which analyzer, for messages and for the store."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self.names: dict[str, str] = {}
        self.identities: dict[str, dict[str, Any]] = {}

    def note(self, checkpoint: Checkpoint) -> None:
        for row in self._planner.identities(checkpoint):
            self.names[row["analysis_id"]] = row["analyzer"]
            self.identities.setdefault(row["analysis_id"], row)


def _count(summary: Summary, checkpoint: Checkpoint, outcome: Outcome, names: dict[str, str]) -> None:
    if outcome.status is AnalysisStatus.OK:
        summary.ok += 1
    elif outcome.status is AnalysisStatus.NOT_APPLICABLE:
        summary.not_applicable += 1
    else:
        if outcome.status is AnalysisStatus.FAILED:
            summary.failed += 1
        else:
            summary.crashed += 1
        place = f"step {checkpoint.step}" if checkpoint.step is not None else checkpoint.location
        summary.problems.append(f"{place}: {names[outcome.analysis_id]} {outcome.status.value}: {outcome.message}")

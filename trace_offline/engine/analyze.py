"""The verb ``analyze``: find the checkpoints, plan what is missing, run it, store it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from trace_offline.analyzers.base import Scope
from trace_offline.analyzers.registry import registry
from trace_offline.checkpoints.discover import discover, select
from trace_offline.core.errors import CheckpointError, UsageError
from trace_offline.core.types import Checkpoint
from trace_offline.engine.execution import Execution, Summary, duplicate_warnings, with_model
from trace_offline.engine.fingerprints import known_fingerprints, with_fingerprints
from trace_offline.engine.options import AnalyzeOptions, choose_jobs
from trace_offline.engine.plan import Planner, default_run_name, resolve_analyzers, short_names
from trace_offline.engine.progress import Progress, Silent
from trace_offline.engine.series import SeriesPlan
from trace_offline.engine.unit import Unit, WorkSettings, model_fingerprint
from trace_offline.engine.worker import check_tokenizer_of, resolve_device
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.store.writer import Writer

__all__ = ["AnalyzeOptions", "Summary", "analyze"]


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

    def fits() -> None:
        if local is not None:
            check_tokenizer_of(Unit(local, (), settings), evaluation)

    if not Path(options.store).exists():
        fits()  # before anything is made; later only when there is something to do, for it loads transformers

    summary = Summary(run, Path(options.store), len(chosen))
    summary.set_aside = [f"{item.location}: {item.state.value}: {item.reason}" for item in found
                         if not item.state.analyzable]  # fmt: skip
    with Writer.open(Path(options.store)) as writer:
        chosen = with_fingerprints(chosen, writer, known_fingerprints(writer))
        summary.warnings = duplicate_warnings(chosen)
        _check_same_run(writer, run, options, chosen)
        writer.register_run(run, _absolute(options.source), settings.evaluation_set, options.stored())
        writer.register_evaluation_set(_evaluation_row(evaluation, settings))
        aside = [item for item in found if not item.state.analyzable]
        writer.register_checkpoints(run, short_names(options.source, [*_with_model(chosen, options), *aside]))

        done = {str(key): str(status) for key, status in writer.read("select analysis_id, status from analyses")}
        single = tuple(item for item in wanted if registry().get(item.name).scope is Scope.CHECKPOINT)
        comparing = tuple(item for item in wanted if item not in single)
        planner = Planner(run, single, settings, done, options.force)
        extracts = writer.path.with_suffix(".extracts")
        series = SeriesPlan(run, comparing, settings, extracts, done, options.force)
        known = [item for item in chosen if item.fingerprint is not None]
        writer.plan(row for item in known for row in planner.identities(item))

        def register(item: Checkpoint) -> None:
            writer.register_checkpoints(run, short_names(options.source, _with_model([item], options)))

        Execution(planner, series, writer, summary, jobs, progress, register, fits).run(chosen)
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
    return with_model(chosen, lambda value: model_fingerprint(value, options.model_factory, options.blocks))


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

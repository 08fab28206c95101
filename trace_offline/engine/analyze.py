"""The verb ``analyze``: find the checkpoints, plan what is missing, run it, store it."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from trace_offline.analyzers.base import Scope
from trace_offline.analyzers.registry import registry
from trace_offline.checkpoints.discover import discover, select
from trace_offline.core.beside import beside
from trace_offline.core.errors import CheckpointError, UsageError
from trace_offline.core.types import Checkpoint
from trace_offline.engine.board import Board
from trace_offline.engine.cache import DEFAULT_SIZE, cache_folder, parse_size
from trace_offline.engine.download_rules import DownloadRules
from trace_offline.engine.execution import Execution, Summary, Workforce, duplicate_warnings
from trace_offline.engine.executors import started_early
from trace_offline.engine.fingerprints import known_fingerprints, with_fingerprints
from trace_offline.engine.fit import check_fit
from trace_offline.engine.heldout import check_used, load_heldout, with_heldout
from trace_offline.engine.interrupt import StopRequest
from trace_offline.engine.options import LATER, ONLY, AnalyzeOptions, Shard, choose_device, choose_jobs, factory_digest
from trace_offline.engine.plan import Planner, default_run_name, resolve_analyzers, short_names
from trace_offline.engine.progress import Progress, Silent
from trace_offline.engine.remarks import remark_warnings, replaced_steps, replaced_text
from trace_offline.engine.removed import removed_since
from trace_offline.engine.series import SeriesPlan
from trace_offline.engine.unit import Unit, WorkSettings
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.store.rows import checkpoint_id
from trace_offline.store.writer import Writer

__all__ = ["AnalyzeOptions", "NothingSelected", "Summary", "analyze"]


class NothingSelected(UsageError):
    """There are checkpoints, but none of those that were asked for."""


def analyze(options: AnalyzeOptions, progress: Progress | None = None, stop: StopRequest | None = None) -> Summary:
    """Bring the store up to date with the source. Doing it twice is a no-op.

    Raises TraceOfflineError (UsageError, CheckpointError, EvaluationSetError, StoreError) for input that cannot be
    used; what fails on single checkpoints is recorded in the store and counted in the summary. ``stop``: once
    requested, units under way are finished and nothing new is begun.
    """
    started = time.monotonic()
    progress = progress or Silent()
    options.check()
    wanted = resolve_analyzers(registry(), options.analyzers, options.params)
    if not options.rotating or options.compare == LATER:  # watch asks for all that it was asked for, then compares
        check_used(registry(), options, wanted)
    evaluation = EvaluationSet.load(options.evaluation_set)
    heldout = None if options.heldout_set is None else load_heldout(options.heldout_set, evaluation)
    wanted = with_heldout(registry(), wanted, heldout)
    single = tuple(item for item in wanted if registry().get(item.name).scope is Scope.CHECKPOINT)
    comparing = tuple(item for item in wanted if item not in single)
    found = discover(options.source, revisions=options.revisions)
    usable = _usable(found, options)
    # A comparison means the whole series: its first and last checkpoint are not those of a selection.
    needed = usable if comparing else _selected(usable, options)
    run = options.run or default_run_name(options.source)

    placement = choose_device(options)
    cache = cache_folder(options.cache, options.cache_size, Path(options.store))
    jobs, threads = choose_jobs(options.jobs, len(placement.gpus), max(item.size_bytes for item in usable))
    executor = options.executor or ("inline" if jobs == 1 and options.timeout is None else "joblib")
    settings = WorkSettings(
        evaluation_set=str(Path(options.evaluation_set).absolute()),
        evaluation_hash=evaluation.hash,
        device=placement.inline if executor == "inline" else placement.device,
        dtype=options.dtype,
        seed=options.seed,
        threads=threads,
        model_factory=options.model_factory,
        blocks=options.blocks,
        tokenizer=options.tokenizer,
        trust_remote_code=options.trust_remote_code,
        factory_digest=factory_digest(options.model_factory),
        heldout_set=None if heldout is None else str(Path(heldout.folder).absolute()),
        heldout_hash=None if heldout is None else heldout.hash,
        board=str(Board.of(Path(options.store).absolute()).folder),
        cache=None if cache is None else str(cache),
        cache_bytes=parse_size(options.cache_size or DEFAULT_SIZE),
    )
    fresh = not Path(options.store).exists()
    with ExitStack() as stack:

        def check() -> None:
            """Called when there is something to do: reading a tokenizer loads transformers."""
            local = next((item for item in needed if item.layout != "hub"), None)
            first = partial(check_fit, None if local is None else Unit(local, (), settings))
            if executor == "joblib":
                stack.enter_context(started_early(jobs, placement.gpus, first))
            else:
                first()

        if fresh:
            check()  # before anything is made
        writer = stack.enter_context(Writer.open(Path(options.store)))
        needed, stamps, unreadable = with_fingerprints(needed, writer, known_fingerprints(writer))
        if not needed:
            raise CheckpointError(f"No checkpoint in {options.source} can be read: {unreadable[0].reason}")
        replaced = _check_same_run(writer, run, options, needed)
        done = {str(key): str(status) for key, status in writer.read("select analysis_id, status from analyses")}
        planner = Planner(run, single, settings, done, options.force, stamps)
        series = SeriesPlan(run, comparing, settings, beside(writer.path, ".extracts"), done, options.force)
        chosen = _selected(needed, options, later=options.rotating and bool(comparing))
        if options.shard is not None:
            needed, chosen = _share(needed, chosen, options.shard)
        removed = removed_since(writer, run, needed) if options.rotating and comparing else []
        if not fresh and (series.pending(needed) or any(planner.missing(item) for item in chosen)):
            check()

        writer.register_run(run, _absolute(options.source), evaluation.hash, options.stored(), _model_type(needed))
        sets = [item for item in (evaluation, heldout) if item is not None]
        names = [writer.register_evaluation_set(_evaluation_row(item)) for item in sets]
        aside = [item for item in found if not item.state.analyzable] + unreadable
        writer.register_checkpoints(run, short_names(options.source, [*needed, *aside]), everything=True)
        writer.plan(row for item in chosen if item.fingerprint for row in planner.identities(item))

        summary = Summary(run, Path(options.store), len(needed if comparing else chosen))
        summary.set_aside = [f"{item.location}: {item.state.value}: {item.reason}" for item in aside]
        summary.warnings = [*replaced, *duplicate_warnings(needed), *remark_warnings(needed)]
        for item, name in zip(sets, names, strict=True):
            if name != item.name:
                summary.warnings.append(
                    f'another evaluation set of this store is called "{item.name}"; this one is "{name}" in history.'
                )

        def register(item: Checkpoint) -> None:
            writer.register_checkpoints(run, short_names(options.source, [item]))

        if options.shard is not None and comparing:
            summary.warnings.append(
                f"{', '.join(item.name for item in comparing)} compare the whole series: this shard only extracts. "
                "Merge the shards, then run the same command without --shard on the merged store."
            )
        workers = Workforce(
            executor,
            jobs,
            Board.of(writer.path),
            options.timeout,
            options.scheduler,
            placement.gpus,
        )
        Execution(
            planner, series, writer, summary, workers, progress, register, stop or StopRequest(),
            compare=options.shard is None and options.compare != LATER, rotating=options.rotating,
            measure=options.compare != ONLY, removed=removed,
            rules=DownloadRules(
                options.hub_disk_limit, bool(options.remove_downloads), beside(writer.path, ".downloads.json")
            ),
        ).run(chosen, needed)  # fmt: skip
    summary.seconds = time.monotonic() - started
    return summary


def _usable(found: list[Checkpoint], options: AnalyzeOptions) -> list[Checkpoint]:
    usable = select(found)
    if not usable:
        reasons = "; ".join(f"{item.location}: {item.state.value}: {item.reason}" for item in found[:5])
        raise CheckpointError(f"No checkpoint in {options.source} can be analyzed. Found {len(found)}: {reasons}")
    return usable


def _selected(usable: list[Checkpoint], options: AnalyzeOptions, *, later: bool = False) -> list[Checkpoint]:
    """Those that were asked for. ``later``: they may still come. Raises NothingSelected."""
    if options.steps is None:
        return usable if options.among is None else _among(usable, options, options.among)
    steps = options.steps
    chosen = [item for item in usable if item.step is not None and item.step in steps]
    if not chosen and not later:
        there = ", ".join(str(item.step) for item in usable[:20])
        raise NothingSelected(f"--steps selects none of the checkpoints in {options.source}; there are steps {there}.")
    return chosen


def _among(usable: list[Checkpoint], options: AnalyzeOptions, among: frozenset[str]) -> list[Checkpoint]:
    # One without a step is the whole series, and its identity says only where it lay.
    run = options.run or default_run_name(options.source)
    chosen = [item for item in usable if item.step is None or checkpoint_id(run, item) in among]
    if not chosen:
        raise NothingSelected(
            f'None of the checkpoints at which run "{run}" was measured is in {options.source} any more. Say where '
            "they are with --source, choose others with --steps, or use analyze."
        )
    return chosen


def _share(
    needed: list[Checkpoint], chosen: list[Checkpoint], shard: Shard
) -> tuple[list[Checkpoint], list[Checkpoint]]:
    """The part of a shard in both: the chosen ones are dealt out first, so that every shard has its share of them."""
    first = {id(item) for item in chosen}
    dealt = [*chosen, *(item for item in needed if id(item) not in first)]
    mine = {id(item) for item in dealt[shard.index - 1 :: shard.count]}
    return [item for item in needed if id(item) in mine], [item for item in chosen if id(item) in mine]


def _absolute(source: str) -> str:
    return source if source.startswith("hf://") else os.path.abspath(source)


def _model_type(chosen: list[Checkpoint]) -> str | None:
    """``gpt_neox``, ``llama``, … as the first configuration on this disk says; None without one."""
    config = next((item.config for item in chosen if item.config is not None), None)
    if config is None:
        return None
    try:
        return str(json.loads(Path(config).read_text(encoding="utf-8")).get("model_type") or "") or None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config} cannot be read as JSON: {error}.") from None


def _check_same_run(writer: Writer, run: str, options: AnalyzeOptions, chosen: list[Checkpoint]) -> list[str]:
    """Two different series must not share one run name; a moved folder may. What is accepted with a warning.

    Step 0 proves nothing: runs that differ in their data alone begin with the same weights.
    """
    known = writer.read("select source from runs where run = ?", [run])
    if not known:
        return []
    stored = dict(
        writer.read(
            "select step, fingerprint from checkpoints where run = ? and state in ('complete', 'duplicate')", [run]
        )
    )
    if known[0][0] == _absolute(options.source):
        return _replaced(run, options, replaced_steps(chosen, stored))
    common = [item for item in chosen if item.fingerprint is not None and stored.get(item.step) is not None]
    differing = [item for item in common if stored[item.step] != item.fingerprint]
    same = [item for item in common if item not in differing and item.step != 0]
    still_there = known[0][0].startswith("hf://") or os.path.exists(known[0][0])
    if differing or (still_there and not same):
        why = f"with other weights at step {differing[0].step}" if differing else "and shares no later step with it"
        raise UsageError(
            f'The store already has a run "{run}", from {known[0][0]}, {why}. '
            "Give this series a name of its own with --run NAME."
        )
    return []


def _replaced(run: str, options: AnalyzeOptions, steps: list[int]) -> list[str]:
    """Another training into the same folder would leave two trainings in one history.

    Whoever names the run says that it is the same one; a training that resumes from an earlier checkpoint writes the
    later ones again while it is watched.
    """
    if not steps:
        return []
    text = replaced_text(run, steps)
    if not options.rotating and (options.run is None if options.named is None else not options.named):
        raise UsageError(
            f"{options.source}: {text}. If this is another training, give it a history of its own with --run NAME, "
            "another name. If it is the same one, whose weights were replaced on purpose (by a training that resumed "
            f'from an earlier step), say so with --run "{run}": only these steps are measured again.'
        )
    return [
        f"{text}. What the store has of other steps stays the latest word on them; if this is another training, give "
        "it a history of its own with --run NAME."
    ]


def _evaluation_row(evaluation: EvaluationSet) -> dict[str, Any]:
    return {
        "hash": evaluation.hash,
        "name": evaluation.name,
        "path": str(Path(evaluation.folder).absolute()),
        "n_examples": evaluation.n_examples,
        "n_tokens": evaluation.n_tokens,
        "tokenizer_hash": evaluation.tokenizer_hash,
        "objective": evaluation.objective,
        "source": evaluation.source,
        "licence": evaluation.licence,
    }

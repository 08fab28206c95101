"""The body of one unit of work. It never raises: everything that goes wrong becomes an outcome with its reason."""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_offline.core.errors import CheckpointError, NotApplicable, TraceOfflineError
from trace_offline.core.types import AnalysisStatus, Array, Artifact, Measurement, Outcome
from trace_offline.engine.beside import in_two_lanes
from trace_offline.engine.board import Reporter, reporter
from trace_offline.engine.cache import UnitActivations
from trace_offline.engine.devices import check_tf32, device_facts, has_gpu, open_device, resolve_device
from trace_offline.engine.extracts import save_extract
from trace_offline.engine.fit import check_tokenizer_of, check_vocabulary, evaluation_set
from trace_offline.engine.progress import name_of
from trace_offline.engine.shared_pass import collect, once_more
from trace_offline.engine.unit import AnalysisRequest, Unit, file_stamps
from trace_offline.engine.watchdog import LOADING, STARTING

_BAR = "/"
_OF_HIDDEN = frozenset({"hidden_states", "labels"})
"""What an analysis may need and still be served from the activation cache (values of ``Need``)."""


@dataclass
class _Job:
    """One analysis on its way: its analyzer, context, and how it ended if it already has.

    ``notes`` go to the summary of the run, ``remarks`` into the store with the analysis.
    """

    request: AnalysisRequest
    analyzer: Any = None
    context: Any = None
    outcome: Outcome | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def run_unit(unit: Unit) -> list[Outcome]:
    """Load the checkpoint once, run one pass, let every analyzer measure; one outcome for each request."""
    jobs = [_Job(request) for request in unit.requests]
    device = unit.settings.device
    report = _listening[-1] if _listening else reporter(unit.settings.board)
    versions = library_versions()
    try:
        report.tell(unit.key, name_of(unit.checkpoint), STARTING, (job.request.analysis_id for job in jobs))
        limit_threads(unit.settings.threads)
        device = resolve_device(unit.settings.device)
        check_tf32(unit.settings.dtype, device)
        open_device(device)
        versions = {**versions, **device_facts(device)}
        _measure_all(unit, jobs, device, versions, report)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        for job in jobs:
            if job.outcome is None:
                job.outcome = ended(job.request.analysis_id, error, device)
    finally:
        report.rest()
    return [_stamp(job, versions, device) for job in jobs]


_listening: list[Reporter] = []


@contextmanager
def reporting(listener: Reporter) -> Iterator[None]:
    """What this process does is told to ``listener`` instead of the board of the unit."""
    _listening.append(listener)
    try:
        yield
    finally:
        _listening.pop()


def limit_threads(threads: int) -> None:
    """Let torch and the BLAS libraries use so many threads; the last digit of a sum can depend on it.

    And let float32 be float32 on a GPU, too.
    """
    import torch
    from threadpoolctl import threadpool_limits

    from trace_offline.activations.precision import true_float32

    torch.set_num_threads(threads)
    threadpool_limits(threads)
    true_float32()


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that can change a number; stored with every analysis."""
    from importlib.metadata import version

    names = ("trace-offline", "torch", "transformers", "numpy", "scipy", "scikit-learn")
    return {name: version(name) for name in names}


@functools.cache
def _model_cache() -> Any:
    from trace_offline.checkpoints.loading import ModelCache

    return ModelCache()


def _measure_all(unit: Unit, jobs: list[_Job], device: str, versions: dict[str, str], report: Reporter) -> None:
    from trace_offline.analyzers.base import Context, Need
    from trace_offline.analyzers.registry import registry
    from trace_offline.checkpoints.loading import load_model

    settings = unit.settings
    key, place = unit.key, name_of(unit.checkpoint)
    report.tell(key, place, LOADING, (job.request.analysis_id for job in jobs))
    evaluation = evaluation_set(settings.evaluation_set, settings.evaluation_hash)
    check_tokenizer_of(unit, evaluation)
    _refuse_changed(unit)

    def load() -> Any:
        loaded = load_model(
            unit.checkpoint,
            device=device,
            dtype=settings.dtype,
            model_factory=settings.model_factory,
            blocks=settings.blocks,
            trust_remote_code=settings.trust_remote_code,
            cache=_model_cache(),
        )
        _refuse_changed(unit)
        check_vocabulary(loaded, evaluation, unit.checkpoint.location)
        return loaded

    activations = UnitActivations.of(unit, device)
    jobs[0].notes = activations.notes
    model = activations.model(load, hidden_only=all(_needs(request) <= _OF_HIDDEN for request in unit.requests))
    texts = evaluation.originals()

    def prepare() -> dict[str, Any]:
        collectors: dict[str, Any] = {}
        for job in jobs:
            if job.outcome is not None:
                continue
            started = time.perf_counter()
            try:
                kind = registry().get(job.request.analyzer)
                job.analyzer = kind()
                params = kind.Params.model_validate(dict(job.request.params))
                heldout = _heldout(unit, model) if Need.HELDOUT in kind.needs else None
                seen = evaluation if Need.PAIRS in kind.needs else texts
                job.context = Context(model, seen, params, settings.seed, step=unit.checkpoint.step, heldout=heldout)
                for name, collector in job.analyzer.collectors(job.context).items():
                    collectors[f"{job.request.analyzer}{_BAR}{name}"] = collector
            except BaseException as error:
                job.outcome = ended(job.request.analysis_id, error, device)
            job.seconds += time.perf_counter() - started
        report.tell(key, place, "forward pass", (job.request.analysis_id for job in jobs if job.outcome is None))
        return {name: each for name, each in collectors.items() if not _over(jobs, name)}

    def run(collectors: Mapping[str, Any], rows_at_most: int | None) -> Mapping[str, BaseException]:
        of_pairs = {job.request.analyzer for job in jobs if job.context and job.context.evaluation is not texts}
        return _run_passes(activations, model, texts, evaluation, collectors, of_pairs, rows_at_most)

    before, started = sum(job.seconds for job in jobs), time.perf_counter()
    found = collect(prepare, run)
    listening = {_owner(name) for name in found.collectors}
    taken = time.perf_counter() - started - (sum(job.seconds for job in jobs) - before)
    if found.remark is not None:
        activations.notes.append(found.remark)
    for job in jobs:
        if found.remark is not None and job.request.analyzer in listening:
            job.remarks.append(found.remark)
        for name, fault in found.broken.items():
            if job.request.analyzer == _owner(name) and job.outcome is None:
                job.outcome = ended(job.request.analysis_id, fault, device)

    own = {id(job): _own_collectors(job, found.collectors) for job in jobs if job.outcome is None}

    def work(job: _Job) -> None:
        _measure(job, own.pop(id(job)), taken / max(1, len(listening)), device)
        report.keep(_stamp(job, versions, device))

    def tell(job: _Job, others: Sequence[_Job]) -> None:
        report.tell(key, place, job.request.analyzer, (item.request.analysis_id for item in (job, *others)))

    # First what needs no device: what those gathered, often only sums, is gone before the others take their memory.
    todo = sorted((job for job in jobs if job.outcome is None), key=lambda job: not type(job.analyzer).on_host)
    beside = [job for job in todo if has_gpu(device) and type(job.analyzer).on_host]
    in_two_lanes(
        [job for job in todo if job not in beside], beside, work, tell, lambda: limit_threads(settings.threads)
    )


def _run_passes(
    activations: UnitActivations,
    model: Any,
    texts: Any,
    evaluation: Any,
    collectors: Mapping[str, Any],
    of_pairs: set[str],
    rows_at_most: int | None,
) -> Mapping[str, BaseException]:
    """All collectors see the texts, those of the analyzers ``of_pairs`` then the changed members of minimal pairs."""
    from trace_offline.activations.forward import run_pass

    broken: dict[str, BaseException] = dict(activations.run_pass(model, texts, collectors, rows_at_most))
    rest = {name: each for name, each in collectors.items() if _owner(name) in of_pairs and name not in broken}
    if rest and evaluation.n_examples > texts.n_examples:
        broken |= run_pass(model, evaluation, rest, first_row=texts.n_examples, rows_at_most=rows_at_most)
    return broken


def _refuse_changed(unit: Unit) -> None:
    if unit.stamps and file_stamps(unit.checkpoint) != unit.stamps:
        raise CheckpointError(
            f"{unit.checkpoint.location} changed after the run began; what is there now is another checkpoint. "
            "Run the same command again."
        )


def _needs(request: AnalysisRequest) -> frozenset[str]:
    """What must be computed for an analyzer; all there is when it cannot be had, which is reported with its job."""
    from trace_offline.analyzers.base import Need
    from trace_offline.analyzers.registry import registry

    try:
        return frozenset(registry().get(request.analyzer).needs)
    except TraceOfflineError:
        return frozenset(Need)


def _owner(name: str) -> str:
    return name.split(_BAR, 1)[0]


def _over(jobs: list[_Job], name: str) -> bool:
    return any(job.request.analyzer == _owner(name) and job.outcome is not None for job in jobs)


def _own_collectors(job: _Job, collectors: dict[str, Any]) -> dict[str, Any]:
    """Taken out, so that what they hold is gone before the next analyzer measures."""
    return {n.split(_BAR, 1)[1]: collectors.pop(n) for n in list(collectors) if _owner(n) == job.request.analyzer}


def _measure(job: _Job, own: dict[str, Any], shared_seconds: float, device: str) -> None:
    started = time.perf_counter()
    try:
        # What was collected is used up by a first attempt.
        told = len(job.remarks)
        job.outcome = once_more(lambda: _result(job, own), job.request.analyzer, job.remarks, repeatable=not own)
        job.notes += job.remarks[told:]
        job.seconds += shared_seconds if own else 0.0
    except BaseException as error:
        job.outcome = ended(job.request.analysis_id, error, device)
    finally:
        job.seconds += time.perf_counter() - started
        # The table of hidden states goes before the next analyzer measures.
        if job.context is not None:
            job.context.collected = {}


def _result(job: _Job, own: Mapping[str, Any]) -> Outcome:
    job.context.collected = {name: collector.finish() for name, collector in own.items()}
    if job.request.extract_to is not None:
        save_extract(job.analyzer.extract(job.context), Path(job.request.extract_to))
        return Outcome(job.request.analysis_id, AnalysisStatus.OK)
    measurements, arrays, artifacts = [], [], []
    for item in job.analyzer.measure(job.context):
        if isinstance(item, Measurement):
            measurements.append(item)
        elif isinstance(item, Array):
            arrays.append(item)
        elif isinstance(item, Artifact):
            artifacts.append(item)
        else:
            raise TypeError(
                f"{job.request.analyzer} yielded {type(item).__name__}; expected Measurement, Array or Artifact"
            )
    if not measurements and not arrays:
        raise NotApplicable(f"{job.request.analyzer} found nothing to measure in this evaluation set.")
    return Outcome(
        job.request.analysis_id,
        AnalysisStatus.OK,
        reasons(measurements),
        measurements=tuple(measurements),
        arrays=tuple(arrays),
        artifacts=tuple(artifacts),
    )


def reasons(measurements: list[Measurement]) -> str | None:
    """Why some numbers of a successful analysis are NULL: each distinct reason once, with how often it occurred."""
    counts: dict[str, int] = {}
    for item in measurements:
        if item.value is None:
            reason = item.reason or "no reason given"
            counts[reason] = counts.get(reason, 0) + 1
    if not counts:
        return None
    return "; ".join(f"{reason} ({count}×)" for reason, count in counts.items())


def ended(key: str, error: BaseException, device: str, seconds: float = 0.0) -> Outcome:
    """An exception as the outcome of an analysis. Only a user's interrupt goes on its way."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, NotApplicable):
        return Outcome(key, AnalysisStatus.NOT_APPLICABLE, error.message, seconds, device)
    if isinstance(error, RuntimeError):
        from trace_offline.activations.batch_size import too_small
        from trace_offline.activations.memory import ran_out

        error = too_small("this checkpoint", error) if ran_out(error) else error
    if isinstance(error, TraceOfflineError):
        return Outcome(key, AnalysisStatus.FAILED, error.message, seconds, device)
    text = "".join(traceback.format_exception(error)[-4:]).strip()
    message = f"{type(error).__name__}: {error}"
    return Outcome(key, AnalysisStatus.FAILED, message, seconds, device, detail={"traceback": text})


def _stamp(job: _Job, versions: dict[str, str], device: str) -> Outcome:
    import dataclasses

    outcome = job.outcome
    if outcome is None:
        outcome = Outcome(job.request.analysis_id, AnalysisStatus.FAILED, "the analysis ended without an outcome")
    detail = {**outcome.detail, "notes": job.notes} if job.notes else outcome.detail
    message = outcome.message
    if job.remarks and outcome.status is AnalysisStatus.OK:
        message = "; ".join([*job.remarks, *([message] if message else [])])
    return dataclasses.replace(
        outcome, message=message, versions=versions, seconds=job.seconds, device=device.split(":")[0], detail=detail
    )


def _heldout(unit: Unit, model: Any) -> Any:
    """The second evaluation set, checked against this checkpoint; None when the run has none."""
    settings = unit.settings
    if settings.heldout_set is None or settings.heldout_hash is None:
        return None
    heldout = evaluation_set(settings.heldout_set, settings.heldout_hash)
    check_tokenizer_of(unit, heldout)
    check_vocabulary(model, heldout, unit.checkpoint.location)
    return heldout.originals()

"""Running units: in this process, or over processes by joblib, with a killed worker costing one analysis only."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from trace_offline.core.types import AnalysisStatus, Outcome
from trace_offline.engine.unit import Unit

Finished = tuple[Unit, list[Outcome]]
Body = Callable[[Unit], list[Outcome]]
T = TypeVar("T")


def run_inline(units: Iterable[Unit], body: Body) -> Iterator[Finished]:
    """One unit after another in this process."""
    for unit in units:
        yield unit, body(unit)


def run_joblib(units: Iterable[Unit], body: Body, jobs: int) -> Iterator[Finished]:
    """Units over ``jobs`` worker processes (joblib, loky), yielded as they finish.

    When a worker dies joblib cannot say which task killed it and drops the pool. The units that were under way (at
    most ``jobs`` + those waiting) are run again one analysis at a time, each alone; an analysis that kills its worker
    again is recorded as crashed and everything else goes on.
    """
    source = iter(units)
    under_way: dict[str, Unit] = {}

    def tasks() -> Iterator[Any]:
        from joblib import delayed

        for unit in source:
            under_way[unit.key] = unit
            yield delayed(_keyed)(body, unit)

    while True:
        try:
            for key, outcomes in _parallel(tasks(), jobs):
                yield under_way.pop(key), outcomes
            return
        except BrokenProcessPool:
            suspects = list(under_way.values())
            under_way.clear()
        for unit in suspects:
            yield unit, list(_alone(unit, body, jobs))


def run_alone(body: Callable[[T], list[Outcome]], task: T, jobs: int) -> list[Outcome]:
    """One task: here when ``jobs`` is 1, else in a worker process, whose death raises BrokenProcessPool."""
    if jobs == 1:
        return body(task)
    from joblib import delayed

    ((_, outcomes),) = list(_parallel(iter([delayed(_named)(body, task)]), jobs))
    return outcomes


def _named(body: Callable[[T], list[Outcome]], task: T) -> tuple[str, list[Outcome]]:
    return "", body(task)


def _parallel(tasks: Iterator[Any], jobs: int) -> Iterator[tuple[str, list[Outcome]]]:
    from joblib import Parallel

    parallel = Parallel(
        # One process would be this one: loky needs two to give isolation.
        n_jobs=max(2, jobs),
        backend="loky",
        return_as="generator_unordered",
        pre_dispatch=jobs,
        batch_size=1,
        initializer=_end_with,
        initargs=(os.getpid(),),
    )
    with warnings.catch_warnings():
        # A generator closed early (an interrupt) warns about the tasks it cancels; that is what was asked for.
        warnings.filterwarnings("ignore", category=UserWarning, module="joblib")
        yield from parallel(tasks)


def _end_with(parent: int) -> None:
    """A worker whose parent was killed must not go on computing beside the run that takes over."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if os.getppid() == parent:
        threading.Thread(target=watch, daemon=True).start()


def _keyed(body: Body, unit: Unit) -> tuple[str, list[Outcome]]:
    return unit.key, body(unit)


def _alone(unit: Unit, body: Body, jobs: int) -> Iterator[Outcome]:
    from joblib import delayed

    for request in unit.requests:
        single = dataclasses.replace(unit, requests=(request,))
        try:
            for _, outcomes in _parallel(iter([delayed(_keyed)(body, single)]), jobs):
                yield from outcomes
        except BrokenProcessPool as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else "killed"
            yield Outcome(
                request.analysis_id,
                AnalysisStatus.CRASHED,
                f"The worker process died while {request.analyzer} ran alone on this checkpoint "
                f"({reason}). Out of memory is the usual cause: try a smaller evaluation set, --jobs 1, or smaller "
                "parameters of this analyzer.",
            )

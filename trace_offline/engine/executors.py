"""Running units: in this process, or over processes by joblib, with a killed worker costing one analysis only."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trace_offline.core.types import AnalysisStatus, Outcome
from trace_offline.engine.board import Board
from trace_offline.engine.devices import Slots
from trace_offline.engine.unit import AnalysisRequest, Unit, Wait
from trace_offline.engine.watchdog import Watchdog

Finished = tuple[Unit, list[Outcome]]
Body = Callable[[Unit], list[Outcome]]
T = TypeVar("T")

_NAP_SECONDS = 0.1

_OUT_OF_MEMORY = (
    "Out of memory is the usual cause: try a smaller evaluation set, --jobs 1, or smaller parameters of this analyzer."
)


def run_inline(units: Iterable[Unit | Wait], body: Body) -> Iterator[Finished]:
    """One unit after another in this process."""
    for unit in units:
        if isinstance(unit, Wait):
            time.sleep(_NAP_SECONDS)
        else:
            yield unit, body(unit)


def run_joblib(
    units: Iterable[Unit | Wait],
    body: Body,
    jobs: int,
    board: Board | None = None,
    timeout: float | None = None,
    gpus: tuple[str, ...] = (),
) -> Iterator[Finished]:
    """Units over ``jobs`` worker processes (joblib, loky), yielded as they finish; each bound to one of ``gpus``.

    When a worker dies joblib cannot say which task killed it and drops the pool. Of the units that were under way (at
    most ``jobs``), what was finished is taken from the board, what was at stake runs again, each analysis alone, and
    the rest goes back into the queue. An analysis that kills its worker again, or that takes longer than ``timeout``
    seconds, is recorded as crashed and everything else goes on.
    """
    return _Pool(iter(units), body, jobs, board, timeout, gpus).run()


@dataclass
class _Pool:
    source: Iterator[Unit | Wait]
    body: Body
    jobs: int
    board: Board | None
    timeout: float | None
    gpus: tuple[str, ...] = ()
    under_way: dict[str, Unit] = field(default_factory=dict)
    again: deque[Unit] = field(default_factory=deque)

    def run(self) -> Iterator[Finished]:
        while True:
            watchdog = Watchdog(self.board, self.timeout)
            try:
                with watchdog:
                    for key, outcomes in _parallel(self._tasks(), self.jobs, self.gpus):
                        if key:
                            yield self.under_way.pop(key), outcomes
                return
            except BrokenProcessPool:
                suspects = list(self.under_way.values())
                self.under_way.clear()
            doing = {} if self.board is None else {item.unit: item.analyses for item in self.board.read()}
            for unit in suspects:
                yield from self._settle(unit, doing.get(unit.key), watchdog.hung)

    def _tasks(self) -> Iterator[Any]:
        from joblib import delayed

        while True:
            unit = self.again.popleft() if self.again else next(self.source, None)
            if unit is None:
                return
            if isinstance(unit, Wait):
                # joblib asks for tasks under a lock that it needs to give us results: the worker waits, not the source.
                yield delayed(_nap)()
                continue
            self.under_way[unit.key] = unit
            yield delayed(_keyed)(self.body, unit)

    def _settle(self, unit: Unit, stake: tuple[str, ...] | None, hung: dict[str, str]) -> Iterator[Finished]:
        """What becomes of a unit whose pool broke. ``stake``: what its worker was at; None when nobody knows."""
        finished = [] if self.board is None else self.board.kept(item.analysis_id for item in unit.requests)
        kept = {outcome.analysis_id for outcome in finished}  # one may end just when its time is over
        finished += [
            Outcome(item.analysis_id, AnalysisStatus.CRASHED, f"{item.analyzer} {hung[item.analysis_id]}")
            for item in unit.requests
            if item.analysis_id in hung and item.analysis_id not in kept
        ]
        if finished:
            yield unit, finished
        over = {outcome.analysis_id for outcome in finished}
        left = [item for item in unit.requests if item.analysis_id not in over]
        suspects = [item for item in left if stake is None or item.analysis_id in stake]
        for request in suspects:
            yield unit, [self._alone(unit, request)]
        rest = tuple(item for item in left if item not in suspects)
        if rest:
            self.again.append(dataclasses.replace(unit, requests=rest))

    def _alone(self, unit: Unit, request: AnalysisRequest) -> Outcome:
        from joblib import delayed

        single = dataclasses.replace(unit, requests=(request,))
        watchdog = Watchdog(self.board, self.timeout)
        try:
            with watchdog:
                ((_, (outcome,)),) = list(_parallel(iter([delayed(_keyed)(self.body, single)]), self.jobs, self.gpus))
                return outcome
        except BrokenProcessPool as error:
            if request.analysis_id in watchdog.hung:
                text = f"{request.analyzer} {watchdog.hung[request.analysis_id]}"
            else:
                reason = str(error).strip().splitlines()[-1] if str(error).strip() else "killed"
                text = (
                    f"The worker process died while {request.analyzer} ran alone on this checkpoint ({reason}). "
                    f"{_OUT_OF_MEMORY}"
                )
            return Outcome(request.analysis_id, AnalysisStatus.CRASHED, text)


def run_alone(
    body: Callable[[T], list[Outcome]], task: T, jobs: int, board: Board | None = None, timeout: float | None = None
) -> list[Outcome]:
    """One task: here when ``jobs`` is 1 and nothing limits its time, else in a worker process.

    Raises BrokenProcessPool when the worker dies twice, or is ended after ``timeout`` seconds.
    """
    if jobs == 1 and timeout is None:
        return body(task)
    from joblib import delayed

    for last in (False, True):
        watchdog = Watchdog(board, timeout)
        try:
            with watchdog:
                ((_, outcomes),) = list(_parallel(iter([delayed(_named)(body, task)]), jobs))
                return outcomes
        except BrokenProcessPool:
            if watchdog.hung:
                raise BrokenProcessPool(next(iter(watchdog.hung.values()))) from None
            if last:
                raise
    raise AssertionError("the second attempt returns or raises")


def _named(body: Callable[[T], list[Outcome]], task: T) -> tuple[str, list[Outcome]]:
    return "", body(task)


@dataclass
class _Kept:
    """The worker processes that joblib keeps for this process, from one pool to the next.

    ``early``: what they are at since before there was work for them.
    """

    started: bool = False
    early: Generator[Any, None, None] | None = None

    def take_early(self) -> Generator[Any, None, None] | None:
        """Once."""
        early, self.early = self.early, None
        return early


_kept = _Kept()


@contextmanager
def started_early(jobs: int, gpus: tuple[str, ...], first: Callable[[], None]) -> Iterator[None]:
    """Inside, workers import their libraries, which takes seconds, while this process plans; one did ``first`` before.

    Raises what ``first`` raises. What goes wrong before they have work ends them at once: the user waits for an error
    message, not for workers.
    """
    from joblib import delayed

    tasks = (delayed(_import)(first if number == 0 else None) for number in range(jobs))
    _kept.early = results = _pool(jobs, gpus, in_order=True)(tasks)
    try:
        with suppress(BrokenProcessPool):  # one that dies at its start is replaced with the pool
            next(results)
        yield
    finally:
        if _kept.take_early() is not None:  # nobody came to use them
            with _unwarned():
                results.close()
            end_workers()


def _import(then: Callable[[], None] | None) -> None:
    import torch  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    import trace_offline.engine.worker  # noqa: F401
    from trace_offline.analyzers.registry import registry

    registry()
    if then is not None:
        then()


def end_workers() -> None:
    """Kill the workers of this process, which have nothing to do any more: to let them tidy up would take seconds."""
    from joblib.externals.loky import get_reusable_executor

    if _kept.started:
        _kept.started = False
        get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


def _wait_for_early() -> None:
    with suppress(BrokenProcessPool):
        for _ in _kept.take_early() or ():
            pass


def _parallel(tasks: Iterator[Any], jobs: int, gpus: tuple[str, ...] = ()) -> Iterator[tuple[str, list[Outcome]]]:
    _wait_for_early()
    parallel = _pool(jobs, gpus)
    with _unwarned():
        yield from parallel(tasks)


@contextmanager
def _unwarned() -> Iterator[None]:
    """A generator closed early (an interrupt) warns about the tasks it cancels; that is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="joblib")
        yield


def _pool(jobs: int, gpus: tuple[str, ...], *, in_order: bool = False) -> Any:
    from joblib import Parallel

    _kept.started = True
    return Parallel(
        # One process would be this one: loky needs two to give isolation.
        n_jobs=max(2, jobs),
        backend="loky",
        return_as="generator" if in_order else "generator_unordered",
        pre_dispatch=jobs,
        batch_size=1,
        initializer=_belong_to,
        initargs=(os.getpid(), Slots.of(gpus, jobs)),
    )


def _belong_to(parent: int, slots: Slots | None = None) -> None:
    """In a worker: Ctrl-C is for the parent to handle, nothing is computed for a parent that was killed, one GPU."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if os.getppid() == parent:
        threading.Thread(target=watch, daemon=True).start()
    if slots is not None:
        slots.bind()


def _nap() -> tuple[str, list[Outcome]]:
    time.sleep(_NAP_SECONDS)
    return "", []


def _keyed(body: Body, unit: Unit) -> tuple[str, list[Outcome]]:
    return unit.key, body(unit)

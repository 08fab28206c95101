"""Running units as Dask futures, on any ``distributed`` scheduler (optional extra ``dask``).

Futures, not joblib's Dask backend: that one waits for ever for a task that always kills its worker.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from trace_offline.core.errors import UsageError
from trace_offline.core.types import AnalysisStatus, Outcome
from trace_offline.engine import worker
from trace_offline.engine.board import Board, reporter
from trace_offline.engine.unit import Unit, Wait
from trace_offline.engine.watchdog import LOADING, limit_of

TOPIC = "trace-offline"
_LOOK_SECONDS = 0.05
_CONNECT_SECONDS = 20

# A worker process with several threads still analyzes one checkpoint at a time: the model and torch's settings are
# shared by the whole process.
_ONE_AT_A_TIME = threading.Lock()


class _Events:
    """In a Dask worker: says what it does as events that the scheduler hands on to the run.

    What is finished goes to the board, which is on a disk that all see; it must not be lost with its worker.
    """

    def __init__(self, run: str, unit: Unit) -> None:
        self.run = run
        self.unit = unit.key
        self.board = reporter(unit.settings.board)

    def tell(self, unit: str, checkpoint: str, task: str, analyses: Iterable[str]) -> None:
        from distributed import get_worker

        here = get_worker()
        here.log_event(
            f"{TOPIC}-{self.run}",
            {"unit": self.unit, "task": task, "analyses": list(analyses), "worker": here.address},
        )

    def keep(self, outcome: Outcome) -> None:
        """Put it down; it also travels with the unit."""
        self.board.keep(outcome)

    def rest(self) -> None:
        """The future ends."""


def run_on_worker(body: Callable[[Unit], list[Outcome]], unit: Unit, run: str) -> list[Outcome]:
    """The task of one future; the scheduler tries it again when its worker dies, which repeats nothing finished.

    It computes with the threads that the worker was given (``--nthreads``): nobody else knows its machine.
    """
    from distributed import get_worker

    finished = _kept(unit)
    left = _without(unit, finished)
    if left is None:
        return finished
    left = dataclasses.replace(left, settings=dataclasses.replace(left.settings, threads=get_worker().state.nthreads))
    with _ONE_AT_A_TIME, worker.reporting(_Events(run, unit)):
        return finished + body(left)


def _kept(unit: Unit) -> list[Outcome]:
    board = unit.settings.board
    return [] if board is None else Board(board).kept(item.analysis_id for item in unit.requests)


def _without(unit: Unit, finished: list[Outcome]) -> Unit | None:
    """The unit with what is left to do; None when nothing is."""
    over = {outcome.analysis_id for outcome in finished}
    left = tuple(item for item in unit.requests if item.analysis_id not in over)
    return dataclasses.replace(unit, requests=left) if left else None


def run_dask(
    units: Iterator[Unit | Wait],
    body: Callable[[Unit], list[Outcome]],
    address: str | None,
    timeout: float | None,
    staffed: Callable[[int], None] = lambda workers: None,
) -> Iterator[tuple[Unit, list[Outcome]]]:
    """Units over the workers of a scheduler, yielded as they finish. ``staffed`` is told how many workers there are.

    When a unit kills its worker as often as the scheduler allows (``distributed.scheduler.allowed-failures``), what it
    had finished is taken from the board, and what it was at runs again, each analysis alone: the last words of a dying
    worker may be lost. An analysis that kills its worker alone is recorded as crashed. One that takes longer than
    ``timeout`` seconds is recorded as crashed and its worker restarted.

    Raises UsageError when ``distributed`` is not installed or no scheduler answers at ``address``.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UsageError("--executor dask needs the package distributed: pip install 'trace-offline[dask]'.") from None
    try:
        client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise UsageError(
            f"--scheduler: no Dask scheduler answers at {address} ({error}). Start one with `dask scheduler`, or check "
            "the address it prints."
        ) from error
    with client:
        yield from _Cluster(client, units, body, timeout, staffed).run()


@dataclass
class _Doing:
    task: str
    analyses: tuple[str, ...]
    worker: str
    since: float


@dataclass
class _Cluster:
    client: Any
    source: Iterator[Unit | Wait]
    body: Callable[[Unit], list[Outcome]]
    timeout: float | None
    staffed: Callable[[int], None]
    futures: dict[Any, Unit] = field(default_factory=dict)
    again: deque[Unit] = field(default_factory=deque)
    doing: dict[str, _Doing] = field(default_factory=dict)
    count: Iterator[int] = field(default_factory=itertools.count)

    def run(self) -> Iterator[tuple[Unit, list[Outcome]]]:
        run = f"{time.time_ns():x}"
        topic = f"{TOPIC}-{run}"
        self.client.subscribe_topic(topic, self._hear)
        try:
            while self._feed(run):
                done = [future for future in self.futures if future.done()]
                if not done:
                    time.sleep(_LOOK_SECONDS)
                for future in done:
                    unit = self.futures.pop(future)
                    yield from self._result(future, unit)
                    future.release()
                yield from self._end_hanging()
        finally:
            self.client.unsubscribe_topic(topic)
            if self.futures:
                self.client.cancel(list(self.futures), force=True)

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        _, said = event
        # Our own clock: those of two machines differ.
        self.doing[said["unit"]] = _Doing(said["task"], tuple(said["analyses"]), said["worker"], time.monotonic())

    def _feed(self, run: str) -> bool:
        """Keep two units for every worker under way; False when nothing is left."""
        workers = max(1, len(self.client.scheduler_info(n_workers=-1)["workers"]))
        self.staffed(workers)
        for _ in range(2 * workers - len(self.futures)):
            unit = self.again.popleft() if self.again else next(self.source, None)
            if unit is None:
                break
            if isinstance(unit, Wait):
                return True
            key = f"trace-offline-{run}-{next(self.count)}"
            future = self.client.submit(run_on_worker, self.body, unit, run, key=key, pure=False, retries=0)
            self.futures[future] = unit
        return bool(self.futures)

    def _result(self, future: Any, unit: Unit) -> Iterator[tuple[Unit, list[Outcome]]]:
        if future.status == "finished":
            self.doing.pop(unit.key, None)
            yield unit, future.result()
            return
        error = future.exception() if future.status == "error" else RuntimeError("the scheduler lost it")
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        yield from self._lost(unit, f"killed its Dask worker again and again ({text})", certain=False)

    def _end_hanging(self) -> Iterator[tuple[Unit, list[Outcome]]]:
        if self.timeout is None:
            return
        for future, unit in list(self.futures.items()):
            doing = self.doing.get(unit.key)
            if doing is None or time.monotonic() - doing.since <= limit_of(doing.task, self.timeout):
                continue
            taken = time.monotonic() - doing.since
            self.client.cancel([future], force=True)
            del self.futures[future]
            self.client.restart_workers([doing.worker], timeout=_CONNECT_SECONDS, raise_for_error=False)
            yield from self._lost(
                unit, f"was ended after {taken:.0f} s: longer than --timeout {self.timeout:g} allows.", certain=True
            )

    def _lost(self, unit: Unit, what: str, *, certain: bool) -> Iterator[tuple[Unit, list[Outcome]]]:
        """Record what was at stake; try the rest again, alone where nobody knows which of several it was.

        ``certain``: the worker lived, so that what it said last is what it was at.
        """
        doing = self.doing.pop(unit.key, None)
        finished = _kept(unit)
        if finished:
            yield unit, finished
        remaining = _without(unit, finished)
        if remaining is None:
            return
        left = list(remaining.requests)
        stake = [item for item in left if doing is not None and item.analysis_id in doing.analyses] or left
        known = certain and doing is not None and (len(stake) == 1 or doing.task == LOADING)
        if known or len(unit.requests) == 1:
            yield unit, [Outcome(item.analysis_id, AnalysisStatus.CRASHED, f"{item.analyzer} {what}") for item in stake]
        else:
            self.again.extend(dataclasses.replace(unit, requests=(item,)) for item in stake)
        rest = tuple(item for item in left if item not in stake)
        if rest:
            self.again.append(dataclasses.replace(unit, requests=rest))

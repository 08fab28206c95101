"""Two lanes of one worker: what computes on the CPU runs beside what uses the GPU, not in between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


def in_two_lanes(
    here: Sequence[T],
    beside: Sequence[T],
    work: Callable[[T], None],
    tell: Callable[[T, Sequence[T]], None],
    prepare: Callable[[], None],
) -> None:
    """``work`` on each of ``here`` in this thread and on each of ``beside`` in another one, both in order.

    ``tell(item, others)`` is called in this thread before an item of ``here``, with all of ``beside`` that are not
    finished and may be at work meanwhile; once ``here`` is through, with each of ``beside`` that is still waited for.
    ``prepare`` is called first in the other thread. With one of the two empty there is no other thread.

    What ``work`` raises in either lane is raised here.
    """
    if not here or not beside:
        for item in (*here, *beside):
            tell(item, ())
            work(item)
        return
    lane = _Lane(beside, work, prepare)
    lane.start()
    for item in here:
        tell(item, lane.unfinished())
        work(item)
    while (waited := lane.current()) is not None:
        tell(waited, ())
        lane.wait_for(waited)
    if lane.error is not None:
        raise lane.error


class _Lane(threading.Thread, Generic[T]):
    """The other thread. A daemon: a run that the user stops now does not wait for it."""

    def __init__(self, items: Sequence[T], work: Callable[[T], None], prepare: Callable[[], None]) -> None:
        super().__init__(daemon=True, name="trace-offline-cpu-lane")
        self._items = list(items)
        self._work = work
        self._prepare = prepare
        self._done = 0
        self._changed = threading.Condition()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._prepare()
            for item in self._items:
                self._work(item)
                self._advance(1)
        except BaseException as error:
            self.error = error
            self._advance(len(self._items))

    def _advance(self, count: int) -> None:
        with self._changed:
            self._done += count
            self._changed.notify_all()

    def unfinished(self) -> Sequence[T]:
        """Those that are at work or will be."""
        with self._changed:
            return tuple(self._items[self._done :])

    def current(self) -> T | None:
        """The one at work; None when the lane is through."""
        return next(iter(self.unfinished()), None)

    def wait_for(self, item: T) -> None:
        """Return when ``item`` is finished, or the lane is through."""
        place = next(index for index, each in enumerate(self._items) if each is item)
        with self._changed:
            self._changed.wait_for(lambda: self._done > place)

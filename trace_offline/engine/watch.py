"""The verb ``watch``: beside a training job, each checkpoint analyzed when it is complete."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from trace_offline.analyzers.base import Scope
from trace_offline.analyzers.registry import registry
from trace_offline.checkpoints.discover import discover, select
from trace_offline.core.errors import CheckpointError, StoreError
from trace_offline.engine.analyze import analyze
from trace_offline.engine.execution import Summary
from trace_offline.engine.interrupt import StopRequest
from trace_offline.engine.options import AnalyzeOptions
from trace_offline.engine.plan import resolve_analyzers
from trace_offline.engine.progress import Progress, Silent
from trace_offline.engine.unit import file_stamps

_NAP_SECONDS = 0.2

Seen = frozenset[tuple[str, tuple[tuple[str, int, int], ...]]]


@dataclass
class Watch:
    """A watch over one source.

    ``interval``: seconds between two looks; ``quiet``: it ends when nothing new came for so many seconds (None: only
    on request). A source that does not exist yet is waited for: the training may be about to begin. Series analyzers
    extract from each checkpoint when it comes and compare once, at the end.
    """

    options: AnalyzeOptions
    interval: float = 30.0
    quiet: float | None = None
    progress: Progress = field(default_factory=Silent)
    stop: StopRequest = field(default_factory=StopRequest)
    clock: Callable[[], float] = time.monotonic
    _seen: Seen = frozenset()

    def run(self) -> Summary:
        """Watch until the training is quiet or the user asks to stop; how it all ended, added up."""
        self.options = replace(self.options, rotating=True)
        single, comparing = self._analyzers()
        total = Summary(self.options.run or "", Path(self.options.store), 0)
        last_new = self.clock()
        self.progress.note(f"watching {self.options.source}; stop with Ctrl-C")
        while not self.stop.requested:
            seen = self._look()
            if seen - self._seen:
                last_new = self.clock()
                if self._round(single, total):
                    self._seen = seen
            elif self.quiet is not None and self.clock() - last_new >= self.quiet:
                break
            self._wait(self.interval)
        if comparing and total.checkpoints and not self.stop.requested:
            self._round(comparing, total)
        total.interrupted = self.stop.requested
        return total

    def _analyzers(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        self.options.check()
        names = [item.name for item in resolve_analyzers(registry(), self.options.analyzers, self.options.params)]
        single = tuple(name for name in names if registry().get(name).scope is Scope.CHECKPOINT)
        return single, tuple(name for name in names if name not in single)

    def _look(self) -> Seen:
        """What can be analyzed now: places with the sizes and times of their files."""
        if not self.options.source.startswith("hf://") and not Path(self.options.source).exists():
            return frozenset()
        found = set()
        try:
            usable = select(discover(self.options.source, revisions=self.options.revisions))
        except CheckpointError:
            return frozenset()  # nothing there yet
        for item in usable:
            try:
                found.add((item.location, file_stamps(item)))
            except CheckpointError:
                continue  # removed since it was found
        return frozenset(found)

    def _round(self, names: tuple[str, ...], total: Summary) -> bool:
        """Analyze what is new; False when it has to be tried again."""
        if not names:
            return True
        params = {name: values for name, values in self.options.params.items() if name in names}
        try:
            summary = analyze(replace(self.options, analyzers=names, params=params), self.progress, self.stop)
        except CheckpointError as error:
            self.progress.note(f"nothing to analyze at the moment: {error.message}")
            return False
        except StoreError as error:
            if "Another run is writing" not in error.message:
                raise
            self.progress.note(f"waiting: {error.message}")
            return False
        _add(total, summary)
        return True

    def _wait(self, seconds: float) -> None:
        # Between two rounds a request to stop takes effect at once.
        self.stop.armed = True
        until = self.clock() + seconds
        while not self.stop.requested and self.clock() < until:
            time.sleep(min(_NAP_SECONDS, max(0.0, until - self.clock())))
        self.stop.armed = False


def _add(total: Summary, summary: Summary) -> None:
    total.run = summary.run
    total.checkpoints = max(total.checkpoints, summary.checkpoints)
    for name in ("ok", "not_applicable", "failed", "crashed", "seconds"):
        setattr(total, name, getattr(total, name) + getattr(summary, name))
    total.already_done, total.shared = summary.already_done, summary.shared
    total.removed += summary.removed
    total.problems += summary.problems
    total.warnings += [text for text in summary.warnings if text not in total.warnings]
    total.slowest = sorted([*total.slowest, *summary.slowest], key=lambda item: -item[2])[: len(summary.slowest) or 5]

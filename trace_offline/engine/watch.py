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
from trace_offline.core.types import Checkpoint
from trace_offline.engine.analyze import NothingSelected, analyze
from trace_offline.engine.execution import Summary
from trace_offline.engine.interrupt import StopRequest
from trace_offline.engine.options import LATER, NOW, ONLY, AnalyzeOptions
from trace_offline.engine.plan import resolve_analyzers
from trace_offline.engine.progress import Progress, Silent
from trace_offline.engine.unit import file_stamps

_NAP_SECONDS = 0.2
_HELD = ("Another run is writing", "is held by")
"""Words of a StoreError that will be over when somebody closes the store."""

Seen = frozenset[tuple[str, tuple[tuple[str, int, int], ...]]]


@dataclass
class Watch:
    """A watch over one source.

    ``interval``: seconds between two looks; ``quiet``: it ends when nothing new came for so many seconds (None: only
    on request). A source that does not exist yet is waited for: the training may be about to begin. Series analyzers
    extract from each checkpoint when it comes and compare once, at the end, also when the user asks to stop. They
    count what the training removed since.
    """

    options: AnalyzeOptions
    interval: float = 30.0
    quiet: float | None = None
    progress: Progress = field(default_factory=Silent)
    stop: StopRequest = field(default_factory=StopRequest)
    clock: Callable[[], float] = time.monotonic
    _seen: Seen = frozenset()
    _comparing: tuple[str, ...] = ()
    _said: str = ""

    def run(self) -> Summary:
        """Watch until the training is quiet or the user asks to stop; how it all ended, added up.

        Raises CheckpointError when it ends and nothing ever came.
        """
        self.options = replace(self.options, rotating=True)
        names, self._comparing = self._analyzers()
        total = Summary(self.options.run or "", Path(self.options.store), 0)
        last_new = self.clock()
        self.progress.note(f"watching {self.options.source}; stop with Ctrl-C")
        while not self.stop.requested:
            seen = self._look()
            if seen - self._seen:
                last_new = self.clock()
                if self._round(names, total, LATER, self.stop):
                    self._seen = seen
            elif self.quiet is not None and self.clock() - last_new >= self.quiet:
                break
            self._wait(self.interval)
        if self._comparing and self._seen:
            self._compare(total)
        total.interrupted = self.stop.requested
        if not self._seen and not total.interrupted:
            raise CheckpointError(
                f"watch saw no checkpoint in {self.options.source} that it could analyze, and nothing new came for "
                f"{self.quiet:g} s (--quiet). Look at it with: trace-offline discover {self.options.source}"
            )
        return total

    def _compare(self, total: Summary) -> None:
        # A request to stop is about what is to come; what was seen is compared.
        asked = self.stop.requested
        how, stop = (ONLY, StopRequest()) if asked else (NOW, self.stop)
        while not self._round(self._comparing, total, how, stop):
            if not self._said.startswith("waiting") or (self.stop.requested and not asked):
                total.failed += 1
                total.problems.append(f"{', '.join(self._comparing)} could not compare: {self._said}")
                return
            time.sleep(min(self.interval, 1.0))

    def _analyzers(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        self.options.check()
        names = [item.name for item in resolve_analyzers(registry(), self.options.analyzers, self.options.params)]
        return tuple(names), tuple(name for name in names if registry().get(name).scope is not Scope.CHECKPOINT)

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
            if not self._is_asked(item):
                continue
            try:
                found.add((item.location, file_stamps(item)))
            except CheckpointError:
                continue  # removed since it was found
        return frozenset(found)

    def _is_asked(self, item: Checkpoint) -> bool:
        # A comparison means the whole series.
        steps = self.options.steps
        return steps is None or bool(self._comparing) or (item.step is not None and item.step in steps)

    def _round(self, names: tuple[str, ...], total: Summary, compare: str, stop: StopRequest) -> bool:
        """Analyze what is new; False when it has to be tried again."""
        params = {name: values for name, values in self.options.params.items() if name in names}
        try:
            options = replace(self.options, analyzers=names, params=params, compare=compare)
            summary = analyze(options, self.progress, stop)
        except (CheckpointError, NothingSelected) as error:
            self._say(f"nothing to analyze at the moment: {error.message}")
            return False
        except StoreError as error:
            if not any(text in error.message for text in _HELD):
                raise
            self._say(f"waiting: {error.message}")
            return False
        _add(total, summary)
        return True

    def _say(self, text: str) -> None:
        self._said = text
        self.progress.note(text)

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

"""Telling the user how far a run is: a bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Protocol

from trace_offline.core.types import AnalysisStatus, Checkpoint, Outcome


class Progress(Protocol):
    """Listens to a run. ``total`` counts analyses."""

    def start(self, total: int, checkpoints: int) -> None:
        """The run begins: ``total`` analyses on ``checkpoints`` checkpoints."""

    def note(self, message: str) -> None:
        """Something the user should read now."""

    def finished(
        self, checkpoint: Checkpoint, outcomes: list[Outcome], names: dict[str, str], left: float | None = None
    ) -> None:
        """One checkpoint is stored; ``names``: analysis_id → analyzer; ``left``: seconds, by what analyses cost."""

    def stop(self) -> None:
        """The run is over, in whatever way."""


def name_of(checkpoint: Checkpoint) -> str:
    """``step 512``, or the location of a checkpoint without a step."""
    return f"step {checkpoint.step}" if checkpoint.step is not None else checkpoint.location


def summarise(outcomes: list[Outcome], names: dict[str, str]) -> str:
    """``loss, probe ok · hessian failed: …`` for one checkpoint."""
    by_status: dict[AnalysisStatus, list[str]] = {}
    for outcome in outcomes:
        by_status.setdefault(outcome.status, []).append(names.get(outcome.analysis_id, outcome.analysis_id))
    parts = [f"{', '.join(found)} {status.value.replace('_', ' ')}" for status, found in by_status.items()]
    return " · ".join(parts)


class Silent:
    """No output: for use from Python."""

    def start(self, total: int, checkpoints: int) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Nothing."""

    def finished(
        self, checkpoint: Checkpoint, outcomes: list[Outcome], names: dict[str, str], left: float | None = None
    ) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class Lines:
    """One line per finished checkpoint, for logs."""

    def __init__(self) -> None:
        self._done = 0
        self._total = 0
        self._started = 0.0

    def start(self, total: int, checkpoints: int) -> None:
        """Say what lies ahead."""
        self._total, self._started = total, time.monotonic()
        self.note(f"{total} analyses on {checkpoints} checkpoints to do")

    def note(self, message: str) -> None:
        """A line of its own."""
        print(message, file=sys.stderr, flush=True)

    def finished(
        self, checkpoint: Checkpoint, outcomes: list[Outcome], names: dict[str, str], left: float | None = None
    ) -> None:
        """Count and report one checkpoint, with the time left at the rate so far."""
        self._done += len(outcomes)
        elapsed = time.monotonic() - self._started
        if left is None:
            left = elapsed / max(1, self._done) * max(0, self._total - self._done)
        self.note(
            f"[{self._done}/{self._total}] {name_of(checkpoint)}: {summarise(outcomes, names)} "
            f"({elapsed:.0f} s, about {left:.0f} s left)"
        )

    def stop(self) -> None:
        """Nothing to take down."""


class Bar:
    """A rich progress bar with rate and time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(stderr=True),
        )
        self._started = 0.0
        self._done = 0

    def start(self, total: int, checkpoints: int) -> None:
        """Show the bar."""
        self._started = time.monotonic()
        self._task = self._bar.add_task(f"analyzing {checkpoints} checkpoints", total=total, rate="", left="")
        self._bar.start()

    def note(self, message: str) -> None:
        """A line above the bar."""
        self._bar.console.print(message, markup=False, highlight=False)

    def finished(
        self, checkpoint: Checkpoint, outcomes: list[Outcome], names: dict[str, str], left: float | None = None
    ) -> None:
        """Advance; print what did not end well."""
        self._done += len(outcomes)
        rate = 60 * self._done / max(1e-9, time.monotonic() - self._started)
        self._bar.update(
            self._task,
            advance=len(outcomes),
            rate=f"{rate:.0f}/min",
            left="" if left is None else f"{timedelta(seconds=round(left))} left",
            description=f"{name_of(checkpoint)} done",
        )
        for outcome in outcomes:
            if outcome.status in (AnalysisStatus.FAILED, AnalysisStatus.CRASHED):
                name = names.get(outcome.analysis_id, "?")
                self.note(f"{name_of(checkpoint)}: {name} {outcome.status.value}: {outcome.message}")

    def stop(self) -> None:
        """Take the bar down."""
        self._bar.stop()


def default_progress() -> Progress:
    """A bar on a terminal, lines elsewhere."""
    return Bar() if sys.stderr.isatty() else Lines()

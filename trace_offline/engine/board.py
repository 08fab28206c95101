"""What the workers of a run do now, and what they finished: small files in ``STORE.workers`` beside the store.

The parent reads them to see which analysis hangs, what was at stake when a worker died, and what was finished before
it died; ``status`` reads them from another terminal. Plain JSON: whoever can write beside a store must not thereby be
able to run code in it.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from trace_offline.core.types import AnalysisStatus, Array, Artifact, Measurement, Outcome

PROGRESS = "progress.json"
DOWNLOAD = "download.json"


@dataclass(frozen=True, slots=True)
class Doing:
    """One worker: its process, the unit, what it does and since when (seconds of ``time.time``).

    ``analyses``: the identities that are lost if it dies now.
    """

    pid: int
    host: str
    unit: str
    checkpoint: str
    task: str
    analyses: tuple[str, ...]
    since: float


class Reporter(Protocol):
    """Hears what a worker does."""

    def tell(self, unit: str, checkpoint: str, task: str, analyses: Iterable[str]) -> None:
        """What this process does from now on."""

    def keep(self, outcome: Outcome) -> None:
        """One analysis is finished."""

    def rest(self) -> None:
        """The unit is through."""


class Mute:
    """Nobody listens."""

    def tell(self, unit: str, checkpoint: str, task: str, analyses: Iterable[str]) -> None:
        """Nothing."""

    def keep(self, outcome: Outcome) -> None:
        """Nothing."""

    def rest(self) -> None:
        """Nothing."""


def reporter(folder: str | None) -> Reporter:
    """Where a worker reports to."""
    return Mute() if folder is None else Board(folder)


class Board:
    """The folder of one run. Writers replace whole files, so that a reader never sees half of one."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @classmethod
    def of(cls, store: Path) -> Board:
        """The board of the run that writes to ``store``."""
        return cls(store.with_name(f"{store.name}.workers"))

    def open(self) -> None:
        """Make the folder; only the run itself does, so that a late worker of an ended run leaves nothing behind."""
        with suppress(OSError):  # a full disk; see _write
            (self.folder / "done").mkdir(parents=True, exist_ok=True)

    def tell(self, unit: str, checkpoint: str, task: str, analyses: Iterable[str]) -> None:
        """Say what this process does from now on."""
        now = Doing(os.getpid(), socket.gethostname(), unit, checkpoint, task, tuple(analyses), time.time())
        self._write(f"{now.host}-{now.pid}.json", asdict(now))

    def rest(self) -> None:
        """Say that this process does nothing for the run any more."""
        (self.folder / f"{socket.gethostname()}-{os.getpid()}.json").unlink(missing_ok=True)

    def read(self) -> list[Doing]:
        """What every worker said last, in order of its process number."""
        found = []
        for path in self.folder.glob("*-*.json"):
            with suppress(ValueError, TypeError, KeyError):  # cut off, as by a loss of power
                record = _load(path)
                if record is not None:
                    found.append(Doing(**{**record, "analyses": tuple(record["analyses"])}))
        return sorted(found, key=lambda item: (item.host, item.pid))

    def keep(self, outcome: Outcome) -> None:
        """Put down a finished analysis before the unit is through: it must not be lost with its worker."""
        self._write(f"done/{outcome.analysis_id}.json", _record(outcome))

    def kept(self, analyses: Iterable[str]) -> list[Outcome]:
        """Those of these analyses that were finished."""
        found = []
        for key in analyses:
            path = self.folder / "done" / f"{key}.json"
            try:
                record = _load(path)
                if record is not None:
                    found.append(_outcome(record))
            except (ValueError, TypeError, KeyError):
                # Cut off, as by a loss of power: measured again, as if it had never been finished.
                path.unlink(missing_ok=True)
        return found

    def all_kept(self) -> list[Outcome]:
        """What a run that was killed left behind."""
        return self.kept(sorted(path.stem for path in (self.folder / "done").glob("*.json")))

    def forget(self, analyses: Iterable[str]) -> None:
        """Remove what is in the store now."""
        for key in analyses:
            (self.folder / "done" / f"{key}.json").unlink(missing_ok=True)

    def progress(self, **values: Any) -> None:
        """Publish how far the run is."""
        self._write(PROGRESS, {**values, "pid": os.getpid(), "host": socket.gethostname(), "at": time.time()})

    def read_progress(self) -> dict[str, Any] | None:
        """How far the run is; None when none is going on."""
        with suppress(ValueError):  # cut off, as by a loss of power
            return _load(self.folder / PROGRESS)
        return None

    def downloading(self, text: str | None) -> None:
        """Publish what is downloaded now; None: nothing is."""
        if text is None:
            (self.folder / DOWNLOAD).unlink(missing_ok=True)
        else:
            self._write(DOWNLOAD, {"text": text})

    def read_download(self) -> str | None:
        """What is downloaded now."""
        with suppress(ValueError):  # cut off, as by a loss of power
            record = _load(self.folder / DOWNLOAD)
            return None if record is None else str(record["text"])
        return None

    def leave(self) -> None:
        """Remove all but finished analyses that could not be stored: the next run stores them."""
        for path in self.folder.glob("*.json"):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # one that is not empty stays
            (self.folder / "done").rmdir()
            self.folder.rmdir()

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        target = self.folder / name
        fresh = target.with_name(f"{target.name}.{os.getpid()}.new")
        text = json.dumps(record, default=_number)
        try:
            fresh.write_text(text, encoding="utf-8")
            os.replace(fresh, target)
        except OSError:
            # The run ended and cleared its board, or the disk is full, which the store will say when it is written.
            # A board that cannot be written costs the view of the run, never the run.
            with suppress(OSError):
                fresh.unlink(missing_ok=True)


def _number(value: Any) -> float | int:
    """NumPy's scalars, which json does not know."""
    plain: float | int = value.item()
    return plain


def _load(path: Path) -> dict[str, Any] | None:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return loaded if isinstance(loaded, dict) else None


def _record(outcome: Outcome) -> dict[str, Any]:
    # The fields as they are: asdict copies every number again, which costs more than to write them.
    record = _fields(outcome)
    record["measurements"] = [_fields(item) for item in outcome.measurements]
    record["arrays"] = [_fields(item) for item in outcome.arrays]
    record["artifacts"] = [
        {**_fields(item), "content": base64.b64encode(item.content).decode("ascii")} for item in outcome.artifacts
    ]
    return record


def _fields(item: Any) -> dict[str, Any]:
    return {field.name: getattr(item, field.name) for field in fields(item)}


def _outcome(record: dict[str, Any]) -> Outcome:
    return Outcome(
        **{
            **record,
            "status": AnalysisStatus(record["status"]),
            "measurements": tuple(Measurement(**item) for item in record["measurements"]),
            "arrays": tuple(Array(**{**item, "values": tuple(item["values"])}) for item in record["arrays"]),
            "artifacts": tuple(
                Artifact(**{**item, "content": base64.b64decode(item["content"])}) for item in record["artifacts"]
            ),
        }
    )

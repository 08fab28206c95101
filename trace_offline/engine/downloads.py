"""Hub revisions during a run: one is downloaded while those before it are analyzed, within a limit, gone after use."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trace_offline.core.errors import CheckpointError, TraceOfflineError, UsageError
from trace_offline.core.types import Checkpoint
from trace_offline.engine.board import Board
from trace_offline.engine.download_rules import DownloadRules, size_text, unit_of
from trace_offline.engine.progress import name_of

if TYPE_CHECKING:
    from trace_offline.checkpoints.hub_download import Download
    from trace_offline.checkpoints.hub_ledger import Entry, Ledger
    from trace_offline.checkpoints.hub_use import InUse

_TICK_SECONDS = 1.0
_NOTE_SECONDS = 30.0
_LEAVE_SECONDS = 3.0

Key = tuple[str, str]
"""Folder of the repository in the cache, and commit."""


class _Closed(BaseException):
    """The run is over and the download not wanted any more. No ``except Exception`` on the way may hold it up."""


class _NoRoom(CheckpointError):
    """The limit is reached, and nothing will make room."""


class Downloads:
    """The revisions a run needs, in order, as they come to lie on this disk.

    A thread fetches one revision ahead of what the workers have: with ``jobs`` workers at most ``jobs`` are in use and
    one is ahead. One whose download failed while it was ahead is tried again when its turn comes. ``lost`` is told of
    those that cannot be had, ``note`` what the user should read now. Safe to call from any thread.

    ``full``: why the rest was not downloaded, with ``skipped``; ``warnings``: what could not be removed.
    """

    def __init__(
        self,
        items: list[Checkpoint],
        rules: DownloadRules,
        *,
        lost: Callable[[Checkpoint, str], None],
        note: Callable[[str], None],
        board: Board,
        jobs: int,
    ) -> None:
        self.items, self.rules, self.jobs = items, rules, jobs
        self.lost, self.note, self.board = lost, note, board
        self.skipped: list[Checkpoint] = []
        self.full: str | None = None
        self.warnings: list[str] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ready: Checkpoint | BaseException | None = None
        self._asked = self._ended = self._closed = self._begun = self._waiting = self._abandoned = False
        self._current: tuple[Checkpoint, Download | None] | None = None
        self._claims: dict[str, Checkpoint] = {}
        self._open: dict[str, set[str]] = {}
        self._left: set[Key] = set()
        self._ticked = self._noted = 0.0
        self._ledger: Ledger | None = None
        self._use: InUse | None = None
        tracked = rules.ledger is not None and (rules.remove or rules.limit is not None)
        if items or (tracked and rules.ledger is not None and rules.ledger.exists()):
            self._prepare(tracked)

    def _prepare(self, tracked: bool) -> None:
        from trace_offline.checkpoints.hub_ledger import Ledger
        from trace_offline.checkpoints.hub_use import InUse

        self._use = InUse()
        if tracked and self.rules.ledger is not None:
            self._ledger = Ledger.open(self.rules.ledger)
            if self.rules.remove:
                # Of an earlier run that was killed, or that kept what it had downloaded: not needed by this one.
                wanted = {_key(item) for item in self.items}
                for key in [key for key in self._ledger.entries if key not in wanted]:
                    self._remove(key)

    def arrivals(self) -> Iterator[Checkpoint | None]:
        """Each revision on this disk with its fingerprint, in order; None while the next one is not there yet."""
        if not self.items:
            return
        self._thread = threading.Thread(target=self._work, name="hub-download", daemon=True)
        self._thread.start()
        while True:
            with self._changed:
                got, self._ready = self._ready, None
                if got is None and self._ended:
                    return
                self._asked = got is None
                if isinstance(got, Checkpoint):
                    got = self._claims[got.location] = _with_own_tokenizer(got)
                self._changed.notify_all()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                self._tell_waiting()
            yield got

    def staffed(self, jobs: int) -> None:
        """So many workers there are now: with Dask they come and go."""
        with self._changed:
            self.jobs = jobs
            self._changed.notify_all()

    def use(self, checkpoint: Checkpoint, analyses: Iterable[str]) -> None:
        """These analyses need the revision until they are stored."""
        with self._changed:
            self._open[checkpoint.location] = set(analyses)

    def stored(self, checkpoint: Checkpoint, analyses: Iterable[str]) -> None:
        """These analyses are in the store; with the last of them the revision is not needed any more."""
        with self._changed:
            left = self._open.get(checkpoint.location, set())
            left.difference_update(analyses)
            if left or checkpoint.location not in self._claims:
                return
            self._open.pop(checkpoint.location, None)
            del self._claims[checkpoint.location]
            self._leave(_key(checkpoint))
            self._changed.notify_all()

    def close(self) -> None:
        """End a download that is under way. What is not removed by then is in the ledger, for the next run."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_LEAVE_SECONDS)
        with self._changed:
            self._abandoned = self._thread is not None and self._thread.is_alive()
            for key in sorted(self._left):
                self._leave(key)
            if self._use is not None:
                self._use.close()
            self.board.downloading(None)

    def state(self) -> str | None:
        """``downloading step 512 (0.3 of 0.8 GB)``; None while nothing is."""
        from trace_offline.checkpoints.hub_ledger import on_disk

        current = self._current
        if current is None:
            return None
        item, download = current
        if self._waiting:
            return f"{name_of(item)} waits for room within --hub-disk-limit {self.rules.limit}"
        if download is None:
            return f"downloading {name_of(item)}"
        total = sum(file.size or 0 for file in download.files)
        unit, name = unit_of(total)
        return f"downloading {name_of(item)} ({on_disk(download) / unit:.3g} of {total / unit:.3g} {name})"

    def _tell_waiting(self) -> None:
        now, text = time.monotonic(), self.state()
        if text is not None and now - self._noted >= _NOTE_SECONDS:
            self._noted = now
            self.note(text)

    # What follows runs in the thread that downloads.

    def _work(self) -> None:
        try:
            for item in self.items:
                if not self._fetch_one(item):
                    break
        except BaseException as error:
            with self._changed:
                self._ready = error
        finally:
            with self._changed:
                self._ended = True

    def _fetch_one(self, item: Checkpoint) -> bool:
        """Put one revision where ``arrivals`` takes it, or say that it is lost; False when the run is over."""
        from trace_offline.checkpoints.hub import is_on_disk

        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._ready is None and self._may_begin()))
            if self._closed:
                return False
            ahead = not self._asked
            self._current = (item, None)
        try:
            if self.full is not None and not is_on_disk(item):
                self.skipped.append(item)
                return True
            got = self._get(item)
            if isinstance(got, CheckpointError) and not isinstance(got, _NoRoom) and ahead:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._asked)
                got = self._get(item)
            self._settle(item, got)
        except _Closed:
            self._current = None
            self._write_off(_key(item))
            return False
        return True

    def _may_begin(self) -> bool:
        return len(self._claims) <= self.jobs

    def _get(self, item: Checkpoint) -> Checkpoint | TraceOfflineError:
        from trace_offline.checkpoints.fingerprint import with_fingerprint
        from trace_offline.checkpoints.hub import fetch

        if self._closed:
            raise _Closed
        assert self._use is not None  # made when there are items
        key = _key(item)
        self._use.take(Path(key[0]), key[1])
        try:
            return with_fingerprint(fetch(item, before=partial(self._make_room, item), during=self._tick))
        except TraceOfflineError as error:
            self._write_off(key)
            return error
        finally:
            self.board.downloading(None)

    def _settle(self, item: Checkpoint, got: Checkpoint | TraceOfflineError) -> None:
        if isinstance(got, _NoRoom):
            self.full = got.message
            self.note(got.message)
            self.skipped.append(item)
        elif isinstance(got, CheckpointError):
            self.lost(item, got.message)
        elif isinstance(got, TraceOfflineError):
            raise got
        with self._changed:
            self._current = None
            if isinstance(got, Checkpoint):
                self._ready = got
            else:
                self._leave(_key(item))

    def _write_off(self, key: Key) -> None:
        """A download came to nothing, or to a part."""
        with self._changed:
            # When the run did not wait for this thread, the file belongs to the next one.
            if self._ledger is not None and not self._abandoned:
                with suppress(OSError):  # a full disk; what the file says too much is put right when it is read
                    self._ledger.settle(key)

    def _make_room(self, item: Checkpoint, download: Download) -> None:
        """Wait until the limit allows this download, and put it down. Raises when it never will."""
        ledger, limit = self._ledger, self.rules.limit_bytes
        with self._changed:
            if ledger is not None:
                entry = ledger.entry(download)
                size = sum(entry.blobs.values())
                if limit is not None and size > limit:
                    raise self._too_large(item, size)
                while limit is not None and ledger.total_with(entry) > limit:
                    if self._closed:
                        raise _Closed
                    if not self._wait_for_room(entry):
                        raise self._no_room(item, entry)
                    entry = ledger.entry(download)  # what two revisions share may have gone with one of them
                ledger.add(entry)
            self._begun = True
            self._current = (item, download)
            self._ticked = 0.0
        self._tick()

    def _too_large(self, item: Checkpoint, size: int) -> TraceOfflineError:
        text = (
            f"{item.location} takes {size_text(size)}, more than --hub-disk-limit {self.rules.limit} allows for all "
            f"downloads together. Give at least {size_text(size)}; with twice that the next revision downloads while "
            "one is analyzed."
        )
        # Nothing was begun yet: better to stop than to say the same of every revision.
        return CheckpointError(text) if self._begun else UsageError(text)

    def _no_room(self, item: Checkpoint, entry: Entry) -> _NoRoom:
        assert self._ledger is not None  # there is no limit without one
        now = self._ledger.bytes()
        more = self._ledger.total_with(entry) - now
        way = (
            "What is there cannot be removed now, because another run uses it or the system refused: try again later,"
            if self.rules.remove
            else "Add --remove-downloads, so that each revision makes room when its analyses are stored,"
        )
        return _NoRoom(
            f"--hub-disk-limit {self.rules.limit} is reached: downloads take {size_text(now)}, and {item.location} "
            f"needs {size_text(more)} more. {way} or give a larger limit; the same command goes on from here."
        )

    def _wait_for_room(self, entry: Entry) -> bool:
        """Whether something was removed, or may be before long."""
        assert self._ledger is not None  # there is no limit without one
        if not self.rules.remove:
            return False
        if any(_key(item) in self._ledger.entries for item in self._claims.values()):
            self._waiting = True
            self.board.downloading(self.state())
            self._changed.wait()
            self._waiting = False
            return True
        # Left by an earlier run and needed later on: it is downloaded again then.
        order = {_key(item): place for place, item in enumerate(self.items)}
        idle = [key for key in self._ledger.entries if key != entry.key]
        return any(self._remove(key) for key in sorted(idle, key=lambda key: -order.get(key, -1)))

    def _tick(self) -> None:
        if self._closed:
            raise _Closed
        now = time.monotonic()
        if now - self._ticked >= _TICK_SECONDS:
            self._ticked = now
            self.board.downloading(self.state())

    # Removing; the caller holds the lock.

    def _leave(self, key: Key) -> None:
        """Nobody of this run needs the revision for what it was taken for; remove it if that is asked."""
        others = [*self._claims.values(), *([self._ready] if isinstance(self._ready, Checkpoint) else [])]
        fetching = self._current is not None and _key(self._current[0]) == key
        if fetching or any(_key(item) == key for item in others):
            return
        if self.rules.remove and self._ledger is not None and key in self._ledger.entries:
            snapshot = self._ledger.entries[key].snapshot
            self._left.add(key)
            if not any(item.tokenizer and Path(item.tokenizer).is_relative_to(snapshot) for item in others):
                self._remove(key)
        elif self._use is not None:
            self._use.give_back(Path(key[0]), key[1])

    def _remove(self, key: Key) -> bool:
        assert self._ledger is not None  # the caller knows the key from there
        assert self._use is not None
        entry = self._ledger.entries[key]
        what = f"hf://{entry.repo}@{entry.refs[0] if entry.refs else entry.commit[:12]}"
        try:
            if not self._use.alone(Path(key[0]), key[1]):
                self._warn(f"{what} stays in the hub cache for now: another run uses it. The next run removes it.")
                return False
            self._ledger.remove(key)
        except OSError as error:
            self._warn(f"{what} could not be removed from the hub cache: {error}. The next run tries again.")
            return False
        finally:
            self._use.give_back(Path(key[0]), key[1])
        self._left.discard(key)
        return True

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def _key(item: Checkpoint) -> Key:
    from trace_offline.checkpoints.hub import parse_source
    from trace_offline.checkpoints.hub_access import repository_folder

    repo, ref = parse_source(item.location)
    return str(repository_folder(repo, None)), item.revision or ref or "main"


def _with_own_tokenizer(item: Checkpoint) -> Checkpoint:
    """Without a tokenizer that was found in another revision and went with it since."""
    from trace_offline.checkpoints.tokenizer_folders import TokenizerFinder

    if item.tokenizer is None or TokenizerFinder().find(Path(item.tokenizer)) == item.tokenizer:
        return item
    return dataclasses.replace(item, tokenizer=None)

"""What the runs of a store downloaded from the hub and have not removed: a small file beside the store.

Only what stands in it is ever removed. It is written before a download begins, so that nothing a killed run left is
forgotten, and it knows which files of a revision were in the cache before: those are the user's.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trace_offline.checkpoints.hub_download import Download
from trace_offline.core.errors import CheckpointError

_VERSION = 1
_PARTIAL = ".incomplete"


@dataclass(frozen=True)
class Entry:
    """One downloaded revision. ``folder``: of the repository in the cache.

    ``blobs``: the files it brought, by their names in the cache, in bytes; one that two downloads share stands in
    both. ``had``: files of the revision, ``kept``: blobs, that were there before. ``refs``: names it gave the revision.
    """

    folder: str
    repo: str
    commit: str
    refs: tuple[str, ...]
    had: tuple[str, ...]
    kept: tuple[str, ...]
    blobs: dict[str, int]

    @property
    def key(self) -> tuple[str, str]:
        """Folder of the repository and commit."""
        return self.folder, self.commit

    @property
    def snapshot(self) -> Path:
        """The folder of the revision."""
        return Path(self.folder) / "snapshots" / self.commit


@dataclass
class Ledger:
    """The entries in the file at ``path``; without entries there is no file."""

    path: Path
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Ledger:
        """Read the file, forgetting what is on the disk no more. Raises CheckpointError for one that is damaged."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            found = [
                Entry(**{**item, **{name: tuple(item[name]) for name in ("refs", "had", "kept")}})
                for item in stored["downloads"]
            ]
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} should list what was downloaded from the hub, but cannot be read ({error}). Remove it to go "
                "on; what it listed then stays in the hub cache, where `hf cache` shows it."
            ) from None
        ledger = cls(path, {item.key: item for item in found})
        for item in found:
            ledger.settle(item.key)
        return ledger

    def bytes(self) -> int:
        """What the downloads take together; a file that several revisions share counts once."""
        return sum(_blobs(self.entries.values()).values())

    def entry(self, download: Download) -> Entry:
        """What this download would add. Raises CheckpointError where the hub does not say sizes and names."""
        silent = [item.name for item in download.files if item.size is None or item.blob is None]
        if silent:
            raise CheckpointError(
                f"hf://{download.repo}@{download.ref or download.commit}: the hub does not say how large {silent[0]} "
                "is, so --hub-disk-limit and --remove-downloads cannot be kept: leave both out."
            )
        planned = {str(item.blob): item.size or 0 for item in download.files}
        folder = download.folder
        known = self.entries.get((str(folder), download.commit))
        if known is not None:
            return dataclasses.replace(known, blobs={n: size for n, size in planned.items() if n not in known.kept})
        ours = {name for item in self.entries.values() if item.folder == str(folder) for name in item.blobs}
        kept = {name for name in planned if name not in ours and (folder / "blobs" / name).exists()}
        snapshot = folder / "snapshots" / download.commit
        ref = download.ref if download.ref and not (folder / "refs" / download.ref).exists() else None
        return Entry(
            folder=str(folder),
            repo=download.repo,
            commit=download.commit,
            refs=(ref,) if ref else (),
            had=tuple(sorted(path.relative_to(snapshot).as_posix() for path in _files(snapshot))),
            kept=tuple(sorted(kept)),
            blobs={name: size for name, size in planned.items() if name not in kept},
        )

    def total_with(self, entry: Entry) -> int:
        """What all downloads would take with this one."""
        return sum(_blobs([*self.entries.values(), entry]).values())

    def add(self, entry: Entry) -> None:
        """Put down a download before it begins."""
        self.entries[entry.key] = entry
        self._save()

    def settle(self, key: tuple[str, str]) -> None:
        """After a download that failed or was killed: forget what of it is not on the disk."""
        entry = self.entries.get(key)
        if entry is None:
            return
        folder = Path(entry.folder)
        for name in entry.blobs:
            _remove_partial(folder, name, resumable=False)
        links = _links(entry)
        there = {path.name for _, path in links if path.exists()}
        blobs = {
            name: size
            for name, size in entry.blobs.items()
            if name in there
            or (folder / "blobs" / name).exists()
            or (folder / "blobs" / f"{name}{_PARTIAL}").exists()
            or any(not path.is_symlink() for path, _ in links)  # a cache without links: nobody can tell which is which
        }
        if not blobs and not links:
            del self.entries[key]
            _remove_empty(entry.snapshot)
        else:
            self.entries[key] = dataclasses.replace(entry, blobs=blobs)
        self._save()

    def remove(self, key: tuple[str, str]) -> None:
        """Remove from the cache what this download brought and nothing else refers to. Raises OSError."""
        entry = self.entries[key]
        folder = Path(entry.folder)
        links = _links(entry)
        brought = {target.name for path, target in links if path.is_symlink() and target.parent == folder / "blobs"}
        others = {name for item in self.entries.values() if item.key != key for name in item.blobs}
        spared = {*entry.kept, *others}
        for path, _ in links:
            path.unlink(missing_ok=True)
        # What is still referred to now is needed by another revision, or was in this one before.
        for snapshot in _folders(folder / "snapshots"):
            spared |= {_target(path).name for path in _files(snapshot)}
        blobs = sorted((brought | set(entry.blobs)) - spared)
        for name in entry.refs:
            ref = folder / "refs" / name
            if ref.is_file() and ref.read_text(encoding="utf-8").strip() == entry.commit:
                ref.unlink()
        _remove_blobs(folder, blobs)
        for name in blobs:
            _remove_partial(folder, name, resumable=True)
        if not entry.had:
            (folder / "trees" / f"{entry.commit}.json").unlink(missing_ok=True)
        _remove_empty(entry.snapshot)
        del self.entries[key]
        self._save()

    def _save(self) -> None:
        if not self.entries:
            self.path.unlink(missing_ok=True)
            return
        fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        record = {"version": _VERSION, "downloads": [asdict(item) for item in self.entries.values()]}
        with fresh.open("w", encoding="utf-8") as stream:
            json.dump(record, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(fresh, self.path)


def on_disk(download: Download) -> int:
    """Bytes of a download that have arrived, for showing: finished files and parts of files."""
    total = 0
    for name in {str(item.blob) for item in download.files}:
        for path in (download.folder / "blobs").glob(f"{name}*"):
            try:
                total += path.stat().st_size
            except OSError:
                continue  # moved into place at this moment
    return total


def _blobs(entries: Iterable[Entry]) -> dict[tuple[str, str], int]:
    return {(item.folder, name): size for item in entries for name, size in item.blobs.items()}


def _folders(path: Path) -> list[Path]:
    return [item for item in path.iterdir() if item.is_dir()] if path.is_dir() else []


def _files(snapshot: Path) -> Iterator[Path]:
    return (path for path in snapshot.rglob("*") if path.is_symlink() or path.is_file())


def _target(path: Path) -> Path:
    """Where a file of a snapshot lies: one step only, because a blob may itself be a link into a shared store."""
    return Path(os.path.abspath(path.parent / os.readlink(path))) if path.is_symlink() else path


def _links(entry: Entry) -> list[tuple[Path, Path]]:
    """The files of the revision that its download brought, with where they lie."""
    found = list(_files(entry.snapshot))
    return [
        (path, _target(path)) for path in found if path.relative_to(entry.snapshot).as_posix() not in set(entry.had)
    ]


def _remove_blobs(folder: Path, names: list[str]) -> None:
    """Delete blobs through the library, which knows about its store of blobs shared between repositories.

    Its own ``delete_revisions`` is not used: for the last revision of a repository it removes the whole folder, with a
    download that is under way in it, and it does not know what of a revision was there before.
    """
    there = frozenset(
        path for path in (folder / "blobs" / name for name in names) if path.exists() or path.is_symlink()
    )
    if not there:
        return
    from huggingface_hub import scan_cache_dir

    nothing = scan_cache_dir(folder.parent).delete_revisions()
    dataclasses.replace(nothing, blobs=there).execute()
    left = sorted(path.name for path in there if path.exists())
    if left:
        raise OSError(f"{folder / 'blobs' / left[0]} cannot be deleted")


def _remove_partial(folder: Path, blob: str, *, resumable: bool) -> None:
    """Delete parts of files that nobody is writing; those a later download could go on with only if ``resumable``."""
    from filelock import FileLock, Timeout

    parts = [
        path for path in (folder / "blobs").glob(f"{blob}*{_PARTIAL}") if resumable or path.name != f"{blob}{_PARTIAL}"
    ]
    if not parts:
        return
    guard = folder.parent / ".locks" / folder.name / f"{blob}.lock"  # the one the library holds while it downloads
    guard.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(guard, timeout=0):
            for path in parts:
                path.unlink(missing_ok=True)
    except Timeout:
        return


def _remove_empty(folder: Path) -> None:
    """Remove the folder and folders in it, as far as they are empty."""
    if not folder.is_dir():
        return
    for item in sorted(folder.rglob("*"), reverse=True):
        if item.is_dir() and not item.is_symlink() and not any(item.iterdir()):
            item.rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()

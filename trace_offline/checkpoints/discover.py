"""Find the checkpoints of a run: in a folder, a file, the hub cache, or on the hub."""

from __future__ import annotations

import difflib
import os
import time
from pathlib import Path

from trace_offline.checkpoints.completeness import SETTLE_SECONDS, Clock
from trace_offline.checkpoints.fingerprint import Cache
from trace_offline.checkpoints.layouts import accelerate, hf_folder, hub_cache, raw_files, unsupported
from trace_offline.checkpoints.layouts.base import Find, Recogniser, Search
from trace_offline.checkpoints.listing import Listing, scan
from trace_offline.checkpoints.naming import StepSource, parse_name
from trace_offline.checkpoints.series import arrange, select
from trace_offline.core.errors import CheckpointError, UsageError, nearest
from trace_offline.core.types import Checkpoint, CheckpointState

__all__ = ["LAYOUTS", "discover", "select"]

LAYOUTS = (
    "hf_folder", "hf_trainer", "hub_cache", "hub", "accelerate", "raw", "nanogpt", "lightning",
    "peft", "dcp", "fsdp", "deepspeed", "megatron", "gguf", "other",
)  # fmt: skip
"""Names of the layouts that discovery tells apart; those of the second line are recognised and set aside."""

_FOLDER_LAYOUTS: tuple[Recogniser, ...] = (unsupported.recognise, hf_folder.recognise, accelerate.recognise)
_SKIPPED = frozenset({"__pycache__", "wandb", "node_modules", "optimizer"})
_MAX_DEPTH = 8
_MAX_FOLDERS = 100_000


def discover(
    source: str | Path,
    *,
    revisions: str | None = None,
    layout: str | None = None,
    now: float | None = None,
    settle_seconds: float = SETTLE_SECONDS,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
    fingerprints: Cache | None = None,
) -> list[Checkpoint]:
    """Every checkpoint of ``source`` in numeric order of steps, those set aside included (without a step: last).

    ``source``: a folder of checkpoints, one checkpoint folder, one file, a hub cache (whole or one ``models--…``), or
    ``hf://org/name[@revision]``. ``revisions``: pattern for names of revisions, ``step*``. ``layout``: keep only finds
    in this layout. ``now``, ``settle_seconds``: a file changed within that time may still be written to.
    ``fingerprints``: hashes known from earlier, filled in place. ``endpoint``, ``cache_dir``: of the hub.

    Reads headers and sampled blocks; files are read in full only to confirm that two hold the same weights. Nothing is
    unpickled. Raises CheckpointError when there is nothing to find, saying what was looked for and found.
    """
    if layout is not None and layout not in LAYOUTS:
        raise CheckpointError(
            f'There is no layout "{layout}".{nearest(layout, LAYOUTS)} Known layouts: {", ".join(LAYOUTS)}.'
        )
    if isinstance(source, str) and source.startswith("hf://"):
        from trace_offline.checkpoints import hub

        return hub.revisions(source, pattern=revisions, cache_dir=cache_dir, endpoint=endpoint)
    path = _existing(source)
    search = Search(path, Clock(time.time() if now is None else now, settle_seconds))
    walk = _Walk(search, revisions)
    finds = walk.start()
    if layout is not None:
        finds = [find for find in finds if find.checkpoint.layout == layout]
    if not finds:
        raise CheckpointError(walk.nothing(layout))
    return arrange(finds, fingerprints)


def _existing(source: str | Path) -> Path:
    if not str(source).strip():
        raise UsageError(
            "SOURCE is empty (a shell variable that is not set?): name a folder or file of checkpoints, or . for the "
            "current folder."
        )
    path = Path(os.path.abspath(Path(source).expanduser()))
    if path.exists():
        return path
    if path.is_symlink():
        raise CheckpointError(f"{source} is a link to {os.readlink(path)}, which is not there.")
    hint = ""
    if path.parent.is_dir():
        close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1, cutoff=0.6)
        hint = (
            f' Did you mean "{path.parent / close[0]}"?' if close else f" {path.parent} exists, {path.name} does not."
        )
    elif str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        hint = f" For a repository on the Hugging Face hub write hf://{source}."
    raise CheckpointError(f"Expected a folder or file of checkpoints, found nothing at {source}.{hint}")


class _Walk:
    """One walk through the folders below the source; remembers what it saw for the message when nothing is found."""

    def __init__(self, search: Search, revisions: str | None) -> None:
        self._search = search
        self._revisions = revisions
        self._visited: set[tuple[int, int]] = set()
        self._folders = 0
        self._files: dict[str, int] = {}
        self._unreadable: list[str] = []

    def start(self) -> list[Find]:
        path = self._search.root
        if path.is_file():
            return self._one_file(path)
        if (repository := hub_cache.repository_of(path)) is not None:
            commit = path.name if path.parent == repository / "snapshots" else None
            return hub_cache.finds(repository, self._search, self._revisions, commit)
        return self._folder(path, 0)

    def _one_file(self, path: Path) -> list[Find]:
        self._files[path.suffix] = 1
        listing = scan(path.parent)
        search = Search(path, self._search.clock, self._search.tokenizers)
        names = raw_files.candidates(listing)
        if path.name not in names and not path.name.endswith((".pt", ".pth", ".ckpt", ".bin", ".safetensors")):
            return []
        find = raw_files.recognise(listing, path.name, search, alone=False, asked=True)
        return [find] if find else []

    def _folder(self, path: Path, depth: int) -> list[Find]:
        listing = self._scan(path)
        if listing is None:
            return []
        if "evaluation_set.json" in listing.files:
            return []
        if hub_cache.repository_name(path):
            return hub_cache.finds(path, self._search, self._revisions)
        refused = unsupported.recognise(listing, self._search, False)
        if refused is not None:
            return [refused]
        nested: list[Find] = []
        if depth < _MAX_DEPTH:
            for name in listing.folders:
                if not self._ignored(name, listing):
                    nested += self._folder(path / name, depth + 1)
        return self._here(listing, nested, depth)

    def _here(self, listing: Listing, nested: list[Find], depth: int) -> list[Find]:
        for recogniser in _FOLDER_LAYOUTS:
            find = recogniser(listing, self._search, bool(nested))
            if find is not None:
                return [*nested, find]
        names = raw_files.candidates(listing)
        found = [raw_files.recognise(listing, name, self._search, alone=len(names) == 1) for name in names]
        finds = [*nested, *(find for find in found if find is not None)]
        if not finds and depth > 0 and parse_name(listing.path.name).source in (StepSource.STEP, StepSource.CHECKPOINT):
            finds.append(self._named_but_empty(listing))
        return finds

    def _named_but_empty(self, listing: Listing) -> Find:
        """A folder with a checkpoint's name and nothing of one inside."""
        clock = self._search.clock
        recent = clock.recent(max(listing.newest, _mtime(listing.path)))
        shown = ", ".join([*sorted(listing.files)[:4], *(f"{name}/" for name in listing.folders[:2])]) or "nothing"
        if listing.files:
            state, reason = (
                CheckpointState.NOT_A_CHECKPOINT,
                f"It has a checkpoint's name but no weights: found {shown}.",
            )
        elif recent:
            state, reason = CheckpointState.BEING_WRITTEN, "It is empty and was made moments ago: look again later."
        else:
            state, reason = CheckpointState.PARTIAL, "It is empty: the save was interrupted or the files were removed."
        step = parse_name(listing.path.name).step
        item = Checkpoint(str(listing.path), "hf_folder", state, step=step, reason=reason)
        return Find(item, str(listing.path.parent))

    def _ignored(self, name: str, listing: Listing) -> bool:
        if name.startswith(".") or name in _SKIPPED:
            return True
        # A link to a neighbour ("latest" → "checkpoint-800") is the neighbour, already found.
        return name in listing.links and (listing.path / name).resolve().is_relative_to(self._search.root.resolve())

    def _scan(self, path: Path) -> Listing | None:
        self._folders += 1
        if self._folders > _MAX_FOLDERS:
            raise CheckpointError(
                f"More than {_MAX_FOLDERS} folders below {self._search.root}: name the folder of one run."
            )
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in self._visited:
                return None
            self._visited.add((status.st_dev, status.st_ino))
            listing = scan(path)
        except OSError as error:
            self._unreadable.append(f"{path} ({error.strerror})")
            return None
        for name in listing.files:
            ending = os.path.splitext(name)[1] or name
            self._files[ending] = self._files.get(ending, 0) + 1
        return listing

    def nothing(self, layout: str | None) -> str:
        """What was looked for and what was there instead."""
        common = sorted(self._files.items(), key=lambda item: (-item[1], item[0]))[:6]
        found = ", ".join(f"{count} × {ending}" for ending, count in common) or "no files"
        wanted = f" in layout {layout}" if layout else ""
        matching = f' matching revisions "{self._revisions}"' if self._revisions else ""
        denied = f" Could not read: {'; '.join(self._unreadable[:3])}." if self._unreadable else ""
        folders = f" in {self._folders} folder{'s' * (self._folders != 1)}" if self._folders else ""
        return (
            f"No checkpoints{wanted}{matching} in {self._search.root}: looked for Hugging Face folders (config.json "
            "with model.safetensors or pytorch_model.bin), checkpoint-N folders, a hub cache (models--org--name), and "
            f".safetensors, .pt, .pth and .ckpt files; found {found}{folders}.{denied}"
        )


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

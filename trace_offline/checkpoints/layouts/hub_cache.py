"""The Hugging Face hub cache: ``models--org--name/{refs,blobs,snapshots}``; the step is the name of a ref."""

from __future__ import annotations

import fnmatch
import os
import re
from dataclasses import replace
from pathlib import Path

from trace_offline.checkpoints.layouts import accelerate, hf_folder, unsupported
from trace_offline.checkpoints.layouts.base import Find, Search
from trace_offline.checkpoints.listing import Listing, scan
from trace_offline.checkpoints.naming import ParsedName, natural_key, parse_name
from trace_offline.core.types import Checkpoint
from trace_offline.core.types import CheckpointState as State

_REPOSITORY = re.compile(r"models--(?P<name>.+)")
_PROVISIONAL_REF = re.compile(r"\.[0-9a-f]{8}\.tmp$")


def repository_name(folder: Path) -> str | None:
    """``models--EleutherAI--pythia-70m`` → ``EleutherAI/pythia-70m``; None for any other folder."""
    found = _REPOSITORY.fullmatch(folder.name)
    return found["name"].replace("--", "/", 1) if found and (folder / "snapshots").is_dir() else None


def repository_of(path: Path) -> Path | None:
    """The ``models--…`` folder that ``path`` is, or is a snapshot of."""
    for folder in (path, *list(path.parents)[:2]):
        if repository_name(folder):
            return folder
    return None


def read_refs(repository: Path) -> dict[str, str]:
    """Ref name → commit. Refs with a slash lie in nested folders; provisional ``.tmp`` ones are ignored."""
    refs: dict[str, str] = {}
    root = repository / "refs"
    for folder, _, names in os.walk(root):
        for name in names:
            if _PROVISIONAL_REF.search(name):
                continue
            path = Path(folder) / name
            try:
                commit = path.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError):
                continue  # a ref that cannot be read names nothing; its snapshot is then found without a name
            if commit:
                refs[path.relative_to(root).as_posix()] = commit
    return refs


def finds(repository: Path, search: Search, revisions: str | None = None, only: str | None = None) -> list[Find]:
    """All snapshots of one cached repository, one find for each step that a ref gives it.

    ``revisions``: only refs that match this pattern. ``only``: the one commit asked for.
    """
    name = repository_name(repository) or repository.name
    refs = read_refs(repository)
    within = search if search.root in repository.parents else replace(search, root=repository.parent)
    found: list[Find] = []
    snapshots = scan(repository / "snapshots")
    for commit in snapshots.folders:
        if only is not None and commit != only:
            continue
        names = sorted((ref for ref, target in refs.items() if target == commit), key=natural_key)
        if revisions is not None:
            names = [ref for ref in names if fnmatch.fnmatchcase(ref, revisions)]
            if not names and not fnmatch.fnmatchcase(commit, revisions):
                continue
        base = _snapshot(scan(repository / "snapshots" / commit), within, repository, name, names)
        if base is not None:
            found += _named(base, names, parse_name(name.split("/")[-1], bare_numbers=False), name, commit)
    return found


def _named(base: Find, names: list[str], of_name: ParsedName, name: str, commit: str) -> list[Find]:
    run = re.sub(r"[-_]?step[-_]?\d+[km]?", "", name)
    base = replace(base, run=f"hub:{run}", final=False).but(layout="hub_cache", revision=commit)
    stepped = [(ref, parse_name(ref)) for ref in names]
    stepped = [(ref, parsed) for ref, parsed in stepped if parsed.step is not None]
    if not stepped:
        checkpoint = base.checkpoint
        if checkpoint.step is None and of_name.step is not None:
            return [base.but(step=of_name.step)]
        return [base.remark(f"Revision {', '.join(names)}." if names and checkpoint.step is None else None)]
    found = []
    for index, (ref, parsed) in enumerate(stepped):
        others = [other for other in names if other != ref] if index == 0 else []
        others = [other for other in others if parse_name(other).step is None]
        found.append(
            base.but(step=parsed.step, tokens_seen=parsed.tokens_seen, stage=parsed.stage, epoch=parsed.epoch)
            .remark(parsed.note)
            .remark(f"Also known as {', '.join(others)}." if others else None)
        )
    return found


def _snapshot(listing: Listing, search: Search, repository: Path, name: str, refs: list[str]) -> Find | None:
    find = (
        unsupported.recognise(listing, search, False)
        or hf_folder.recognise(listing, search, False)
        or accelerate.recognise(listing, search, False)
    )
    wanted = f"`hf download {name}" + (f" --revision {refs[0]}" if refs else "") + "`"
    if find is None:
        if not listing.files:
            return None
        find = Find(Checkpoint(str(listing.path), "hub_cache", State.NOT_A_CHECKPOINT), run="")
    checkpoint = find.checkpoint
    if checkpoint.state is State.NOT_A_CHECKPOINT or (
        checkpoint.state is State.PARTIAL and not checkpoint.weight_files
    ):
        state, reason = _not_downloaded(repository, search, wanted)
        find = find.but(state=state, reason=reason)
    elif checkpoint.state is State.PARTIAL:
        find = find.remark(f"Fetch the rest with {wanted}.")
        if _downloading(repository, search):
            find = find.but(state=State.BEING_WRITTEN)
    if find.checkpoint.tokenizer is None:
        find = find.but(tokenizer=_tokenizer_elsewhere(repository, search))
    return find


def _not_downloaded(repository: Path, search: Search, wanted: str) -> tuple[State, str]:
    if _downloading(repository, search):
        return State.BEING_WRITTEN, "Its weights are not here yet and a download is under way: look again later."
    return State.PARTIAL, f"Its weights are not in the cache; fetch them with {wanted}."


def _downloading(repository: Path, search: Search) -> bool:
    try:
        blobs = scan(repository / "blobs")
    except OSError:
        return False  # the layout without links has no blobs folder
    return any(name.endswith(".incomplete") and search.clock.recent(entry.mtime) for name, entry in blobs.files.items())


def _tokenizer_elsewhere(repository: Path, search: Search) -> str | None:
    """The tokenizer of another snapshot of the same repository: main's first."""
    refs = read_refs(repository)
    order = [refs.get("main"), *sorted(refs.values())]
    for commit in order:
        if commit is None:
            continue
        folder = repository / "snapshots" / commit
        if folder.is_dir() and search.tokenizers.find(folder) == str(folder):
            return str(folder)
    return None

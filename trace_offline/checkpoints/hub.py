"""Checkpoints on the Hugging Face hub: list the revisions of a repository, fetch one at a time.

A listing downloads nothing. A fetched revision lies in the ordinary hub cache and is found there again, offline too.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from trace_offline.checkpoints.completeness import Clock
from trace_offline.checkpoints.hub_access import (
    cache_root,
    cause,
    endpoint_url,
    explained,
    hub_errors,
    offline,
    remember_ref,
    repository_folder,
    unreachable,
)
from trace_offline.checkpoints.hub_download import Download, plan_download
from trace_offline.checkpoints.layouts import hub_cache
from trace_offline.checkpoints.layouts.base import Search
from trace_offline.checkpoints.naming import ParsedName, natural_key, parse_name
from trace_offline.core.errors import CheckpointError
from trace_offline.core.types import Checkpoint, CheckpointState

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SOURCE = re.compile(r"hf://(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^@\s]+))?/?")


@dataclass(frozen=True, slots=True)
class _Ref:
    name: str
    commit: str


def revisions(
    source: str,
    *,
    pattern: str | None = None,
    cache_dir: Path | str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> list[Checkpoint]:
    """The revisions of ``hf://org/name[@revision]`` as checkpoints in numeric order of steps; downloads nothing.

    ``pattern``: only branches and tags that match, such as ``step*``; without it, those whose names give a step, or
    ``main`` when none does. A revision at the same commit as an earlier step is its duplicate. Offline (HF_HUB_OFFLINE,
    ``local_files_only``, or no connection) the cached revisions are listed.

    Raises CheckpointError when the repository or revision cannot be had, quoting the cause.
    """
    repo, revision = parse_source(source)
    folder = repository_folder(repo, cache_dir)
    if local_files_only or offline():
        return _cached(repo, folder, pattern, revision, "offline (HF_HUB_OFFLINE is set)" if offline() else "offline")
    try:
        refs = _remote_refs(repo, revision, endpoint, token)
    except unreachable() as error:
        try:
            return _cached(repo, folder, pattern, revision, "the hub cannot be reached")
        except CheckpointError as nothing:
            raise CheckpointError(f"{nothing.message} ({cause(error)})") from None
    except hub_errors() as error:
        raise explained(error, repo, revision) from None
    chosen = [ref for ref in refs if _wanted(ref, pattern)]
    if not chosen:
        listed = ", ".join(sorted((ref.name for ref in refs), key=natural_key)[:8]) or "none"
        raise CheckpointError(
            f'hf://{repo} has no revision that matches "{pattern}"; it has {len(refs)} branches and tags: {listed}'
            f"{', …' * (len(refs) > 8)}."
        )
    return _ordered(repo, chosen, explicit=pattern is not None or revision is not None)


def fetch(
    checkpoint: Checkpoint,
    *,
    cache_dir: Path | str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    before: Callable[[Download], None] | None = None,
    during: Callable[[], None] | None = None,
) -> Checkpoint:
    """One revision on this disk: configuration, weights (safetensors, else .bin) and tokenizer. Nothing twice.

    The result keeps location, layout and step and has ``weight_files``, ``config`` and ``tokenizer``. A checkpoint that
    is not on the hub is returned as it is. ``before``: told what will be downloaded before anything is, if anything
    must be; ``during``: called again and again while it is, from several threads. Either may raise to prevent it.

    Raises CheckpointError when it cannot be had or arrives incomplete.
    """
    if checkpoint.layout != "hub":
        return checkpoint
    repo, ref = parse_source(checkpoint.location)
    commit = checkpoint.revision or ref or "main"
    folder = repository_folder(repo, cache_dir)
    no_asking = local_files_only or offline()
    local = _on_disk(folder, commit)
    ready = local is not None and local.state is CheckpointState.COMPLETE
    if not ready or (local is not None and local.tokenizer is None and not no_asking):
        try:
            if no_asking:
                raise CheckpointError(
                    f"hf://{repo}@{commit[:12]} is not complete in the cache {cache_root(cache_dir)} and the hub may "
                    "not be asked (offline): connect and run again."
                )
            download = plan_download(repo, ref, commit, folder, endpoint, token)
            if before is not None:
                before(download)
            download.run(endpoint, token, during)
            local = _on_disk(folder, commit)
        except CheckpointError:
            if not ready:
                raise
        except (*unreachable(), *hub_errors()) as error:
            if (
                not ready
            ):  # only the tokenizer was wanted in addition; weights that are here can be used without the hub
                raise explained(error, repo, ref or commit) from None
    if local is None or local.state is not CheckpointState.COMPLETE:
        why = local.reason if local is not None else "nothing of it arrived."
        raise CheckpointError(f"hf://{repo}@{ref or commit} is not complete on this disk: {why}")
    if ref is not None and not _COMMIT.fullmatch(ref):
        remember_ref(folder, ref, commit)
    return replace(
        checkpoint,
        weight_files=local.weight_files,
        config=local.config,
        tokenizer=local.tokenizer,
        size_bytes=local.size_bytes,
    )


def is_on_disk(checkpoint: Checkpoint, cache_dir: Path | str | None = None) -> bool:
    """Whether ``fetch`` would have nothing to download for this revision's weights."""
    repo, ref = parse_source(checkpoint.location)
    local = _on_disk(repository_folder(repo, cache_dir), checkpoint.revision or ref or "main")
    return local is not None and local.state is CheckpointState.COMPLETE


def parse_source(source: str) -> tuple[str, str | None]:
    """``hf://org/name@revision`` → (``org/name``, revision or None). Raises CheckpointError for anything else."""
    found = _SOURCE.fullmatch(source)
    if not found:
        raise CheckpointError(
            f'Expected hf://org/name or hf://org/name@revision, found "{source}". '
            "Choose several revisions with --revisions 'step*'."
        )
    return found["repo"], found["revision"]


def _remote_refs(repo: str, revision: str | None, endpoint: str | None, token: str | None) -> list[_Ref]:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint_url(endpoint), token=token)
    if revision is not None:
        if _COMMIT.fullmatch(revision):
            return [_Ref(revision, revision)]
        commit = api.repo_info(repo, revision=revision).sha
        return [_Ref(revision, str(commit))]
    listed = api.list_repo_refs(repo)
    return [_Ref(ref.name, ref.target_commit) for ref in (*listed.branches, *listed.tags)]


def _wanted(ref: _Ref, pattern: str | None) -> bool:
    return pattern is None or fnmatch.fnmatchcase(ref.name, pattern)


def _ordered(repo: str, refs: list[_Ref], *, explicit: bool) -> list[Checkpoint]:
    """One checkpoint a step; names without a step only where they are all there is, or were asked for."""
    of_repo = parse_name(repo.split("/")[-1], bare_numbers=False)
    parsed = [(ref, parse_name(ref.name)) for ref in sorted(refs, key=lambda item: natural_key(item.name))]
    stepped = [(ref, name) for ref, name in parsed if name.step is not None]
    others = [(ref, name) for ref, name in parsed if name.step is None]
    stepped.sort(key=lambda pair: (pair[1].step or 0, pair[1].stage or ""))
    result: list[Checkpoint] = []
    owner: dict[str, Checkpoint] = {}
    taken: dict[int, Checkpoint] = {}
    for ref, name in stepped:
        item = _checkpoint(repo, ref, name)
        step = item.step
        assert step is not None
        if step in taken:
            item = _second(item, taken[step])
        elif ref.commit in owner:
            first = owner[ref.commit]
            item = replace(
                item,
                state=CheckpointState.DUPLICATE,
                duplicate_of=first.step,
                reason=f"The same commit as step {first.step}: computed once, shown at both.",
            )
            taken[step] = item
        else:
            taken[step] = owner[ref.commit] = item
        result.append(item)
    names: dict[str, list[str]] = {}
    for ref, _ in others:
        if ref.commit in owner:
            names.setdefault(ref.commit, []).append(ref.name)
    result = [
        replace(item, reason=f"Also known as {', '.join(names[item.revision])}.")
        if item.revision in names and item.state is CheckpointState.COMPLETE
        else item
        for item in result
    ]
    if stepped:
        return result
    loose = [(ref, name) for ref, name in others if explicit or ref.name == "main"] or others[:1]
    return [
        _checkpoint(repo, ref, of_repo if of_repo.step is not None else name, note=len(loose) == 1)
        for ref, name in loose
    ]


def _checkpoint(repo: str, ref: _Ref, name: ParsedName, *, note: bool = False) -> Checkpoint:
    reason = name.note
    if name.step is None and note:
        reason = "The name of its revision gives no step."
    return Checkpoint(
        location=f"hf://{repo}@{ref.name}",
        layout="hub",
        state=CheckpointState.COMPLETE,
        step=name.step,
        tokens_seen=name.tokens_seen,
        stage=name.stage,
        epoch=name.epoch,
        reason=reason,
        revision=ref.commit,
    )


def _second(item: Checkpoint, first: Checkpoint) -> Checkpoint:
    same = item.revision == first.revision
    why = (
        "the same commit"
        if same
        else f"other contents; choose a stage or series with --revisions '{item.stage or ''}*'"
    )
    return replace(
        item,
        step=None,
        state=CheckpointState.DUPLICATE if same else CheckpointState.UNSUPPORTED,
        duplicate_of=first.step if same else None,
        reason=f"Step {first.step} is already in the series as {first.location.split('@')[-1]}, with {why}.",
    )


def _cached(repo: str, folder: Path, pattern: str | None, revision: str | None, why: str) -> list[Checkpoint]:
    """The revisions in the cache, as the listing of the hub would name them."""
    refs = [_Ref(name, commit) for name, commit in hub_cache.read_refs(folder).items()] if folder.is_dir() else []
    if revision is not None:
        refs = [ref for ref in refs if ref.name == revision]
        if not refs and _COMMIT.fullmatch(revision):
            refs = [_Ref(revision, revision)]
    refs = [ref for ref in refs if _wanted(ref, pattern) and (folder / "snapshots" / ref.commit).is_dir()]
    if not refs:
        what = f"hf://{repo}" + (f"@{revision}" if revision else f' with revisions "{pattern}"' if pattern else "")
        raise CheckpointError(
            f"{what} is not in the cache {folder.parent} and {why}: connect and run again, or download it first with "
            f"`hf download {repo} --revision {revision or 'NAME'}`."
        )
    listed = _ordered(repo, refs, explicit=pattern is not None or revision is not None)
    result = []
    for item in listed:
        local = _on_disk(folder, str(item.revision))
        if item.state is CheckpointState.COMPLETE and (local is None or local.state is not CheckpointState.COMPLETE):
            reason = local.reason if local is not None else "It is not in the cache."
            state = local.state if local is not None else CheckpointState.PARTIAL
            item = replace(item, state=state, reason=reason)
        result.append(item)
    return result


def _on_disk(folder: Path, commit: str) -> Checkpoint | None:
    """The snapshot of this commit in the cache, judged like any other folder."""
    if not (folder / "snapshots" / commit).is_dir():
        return None
    found = hub_cache.finds(folder, Search(folder, Clock(time.time())), only=commit)
    return found[0].checkpoint if found else None

"""How the hub is reached: environment, cache folder, and the library's errors in plain words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trace_offline.core.errors import CheckpointError


def offline() -> bool:
    """Has the user forbidden to ask the hub?"""
    from huggingface_hub import constants

    # The library reads the variable when it is imported; a script may set it later and mean it.
    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def cache_root(cache_dir: Path | str | None) -> Path:
    """The folder of the hub cache: the one given, else what the environment says now."""
    from huggingface_hub import constants

    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if named := os.environ.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(constants.HF_HUB_CACHE)


def repository_folder(repo: str, cache_dir: Path | str | None) -> Path:
    """Where the cache keeps this repository."""
    return cache_root(cache_dir).absolute() / f"models--{repo.replace('/', '--')}"


def endpoint_url(endpoint: str | None) -> str | None:
    """The hub to ask: the one given, else HF_ENDPOINT as it is now (the library reads it only when imported)."""
    return endpoint or os.environ.get("HF_ENDPOINT") or None


def remember_ref(folder: Path, ref: str, commit: str) -> None:
    """Keep the revision's name: a download by commit leaves none, and offline the step is known by the name only."""
    path = folder / "refs" / ref
    if not path.resolve().is_relative_to((folder / "refs").resolve()):
        return
    try:
        if path.is_file() and path.read_text(encoding="utf-8") == commit:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        provisional = path.with_name(f"{path.name}.{os.getpid() % 16**8:08x}.tmp")
        provisional.write_text(commit, encoding="utf-8")
        provisional.replace(path)
    except OSError:
        # A cache that may only be read: the revision is usable now, only its name is not kept for later.
        return


def unreachable() -> tuple[type[BaseException], ...]:
    """No answer from the hub, as opposed to an answer that says no."""
    from huggingface_hub import errors

    transport = [kind for kind in errors.HTTPError.__subclasses__() if kind.__name__ == "RequestError"]
    return (*transport, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)


def hub_errors() -> tuple[type[BaseException], ...]:
    """Whatever the hub library raises when it cannot do what it was asked."""
    from huggingface_hub import errors

    return (errors.HTTPError, errors.HFValidationError, OSError)


def explained(error: BaseException, repo: str, revision: str | None) -> CheckpointError:
    """The error in the words of the user's command, quoting the cause."""
    from huggingface_hub import errors

    what = f"hf://{repo}" + (f"@{revision}" if revision else "")
    if isinstance(error, errors.RevisionNotFoundError):
        text = f"{what}: the repository has no such revision; `trace-offline discover hf://{repo}` lists those it has."
    elif isinstance(error, errors.GatedRepoError):
        text = f"{what} is gated: accept its terms on the hub, then log in with `hf auth login`."
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = f"{what} was not found: check the spelling; if it is private, log in with `hf auth login`."
    elif isinstance(error, errors.OfflineModeIsEnabled):
        text = f"{what} is not in the cache and HF_HUB_OFFLINE is set: unset it and run again."
    elif isinstance(error, unreachable()):
        text = f"{what} is not complete in the cache and the hub cannot be reached: check the connection."
    else:
        text = f"{what} cannot be fetched."
    return CheckpointError(f"{text} ({cause(error)})")


def cause(error: BaseException) -> str:
    """Name and first line of the innermost error: the outer ones guess at connections when a file is missing."""
    inner = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    lines = str(inner).strip().splitlines()
    return f"{type(inner).__name__}: {lines[0]}" if lines else type(inner).__name__


def quiet_bar() -> Any:
    """A progress bar that shows nothing: downloads run behind an analysis that has its own."""
    from huggingface_hub.utils import tqdm

    class Quiet(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Quiet

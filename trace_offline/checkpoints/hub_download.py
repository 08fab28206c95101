"""One download from the hub: which files, how large, under which names the cache will keep them; and doing it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_offline.checkpoints.hub_access import endpoint_url
from trace_offline.core.errors import CheckpointError

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SHARDS = (
    re.compile(r"model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json"),
    re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin|pytorch_model\.bin\.index\.json"),
)
_BESIDES = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a revision. ``size`` in bytes and ``blob``, its name in the cache, are None where the hub is silent."""

    name: str
    size: int | None
    blob: str | None


@dataclass(frozen=True, slots=True)
class Download:
    """What is about to be fetched. ``folder``: of the repository in the cache; ``ref``: the revision's name, if any."""

    repo: str
    ref: str | None
    commit: str
    folder: Path
    files: tuple[HubFile, ...]

    def run(self, endpoint: str | None, token: str | None, during: Callable[[], None] | None = None) -> None:
        """Fetch the files into the cache; ``during`` is called at every portion, in several threads, and may raise."""
        from huggingface_hub import snapshot_download

        snapshot_download(
            self.repo,
            revision=self.commit,
            cache_dir=self.folder.parent,
            endpoint=endpoint_url(endpoint),
            token=token,
            allow_patterns=[item.name for item in self.files],
            tqdm_class=_listening_bar(during or _nothing),
        )


def plan_download(
    repo: str, ref: str | None, commit: str, folder: Path, endpoint: str | None, token: str | None
) -> Download:
    """Ask the hub for the files of a revision and choose those to fetch. Raises CheckpointError without weights."""
    from huggingface_hub import HfApi

    # Unlike a listing of the tree, this answers at once when there is no connection (no retries with pauses).
    info = HfApi(endpoint=endpoint_url(endpoint), token=token).model_info(repo, revision=commit, files_metadata=True)
    files = {item.rfilename: item for item in info.siblings or []}
    chosen = []
    for name in needed(repo, list(files)):
        item = files[name]
        chosen.append(HubFile(name, item.size, item.blob_id if item.lfs is None else item.lfs.sha256))
    return Download(repo, ref, commit, folder, tuple(chosen))


def needed(repo: str, names: list[str]) -> list[str]:
    """Configuration, tokenizer and one set of weights: single file before shards, safetensors before pickles."""
    top = [name for name in names if "/" not in name]
    besides = [name for name in top if name.endswith(_BESIDES) and not name.endswith(".index.json")]
    for single, shards in zip(_SINGLE, _SHARDS, strict=True):
        weights = [single] if single in top else [name for name in top if shards.fullmatch(name)]
        if weights:
            return sorted({*besides, *weights})
    adapters = [name for name in top if name.startswith("adapter_")]
    what = "a PEFT adapter only" if adapters else ", ".join(sorted(top)[:6]) or "no files"
    raise CheckpointError(
        f"hf://{repo} holds no weights that can be read: expected model.safetensors or pytorch_model.bin (or their "
        f"shards), found {what}."
    )


def _nothing() -> None:
    """Nobody listens."""


def _listening_bar(heard: Callable[[], None]) -> Any:
    """A progress bar that shows nothing, because the analysis has its own, and says whenever something arrived."""
    from trace_offline.checkpoints.hub_access import quiet_bar

    class Listening(quiet_bar()):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> bool | None:
            heard()
            result: bool | None = super().update(n)
            return result

    return Listening

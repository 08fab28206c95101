"""The tokenizer of a hub repository alone: enough to build an evaluation set, without gigabytes of weights."""

from __future__ import annotations

from pathlib import Path

from trace_offline.checkpoints.hub import parse_source
from trace_offline.checkpoints.hub_access import (
    cache_root,
    endpoint_url,
    explained,
    hub_errors,
    offline,
    quiet_bar,
    unreachable,
)
from trace_offline.core.errors import CheckpointError

_FILES = (
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)


def fetch_tokenizer(source: str, *, cache_dir: Path | str | None = None, endpoint: str | None = None) -> Path:
    """The folder with the tokenizer of ``hf://org/name[@revision]`` (default: main), downloaded at most once.

    Raises CheckpointError when the repository cannot be had or holds no tokenizer.
    """
    from huggingface_hub import snapshot_download

    repo, revision = parse_source(source)
    revision = revision or "main"
    try:
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache_root(cache_dir),
                endpoint=endpoint_url(endpoint),
                allow_patterns=list(_FILES),
                local_files_only=offline(),
                tqdm_class=quiet_bar(),
            )
        )
    except (*unreachable(), *hub_errors()) as error:
        raise explained(error, repo, revision) from None
    if not any(item.name.startswith(("tokenizer", "vocab", "spiece")) for item in folder.iterdir()):
        raise CheckpointError(f"hf://{repo}@{revision} holds no tokenizer; name a folder that does with --tokenizer.")
    return folder

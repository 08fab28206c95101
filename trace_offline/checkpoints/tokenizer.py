"""The tokenizer of a checkpoint: where it lies, loading it offline, and a hash of what determines token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trace_offline.checkpoints.tokenizer_folders import TokenizerFinder
from trace_offline.core.errors import CheckpointError, UsageError
from trace_offline.core.hashing import canonical_json, digest, file_digest
from trace_offline.core.types import Checkpoint

_IDS = ("normalizer", "pre_tokenizer", "post_processor")
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "config.json",
)
_known: dict[str, str] = {}


def tokenizer_folder(checkpoint: Checkpoint, override: str | Path | None = None) -> Path | None:
    """The folder (or ``tokenizer.json``) to load the tokenizer from: the user's, the one found, one beside or above.

    None when there is none. Raises UsageError when ``override`` is given and holds no tokenizer.
    """
    if override is not None:
        path = Path(override)
        if path.is_file() or (path.is_dir() and TokenizerFinder().find(path) == str(path)):
            return path
        found = "a folder without tokenizer files" if path.is_dir() else "nothing there"
        raise UsageError(
            f"--tokenizer: expected a folder with tokenizer files (tokenizer.json, …) or a tokenizer.json, "
            f"found {found}: {path}"
        )
    if checkpoint.tokenizer is not None:
        return Path(checkpoint.tokenizer)
    if checkpoint.location.startswith("hf://"):
        return None
    location = Path(checkpoint.location)
    beside = TokenizerFinder().find(location if location.is_dir() else location.parent)
    return None if beside is None else Path(beside)


def load_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer of a folder (or of one ``tokenizer.json`` file); no network, no code of the folder.

    Raises CheckpointError when the files cannot be read as a tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(folder)
    file = path if path.is_file() else path / "tokenizer.json"
    problem: Exception | None = None
    if path.is_dir():
        try:
            return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a folder with tokenizer.json alone, a class this version does not know, …
            problem = error
    if file.is_file():
        try:
            return PreTrainedTokenizerFast(tokenizer_file=str(file))
        except Exception as error:
            problem = error
    reason = (str(problem).strip() or type(problem).__name__).splitlines()[0] if problem else "there is no such file"
    raise CheckpointError(
        f"{path}: no tokenizer can be loaded from it ({reason[:300]}). Name a folder that has one with --tokenizer."
    )


def tokenizer_hash(folder_or_tokenizer: Any) -> str:
    """32 hex digits that are equal when the same text gives the same ids.

    Over the vocabulary and merges, the normalizer, pre-tokenizer, post-processor and added tokens of a fast tokenizer,
    or the sorted vocabulary of another; not over padding, truncation or chat templates, which do not change ids. A
    folder is loaded first, so that a folder and the tokenizer loaded from it have one hash.
    """
    if not isinstance(folder_or_tokenizer, str | Path):
        return _hash(folder_or_tokenizer)
    path = Path(folder_or_tokenizer)
    files = [path] if path.is_file() else [file for name in _FILES if (file := path / name).is_file()]
    # many checkpoints carry copies of one tokenizer: the same files need not be parsed again
    content = digest(*(part for file in files for part in (file.name, file_digest(file))))
    if content not in _known:
        _known[content] = _hash(load_tokenizer(path))
    return _known[content]


def _hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
    if backend is None and hasattr(tokenizer, "to_str"):
        backend = tokenizer
    if backend is None or not hasattr(backend, "to_str"):
        return digest("vocabulary", canonical_json(sorted(tokenizer.get_vocab().items())))
    description = json.loads(backend.to_str())
    parts = {name: description.get(name) for name in _IDS}
    parts["model"] = {name: value for name, value in description["model"].items() if name != "dropout"}
    parts["added_tokens"] = sorted(description.get("added_tokens", []), key=lambda token: int(token["id"]))
    return digest("fast", canonical_json(parts))

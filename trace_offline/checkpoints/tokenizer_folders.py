"""Where the tokenizer of a checkpoint lies: beside the weights, above them, or in the run's final folder."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

_TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json"}
)
_CONFIG_ONLY = "tokenizer_config.json"  # enough for tokenizers without a vocabulary (bytes, characters)
_SIBLINGS = ("tokenizer", "final", "final_model", "final_checkpoint", "best", "last", "model")
_LEVELS_UP = 2


def has_tokenizer(names: Collection[str]) -> bool:
    """Do these file names include a tokenizer?"""
    return not _TOKENIZER_FILES.isdisjoint(names) or _CONFIG_ONLY in names


class TokenizerFinder:
    """Looks each folder up once, however many checkpoints ask for it."""

    def __init__(self) -> None:
        self._known: dict[Path, bool] = {}
        self._above: dict[Path, str | None] = {}

    def find(self, folder: Path, names: Collection[str] | None = None) -> str | None:
        """Folder with tokenizer files for weights in ``folder`` (whose file names may be given), or None."""
        if names is not None:
            self._known[folder] = has_tokenizer(names)
        if self._has(folder):
            return str(folder)
        parent = folder.parent
        if parent not in self._above:
            self._above[parent] = self._search_from(parent)
        return self._above[parent]

    def _search_from(self, parent: Path) -> str | None:
        for above in (parent, *parent.parents)[:_LEVELS_UP]:
            for candidate in (above, *(above / name for name in _SIBLINGS)):
                if self._has(candidate):
                    return str(candidate)
        return None

    def _has(self, folder: Path) -> bool:
        known = self._known.get(folder)
        if known is None:
            try:
                known = has_tokenizer(os.listdir(folder))
            except OSError:
                known = False
            self._known[folder] = known
        return known

"""The tokenizer of a checkpoint as the builders need it: ids with character offsets, special tokens, longest row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_offline.checkpoints.tokenizer_folders import TokenizerFinder
from trace_offline.core.errors import CheckpointError, EvaluationSetError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LONGEST = 1024
"""Default for the longest row, unless the model takes less."""

_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class Encoded:
    """One text without special tokens of the row: ``ids``, ``tokens`` as in the vocabulary, ``offsets`` in the text."""

    ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class SourceTokenizer:
    """A loaded tokenizer. ``prefix`` and ``suffix``: what it puts around a text by itself (``<s>``; ``[CLS] … [SEP]``).

    ``special_ids``: tokens that never count; ``longest``: longest row its model takes, at most ``LONGEST``;
    ``vocabulary``: rows of the model's embedding when its configuration is known.
    """

    backend: Tokenizer
    name: str
    hash: str
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    bos_id: int | None
    mask_id: int | None
    pad_id: int | None
    special_ids: tuple[int, ...]
    longest: int
    vocabulary: int | None

    @classmethod
    def load(cls, source: Path | str) -> SourceTokenizer:
        """From a checkpoint folder (or one above it that has the tokenizer) or a ``tokenizer.json`` file.

        Raises EvaluationSetError when none is found or it gives no character offsets.
        """
        from trace_offline.checkpoints.tokenizer import load_tokenizer, tokenizer_hash

        path = Path(source)
        if not path.exists():
            raise EvaluationSetError(
                f"{path}: there is no such tokenizer; give a checkpoint folder or a tokenizer.json file."
            )
        if path.is_dir():
            place = TokenizerFinder().find(path)
            if place is None:
                raise EvaluationSetError(
                    f"{path}: no tokenizer in this folder or above it. Give a folder with tokenizer.json."
                )
            path = Path(place)
        try:
            loaded = load_tokenizer(path)
        except CheckpointError as error:
            raise EvaluationSetError(error.message) from error
        backend = getattr(loaded, "backend_tokenizer", None)
        if backend is None:
            raise EvaluationSetError(
                f"{path}: the tokenizer gives no character offsets, so words cannot be aligned with its tokens. Save "
                "it in the fast form (tokenizer.json)."
            )
        backend.no_truncation()
        backend.no_padding()
        prefix, suffix = _frame(backend)
        special = {int(token) for token in loaded.all_special_ids}
        special |= {identifier for identifier, token in backend.get_added_tokens_decoder().items() if token.special}
        mask = loaded.mask_token_id
        if mask is None:
            usual = (backend.token_to_id(text) for text in ("[MASK]", "<mask>"))
            mask = next((identifier for identifier in usual if identifier in special), None)
        config = _json((path if path.is_dir() else path.parent) / "config.json")
        return cls(
            backend=backend,
            name="/".join(path.absolute().parts[-2:]),
            hash=tokenizer_hash(path),
            prefix=prefix,
            suffix=suffix,
            bos_id=loaded.bos_token_id if loaded.bos_token_id is not None else (prefix[0] if prefix else None),
            mask_id=mask,
            pad_id=loaded.pad_token_id,
            special_ids=tuple(sorted(special | set(prefix) | set(suffix))),
            longest=_longest(config, loaded.model_max_length),
            vocabulary=size if isinstance(size := config.get("vocab_size"), int) else None,
        )

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Each text without the special tokens of the row."""
        return [
            Encoded(found.ids, found.tokens, found.offsets)
            for found in self.backend.encode_batch(list(texts), add_special_tokens=False)
        ]

    def row_frame(self, objective: str, add_bos: bool | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Special tokens before and after each text.

        The tokenizer's own; when it adds none, the beginning-of-sequence token if it has one (``add_bos`` None or True)
        so that the first word, too, is predicted. ``add_bos=False``: nothing before the text. A masked LM always gets
        the tokenizer's own. Raises EvaluationSetError when ``add_bos=True`` and there is no such token.
        """
        if objective == "masked_lm":
            return self.prefix, self.suffix
        if add_bos is False:
            return (), self.suffix
        if self.prefix:
            return self.prefix, self.suffix
        if self.bos_id is not None:
            return (self.bos_id,), self.suffix
        if add_bos:
            raise EvaluationSetError(f"the tokenizer {self.name} has no beginning-of-sequence token to put first.")
        return (), self.suffix


def _frame(backend: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Special tokens that the post-processor puts before and after a text."""
    found = backend.encode("a")
    text = [index for index, special in enumerate(found.special_tokens_mask) if not special]
    if not text:
        return tuple(found.ids), ()
    return tuple(found.ids[: text[0]]), tuple(found.ids[text[-1] + 1 :])


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationSetError(f"{path}: cannot be read as JSON ({error}).") from error
    return content if isinstance(content, dict) else {}


def _longest(config: dict[str, Any], of_tokenizer: int) -> int:
    text_config = config.get("text_config")
    sections = [config, text_config if isinstance(text_config, dict) else {}]
    values = [section.get(key) for section in sections for key in _LENGTH_KEYS] + [of_tokenizer]
    return int(min([LONGEST, *(value for value in values if isinstance(value, (int, float)) and value > 1)]))

"""Saving one checkpoint so that a reader sees either the whole of it or nothing."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_offline.core.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import nn

RECORD = "trace_offline.json"
"""Written beside the weights: step and tokens seen."""


def save_checkpoint(
    model: Any,
    folder: Path | str,
    step: int,
    *,
    tokenizer: Any = None,
    tokens_seen: int | None = None,
    name: str = "step{step}",
) -> Path:
    """Save ``model`` (and ``tokenizer``) into ``folder/name`` and return that folder.

    Models and tokenizers of transformers are written with ``save_pretrained``; any other ``torch.nn.Module`` as
    ``model.safetensors`` (its state dict; tied tensors once). Everything is written into a temporary neighbour that is
    renamed when complete, so an interrupted save never leaves half a checkpoint under the final name. In distributed
    training call it on one process only, with the unwrapped model.

    Raises UsageError for a bad ``step`` or ``name`` or a wrapped model, CheckpointError when the folder exists or
    writing fails.
    """
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise UsageError(f"save_checkpoint: step must be a whole number from 0; found {step!r}.")
    if tokens_seen is not None and (not isinstance(tokens_seen, int) or tokens_seen < 0):
        raise UsageError(f"save_checkpoint: tokens_seen must be a whole number from 0 or None; found {tokens_seen!r}.")
    try:
        final_name = name.format(step=step)
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f'save_checkpoint: name may use {{step}} only; found "{name}".') from error
    if "{step" not in name or not final_name or Path(final_name).name != final_name:
        raise UsageError(f'save_checkpoint: name must be a folder name containing {{step}}; found "{name}".')
    wrapper = type(model).__name__
    if wrapper in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
        raise UsageError(
            f"save_checkpoint: the model is wrapped in {wrapper}; pass the model inside it (model.module)."
        )
    target = Path(folder) / final_name
    if target.exists():
        raise CheckpointError(
            f"{target}: already exists; checkpoints are never overwritten. Delete it, or save to another folder."
        )
    temporary = target.with_name(f".{final_name}.{uuid.uuid4().hex[:8]}.tmp")
    record = {"format_version": 1, "step": step, "tokens_seen": tokens_seen}
    try:
        temporary.mkdir(parents=True)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(temporary)
        else:
            _save_state(model, temporary / "model.safetensors")
        if tokenizer is not None:
            _save_tokenizer(tokenizer, temporary)
        (temporary / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        os.rename(temporary, target)
    except OSError as error:
        raise CheckpointError(f"{target}: the checkpoint cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _save_state(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    # Keeps one name of each group of tied tensors and notes the others in the file's metadata.
    save_model(model, str(path))


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    elif hasattr(tokenizer, "save"):
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        raise UsageError(
            "save_checkpoint: tokenizer must have save_pretrained (transformers) or save (tokenizers); found "
            f"{type(tokenizer).__name__}."
        )

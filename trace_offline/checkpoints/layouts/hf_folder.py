"""Hugging Face model folders, and those of the HF Trainer, whose ``trainer_state.json`` is written last."""

from __future__ import annotations

import json
import re
from pathlib import Path

from trace_offline.checkpoints.layouts.base import (
    SIDECAR,
    Find,
    Identity,
    Search,
    identify,
    read_trainer_state,
    total_size,
)
from trace_offline.checkpoints.layouts.weights_in_folder import folder_weights
from trace_offline.checkpoints.listing import Listing
from trace_offline.checkpoints.naming import StepSource, parse_name
from trace_offline.core.types import Checkpoint
from trace_offline.core.types import CheckpointState as State

_TRAINER_FOLDER = re.compile(r"checkpoint-\d+")
# Written by the Trainer between the weights and trainer_state.json.
_RESUME_FILE = re.compile(r"optimizer\.(?:pt|bin)|scheduler\.pt|scaler\.pt|rng_state(?:_\d+)?\.pth")
_STATE = "trainer_state.json"


def recognise(listing: Listing, search: Search, has_nested: bool) -> Find | None:
    """A folder with ``config.json`` and weights, or one that the HF Trainer wrote."""
    files = listing.files
    resume = any(_RESUME_FILE.fullmatch(name) for name in files)
    of_trainer = (
        _STATE in files
        or "training_args.bin" in files
        or (resume and bool(_TRAINER_FOLDER.fullmatch(listing.path.name)))
    )
    config = _config(listing)
    if not of_trainer and config is None:
        return None
    weights = folder_weights(listing, search.clock)
    trainer_state = read_trainer_state(listing.path / _STATE) if _STATE in files else None
    identity = identify(
        listing.path,
        search,
        own_name=not has_nested,
        sidecar=listing.path / SIDECAR if SIDECAR in files else None,
        trainer_state=trainer_state,
    )
    layout = "hf_trainer" if of_trainer else "hf_folder"
    if weights is None:
        return _without_weights(listing, search, layout, identity, config, has_nested=has_nested)
    state, reason = weights.verdict.state, weights.verdict.reason
    if state is State.COMPLETE and config is not None and (problem := _config_problem(listing, config, search)):
        state, reason = problem
    if state is State.COMPLETE and not has_nested:
        unfinished = _trainer_unfinished(listing, search, resume=resume, state_read=trainer_state is not None)
        state, reason = unfinished or (state, reason)
    checkpoint = Checkpoint(
        location=str(listing.path),
        layout=layout,
        state=state,
        reason=reason,
        weight_files=tuple(sorted(str(listing.path / name) for name in weights.names)),
        config=str(listing.path / config) if config else None,
        tokenizer=search.tokenizers.find(listing.path, files),
        size_bytes=total_size(listing, weights.names),
        **identity.fields(),
    )
    run = listing.path if has_nested else listing.path.parent
    find = Find(checkpoint, str(run), weights.verdict.layout_digest, final=has_nested, by_epoch=identity.by_epoch)
    return find.remark(identity.note)


def _config(listing: Listing) -> str | None:
    entry = listing.files.get("config.json")
    return "config.json" if entry and not entry.broken else None


def _config_problem(listing: Listing, config: str, search: Search) -> tuple[State, str] | None:
    try:
        content = json.loads((listing.path / config).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        recent = search.clock.recent(listing.files[config].mtime)
        return (State.BEING_WRITTEN if recent else State.UNREADABLE), f"{config} is no valid JSON ({error})."
    if not isinstance(content, dict):
        return State.UNREADABLE, f"{config} is no JSON object; expected the configuration of a Hugging Face model."
    return None


def _trainer_unfinished(
    listing: Listing, search: Search, *, resume: bool, state_read: bool
) -> tuple[State, str] | None:
    """The Trainer writes weights, optimizer, random state and, last, trainer_state.json; there is no rename."""
    if state_read:
        return None
    damaged = _STATE in listing.files
    recent = search.clock.recent(listing.newest)
    if resume or damaged:
        what = f"{_STATE} is cut short" if damaged else f"{_STATE}, which the Trainer writes last, is missing"
        if recent:
            ago = max(0, round(search.clock.now - listing.newest))
            return (
                State.BEING_WRITTEN,
                f"{what} and files changed {ago} s ago: it is still being saved; look again later.",
            )
        return State.PARTIAL, f"{what}: the save was interrupted, so the weights may belong to no single step."
    if recent and _TRAINER_FOLDER.fullmatch(listing.path.name) and search.is_trainer_run(listing.path.parent):
        return State.BEING_WRITTEN, (
            f"{_STATE} is missing, the other checkpoints of this run have one, and files changed moments ago: "
            "it is still being saved; look again later."
        )
    return None


def _without_weights(
    listing: Listing, search: Search, layout: str, identity: Identity, config: str | None, *, has_nested: bool
) -> Find | None:
    named = parse_name(listing.path.name).source in (StepSource.STEP, StepSource.CHECKPOINT)
    if has_nested or not (named or config):
        return None  # a run's own folder with its state and logs, or tokenizer files: nothing anyone calls a checkpoint
    if not named and not _is_model_config(listing.path / "config.json"):
        return None
    recent = search.clock.recent(listing.newest)
    shown = ", ".join(sorted(listing.files)[:4])
    if named:
        state = State.BEING_WRITTEN if recent else State.PARTIAL
        reason = f"It holds no weights yet (found {shown})." if recent else f"It holds no weights (found {shown})."
    else:
        state = State.NOT_A_CHECKPOINT
        reason = f"It holds a model's configuration but no weights (found {shown})."
    checkpoint = Checkpoint(
        location=str(listing.path), layout=layout, state=state, reason=reason, config=None, **identity.fields()
    )
    return Find(checkpoint, str(listing.path.parent))


def _is_model_config(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and bool({"model_type", "architectures"} & content.keys())

"""Single files: raw state dicts, nanoGPT's ``ckpt.pt`` and Lightning's ``.ckpt``, told apart without unpickling."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trace_offline.checkpoints.completeness import Verdict, check_weight_file
from trace_offline.checkpoints.layouts.base import SIDECAR, Find, Search, identify
from trace_offline.checkpoints.layouts.unsupported import unsupported_file
from trace_offline.checkpoints.listing import FileEntry, Listing
from trace_offline.checkpoints.naming import StepSource, parse_name
from trace_offline.checkpoints.safetensors_header import read_header
from trace_offline.checkpoints.torch_archive import TorchOutline, is_torch_file
from trace_offline.core.errors import CheckpointError
from trace_offline.core.types import Checkpoint
from trace_offline.core.types import CheckpointState as State

_ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_FOREIGN_ENDINGS = (".gguf", ".zanj")
_PROVISIONAL = re.compile(r"\.(?:incomplete|tmp|part|partial)$")
# What training leaves beside the weights: never the weights themselves.
_AUXILIARY = re.compile(
    r"(?:optimizer|optim|opt_state|scheduler|lr_scheduler|scaler|sampler|rng|random_states|training_args"
    r"|custom_checkpoint|train_state|trainer_state|dataloader|batches|dataset)(?:[-_.].*)?|(?:train|val|valid|test)\.\w+",
    re.IGNORECASE,
)
_BATCH_TENSORS = frozenset({"input_ids", "attention_mask", "labels", "token_type_ids", "example", "group", "split"})
_STEP_KEYS = ("iter_num", "global_step", "step", "iteration", "steps")


def candidates(listing: Listing) -> list[str]:
    """Names in a folder that may be weights of their own."""
    found = []
    for name in listing.files:
        stem = _PROVISIONAL.sub("", name)
        if stem.lower().endswith(_ENDINGS + _FOREIGN_ENDINGS) and not _AUXILIARY.fullmatch(stem):
            found.append(name)
    return found


def recognise(folder: Listing, name: str, search: Search, *, alone: bool, asked: bool = False) -> Find | None:
    """One file. ``alone``: the only candidate of its folder, whose name may then be a number that is the step.

    ``None`` for a ``.bin`` that torch did not write (token files, exports) and for saved batches, unless ``asked``: the
    user named this very file.
    """
    path, entry = folder.path / name, folder.files[name]
    if foreign := unsupported_file(name, str(path)):
        return _made(folder, path, entry, search, foreign[0], Verdict(State.UNSUPPORTED, foreign[1]))
    if _PROVISIONAL.search(name):
        if _PROVISIONAL.sub("", name) in folder.files:
            return None
        recent = search.clock.recent(entry.mtime)
        state = State.BEING_WRITTEN if recent else State.PARTIAL
        reason = f"{name} still has its provisional name: " + (
            "it is being written." if recent else "the save or download was interrupted."
        )
        return _made(folder, path, entry, search, "raw", Verdict(state, reason))
    if entry.broken:
        return _made(folder, path, entry, search, "raw", Verdict(State.PARTIAL, f"{name} is a link to a missing file."))
    if name.endswith(".bin") and not asked and not _begins_like_torch(path):
        return None
    known = parse_name(name).source in (StepSource.STEP, StepSource.CHECKPOINT, StepSource.NUMBER)
    verdict = check_weight_file(path, entry.mtime, search.clock, keys=not known)
    layout = "raw"
    if verdict.outline is not None and verdict.state is State.COMPLETE:
        layout, verdict = _judge_content(name, verdict, verdict.outline)
    elif verdict.state is State.COMPLETE:
        try:
            batches = _is_batches(path)
        except (CheckpointError, OSError):  # it was whole a moment ago
            verdict = Verdict(State.UNREADABLE, f"{name} was removed or changed while it was looked at.")
        else:
            if batches and not asked:
                return None
            if batches:
                verdict = Verdict(State.NOT_A_CHECKPOINT, f"{name} holds token batches, not weights.")
    return _made(folder, path, entry, search, layout, verdict, alone=alone)


def _made(
    folder: Listing, path: Path, entry: FileEntry, search: Search, layout: str, verdict: Verdict, *, alone: bool = False
) -> Find:
    def content() -> dict[str, Any]:
        return {"step": verdict.outline.integer(*_STEP_KEYS) if verdict.outline else None}

    sidecar = folder.path / SIDECAR if alone and SIDECAR in folder.files else None
    identity = identify(path, search, content=content, sidecar=sidecar, numbered_parent=alone)
    checkpoint = Checkpoint(
        location=str(path),
        layout=layout,
        state=verdict.state,
        reason=verdict.reason,
        weight_files=() if verdict.state is State.UNSUPPORTED else (str(path),),
        tokenizer=search.tokenizers.find(folder.path, folder.files),
        size_bytes=entry.size,
        **identity.fields(),
    )
    # step_100/model.pt belongs to the run above step_100; ckpt_100.pt to its own folder's.
    by_folder = parse_name(path.name).step is None and parse_name(folder.path.name, bare_numbers=alone).step is not None
    run = folder.path.parent if by_folder and folder.path != search.root else folder.path
    return Find(checkpoint, str(run), verdict.layout_digest, by_epoch=identity.by_epoch).remark(identity.note)


def _judge_content(name: str, verdict: Verdict, found: TorchOutline) -> tuple[str, Verdict]:
    keys = set(found.keys)
    if {"model_args", "iter_num"} <= keys:
        return "nanogpt", verdict
    if "state_dict" in keys and keys & {"pytorch-lightning_version", "lightning_version", "loops"}:
        return "lightning", verdict
    if keys == {"state", "param_groups"}:
        return "raw", Verdict(State.NOT_A_CHECKPOINT, f"{name} holds the state of an optimizer, not weights.")
    if found.complete_keys and not keys:
        return "raw", Verdict(
            State.UNSUPPORTED,
            f"{name} holds one pickled object (a whole module or a tensor), not a dictionary of weights, and reading "
            "it would run its code: save the weights with `torch.save(model.state_dict(), …)`.",
        )
    return "raw", verdict


def _begins_like_torch(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return is_torch_file(stream.read(16))
    except OSError:
        return True  # let the check that follows say why


def _is_batches(path: Path) -> bool:
    return set(read_header(path).tensors) <= _BATCH_TENSORS

"""``Accelerator.save_state`` folders and other folders of standard-named weights without a configuration."""

from __future__ import annotations

import re

from trace_offline.checkpoints.layouts.base import SIDECAR, Find, Search, identify, total_size
from trace_offline.checkpoints.layouts.weights_in_folder import folder_weights
from trace_offline.checkpoints.listing import Listing
from trace_offline.core.types import Checkpoint

_COMPANION = re.compile(
    r"optimizer(?:_\d+)?\.bin|scheduler(?:_\d+)?\.bin|sampler(?:_\d+)?\.bin|random_states_\d+\.pkl"
    r"|custom_checkpoint_\d+\.pkl"
)
_INDEX = re.compile(r"checkpoint_(\d+)")


def recognise(listing: Listing, search: Search, has_nested: bool) -> Find | None:
    """Weights under standard names without ``config.json``; ``accelerate`` when its other files lie beside them."""
    weights = folder_weights(listing, search.clock)
    if weights is None:
        return None
    companions = any(_COMPANION.fullmatch(name) for name in listing.files)
    identity = identify(
        listing.path,
        search,
        own_name=not has_nested,
        sidecar=listing.path / SIDECAR if SIDECAR in listing.files else None,
    )
    checkpoint = Checkpoint(
        location=str(listing.path),
        layout="accelerate" if companions else "raw",
        state=weights.verdict.state,
        reason=weights.verdict.reason,
        weight_files=tuple(sorted(str(listing.path / name) for name in weights.names)),
        tokenizer=search.tokenizers.find(listing.path, listing.files),
        size_bytes=total_size(listing, weights.names),
        **identity.fields(),
    )
    run = listing.path if has_nested else listing.path.parent
    find = Find(checkpoint, str(run), weights.verdict.layout_digest, final=has_nested, by_epoch=identity.by_epoch)
    find = find.remark(identity.note)
    # accelerate numbers its automatic folders 0, 1, 2, … by save, not by step.
    if companions and listing.path.parent.name == "checkpoints" and (match := _INDEX.fullmatch(listing.path.name)):
        find = find.remark(f"accelerate counts its saves: {int(match[1])} is an index, shown as the step.")
    return find

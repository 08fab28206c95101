"""Did transformers take over what the configuration says about rotary positions?

Versions 5.0 to at least 5.4 read ``partial_rotary_factor`` of a GPT-NeoX configuration as 0.25 whatever it says, so a
model saved with another value computes something else after loading, without a warning.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from trace_offline.core.errors import CheckpointError


def refuse_changed_rotary(module: nn.Module, config: Path) -> None:
    """Raise CheckpointError when a rotary parameter of ``config.json`` arrived with another value."""
    said = json.loads(config.read_text(encoding="utf-8"), parse_constant=str).get("rope_parameters")
    got = getattr(getattr(module, "config", None), "rope_parameters", None)
    if not isinstance(said, dict) or not isinstance(got, dict):
        return
    changed = [name for name, value in said.items() if name in got and got[name] != value]
    if changed:
        name = changed[0]
        raise CheckpointError(
            f"{config}: rope_parameters.{name} is {said[name]!r}, but this version of transformers made it "
            f"{got[name]!r}; the model would compute something else. Upgrade with: pip install --upgrade transformers"
        )

"""Writing what a series analyzer keeps of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_offline.core.errors import StoreError


def save_extract(arrays: Mapping[str, Any], target: Path) -> None:
    """Write an extract in one move, so that a killed run leaves none that is half written.

    Raises StoreError where it cannot be written: without it the checkpoint cannot be compared.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    fresh = target.with_name(f"{target.name}.{os.getpid()}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: array.detach().cpu().contiguous().clone() for name, array in arrays.items()}, fresh)
        os.replace(fresh, target)
    except (OSError, SafetensorError) as error:
        from trace_offline.store.writer import write_failure

        raise StoreError(write_failure(target.parent, error, "the extracts beside the store")) from error
    finally:
        fresh.unlink(missing_ok=True)

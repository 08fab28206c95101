"""Where the residual blocks of a network are (defined with the loader, which looks for them once per checkpoint)."""

from __future__ import annotations

from trace_offline.checkpoints.blocks import find_blocks

__all__ = ["find_blocks"]

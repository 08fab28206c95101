"""A loaded network as the analyzers see it. Loading makes it, so it is defined with the loader; its users are here."""

from __future__ import annotations

from trace_offline.checkpoints.model_view import ModelView, logits_of

__all__ = ["ModelView", "logits_of"]

"""The few lines a training script needs: save checkpoints and, once, the fixed evaluation batches.

Importing this loads neither transformers nor the analysis code. ``RecordingCallback`` (for the Trainer of
transformers) is loaded when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from trace_offline.recording.checkpoint import save_checkpoint
from trace_offline.recording.evaluation import save_evaluation_set

if TYPE_CHECKING:
    from trace_offline.recording.trainer import RecordingCallback

__all__ = ["RecordingCallback", "save_checkpoint", "save_evaluation_set"]


def __getattr__(name: str) -> Any:
    if name == "RecordingCallback":
        from trace_offline.recording.trainer import RecordingCallback

        return RecordingCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The few lines a training script needs: save checkpoints and, once, the fixed evaluation batches.

Importing this loads neither transformers nor the analysis code.
"""

from trace_offline.recording.checkpoint import save_checkpoint
from trace_offline.recording.evaluation import save_evaluation_set

__all__ = ["save_checkpoint", "save_evaluation_set"]

"""Recording from the Trainer of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from trace_offline.recording.checkpoint import RECORD, save_checkpoint
from trace_offline.recording.evaluation import save_evaluation_set


class RecordingCallback(TrainerCallback):
    """Writes the evaluation set once, the untrained model as ``checkpoint-0``, and step and tokens beside each save.

    ``Trainer(..., callbacks=[RecordingCallback(input_ids, annotations=…)])``. ``input_ids`` and ``evaluation`` go to
    ``save_evaluation_set``; the set lies in ``<output_dir>/<folder>`` (``folder`` may also be absolute). The tokenizer
    is the Trainer's unless given. ``initial=False``: no ``checkpoint-0`` (the Trainer itself never saves step 0).
    Only the first process writes. Raises EvaluationSetError at the start of training, not at its end.
    """

    def __init__(
        self, input_ids: Any, *, folder: Path | str = "evaluation_set", initial: bool = True, **evaluation: Any
    ) -> None:
        self._input_ids = input_ids
        self._folder = Path(folder)
        self._initial = initial
        self._evaluation = evaluation

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the evaluation set and, at step 0, the untrained model."""
        if not state.is_world_process_zero:
            return
        tokenizer = kwargs.get("processing_class")
        keywords: dict[str, Any] = {"tokenizer": tokenizer} | self._evaluation
        save_evaluation_set(Path(args.output_dir) / self._folder, self._input_ids, **keywords)
        target = Path(args.output_dir) / "checkpoint-0"
        if self._initial and state.global_step == 0 and not target.exists():
            save_checkpoint(kwargs["model"], args.output_dir, 0, tokenizer=tokenizer, name="checkpoint-{step}")
            state.save_to_json(str(target / "trainer_state.json"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has written everything else by now, so this file marks the checkpoint as complete."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            record = {
                "format_version": 1,
                "step": state.global_step,
                "tokens_seen": int(state.num_input_tokens_seen) or None,
            }
            (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")

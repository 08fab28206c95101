"""Do the evaluation sets of a run and its checkpoints belong together?"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from trace_offline.core.errors import EvaluationSetError
from trace_offline.engine.unit import Unit


@functools.lru_cache(maxsize=2)
def evaluation_set(folder: str, expected_hash: str) -> Any:
    """The evaluation set of the run, opened once per worker. Raises EvaluationSetError when it changed meanwhile."""
    from trace_offline.evaluation.evaluation_set import EvaluationSet

    loaded = EvaluationSet.load(Path(folder))
    if loaded.hash != expected_hash:
        raise EvaluationSetError(f"The evaluation set {folder} changed while the run was going on; start it again.")
    return loaded


def check_fit(unit: Unit | None) -> None:
    """Raise EvaluationSetError when the checkpoint of ``unit`` has another tokenizer than an evaluation set of it."""
    if unit is not None:
        settings = unit.settings
        check_tokenizer_of(unit, evaluation_set(settings.evaluation_set, settings.evaluation_hash))
        if settings.heldout_set is not None and settings.heldout_hash is not None:
            check_tokenizer_of(unit, evaluation_set(settings.heldout_set, settings.heldout_hash))


def check_tokenizer_of(unit: Unit, evaluation: Any) -> None:
    """Refuse a checkpoint whose tokenizer gives other ids than the evaluation set's, naming both."""
    from trace_offline.checkpoints.tokenizer import tokenizer_folder, tokenizer_hash
    from trace_offline.evaluation.evaluation_set import check_tokenizer

    if evaluation.tokenizer_hash is None:
        return
    folder = tokenizer_folder(unit.checkpoint, unit.settings.tokenizer)
    if folder is None:
        return
    check_tokenizer(evaluation, tokenizer_hash(Path(folder)), str(folder))


def check_vocabulary(model: Any, evaluation: Any, location: str) -> None:
    """Ids beyond the embedding table would end in an index error deep inside the model."""
    getter = getattr(model.module, "get_input_embeddings", None)
    table = getter() if callable(getter) else None
    rows = getattr(table, "num_embeddings", None)
    largest = _largest_id(str(evaluation.folder), evaluation.hash)
    if rows is not None and largest >= rows:
        raise EvaluationSetError(
            f'The evaluation set "{evaluation.name}" contains token id {largest}, but the embedding of the checkpoint '
            f"{location} has only {rows} rows: they belong to different tokenizers."
        )


@functools.lru_cache(maxsize=2)
def _largest_id(folder: str, expected_hash: str) -> int:
    evaluation = evaluation_set(folder, expected_hash)
    block = 1024
    return max(
        int(evaluation.tokens(start, min(start + block, evaluation.n_examples)).input_ids.max())
        for start in range(0, evaluation.n_examples, block)
    )

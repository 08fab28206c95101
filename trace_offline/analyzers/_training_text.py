"""What several analyzers need of the training text: its n-gram models at the places that are predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trace_offline.activations.batch import IGNORED, ForwardBatch
from trace_offline.analyzers._measurements import check_targets
from trace_offline.core.errors import EvaluationSetError, NotApplicable
from trace_offline.estimators.clustered import Codes
from trace_offline.estimators.ngram import WittenBell

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.evaluation.evaluation_set import EvaluationSet
    from trace_offline.evaluation.training_text import TrainingText


class Places(NamedTuple):
    """Predictions of one batch that have a target: where they are made, and what comes next. All ``[n]``.

    ``row``: of the set; ``position``: of the token that is predicted; ``target``: which it is.
    """

    b: Tensor
    t: Tensor
    target: Tensor
    row: Codes
    position: Codes


def training_text_of(evaluation: EvaluationSet) -> TrainingText:
    """What the set knows of its training text. Raises NotApplicable when it knows nothing."""
    from trace_offline.evaluation.evaluation_set import ADD_TRAINING_TEXT

    if not getattr(evaluation, "has_training_text", False):
        raise NotApplicable(f"not applicable because the evaluation set knows no training text. {ADD_TRAINING_TEXT}")
    if not evaluation.labels_shifted:
        raise NotApplicable("not applicable because predictions of this evaluation set are not of the next token")
    return evaluation.training_text()


def places_of(batch: ForwardBatch) -> Places:
    """The predictions of a batch that have a target. Raises EvaluationSetError for a target that is no output."""
    b, t = (batch.targets != IGNORED).nonzero(as_tuple=True)
    target = batch.targets[b, t]
    if len(b):
        check_targets(target, batch.log_probabilities.shape[-1])
    return Places(b, t, target, batch.examples[b].cpu().numpy(), t.cpu().numpy() + 1)


def models_of(training: TrainingText, classes: int) -> WittenBell:
    """The n-gram models over the outputs of a network. Raises EvaluationSetError when it has too few."""
    try:
        return WittenBell(training.levels, classes)
    except ValueError as error:
        raise EvaluationSetError(
            f"the network predicts the classes 0 to {classes - 1}, but {error}: the training text was tokenized with "
            "another tokenizer. Build the evaluation set with this checkpoint's tokenizer."
        ) from error


def contexts_at(training: TrainingText, places: Places, part: slice) -> Codes:
    """``[order, n]``: the contexts before the tokens that are predicted at these places."""
    found: Codes = np.ascontiguousarray(training.context[:, places.row[part], places.position[part]], dtype=np.int64)
    return found

"""The second evaluation set of a run: text that was held out of training, beside text of the training itself.

Only analyzers with ``Need.HELDOUT`` see it, and only their analyses carry its hash: in the stored parameters, under
``heldout_set``. All others keep the identity they have without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trace_offline.analyzers.base import Need
from trace_offline.analyzers.registry import Registry
from trace_offline.core.errors import EvaluationSetError, UsageError
from trace_offline.engine.unit import Wanted
from trace_offline.evaluation.evaluation_set import EvaluationSet

if TYPE_CHECKING:
    from trace_offline.engine.options import AnalyzeOptions


def uses_heldout(known: Registry, analyzer: str) -> bool:
    """Whether an analyzer looks at a second evaluation set when there is one."""
    return Need.HELDOUT in known.get(analyzer).needs


def check_used(known: Registry, options: AnalyzeOptions, wanted: Sequence[Wanted]) -> None:
    """Raise UsageError when a second evaluation set is given and no analyzer of the run would look at it."""
    if options.heldout_set is None or any(uses_heldout(known, item.name) for item in wanted):
        return
    able = ", ".join(name for name in known.analyzers if uses_heldout(known, name))
    raise UsageError(
        f"--heldout-set is given, but none of the analyzers of this run ({', '.join(item.name for item in wanted)}) "
        f"uses a second evaluation set. These do: {able or 'none is installed'}. Add one with --analyzer."
    )


def load_heldout(folder: Path, evaluation: EvaluationSet) -> EvaluationSet:
    """Open the second evaluation set and check that its losses can be compared with those of the first.

    Raises:
        UsageError: it is the first set over again.
        EvaluationSetError: it cannot be read, or has another tokenizer or objective.

    """
    heldout = EvaluationSet.load(folder)
    if heldout.hash == evaluation.hash:
        raise UsageError(
            f"--heldout-set {folder} has the same content as --evaluation-set {evaluation.folder}; a comparison needs "
            "two sets. Give one of text that the model was trained on and one of text that was held out."
        )
    hashes = (heldout.tokenizer_hash, evaluation.tokenizer_hash)
    if None not in hashes and hashes[0] != hashes[1]:
        raise EvaluationSetError(
            f'the held-out set "{heldout.name}" ({folder}) was made with the tokenizer '
            f"{heldout.tokenizer or 'of unknown name'} (hash {hashes[0]}), the evaluation set "
            f'"{evaluation.name}" with {evaluation.tokenizer or "one of unknown name"} (hash {hashes[1]}). Losses per '
            "token of two tokenizers cannot be compared; build both sets with the checkpoint's tokenizer."
        )
    if heldout.objective != evaluation.objective:
        raise EvaluationSetError(
            f'the held-out set "{heldout.name}" ({folder}) has the objective {heldout.objective}, the evaluation set '
            f'"{evaluation.name}" {evaluation.objective}. Their losses cannot be compared; build both for one '
            "objective."
        )
    return heldout


def with_heldout(known: Registry, wanted: Sequence[Wanted], heldout: EvaluationSet | None) -> tuple[Wanted, ...]:
    """The analyzers of a run, with the second set's hash in the identity of those that use it."""
    if heldout is None:
        return tuple(wanted)
    return tuple(replace(item, heldout=heldout.hash) if uses_heldout(known, item.name) else item for item in wanted)

"""The contract of an analyzer (entry-point group ``trace_offline.analyzers``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from trace_offline.core.params import Params
from trace_offline.core.types import Result

if TYPE_CHECKING:
    from trace_offline.activations.batch import Collector
    from trace_offline.activations.model import ModelView
    from trace_offline.evaluation.evaluation_set import EvaluationSet


class Scope(StrEnum):
    """``checkpoint``: one checkpoint at a time. ``series``: compares checkpoints of a run."""

    CHECKPOINT = "checkpoint"
    SERIES = "series"


class Need(StrEnum):
    """What must be computed for an analyzer; the engine computes the union once per checkpoint."""

    HIDDEN_STATES = "hidden_states"
    LOGITS = "logits"
    LOSS_GRADIENTS = "loss_gradients"
    WEIGHTS = "weights"
    LABELS = "labels"
    PAIRS = "pairs"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric an analyzer emits: name as stored, unit ("nats", "1", "dimensions", …), meaning in one sentence."""

    name: str
    unit: str
    meaning: str


@dataclass
class Context:
    """Everything an analyzer may look at; it opens no file, loads no checkpoint, touches no database.

    ``model``: the loaded network (module, blocks, device, dtype). ``evaluation``: the fixed evaluation set.
    ``collected``: what the analyzer's own collectors gathered in the shared pass, by the names it gave them.
    ``seed``: the same for every checkpoint of a run, so that random choices (which tokens, which probe vectors) do not
    add noise between steps. ``step``: training step, for messages only.
    """

    model: ModelView
    evaluation: EvaluationSet
    params: Any
    seed: int
    collected: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None


class Analyzer:
    """A named, versioned measurement. Subclass, fill the class attributes, implement ``measure``.

    Raise ``NotApplicable("…because…")`` in ``collectors`` or ``measure`` when the question has no meaning here.
    ``version`` changes whenever numbers could change; the identity of every stored analysis contains it.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    scope: ClassVar[Scope] = Scope.CHECKPOINT
    needs: ClassVar[frozenset[Need]] = frozenset()
    metrics: ClassVar[tuple[MetricSpec, ...]] = ()

    class Params(Params):
        """No parameters."""

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """Listeners for the shared forward pass, by name; called before the pass, ``context.collected`` is empty."""
        return {}

    def measure(self, context: Context) -> Iterator[Result]:
        """Yield measurements, arrays and artifacts; called after the pass, ``context.collected`` is filled."""
        raise NotImplementedError

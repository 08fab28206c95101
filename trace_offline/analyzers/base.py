"""The contract of an analyzer (entry-point group ``trace_offline.analyzers``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from trace_offline.core.params import Params
from trace_offline.core.types import Result

if TYPE_CHECKING:
    from torch import Tensor

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
    HELDOUT = "heldout"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric an analyzer emits: name as stored, unit ("nats", "1", "dimensions", …), meaning in one sentence."""

    name: str
    unit: str
    meaning: str


@dataclass
class Context:
    """Everything an analyzer may look at; it opens no file, loads no checkpoint, touches no database.

    ``model``: the loaded network (module, blocks, device, dtype). ``evaluation``: the fixed evaluation set; the changed
    members of its minimal pairs are shown to analyzers with ``Need.PAIRS`` only.
    ``collected``: what the analyzer's own collectors gathered in the shared pass, by the names it gave them.
    ``seed``: the same for every checkpoint of a run, so that random choices (which tokens, which probe vectors) do not
    add noise between steps. ``step``: training step, for messages only. ``heldout``: the second evaluation set, given
    to analyzers with ``Need.HELDOUT`` only; None when the run has none.
    """

    model: ModelView
    evaluation: EvaluationSet
    params: Any
    seed: int
    collected: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    heldout: EvaluationSet | None = None


class Analyzer:
    """A named, versioned measurement. Subclass, fill the class attributes, implement ``measure``.

    Raise ``NotApplicable("…because…")`` in ``collectors`` or ``measure`` when the question has no meaning here.
    ``version`` changes whenever numbers could change; the identity of every stored analysis contains it.
    ``on_host``: ``measure`` (``extract``) asks the network for no computation, and what was collected is on the CPU.
    Where a GPU is used, such analyzers run in a thread of their own, beside those that need it.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    scope: ClassVar[Scope] = Scope.CHECKPOINT
    needs: ClassVar[frozenset[Need]] = frozenset()
    on_host: ClassVar[bool] = False
    metrics: ClassVar[tuple[MetricSpec, ...]] = ()

    class Params(Params):
        """No parameters."""

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """Listeners for the shared forward pass, by name; called before the pass, ``context.collected`` is empty."""
        return {}

    def measure(self, context: Context) -> Iterator[Result]:
        """Yield measurements, arrays and artifacts; called after the pass, ``context.collected`` is filled."""
        raise NotImplementedError


@dataclass(frozen=True)
class Extract:
    """What a series analyzer kept of one checkpoint: named arrays, read lazily from a file.

    ``position``: place in the series from 0. ``load(name)`` returns one array as a CPU tensor; nothing is cached, so
    that comparing a long series holds two checkpoints in memory, not all.
    """

    position: int
    step: int | None
    path: str

    def load(self, name: str) -> Tensor:
        """One array by its name. Raises KeyError when ``extract`` gave none of that name."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as stream:
            if name not in stream.keys():  # noqa: SIM118 - a safetensors handle is no dict
                raise KeyError(name)
            return stream.get_tensor(name)

    def names(self) -> tuple[str, ...]:
        """Names of the arrays there are."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as stream:
            return tuple(stream.keys())


@dataclass
class SeriesContext:
    """What a series analyzer may look at when it compares: the extracts in order of training, one per checkpoint.

    ``evaluation``, ``params``, ``seed``: as in ``Context``. A series may be short: one checkpoint is its own start and
    end and has no previous one.
    """

    extracts: tuple[Extract, ...]
    evaluation: EvaluationSet
    params: Any
    seed: int


class SeriesAnalyzer(Analyzer):
    """A measurement that compares checkpoints of a run, in two stages.

    ``extract`` sees one loaded checkpoint (after the shared pass, like ``measure``) and returns the arrays that the
    comparison needs: keep them small (sampled positions, a few vectors). They are kept beside the store, so that a
    longer series or other comparisons never load a model again. ``compare`` sees all extracts and yields, for each
    position of the series, what belongs to that checkpoint.
    """

    scope: ClassVar[Scope] = Scope.SERIES

    def extract(self, context: Context) -> Mapping[str, Tensor]:
        """Arrays of one checkpoint, by name. May raise NotApplicable."""
        raise NotImplementedError

    def compare(self, series: SeriesContext) -> Iterator[tuple[int, Result]]:
        """Yield ``(position, measurement or array)`` for the checkpoint at that position."""
        raise NotImplementedError

    def extract_params(self, params: Any) -> Mapping[str, Any]:
        """The parameters that change what ``extract`` returns; the others cause a new comparison only."""
        return dict(params.model_dump(mode="json"))

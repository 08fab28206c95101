"""The gradient of the evaluation loss: its size against its noise, by part of the network, and which losses agree.

The evaluation set is cut into independent parts of whole documents; gradients of their summed losses give the gradient
of the mean loss, how much of it is noise, and standard errors. Losses restricted to the words of one class of an
annotated task tell whether what improves one class would improve another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from trace_offline.analyzers._measurements import missing
from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Result

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.activations.batch import Collector
    from trace_offline.analyzers._gradient_parts import RestrictedLoss

_GIB = 1 << 30


class GradientsAnalyzer(Analyzer):
    """Gradient norms, signal-to-noise and cosines between losses, by layer and component."""

    name = "gradients"
    version = "1"
    summary = "gradient norm and signal-to-noise by layer and component; cosines between the gradients of losses"
    reference = (
        "McCandlish et al. 2018, arXiv:1812.06162 (noise scale); Yu et al. 2020, arXiv:2001.06782 (gradient cosine "
        "between tasks)"
    )
    needs = frozenset({Need.LOSS_GRADIENTS, Need.WEIGHTS, Need.LABELS})
    metrics = (
        MetricSpec("gradient_norm", "nats / weight unit", "length of the gradient of the mean loss"),
        MetricSpec("signal_to_noise", "1", "squared gradient over the variance of one sequence's gradient"),
        MetricSpec("gradient_cosine_halves", "1", "cosine of the gradients on two halves of the evaluation set"),
        MetricSpec("gradient_gini", "1", "Gini index of the magnitudes in the gradient: 0 all equal, towards 1 few"),
        MetricSpec("gradient_hoyer", "1", "Hoyer's sparsity of the gradient: 0 all equal, 1 a single entry"),
        MetricSpec("gradient_spectral_norm", "nats / weight unit", "largest singular value of the gradient's matrices"),
        MetricSpec("gradient_stable_rank", "dimensions", "squared norm / squared spectral norm of those matrices"),
        MetricSpec("gradient_effective_rank", "dimensions", "exp of the entropy of their normalised singular values"),
        MetricSpec("gradient_proportional_effective_rank", "1", "effective rank / number of singular values"),
        MetricSpec("gradient_condition_number", "1", "largest / smallest singular value of those matrices"),
        MetricSpec("class_gradient_norm", "nats / weight unit", "the same for the mean loss of one class's words"),
        MetricSpec("gradient_cosine", "1", "cosine of the gradients of two classes' (or tasks') losses"),
    )

    class Params(BaseParams):
        """How much data, and which losses."""

        max_sequences: int = Field(128, ge=2, description="rows of the evaluation set in the loss")
        parts: int = Field(12, ge=4, le=1000, description="independent parts the rows are cut into")
        tasks: tuple[str, ...] = Field((), description="annotated tasks to compare; none named: all")
        max_classes: int = Field(6, ge=0, le=100, description="most frequent classes of each task; 0: no classes")
        min_class_targets: int = Field(20, ge=1, description="fewest targets of a class worth a gradient")
        matrix_numbers: bool = Field(True, description="also sparsity and singular values of the gradient")
        max_memory_gb: float = Field(
            4.0, gt=0, description="memory for gradients, in GiB, beside the network and graph"
        )

        @field_validator("tasks", mode="before")
        @classmethod
        def _one_or_more(cls, value: Any) -> Any:
            if isinstance(value, str):
                return tuple(part.strip() for part in value.split(",") if part.strip())
            return value

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """None: gradients need passes of their own."""
        return {}

    def measure(self, context: Context) -> Iterator[Result]:
        """Numbers of every layer × component, layer and the network; norms and cosines of classes for the network.

        Raises NotApplicable when there is no target or no parameter, and when ``max_memory_gb`` is too small for the
        gradient of the whole loss.
        """
        from trace_offline.activations.components import parameter_groups
        from trace_offline.analyzers import _gradient_parts as parts_of
        from trace_offline.analyzers._curvature_batch import in_dtype
        from trace_offline.analyzers._gradient_products import Products

        params, evaluation = context.params, context.evaluation
        groups = parameter_groups(context.model)
        if not groups:
            raise NotApplicable("not applicable because the network has no floating-point parameters")
        tasks = parts_of.chosen_tasks(evaluation, params.tasks)
        source = parts_of.Rows(evaluation)
        parts = parts_of.choose_parts(source, params.max_sequences, params.parts, context.seed)
        rows = [row for part in parts for row in part.rows]
        classes = parts_of.TargetClasses(evaluation, tasks if params.max_classes else (), rows)
        losses, few = parts_of.restricted_losses(source, classes, parts, params.max_classes, params.min_class_targets)
        # The groups are those of the loaded network; a copy in another precision no longer knows its blocks.
        model = context.model if context.model.dtype == "float64" else in_dtype(context.model, "float32")
        named = model.parameters_by_name()
        ordered = [(place, [named[name] for name in names]) for place, names in groups.items()]
        size = sum(tensor.numel() for _, tensors in ordered for tensor in tensors)
        losses, dropped = _affordable(losses, size, params.max_memory_gb)
        gradients = parts_of.PartGradients(
            model, source, [tensor for _, tensors in ordered for tensor in tensors], classes, losses
        )
        widths = [(place, sum(tensor.numel() for tensor in tensors)) for place, tensors in ordered]
        products = Products.of(gradients, parts, widths, len(losses), params.max_memory_gb)
        yield from products.by_place(evaluation.split is not None)
        if params.matrix_numbers:
            yield from _matrix_numbers(context, products.mean)
        yield from products.by_class(losses)
        for loss in few:
            reason = f"{loss.n_targets} targets among {len(rows)} sequences, fewer than {params.min_class_targets}"
            yield missing(
                "class_gradient_norm", reason, loss.n_targets, component="all", task=loss.task, label=loss.label
            )
        for loss, reason in dropped:
            yield missing(
                "class_gradient_norm", reason, loss.n_targets, component="all", task=loss.task, label=loss.label
            )


def _matrix_numbers(context: Context, mean: Tensor) -> Iterator[Result]:
    """Sparsity and singular values of the gradient of the mean loss, for every layer × component."""
    from trace_offline.activations.components import parameter_groups
    from trace_offline.analyzers._matrix_numbers import (
        convolution_weights,
        sparsity_numbers,
        spectra_of,
        spectral_numbers,
        union,
    )

    parameters, convolutions = context.model.parameters_by_name(), convolution_weights(context.model.module)
    start = 0
    for place, names in parameter_groups(context.model).items():
        first, tensors = start, {}
        for name in names:
            shape = parameters[name].shape
            tensors[name] = mean[start : start + shape.numel()].reshape(shape)
            start += shape.numel()
        where = {"layer": place.layer, "component": place.component}
        yield from sparsity_numbers(mean[first:start], where, "gradient_")
        together = union(spectra_of(tensors, convolutions))
        if together is not None:
            yield from spectral_numbers(together, where, "gradient_")


def _affordable(
    losses: list[RestrictedLoss], size: int, max_memory_gb: float
) -> tuple[list[RestrictedLoss], list[tuple[RestrictedLoss, str]]]:
    """The losses whose gradients fit: sums over all parts (3 more for the whole loss), and one part's at a time."""
    row = 4 * size / _GIB
    needed = (3 + 1 + 2 * len(losses)) * row
    if 4 * row > max_memory_gb:
        raise NotApplicable(
            f"not applicable because the gradients of {size:,} parameters need {4 * row:.3g} GiB and max_memory_gb is "
            f"{max_memory_gb:g}: set max_memory_gb to at least {4 * row:.2g}"
        )
    if needed <= max_memory_gb:
        return losses, []
    reason = (
        f"the gradients of {len(losses)} losses need {needed:.3g} GiB and max_memory_gb is {max_memory_gb:g}: raise "
        "it, or lower max_classes"
    )
    return [], [(loss, reason) for loss in losses if loss.label is not None]

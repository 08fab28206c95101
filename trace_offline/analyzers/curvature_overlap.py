"""Do the most curved directions stay the same through training? Overlap of top Hessian eigenspaces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from trace_offline.analyzers.base import Context, Extract, MetricSpec, Need, SeriesAnalyzer, SeriesContext
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Array, Measurement, Result

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.activations.batch import Collector

COMPONENT = "all"


class CurvatureOverlapAnalyzer(SeriesAnalyzer):
    """Overlap of the subspace of the k largest Hessian eigenvalues with that of other checkpoints.

    The loss, and so the Hessian, is taken on the same part of the evaluation set at every checkpoint. Nothing here is
    random but the start of Lanczos; ``subspace_error`` says how well each subspace is known.
    """

    name = "curvature_overlap"
    version = "1"
    summary = "overlap of the top Hessian eigenspace with the previous, the first and the final checkpoint's"
    reference = (
        "Gur-Ari, Roberts & Dyer 2018, Gradient Descent Happens in a Tiny Subspace, arXiv:1812.04754; Björck & Golub "
        "1973 (principal angles); Davis & Kahan 1970 (error of a subspace)"
    )
    needs = frozenset({Need.LOSS_GRADIENTS, Need.LABELS})
    metrics = (
        MetricSpec("overlap_previous", "1", "with the checkpoint before: |V₁ᵀV₂|_F² / k, 1 = same subspace"),
        MetricSpec("overlap_first", "1", "with the first checkpoint of the series"),
        MetricSpec("overlap_final", "1", "with the last checkpoint of the series"),
        MetricSpec("overlap_chance", "1", "expected between random subspaces, k / parameters"),
        MetricSpec("eigenvalue", "nats", "the eigenvalues whose vectors span the subspace, label = rank"),
        MetricSpec("relative_gap", "1", "(λ_k − λ_{k+1}) / λ_1: near 0 the subspace is cut out of a crowd arbitrarily"),
        MetricSpec(
            "subspace_error", "1", "largest sine of the angle to the true subspace, residuals / gap: above 1 = unknown"
        ),
        MetricSpec("vectors", "vectors", "k in effect: eigenvectors kept, within max_extract_gb"),
    )

    class Params(BaseParams):
        """Parameters of ``curvature_overlap``."""

        k: int = Field(5, ge=1, le=100, description="dimension of the subspace: how many of the largest eigenvalues")
        tolerance: float = Field(
            1e-4, ge=1e-12, le=0.1, description="relative accuracy of each eigenvalue; vectors are less accurate"
        )
        max_steps: int = Field(
            150, ge=1, le=5000, description="most products for the eigenvectors (with restarts: four times as many)"
        )
        max_extract_gb: float = Field(
            1.0, gt=0, description="disk for the vectors of one checkpoint, in GiB; fewer vectors are kept when short"
        )
        max_sequences: int = Field(16, ge=1, description="most sequences of the evaluation set in the loss")
        max_tokens: int = Field(2048, ge=1, description="most tokens of the evaluation set in the loss")
        micro_batch: int | None = Field(
            None, ge=1, description="sequences differentiated together; None: as many as max_graph_gb allows"
        )
        max_graph_gb: float = Field(4.0, gt=0, description="memory for gradient graphs, in GiB")
        max_basis_gb: float = Field(4.0, gt=0, description="memory for Lanczos vectors, in GiB")
        dtype: Literal["float32", "float64"] = Field("float32", description="precision of network and vectors")

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """None: second derivatives need passes of their own."""
        return {}

    def extract(self, context: Context) -> Mapping[str, Tensor]:
        """``vectors [k, n]`` (float32), ``values``, ``residuals``, ``converged`` ``[k + 1]``.

        Raises NotApplicable as ``hessian`` does, and when not one vector fits into ``max_extract_gb``.
        """
        from trace_offline.analyzers._curvature_overlap import top_subspace  # torch only when it is needed

        return top_subspace(context.model, context.evaluation, context.params, context.seed)

    def compare(self, series: SeriesContext) -> Iterator[tuple[int, Result]]:
        """For each checkpoint its overlaps; arrays ``principal_angles``, label ``previous``, ``first`` or ``final``."""
        extracts = series.extracts
        for position, extract in enumerate(extracts):
            yield from ((position, item) for item in _own(extract))
            others = {"first": extracts[0], "final": extracts[-1]}
            if position:
                others = {"previous": extracts[position - 1], **others}
            else:
                reason = "the first checkpoint of a series has no previous one"
                yield position, _number("overlap_previous", None, None, reason=reason)
            for label, other in others.items():
                yield from ((position, item) for item in _overlap(extract, other, label))


def _own(extract: Extract) -> Iterator[Measurement]:
    values, residuals = extract.load("values").tolist(), extract.load("residuals").tolist()
    converged = extract.load("converged").tolist()
    count, size = extract.load("shape").tolist()
    yield _number("vectors", count, None)
    yield _number("overlap_chance", count / size, None)
    for rank in range(count):
        reason = None if converged[rank] else _unconverged(values[rank], residuals[rank])
        yield _number("eigenvalue", values[rank] if converged[rank] else None, None, str(rank + 1), reason)
    if count == len(values):
        reason = f"the network has only {size} parameters: its whole space has no gap"
        yield _number("relative_gap", None, None, reason=reason)
        yield _number("subspace_error", 0.0, None)
        return
    gap = values[count - 1] - values[count]
    whole = max(abs(value) for value in values)
    error = sum(r * r for r in residuals[:count]) ** 0.5
    if not all(converged):
        reason = "not all eigenvalues converged; raise max_steps"
        yield _number("relative_gap", None, None, reason=reason)
        yield _number("subspace_error", None, None, reason=reason)
    elif whole == 0 or gap <= 0:
        yield _number("relative_gap", 0.0, None)
        yield _number("subspace_error", None, None, reason="λ_k and λ_{k+1} are equal: the subspace is not defined")
    else:
        yield _number("relative_gap", gap / whole, None)
        yield _number("subspace_error", error / gap, None)


def _overlap(extract: Extract, other: Extract, label: str) -> Iterator[Result]:
    from trace_offline.estimators.subspace_overlap import subspace_overlap

    metric = f"overlap_{label}"
    sizes = [item.load("shape").tolist() for item in (extract, other)]
    count = min(sizes[0][0], sizes[1][0])
    if sizes[0][1] != sizes[1][1]:
        reason = f"the checkpoints have {sizes[0][1]} and {sizes[1][1]} parameters: there is no common space"
        yield _number(metric, None, None, reason=reason)
        return
    for item in (extract, other):
        if not bool(item.load("converged")[:count].all()):
            reason = f"the {count} largest eigenvalues at step {item.step} did not converge; raise max_steps"
            yield _number(metric, None, None, reason=reason)
            return
    found = subspace_overlap(extract.load("vectors")[:count], other.load("vectors")[:count])
    yield _number(metric, found.value, count)
    yield Array("principal_angles", tuple(found.angles.tolist()), component=COMPONENT, label=label)


def _unconverged(value: float, residual: float) -> str:
    return f"not converged (at {value:.6g} with residual {residual:.3g}); raise max_steps or tolerance"


def _number(
    metric: str, value: float | None, n: int | None, label: str | None = None, reason: str | None = None
) -> Measurement:
    number = None if value is None else float(value)
    return Measurement(metric, number, n=n, component=COMPONENT, label=label, reason=reason)

"""Two positive semidefinite neighbours of the Hessian: generalised Gauss-Newton and empirical Fisher.

Both are taken on the same part of the evaluation set as ``hessian`` with the same seed and parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Result

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trace_offline.activations.batch import Collector


def _metrics(letter: str, matrix: str) -> tuple[MetricSpec, ...]:
    return (
        MetricSpec("batch_loss", "nats", "mean loss of the part of the evaluation set the matrix is taken on"),
        MetricSpec("eigenvalue", "nats", f"of the {matrix}, label = rank: 1 is the largest"),
        MetricSpec("residual", "nats", f"|{letter}v - λv| of each eigenpair, label = its rank"),
        MetricSpec("trace", "nats", f"trace of the {matrix}: found eigenpairs exactly, the rest by n random probes"),
        MetricSpec("trace_square", "nats²", f"trace of the squared {matrix}"),
        MetricSpec("participation_ratio", "directions", f"Tr({letter})² / Tr({letter}²)"),
        MetricSpec("hessian_trace", "nats", "trace of the Hessian by the same probes"),
        MetricSpec("trace_ratio", "1", f"Tr({letter}) / Tr(H) from paired probes"),
        MetricSpec("gradient_curvature", "nats", f"along the gradient g of the loss, gᵀ{letter}g / gᵀg"),
        MetricSpec("products", "products", f"products with the {matrix}"),
        MetricSpec(
            "basis_on_host", "1", "1 where Lanczos vectors lay in host memory, the device having no room; else 0"
        ),
        MetricSpec("hessian_products", "products", "Hessian-vector products"),
        MetricSpec("parameters", "parameters", "order of the matrix: floating parameters, tied ones once"),
    )


class OutputCurvatureParams(BaseParams):
    """Parameters of ``gauss_newton`` and ``empirical_fisher``."""

    k: int = Field(5, ge=1, le=1000, description="how many of the largest eigenvalues")
    tolerance: float = Field(1e-3, ge=1e-12, le=0.1, description="relative accuracy of each eigenvalue")
    max_steps: int = Field(
        100, ge=1, le=5000, description="most products for the eigenvalues (with restarts: four times as many)"
    )
    trace_probes: int = Field(24, ge=2, le=10000, description="random vectors for the traces: a product of each matrix")
    max_sequences: int = Field(16, ge=1, description="most sequences of the evaluation set in the loss")
    max_tokens: int = Field(2048, ge=1, description="most tokens of the evaluation set in the loss")
    micro_batch: int | None = Field(
        None, ge=1, description="sequences differentiated together; None: as many as max_graph_gb allows"
    )
    max_graph_gb: float = Field(4.0, gt=0, description="memory for gradient graphs, in GiB")
    max_basis_gb: float = Field(4.0, gt=0, description="memory for Lanczos vectors, in GiB")
    dtype: Literal["float32", "float64"] = Field("float32", description="precision of network and vectors")


class GaussNewtonAnalyzer(Analyzer):
    """Curvature of the loss through a network taken as linear; standard errors are over probe vectors."""

    name = "gauss_newton"
    version = "1"
    summary = "eigenvalues and trace of the generalised Gauss-Newton matrix, and its share of the Hessian's trace"
    reference = (
        "Schraudolph 2002, Fast Curvature Matrix-Vector Products; Martens 2020, arXiv:1412.1193; Sagun, Evci, Güney, "
        "Dauphin & Bottou 2017, arXiv:1706.04454 (Hessian = Gauss-Newton + rest)"
    )
    needs = frozenset({Need.LOSS_GRADIENTS, Need.LABELS})
    metrics = _metrics("G", "Gauss-Newton matrix")
    matrix: ClassVar[Literal["ggn", "fisher"]] = "ggn"

    class Params(OutputCurvatureParams):
        """Parameters of ``gauss_newton``."""

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """None: derivatives need passes of their own."""
        return {}

    def measure(self, context: Context) -> Iterator[Result]:
        """Measurements with component ``all``; array ``ritz``. Raises NotApplicable as ``hessian`` does."""
        from trace_offline.analyzers._curvature_outputs import measure_outputs  # torch only when it is needed

        yield from measure_outputs(self.matrix, context.model, context.evaluation, context.params, context.seed)


class EmpiricalFisherAnalyzer(GaussNewtonAnalyzer):
    """Second moment of the gradients of single targets; standard errors are over probe vectors."""

    name = "empirical_fisher"
    summary = "eigenvalues and trace of the second moment of single targets' gradients, beside the Hessian's trace"
    reference = (
        "Kunstner, Balles & Hennig 2019, arXiv:1905.12558 (what the empirical Fisher is and is not); Martens 2020, "
        "arXiv:1412.1193; Schraudolph 2002 (products)"
    )
    metrics = _metrics("F", "empirical Fisher matrix")
    matrix = "fisher"

    class Params(OutputCurvatureParams):
        """Parameters of ``empirical_fisher``."""

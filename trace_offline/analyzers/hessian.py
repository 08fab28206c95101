"""Curvature of the loss: both ends of the Hessian's spectrum, its trace, density and negative mass.

The loss is the mean cross-entropy (nats per target) of a fixed random part of the evaluation set, the same for every
checkpoint; the Hessian is taken with respect to all floating parameters, tied ones once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from trace_offline.analyzers.base import Analyzer, Context, MetricSpec, Need
from trace_offline.core.params import Params as BaseParams
from trace_offline.core.types import Result

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trace_offline.activations.batch import Collector


class HessianAnalyzer(Analyzer):
    """How curved the loss is at this checkpoint, and in how many directions.

    Standard errors: those of ``trace``, ``trace_square``, ``participation_ratio``, ``effective_rank`` and
    ``negative_mass`` are over the random probe vectors (n = probes) and say how well the number of *this* part of the
    evaluation set is known. How the curvature varies with the data is not estimated here (see
    ``train_heldout_curvature``), so all other numbers have no standard error; their n is the number of sequences.
    """

    name = "hessian"
    version = "2"
    summary = "eigenvalues, trace, effective rank, density, negative mass of the loss Hessian; gradient and curvature"
    reference = (
        "Pearlmutter 1994, Fast Exact Multiplication by the Hessian (products); Golub & Van Loan, Matrix Computations, "
        "10.1 (Lanczos); Ghorbani, Krishnan & Xiao 2019, arXiv:1901.10159, and Ubaru, Chen & Saad 2017 (stochastic "
        "Lanczos quadrature); Papyan 2018, arXiv:1811.07062 (deflation); "
        "Meyer, Musco, Musco & Woodruff 2021, arXiv:2010.09649 (Hutch++: trace of a subspace exactly, of the rest by "
        "probes); Roy & Vetterli 2007 (effective rank)"
    )
    needs = frozenset({Need.LOSS_GRADIENTS, Need.LABELS})
    metrics = (
        MetricSpec("batch_loss", "nats", "mean loss of the part of the evaluation set the Hessian is taken on"),
        MetricSpec(
            "eigenvalue", "nats", "label = rank: 1 is the largest algebraic eigenvalue, 2 the next; never by size"
        ),
        MetricSpec("smallest_eigenvalue", "nats", "the smallest algebraic (most negative) eigenvalue"),
        MetricSpec(
            "residual",
            "nats",
            "|Hv - λv| of each eigenpair, label = its rank or 'smallest': an eigenvalue lies within this distance",
        ),
        MetricSpec(
            "trace",
            "nats",
            "trace of the Hessian: the found eigenpairs exactly, the rest by n random probes; 95 %: ± t(n − 1) stderr",
        ),
        MetricSpec("trace_square", "nats²", "trace of the squared Hessian, the sum of all squared eigenvalues"),
        MetricSpec(
            "participation_ratio", "directions", "Tr(H)² / Tr(H²): number of directions if all curved alike and upwards"
        ),
        MetricSpec(
            "effective_rank",
            "directions",
            "exp of the entropy of |λ| / Σ|λ|: number of directions that the absolute curvature is spread over",
        ),
        MetricSpec(
            "negative_mass",
            "1",
            "share of the absolute curvature that is negative, Σ_{λ<0}|λ| / Σ|λ|: 0 = convex, 0.5 = both alike",
        ),
        MetricSpec(
            "negative_fraction_lower",
            "1",
            "the share of eigenvalues below zero is certainly larger than this, for the probes used",
        ),
        MetricSpec(
            "negative_fraction_upper",
            "1",
            "the share of eigenvalues below zero is certainly smaller than this; near 1: bulk at 0 not resolved",
        ),
        MetricSpec("gradient_norm", "nats", "Euclidean norm of the gradient of batch_loss"),
        MetricSpec("gradient_curvature", "nats", "curvature along the gradient, gᵀHg / gᵀg"),
        MetricSpec("hessian_gradient_norm", "nats", "|Hg|, the norm of the Hessian times the gradient"),
        MetricSpec(
            "gradient_top_overlap",
            "1",
            "share of the squared gradient in the span of the k largest eigenvalues' vectors, |P_k g|² / |g|²",
        ),
        MetricSpec("gradient_top_overlap_chance", "1", "what a random direction would give, k / parameters"),
        MetricSpec("products", "products", "Hessian-vector products used by this analysis"),
        MetricSpec("basis_vectors", "vectors", "Lanczos vectors held at most, within max_basis_gb"),
        MetricSpec("basis_on_host", "1", "1 where those vectors lay in host memory, the device having no room; else 0"),
        MetricSpec("restarts", "restarts", "how often the basis was compressed for lack of memory; 0 where all fitted"),
        MetricSpec("parameters", "parameters", "order n of the Hessian: floating parameters, tied ones once"),
    )

    class Params(BaseParams):
        """Parameters of ``hessian``."""

        k: int = Field(10, ge=1, le=1000, description="how many of the largest algebraic eigenvalues")
        tolerance: float = Field(
            1e-3,
            ge=1e-12,
            le=0.1,
            description="relative accuracy of each eigenvalue; below 1 % of the largest (smallest: 10 %), of that",
        )
        max_steps: int = Field(
            150,
            ge=1,
            le=5000,
            description="most products for the eigenvalues (with restarts: four times as many) and basis vectors",
        )
        slq_probes: int = Field(
            8, ge=2, le=1000, description="random vectors for density, effective rank and negative mass"
        )
        slq_steps: int = Field(
            10, ge=2, le=1000, description="Lanczos steps for each of them: resolution of the density"
        )
        trace_probes: int = Field(
            24,
            ge=2,
            le=10000,
            description="random vectors for the traces: those of the density, and further ones of one product each",
        )
        grid_points: int = Field(1024, ge=64, le=65536, description="length of the arrays density_grid and density")
        broadening: float = Field(
            0.01, gt=0, le=1, description="width of the density's Gaussian kernel, as a share of λ_max − λ_min"
        )
        max_sequences: int = Field(16, ge=1, description="most sequences of the evaluation set in the loss")
        max_tokens: int = Field(2048, ge=1, description="most tokens of the evaluation set in the loss")
        micro_batch: int | None = Field(
            None, ge=1, description="sequences differentiated together; None: as many as max_graph_gb allows"
        )
        max_graph_gb: float = Field(4.0, gt=0, description="memory for gradient graphs, in GiB")
        max_basis_gb: float = Field(
            4.0, gt=0, description="memory for Lanczos vectors, in GiB: restarts, then fewer eigenvalues, when short"
        )
        dtype: Literal["float32", "float64"] = Field("float32", description="precision of network and vectors")

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """None: second derivatives need passes of their own."""
        return {}

    def measure(self, context: Context) -> Iterator[Result]:
        """Measurements with component ``all``; arrays ``density_grid``, ``density``, ``ritz``, ``slq_nodes``, ….

        Raises NotApplicable when nothing has a target, when there is nothing to differentiate by, and when
        ``max_graph_gb`` or ``max_basis_gb`` is too small for one step.
        """
        from trace_offline.analyzers._curvature import measure_curvature  # torch only when it is needed

        yield from measure_curvature(context.model, context.evaluation, context.params, context.seed)

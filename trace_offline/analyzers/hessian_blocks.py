"""Curvature block by block: layer × attention, MLP, norm; embedding, head.

The diagonal block ``H_bb`` of the Hessian holds the second derivatives with respect to the parameters of one place of
the network, all others held fixed. The loss is that of the analyzer ``hessian``.
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


class HessianBlocksAnalyzer(Analyzer):
    """How curved the loss is with respect to each part of the network.

    Standard errors are over the random probe vectors (n = probes): how well the number of this part of the evaluation
    set is known. The other numbers have none; their n is the number of sequences.
    """

    name = "hessian_blocks"
    version = "1"
    summary = (
        "eigenvalues, trace, density of the Hessian's block of each layer's attention, MLP, norms, embedding, head"
    )
    reference = (
        "Pearlmutter 1994 (products); Hutchinson 1990 and Meyer, Musco, Musco & Woodruff 2021, arXiv:2010.09649 "
        "(traces of all blocks from shared probes, found eigenpairs deflated); Golub & Van Loan, "
        "Matrix Computations, 10.1; Wu & Simon 2000 (restarts); Ghorbani, Krishnan & Xiao 2019, arXiv:1901.10159 "
        "(stochastic Lanczos quadrature); Roy & Vetterli 2007 (effective rank)"
    )
    needs = frozenset({Need.LOSS_GRADIENTS, Need.LABELS})
    metrics = (
        MetricSpec("batch_loss", "nats", "mean loss of the part of the evaluation set, component 'all'"),
        MetricSpec("eigenvalue", "nats", "of the block, label = rank: 1 is the largest algebraic eigenvalue"),
        MetricSpec("smallest_eigenvalue", "nats", "the block's smallest algebraic (most negative) eigenvalue"),
        MetricSpec("residual", "nats", "|H_bb v - λv| of each eigenpair, label = its rank or 'smallest'"),
        MetricSpec(
            "trace", "nats", "trace of the block; component 'all': of the whole Hessian, the sum over the blocks"
        ),
        MetricSpec("trace_square", "nats²", "squared Frobenius norm of the block, the sum of its squared eigenvalues"),
        MetricSpec(
            "effective_rank",
            "directions",
            "of the block, exp of the entropy of |λ| / Σ|λ|: directions that its absolute curvature is spread over",
        ),
        MetricSpec("negative_mass", "1", "share of the block's absolute curvature that is negative, Σ_{λ<0}|λ| / Σ|λ|"),
        MetricSpec(
            "negative_fraction_lower",
            "1",
            "the share of the block's eigenvalues below zero is certainly larger than this, for the probes used",
        ),
        MetricSpec(
            "negative_fraction_upper",
            "1",
            "the share of the block's eigenvalues below zero is certainly smaller than this, for the probes used",
        ),
        MetricSpec("gradient_norm", "nats", "Euclidean norm of the block's part of the gradient"),
        MetricSpec("gradient_curvature", "nats", "curvature along the block's part of the gradient, gᵀHg / gᵀg"),
        MetricSpec("parameters", "parameters", "order of the block"),
        MetricSpec(
            "products", "products", "products through the block; component 'all': full ones, shared by all blocks"
        ),
        MetricSpec(
            "basis_on_host", "1", "1 where Lanczos vectors lay in host memory, the device having no room; else 0"
        ),
    )

    class Params(BaseParams):
        """Parameters of ``hessian_blocks``."""

        k: int = Field(1, ge=1, le=100, description="how many of the largest algebraic eigenvalues of each block")
        tolerance: float = Field(1e-3, ge=1e-12, le=0.1, description="relative accuracy of each eigenvalue")
        max_steps: int = Field(80, ge=1, le=5000, description="most products for the eigenvalues of one block")
        trace_probes: int = Field(24, ge=3, le=10000, description="random vectors shared by all blocks: full products")
        own_probes: int = Field(
            0,
            ge=0,
            le=10000,
            description="random vectors through each block alone instead: less noise, but so many products per block",
        )
        slq_probes: int = Field(
            4, ge=0, le=1000, description="random vectors of each block for density, effective rank and negative mass"
        )
        slq_steps: int = Field(
            10, ge=2, le=1000, description="Lanczos steps for each of them, all through that block alone"
        )
        grid_points: int = Field(256, ge=64, le=65536, description="length of the arrays density_grid and density")
        broadening: float = Field(
            0.01, gt=0, le=1, description="width of the density's Gaussian kernel, as a share of λ_max − λ_min"
        )
        max_sequences: int = Field(16, ge=1, description="most sequences of the evaluation set in the loss")
        max_tokens: int = Field(2048, ge=1, description="most tokens of the evaluation set in the loss")
        micro_batch: int | None = Field(
            None, ge=1, description="sequences differentiated together; None: as many as max_graph_gb allows"
        )
        max_graph_gb: float = Field(4.0, gt=0, description="memory for gradient graphs, in GiB")
        max_basis_gb: float = Field(4.0, gt=0, description="memory for Lanczos vectors and probes, in GiB")
        dtype: Literal["float32", "float64"] = Field("float32", description="precision of network and vectors")

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """None: second derivatives need passes of their own."""
        return {}

    def measure(self, context: Context) -> Iterator[Result]:
        """Measurements by layer and component; arrays ``density_grid``, ``density``, ``ritz``, … of each block.

        Raises NotApplicable as ``hessian`` does, but for memory only where not one block fits.
        """
        from trace_offline.analyzers._curvature_blocks import measure_blocks  # torch only when it is needed

        yield from measure_blocks(context.model, context.evaluation, context.params, context.seed)

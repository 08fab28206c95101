"""Is the loss more curved on text it was trained on than on text it was not? Trace and top eigenvalue of both."""

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


class TrainHeldoutCurvatureAnalyzer(Analyzer):
    """The Hessian on text of the training against text that was held out of it.

    The two are the evaluation set and the run's second one, where it has one; else the rows of split 0 (train) and of
    split 1 (held out) of the evaluation set.

    Standard errors cover the choice of sequences (jackknife over groups of sequences) and, for traces, of the random
    vectors; those of eigenvalues are first-order. n is the number of groups.
    """

    name = "train_heldout_curvature"
    version = "1"
    summary = "loss, trace and top eigenvalue of the Hessian on training and on held-out rows, ratios with intervals"
    reference = (
        "Efron & Stein 1981 (jackknife); Satterthwaite 1946 (interval); Magnus 1985, Econometric Theory 1 (derivative "
        "of an eigenvalue); Meyer, Musco, Musco & Woodruff 2021, arXiv:2010.09649 (trace)"
    )
    needs = frozenset({Need.LOSS_GRADIENTS, Need.LABELS, Need.HELDOUT})
    metrics = (
        MetricSpec("batch_loss", "nats", "mean loss per target; label 'train' or 'heldout'"),
        MetricSpec("trace", "nats", "trace of the Hessian; label 'train' or 'heldout'"),
        MetricSpec("top_eigenvalue", "nats", "largest algebraic eigenvalue; label 'train' or 'heldout'"),
        MetricSpec("batch_loss_ratio", "1", "mean loss on held-out rows / on training rows"),
        MetricSpec("batch_loss_ratio_lower", "1", "lower end of the 95 % interval of batch_loss_ratio"),
        MetricSpec("batch_loss_ratio_upper", "1", "upper end of the 95 % interval of batch_loss_ratio"),
        MetricSpec("trace_ratio", "1", "trace on held-out rows / trace on training rows"),
        MetricSpec("trace_ratio_lower", "1", "lower end of the 95 % interval of trace_ratio"),
        MetricSpec("trace_ratio_upper", "1", "upper end of the 95 % interval of trace_ratio"),
        MetricSpec("top_eigenvalue_ratio", "1", "top eigenvalue on held-out rows / on training rows"),
        MetricSpec("top_eigenvalue_ratio_lower", "1", "lower end of the 95 % interval of top_eigenvalue_ratio"),
        MetricSpec("top_eigenvalue_ratio_upper", "1", "upper end of the 95 % interval of top_eigenvalue_ratio"),
        MetricSpec("sequences", "sequences", "rows used; label 'train' or 'heldout'"),
        MetricSpec(
            "shared_sequences", "sequences", "held-out rows used whose tokens are those of a training row used; n: rows"
        ),
        MetricSpec(
            "basis_on_host", "1", "1 where Lanczos vectors lay in host memory, the device having no room; else 0"
        ),
        MetricSpec("products", "products", "Hessian-vector products, both sides together"),
    )

    class Params(BaseParams):
        """Parameters of ``train_heldout_curvature``."""

        k: int = Field(1, ge=1, le=100, description="eigenvectors of each side taken out of the traces' noise")
        tolerance: float = Field(1e-3, ge=1e-12, le=0.1, description="relative accuracy of each eigenvalue")
        max_steps: int = Field(
            100, ge=1, le=5000, description="most products for the eigenvalues (with restarts: four times as many)"
        )
        trace_probes: int = Field(
            12, ge=2, le=10000, description="random vectors for the traces, the same on both sides"
        )
        max_sequences: int = Field(16, ge=2, description="most sequences of either side")
        max_tokens: int = Field(2048, ge=1, description="most tokens of either side")
        max_graph_gb: float = Field(4.0, gt=0, description="memory for gradient graphs, in GiB")
        max_basis_gb: float = Field(4.0, gt=0, description="memory for Lanczos vectors, in GiB")
        dtype: Literal["float32", "float64"] = Field("float32", description="precision of network and vectors")

    def collectors(self, context: Context) -> Mapping[str, Collector]:
        """None: second derivatives need passes of their own."""
        return {}

    def measure(self, context: Context) -> Iterator[Result]:
        """Measurements with component ``all``.

        Raises NotApplicable when there is neither a second evaluation set nor a split, or one side has fewer than two
        groups, and as ``hessian`` does.
        """
        from trace_offline.analyzers._curvature_split import measure_split  # torch only when it is needed

        yield from measure_split(context.model, context.evaluation, context.params, context.seed, context.heldout)

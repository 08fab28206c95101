"""The top Hessian eigenspace of one checkpoint, small enough to be kept."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trace_offline.activations.losses import double_backward_attention
from trace_offline.analyzers._curvature import streams
from trace_offline.analyzers._curvature_batch import (
    GIB,
    check_labels,
    choose_rows,
    in_dtype,
    losses_of,
    plan_batches,
    weights_of,
)
from trace_offline.analyzers._curvature_plan import plan_basis, settle
from trace_offline.core.errors import NotApplicable
from trace_offline.estimators.hvp import HessianOperator, NonFiniteError, require_gradients
from trace_offline.estimators.thick_restart import bounded_eigenpairs

if TYPE_CHECKING:
    from trace_offline.activations.model import ModelView
    from trace_offline.analyzers.curvature_overlap import CurvatureOverlapAnalyzer
    from trace_offline.evaluation.evaluation_set import EvaluationSet


def top_subspace(
    model: ModelView, evaluation: EvaluationSet, params: CurvatureOverlapAnalyzer.Params, seed: int
) -> dict[str, Tensor]:
    """``vectors [k, n]`` float32; ``values``, ``residuals``, ``converged`` ``[k + 1]``; ``shape`` (k, n); on CPU."""
    rows = choose_rows(evaluation, params.max_sequences, params.max_tokens, seed)
    model = in_dtype(model, params.dtype)
    parameters = weights_of(model)
    n = sum(parameter.numel() for parameter in parameters)
    kept = min(params.k, n, int(params.max_extract_gb * GIB) // (4 * n))
    if not kept:
        raise NotApplicable(
            f"not applicable because one vector of {n:,} parameters takes {4 * n / GIB:.3g} GiB, and max_extract_gb is "
            f"{params.max_extract_gb:g}: raise max_extract_gb"
        )
    # one eigenvalue more than vectors: the gap below the subspace says whether it is well defined
    asked = partial(
        plan_basis, n, parameters[0].element_size(), k=kept + 1, smallest=0, max_steps=params.max_steps, slq_steps=1,
        max_basis_gb=params.max_basis_gb,
    )  # fmt: skip
    plan = asked()
    with require_gradients(parameters), double_backward_attention():
        check_labels(model, rows)
        try:
            batches = plan_batches(model, parameters, rows, params.micro_batch, params.max_graph_gb)
            losses = losses_of(model, rows, batches.micro_batches)
            with HessianOperator(losses, parameters, keep_graphs=batches.keep_graphs) as operator:
                plan, vectors = settle(plan, operator, batches.graph_bytes, lambda free: asked(free=free))
                kept = min(kept, plan.k if plan.k == n else max(plan.k - 1, 1))
                pairs = bounded_eigenpairs(
                    vectors, largest=plan.k, tolerance=params.tolerance, max_steps=plan.max_steps,
                    max_basis=plan.basis, generator=torch.Generator().manual_seed(streams(seed, 1)[0]),
                ).largest  # fmt: skip
        except NonFiniteError as error:
            raise NotApplicable(f"not applicable because {error}") from error
    kept = min(kept, len(pairs))
    return {
        "vectors": pairs.vectors[:kept].float().cpu().contiguous(),
        "values": torch.tensor(pairs.values, dtype=torch.float64),
        "residuals": torch.tensor(pairs.residuals, dtype=torch.float64),
        "converged": torch.tensor(pairs.converged, dtype=torch.bool),
        "shape": torch.tensor([kept, n], dtype=torch.int64),
    }

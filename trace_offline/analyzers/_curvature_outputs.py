"""What ``gauss_newton`` and ``empirical_fisher`` do once torch is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from trace_offline.activations.losses import double_backward_attention
from trace_offline.analyzers._curvature import COMPONENT, ZERO_GRADIENT, streams
from trace_offline.analyzers._curvature_batch import (
    check_labels,
    choose_rows,
    in_dtype,
    losses_of,
    outputs_of,
    plan_batches,
    weights_of,
)
from trace_offline.analyzers._curvature_plan import BasisPlan, plan_basis, settle, vectors_at
from trace_offline.core.types import Array, Measurement, Result
from trace_offline.estimators.fisher import EmpiricalFisherOperator
from trace_offline.estimators.ggn import GaussNewtonOperator, OutputCurvature
from trace_offline.estimators.hutchpp import Moments, complement_moments, mean_of, participation_ratio, ratio_of
from trace_offline.estimators.hvp import HessianOperator, NonFiniteError, require_gradients
from trace_offline.estimators.lanczos import Eigenpairs, Spectrum
from trace_offline.estimators.slq import Estimate
from trace_offline.estimators.thick_restart import bounded_eigenpairs

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.activations.model import ModelView
    from trace_offline.analyzers.gauss_newton import OutputCurvatureParams
    from trace_offline.estimators.operators import SymmetricOperator
    from trace_offline.evaluation.evaluation_set import EvaluationSet

_KINDS: dict[str, type[OutputCurvature]] = {"ggn": GaussNewtonOperator, "fisher": EmpiricalFisherOperator}
_MATRIX = ("trace", "trace_square", "participation_ratio", "gradient_curvature", "hessian_trace", "trace_ratio")


def measure_outputs(
    matrix: str, model: ModelView, evaluation: EvaluationSet, params: OutputCurvatureParams, seed: int
) -> Iterator[Result]:
    """All results of the analysis; values that are not finite are missing with the reason."""
    rows = choose_rows(evaluation, params.max_sequences, params.max_tokens, seed)
    model = in_dtype(model, params.dtype)
    parameters = weights_of(model)
    count = sum(parameter.numel() for parameter in parameters)
    asked = partial(
        plan_basis, count, parameters[0].element_size(), k=params.k, smallest=0, max_steps=params.max_steps,
        slq_steps=1, max_basis_gb=params.max_basis_gb,
    )  # fmt: skip
    basis = asked()
    yield _plain("parameters", count, len(rows))
    with require_gradients(parameters), double_backward_attention():
        check_labels(model, rows)
        try:
            # the graphs of logits and of Jᵀw hold what the graph of the loss and its gradient holds
            plan = plan_batches(model, parameters, rows, params.micro_batch, params.max_graph_gb)
            losses = losses_of(model, rows, plan.micro_batches)
            with HessianOperator(losses, parameters, keep_graphs=False) as first:
                gradient, loss = first.gradient, first.loss
        except NonFiniteError as error:
            yield from _undefined(str(error), params.k, len(rows), ("batch_loss", *_MATRIX))
            return
        yield _plain("batch_loss", loss, len(rows))
        search_seed, probe_seed = streams(seed, 2)
        outputs = outputs_of(model, rows, plan.micro_batches)
        try:
            with _KINDS[matrix](outputs, parameters, keep_graphs=plan.keep_graphs) as operator:
                basis, vectors = settle(basis, operator, plan.graph_bytes, lambda free: asked(free=free))
                results, known, samples = _of_matrix(
                    vectors, gradient, basis, params, len(rows), search_seed, probe_seed
                )
            with HessianOperator(losses, parameters, keep_graphs=plan.keep_graphs) as hessian:
                results += _of_hessian(vectors_at(hessian, basis.host), samples, known.vectors, params, probe_seed)
                results.append(_plain("hessian_products", hessian.products, len(rows)))
        except NonFiniteError as error:
            results = list(_undefined(str(error), params.k, len(rows), _MATRIX))
        yield from results


def _of_matrix(
    operator: SymmetricOperator,
    gradient: Tensor,
    plan: BasisPlan,
    params: OutputCurvatureParams,
    sequences: int,
    search_seed: int,
    probe_seed: int,
) -> tuple[list[Result], Eigenpairs, np.ndarray]:
    spectrum = bounded_eigenpairs(
        operator, largest=plan.k, tolerance=params.tolerance, max_steps=plan.max_steps, max_basis=plan.basis,
        generator=torch.Generator().manual_seed(search_seed),
    )  # fmt: skip
    known = spectrum.pairs.take(np.flatnonzero(spectrum.pairs.converged).tolist())
    moments = _moments(operator, params.trace_probes, probe_seed, known.vectors)
    results: list[Result] = list(_eigenvalues(spectrum, params.k, plan, operator.n, sequences))
    exact = float(known.values.sum())
    first = moments.first + exact if len(moments.first) else np.array([exact])
    found = float((known.values**2 + 2 * known.residuals**2).sum())
    second = moments.second + found if len(moments.second) else np.array([found])
    probes = len(moments.first)
    results.append(_estimated("trace", mean_of(moments.first, exact)))
    results.append(_estimated("trace_square", mean_of(moments.second, found)))
    try:
        ratio = participation_ratio(first, second)
        results.append(_estimated("participation_ratio", ratio if probes else Estimate(ratio.value, 0.0, 0)))
    except ZeroDivisionError as error:
        results.append(_missing("participation_ratio", str(error), probes))
    gradient = gradient.to(operator.device)
    square = float(torch.dot(gradient, gradient))
    if square == 0:
        results.append(_missing("gradient_curvature", ZERO_GRADIENT, sequences))
    else:
        along = float(torch.dot(gradient, operator.product(gradient))) / square
        if not np.isfinite(along):
            raise NonFiniteError(f"the matrix times the gradient is not finite ({along})")
        results.append(_plain("gradient_curvature", along, sequences))
    results.append(_plain("products", operator.products, sequences))
    results.append(_plain("basis_on_host", float(plan.host), sequences))
    results.append(Array("ritz", tuple(spectrum.ritz.tolist()), component=COMPONENT))
    return results, known, first


def _of_hessian(
    hessian: SymmetricOperator, samples: np.ndarray, vectors: Tensor, params: OutputCurvatureParams, probe_seed: int
) -> list[Result]:
    """The Hessian's trace by the same subspace and probes, so that the noise of the two goes together."""
    moments = _moments(hessian, params.trace_probes, probe_seed, vectors)
    known = sum(float(torch.dot(row, hessian.product(row))) for row in vectors)
    trace = mean_of(moments.first, known)
    if not np.isfinite(trace.value):
        raise NonFiniteError("the Hessian times an eigenvector is not finite")
    probes = len(moments.first)
    below = moments.first + known if probes else np.array([known])
    if trace.value == 0 or abs(trace.value) < 2 * (trace.stderr or 0.0):
        reason = f"the Hessian's trace is zero within two standard errors ({trace.value:.3g} ± {trace.stderr:.2g})"
        return [_estimated("hessian_trace", trace), _missing("trace_ratio", reason, probes)]
    ratio = ratio_of(samples, below)
    return [
        _estimated("hessian_trace", trace),
        _estimated("trace_ratio", ratio if probes else Estimate(ratio.value, 0.0, 0)),
    ]


def _moments(operator: SymmetricOperator, probes: int, seed: int, vectors: Tensor) -> Moments:
    return complement_moments(operator, probes, torch.Generator().manual_seed(seed), vectors)


def _eigenvalues(spectrum: Spectrum, k: int, plan: BasisPlan, n: int, sequences: int) -> Iterator[Measurement]:
    pairs = spectrum.largest
    for rank in range(k):
        label = str(rank + 1)
        if rank >= len(pairs):
            reason = f"not reached in {spectrum.products} products; raise max_steps"
            if n <= rank:
                reason = f"the network has only {n} parameters"
            elif plan.k <= rank:
                reason = plan.fewer
            yield _missing("eigenvalue", reason, sequences, label)
            continue
        value, residual = float(pairs.values[rank]), float(pairs.residuals[rank])
        if pairs.converged[rank]:
            yield _plain("eigenvalue", value, sequences, label)
        else:
            reason = (
                f"not converged after {spectrum.products} products (at {value:.6g} with residual {residual:.3g}); "
                "raise max_steps or tolerance"
            )
            yield _missing("eigenvalue", reason, sequences, label)
        yield _plain("residual", residual, sequences, label)


def _undefined(reason: str, k: int, sequences: int, metrics: tuple[str, ...]) -> Iterator[Measurement]:
    for metric in metrics:
        yield _missing(metric, reason, sequences)
    for rank in range(1, k + 1):
        yield _missing("eigenvalue", reason, sequences, str(rank))


def _plain(metric: str, value: float, n: int, label: str | None = None) -> Measurement:
    return Measurement(metric, float(value), n=n, component=COMPONENT, label=label)


def _missing(metric: str, reason: str, n: int, label: str | None = None) -> Measurement:
    return Measurement(metric, None, n=n, component=COMPONENT, label=label, reason=reason)


def _estimated(metric: str, estimate: Estimate) -> Measurement:
    return Measurement(metric, estimate.value, stderr=estimate.stderr, n=estimate.probes, component=COMPONENT)

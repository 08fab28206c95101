"""What the ``hessian`` analyzer does once torch is loaded: operator, Lanczos, quadrature, and their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from trace_offline.activations.losses import double_backward_attention
from trace_offline.analyzers._curvature_batch import (
    check_labels,
    choose_rows,
    in_dtype,
    losses_of,
    plan_batches,
    weights_of,
)
from trace_offline.analyzers._curvature_density import DISTRIBUTION, distribution
from trace_offline.analyzers._curvature_plan import BasisPlan, plan_basis, settle
from trace_offline.core.types import Array, Measurement, Result
from trace_offline.estimators.hutchpp import Moments, complement_moments, mean_of, participation_ratio
from trace_offline.estimators.hvp import HessianOperator, NonFiniteError, require_gradients
from trace_offline.estimators.lanczos import Eigenpairs, Spectrum
from trace_offline.estimators.slq import Estimate, Quadrature, spectral_quadrature
from trace_offline.estimators.thick_restart import bounded_eigenpairs

if TYPE_CHECKING:
    from trace_offline.activations.model import ModelView
    from trace_offline.analyzers.hessian import HessianAnalyzer
    from trace_offline.estimators.operators import SymmetricOperator
    from trace_offline.evaluation.evaluation_set import EvaluationSet

COMPONENT = "all"
ZERO_GRADIENT = "the gradient is zero: it has no direction"


def measure_curvature(
    model: ModelView, evaluation: EvaluationSet, params: HessianAnalyzer.Params, seed: int
) -> Iterator[Result]:
    """All results of the analysis; values that are not finite are missing with the reason."""
    rows = choose_rows(evaluation, params.max_sequences, params.max_tokens, seed)
    model = in_dtype(model, params.dtype)
    parameters = weights_of(model)
    count = sum(parameter.numel() for parameter in {id(p): p for p in parameters}.values())
    asked = partial(
        plan_basis, count, parameters[0].element_size(), k=params.k, smallest=1, max_steps=params.max_steps,
        slq_steps=params.slq_steps, max_basis_gb=params.max_basis_gb,
        instead="; or take hessian_blocks, whose vectors are as long as one block",
    )  # fmt: skip
    basis = asked()
    yield _plain("parameters", count, len(rows))
    with require_gradients(parameters), double_backward_attention():
        check_labels(model, rows)
        try:
            plan = plan_batches(model, parameters, rows, params.micro_batch, params.max_graph_gb)
            losses = losses_of(model, rows, plan.micro_batches)
            operator = HessianOperator(losses, parameters, keep_graphs=plan.keep_graphs)
        except NonFiniteError as error:
            yield from _undefined(str(error), params.k, len(rows), _FIRST + _SECOND)
            return
        with operator:
            yield _plain("batch_loss", operator.loss, len(rows))
            yield _plain("gradient_norm", operator.gradient_norm, len(rows))
            try:
                basis, vectors = settle(basis, operator, plan.graph_bytes, lambda free: asked(free=free))
                results = list(_second_order(operator, vectors, params, basis, len(rows), seed))
            except NonFiniteError as error:
                results = list(_undefined(str(error), params.k, len(rows), _SECOND))
            yield from results
            yield _plain("products", operator.products, len(rows))


def _second_order(
    hessian: HessianOperator,
    operator: SymmetricOperator,
    params: HessianAnalyzer.Params,
    plan: BasisPlan,
    sequences: int,
    seed: int,
) -> Iterator[Result]:
    """``operator``: the Hessian with its vectors where the plan has them."""
    yield from gradient_curvature(hessian, sequences)
    # Independent streams: the probes must not depend on how many start vectors the search for eigenvalues drew.
    search_seed, probe_seed, trace_seed = streams(seed, 3)
    search = torch.Generator().manual_seed(search_seed)
    spectrum = bounded_eigenpairs(
        operator,
        largest=plan.k,
        smallest=1,
        tolerance=params.tolerance,
        max_steps=plan.max_steps,
        max_basis=plan.basis,
        generator=search,
    )
    known = _converged(spectrum.pairs)
    quadrature = spectral_quadrature(
        operator,
        probes=params.slq_probes,
        steps=plan.slq_steps,
        generator=torch.Generator().manual_seed(probe_seed),
        exact_values=known.values,
        exact_vectors=known.vectors,
    )
    extra = complement_moments(
        operator,
        max(0, params.trace_probes - params.slq_probes),
        torch.Generator().manual_seed(trace_seed),
        known.vectors,
    )
    spectrum = _without_gaps(operator, spectrum, quadrature, params.tolerance, plan, search)
    yield from _eigenvalues(spectrum, params.k, plan, operator.n, sequences)
    yield from gradient_overlap(hessian, spectrum, params.k, sequences)
    yield from _moments(quadrature, extra, known)
    yield from distribution(quadrature, params, operator.dtype, COMPONENT)
    yield _plain("basis_vectors", plan.basis, sequences)
    yield _plain("basis_on_host", float(plan.host), sequences)
    yield _plain("restarts", spectrum.restarts, sequences)
    yield Array("ritz", tuple(spectrum.ritz.tolist()), component=COMPONENT)
    yield Array("ritz_residual", tuple(spectrum.ritz_residuals.tolist()), component=COMPONENT)


def streams(seed: int, count: int) -> list[int]:
    """Seeds of ``count`` independent streams; the first ones do not depend on how many there are."""
    return [int(child.generate_state(1)[0]) for child in np.random.SeedSequence(seed).spawn(count)]


def gradient_curvature(operator: HessianOperator, sequences: int) -> Iterator[Measurement]:
    """``gᵀHg / gᵀg`` and ``‖Hg‖`` from one product."""
    gradient = operator.gradient
    square = float(torch.dot(gradient, gradient))
    if square == 0:
        yield _missing("gradient_curvature", ZERO_GRADIENT, sequences)
        yield _plain("hessian_gradient_norm", 0.0, sequences)
        return
    image = operator.product(gradient)
    value = float(torch.dot(gradient, image)) / square
    if not np.isfinite(value):
        raise NonFiniteError(f"the Hessian times the gradient is not finite ({value})")
    yield _plain("gradient_curvature", value, sequences)
    yield _plain("hessian_gradient_norm", float(torch.linalg.vector_norm(image)), sequences)


def gradient_overlap(operator: HessianOperator, spectrum: Spectrum, k: int, sequences: int) -> Iterator[Measurement]:
    """``‖P_k g‖² / ‖g‖²``: the share of the squared gradient in the span of the k largest eigenvalues' vectors."""
    largest, metric = spectrum.largest, "gradient_top_overlap"
    square = float(torch.dot(operator.gradient, operator.gradient))
    if square == 0:
        yield _missing(metric, ZERO_GRADIENT, sequences)
    elif len(largest) < min(k, operator.n) or not largest.converged.all():
        yield _missing(metric, "not all k eigenvectors were found; raise max_steps (and max_basis_gb)", sequences)
    else:
        along = largest.vectors @ operator.gradient.to(largest.vectors.device)
        share = float(along.double().square().sum()) / square
        yield _plain(metric, min(share, 1.0), sequences)
    yield _plain("gradient_top_overlap_chance", min(k, operator.n) / operator.n, sequences)


def _converged(pairs: Eigenpairs) -> Eigenpairs:
    return pairs.take(np.flatnonzero(pairs.converged).tolist())


def _without_gaps(
    operator: SymmetricOperator,
    spectrum: Spectrum,
    quadrature: Quadrature,
    tolerance: float,
    plan: BasisPlan,
    generator: torch.Generator,
) -> Spectrum:
    """Search again where the probes prove that an eigenvalue was missed.

    One start vector finds one vector of each eigenspace. A Ritz value of a probe in the complement of the found pairs
    is a lower bound of what is left there: when it lies beyond the last wanted value, a copy was missed.
    """
    if not spectrum.pairs.converged.all() or spectrum.complete or not quadrature.probes:
        return spectrum
    low = min(float(nodes.min()) for nodes in quadrature.nodes)
    high = max(float(nodes.max()) for nodes in quadrature.nodes)
    slack = tolerance * float(np.abs(spectrum.pairs.values).max())
    missed = high > spectrum.largest.values[-1] + slack or low < spectrum.smallest.values[-1] - slack
    if not missed:
        return spectrum
    return bounded_eigenpairs(
        operator,
        largest=plan.k,
        smallest=1,
        tolerance=tolerance,
        max_steps=plan.max_steps,
        max_basis=plan.basis,
        generator=generator,
        locked=spectrum.pairs,
    )


def _eigenvalues(spectrum: Spectrum, k: int, plan: BasisPlan, n: int, sequences: int) -> Iterator[Measurement]:
    found = len(spectrum.largest)
    rows: list[tuple[str, str | None, str, Eigenpairs, int]] = [
        ("eigenvalue", str(rank + 1), str(rank + 1), spectrum.largest, rank) for rank in range(found)
    ]
    rows.append(("smallest_eigenvalue", None, "smallest", spectrum.smallest, 0))
    for metric, label, residual_label, pairs, place in rows:
        value, residual = float(pairs.values[place]), float(pairs.residuals[place])
        if pairs.converged[place]:
            yield _plain(metric, value, sequences, label)
        else:
            yield _missing(
                metric,
                f"not converged after {spectrum.products} products (at {value:.6g} with residual {residual:.3g}); "
                "raise max_steps (and max_basis_gb) or tolerance",
                sequences,
                label,
            )
        yield _plain("residual", residual, sequences, residual_label)
    for rank in range(found, k):
        if n <= rank:
            reason = f"the network has only {n} parameters"
        elif plan.k <= rank:
            reason = plan.fewer
        else:
            reason = f"not reached in {spectrum.products} products; raise max_steps (and max_basis_gb)"
        yield _missing("eigenvalue", reason, sequences, str(rank + 1))


def _moments(quadrature: Quadrature, extra: Moments, known: Eigenpairs) -> Iterator[Measurement]:
    """Tr H, Tr H² and the participation ratio from the probes of the density and the extra ones together."""
    first = np.concatenate((quadrature.samples(lambda points: points), extra.first + known.values.sum()))
    # Tr H² of the found part is Σ‖Hq‖² + ‖PHQ‖²; what an approximate vector leaves outside is its residual, twice.
    found = float((known.values**2 + 2 * known.residuals**2).sum())
    second = np.concatenate(
        (
            quadrature.samples(np.square) + 2 * float((known.residuals**2).sum()),
            extra.second + found,
        )
    )
    if quadrature.probes == 0:
        yield _estimated("trace", Estimate(float(first[0]), 0.0, 0))
        yield _estimated("trace_square", Estimate(float(second[0]), 0.0, 0))
    else:
        yield _estimated("trace", mean_of(first))
        yield _estimated("trace_square", mean_of(second))
    try:
        ratio = participation_ratio(first, second)
        exact = quadrature.probes == 0
        yield _estimated("participation_ratio", Estimate(ratio.value, 0.0, 0) if exact else ratio)
    except ZeroDivisionError as error:
        yield _missing("participation_ratio", str(error), len(first))


_FIRST = ("batch_loss", "gradient_norm")
_SECOND = (
    "gradient_curvature",
    "hessian_gradient_norm",
    "gradient_top_overlap",
    "smallest_eigenvalue",
    "trace",
    "trace_square",
    "participation_ratio",
    *DISTRIBUTION,
)


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

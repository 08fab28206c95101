"""What the ``hessian_blocks`` analyzer does once torch is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from trace_offline.activations.components import Place, parameter_groups
from trace_offline.activations.losses import double_backward_attention
from trace_offline.analyzers._curvature import ZERO_GRADIENT, streams
from trace_offline.analyzers._curvature_batch import (
    GIB,
    check_labels,
    choose_rows,
    in_dtype,
    losses_of,
    plan_batches,
    weights_of,
)
from trace_offline.analyzers._curvature_plan import BasisPlan, plan_basis
from trace_offline.core.errors import NotApplicable
from trace_offline.core.types import Array, Measurement, Result
from trace_offline.estimators.block_moments import BlockMoments, block_moments
from trace_offline.estimators.hutchpp import Moments, complement_moments, mean_of
from trace_offline.estimators.hvp import HessianBlock, HessianOperator, NonFiniteError, require_gradients
from trace_offline.estimators.lanczos import Eigenpairs, Spectrum
from trace_offline.estimators.slq import Estimate
from trace_offline.estimators.thick_restart import bounded_eigenpairs

if TYPE_CHECKING:
    from trace_offline.activations.model import ModelView
    from trace_offline.analyzers.hessian_blocks import HessianBlocksAnalyzer
    from trace_offline.evaluation.evaluation_set import EvaluationSet

_BLOCK = ("smallest_eigenvalue", "trace", "trace_square", "gradient_norm", "gradient_curvature")


def measure_blocks(
    model: ModelView, evaluation: EvaluationSet, params: HessianBlocksAnalyzer.Params, seed: int
) -> Iterator[Result]:
    """All results of the analysis; values that are not finite are missing with the reason."""
    rows = choose_rows(evaluation, params.max_sequences, params.max_tokens, seed)
    groups = _groups(model)
    # names and order are those of the view that was given; a widened copy has the same
    model = in_dtype(model, params.dtype)
    parameters = weights_of(model)
    sizes = [parameter.numel() for parameter in parameters]
    item = parameters[0].element_size()
    plans = {
        place: plan_basis(
            sum(sizes[i] for i in places), item, k=params.k, smallest=1, max_steps=params.max_steps, slq_steps=1,
            max_basis_gb=params.max_basis_gb,
        )
        for place, places in groups.items()
    }  # fmt: skip
    together = _held_together(sum(sizes) * item, params)
    with require_gradients(parameters), double_backward_attention():
        check_labels(model, rows)
        try:
            plan = plan_batches(model, parameters, rows, params.micro_batch, params.max_graph_gb)
            operator = HessianOperator(
                losses_of(model, rows, plan.micro_batches), parameters, keep_graphs=plan.keep_graphs
            )
        except NonFiniteError as error:
            yield _number(Place(None, "all"), "batch_loss", None, len(rows), reason=str(error))
            for place in groups:
                yield from _undefined(place, str(error), params.k, len(rows))
            return
        with operator:
            yield _number(Place(None, "all"), "batch_loss", operator.loss, len(rows))
            blocks = {place: operator.block(places) for place, places in groups.items()}
            try:
                results = list(_measure(operator, blocks, plans, params, together, len(rows), seed))
            except NonFiniteError as error:
                results = [r for place in blocks for r in _undefined(place, str(error), params.k, len(rows))]
            yield from results


def _groups(model: ModelView) -> dict[Place, list[int]]:
    """Place → where its parameters lie in the list of all floating parameters."""
    names = [name for name, p in model.parameters_by_name().items() if p.is_floating_point() and p.numel()]
    return {place: [names.index(name) for name in members] for place, members in parameter_groups(model).items()}


def _held_together(vector: int, params: HessianBlocksAnalyzer.Params) -> int:
    """Probes held at once beside the eigenvectors of all blocks (k + 1 vectors of the whole in total)."""
    room = int(params.max_basis_gb * GIB) // vector - (params.k + 1) - 3
    if room < 4:
        needed = (params.k + 8) * vector / GIB
        raise NotApplicable(
            f"not applicable because the probes need at least {needed:.3g} GiB, and max_basis_gb is "
            f"{params.max_basis_gb:g}: raise max_basis_gb"
        )
    return min(params.trace_probes, room // 2)


def _measure(
    operator: HessianOperator,
    blocks: dict[Place, HessianBlock],
    plans: dict[Place, BasisPlan],
    params: HessianBlocksAnalyzer.Params,
    together: int,
    sequences: int,
    seed: int,
) -> Iterator[Result]:
    search_seed, probe_seed = streams(seed, 2)
    known: dict[Place, Eigenpairs] = {}
    for index, (place, block) in enumerate(blocks.items()):
        # a stream for each block: what one block draws must not change the next
        search = torch.Generator().manual_seed(streams(search_seed, index + 1)[-1])
        spectrum = bounded_eigenpairs(
            block, largest=plans[place].k, smallest=1, tolerance=params.tolerance,
            max_steps=plans[place].max_steps, max_basis=plans[place].basis, generator=search,
        )  # fmt: skip
        known[place] = spectrum.pairs.take(np.flatnonzero(spectrum.pairs.converged).tolist())
        yield from _eigenvalues(place, block, spectrum, params.k, plans[place], sequences)
        yield from _gradient(place, block, sequences)
        yield _number(place, "parameters", block.n, sequences)
    own = {
        place: complement_moments(
            block,
            params.own_probes,
            torch.Generator().manual_seed(streams(probe_seed, index + 1)[-1]),
            known[place].vectors,
        )
        for index, (place, block) in enumerate(blocks.items())
        if params.own_probes
    }
    for place, block in blocks.items():
        yield _number(place, "products", block.products, sequences)
    moments = block_moments(
        operator,
        [block.ranges for block in blocks.values()],
        probes=params.trace_probes,
        generator=torch.Generator().manual_seed(probe_seed),
        bases=[known[place].vectors for place in blocks],
        together=together,
    )
    yield from _traces(list(blocks), moments, known, own)
    yield _number(Place(None, "all"), "products", operator.products, sequences)


def _traces(
    places: list[Place], moments: BlockMoments, known: dict[Place, Eigenpairs], own: dict[Place, Moments]
) -> Iterator[Measurement]:
    whole = np.zeros(0)
    for index, place in enumerate(places):
        pairs = known[place]
        trace = moments.trace(index, float(pairs.values.sum()))
        square = moments.square(index)
        if place in own:
            trace, square = mean_of(own[place].first, float(pairs.values.sum())), mean_of(own[place].second)
        # what an approximate eigenvector leaves outside its span is its residual, counted twice in the norm
        found = float((pairs.values**2 + 2 * pairs.residuals**2).sum())
        yield _estimated(place, "trace", trace)
        yield _estimated(place, "trace_square", Estimate(square.value + found, square.stderr, square.probes))
        samples = moments.traces(index)
        if len(samples):
            whole = samples if not len(whole) else whole + samples
    total = sum(float(pairs.values.sum()) for pairs in known.values())
    yield _estimated(Place(None, "all"), "trace", mean_of(whole, total))


def _gradient(place: Place, block: HessianBlock, sequences: int) -> Iterator[Measurement]:
    gradient = block.gradient
    square = float(torch.dot(gradient, gradient))
    yield _number(place, "gradient_norm", square**0.5, sequences)
    if square == 0:
        yield _number(place, "gradient_curvature", None, sequences, reason=ZERO_GRADIENT)
        return
    value = float(torch.dot(gradient, block.product(gradient))) / square
    if not np.isfinite(value):
        raise NonFiniteError(f"the Hessian times the gradient is not finite ({value})")
    yield _number(place, "gradient_curvature", value, sequences)


def _eigenvalues(
    place: Place, block: HessianBlock, spectrum: Spectrum, k: int, plan: BasisPlan, sequences: int
) -> Iterator[Result]:
    largest, smallest = spectrum.largest, spectrum.smallest
    rows = [("eigenvalue", str(rank + 1), largest, rank) for rank in range(len(largest))]
    for metric, label, pairs, at in [*rows, ("smallest_eigenvalue", None, smallest, 0)]:
        value, residual = float(pairs.values[at]), float(pairs.residuals[at])
        if pairs.converged[at]:
            yield _number(place, metric, value, sequences, label)
        else:
            reason = (
                f"not converged after {spectrum.products} products (at {value:.6g} with residual {residual:.3g}); "
                "raise max_steps or tolerance"
            )
            yield _number(place, metric, None, sequences, label, reason)
        yield _number(place, "residual", residual, sequences, label or "smallest")
    for rank in range(len(largest), k):
        reason = f"not reached in {spectrum.products} products; raise max_steps"
        if block.n <= rank:
            reason = f"the block has only {block.n} parameters"
        elif plan.k <= rank:
            reason = f"max_basis_gb has room for the vectors of {plan.k} eigenvalues only; raise it"
        yield _number(place, "eigenvalue", None, sequences, str(rank + 1), reason)
    yield Array("ritz", tuple(spectrum.ritz.tolist()), layer=place.layer, component=str(place.component))


def _undefined(place: Place, reason: str, k: int, sequences: int) -> Iterator[Measurement]:
    for metric in _BLOCK:
        yield _number(place, metric, None, sequences, reason=reason)
    for rank in range(1, k + 1):
        yield _number(place, "eigenvalue", None, sequences, str(rank), reason)


def _number(
    place: Place, metric: str, value: float | None, n: int, label: str | None = None, reason: str | None = None
) -> Measurement:
    number = None if value is None else float(value)
    return Measurement(
        metric, number, n=n, layer=place.layer, component=str(place.component), label=label, reason=reason
    )


def _estimated(place: Place, metric: str, estimate: Estimate) -> Measurement:
    return Measurement(
        metric, estimate.value, estimate.stderr, estimate.probes, layer=place.layer, component=str(place.component)
    )

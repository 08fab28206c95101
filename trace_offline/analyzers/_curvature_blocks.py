"""What the ``hessian_blocks`` analyzer does once torch is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from trace_offline.activations.components import Place, parameter_groups
from trace_offline.activations.losses import double_backward_attention
from trace_offline.analyzers._curvature import ZERO_GRADIENT, streams
from trace_offline.analyzers._curvature_batch import (
    check_labels,
    choose_rows,
    in_dtype,
    losses_of,
    plan_batches,
    weights_of,
)
from trace_offline.analyzers._curvature_blocks_plan import BlocksPlan, plan_blocks
from trace_offline.analyzers._curvature_density import DISTRIBUTION, distribution
from trace_offline.analyzers._curvature_plan import BasisPlan, place_for, vectors_at
from trace_offline.core.types import Array, Measurement, Result
from trace_offline.estimators.block_moments import BlockMoments, block_moments
from trace_offline.estimators.block_quadrature import block_quadratures
from trace_offline.estimators.hutchpp import Moments, complement_moments, mean_of
from trace_offline.estimators.hvp import HessianBlock, HessianOperator, NonFiniteError, require_gradients
from trace_offline.estimators.krylov import Floats
from trace_offline.estimators.lanczos import Eigenpairs, Spectrum
from trace_offline.estimators.slq import Estimate
from trace_offline.estimators.thick_restart import bounded_eigenpairs

if TYPE_CHECKING:
    from trace_offline.activations.model import ModelView
    from trace_offline.analyzers.hessian_blocks import HessianBlocksAnalyzer
    from trace_offline.evaluation.evaluation_set import EvaluationSet

WHOLE = Place(None, "all")


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
    orders = {place: sum(sizes[i] for i in places) for place, places in groups.items()}
    asked = partial(plan_blocks, orders, parameters[0].element_size(), params)
    everything = asked()
    with require_gradients(parameters), double_backward_attention():
        check_labels(model, rows)
        try:
            plan = plan_batches(model, parameters, rows, params.micro_batch, params.max_graph_gb)
            operator = HessianOperator(
                losses_of(model, rows, plan.micro_batches), parameters, keep_graphs=plan.keep_graphs
            )
        except NonFiniteError as error:
            yield _number(WHOLE, "batch_loss", None, len(rows), reason=str(error))
            for place in groups:
                yield from _undefined(place, str(error), params, len(rows))
            return
        with operator:
            where = place_for(everything.bytes, operator.device, plan.graph_bytes)
            if where.free is not None:
                everything = asked(where.free)
            yield _number(WHOLE, "batch_loss", operator.loss, len(rows))
            blocks = {place: operator.block(places) for place, places in groups.items()}
            search = _Search(operator, blocks, everything, params, len(rows), where.host, streams(seed, 3))
            try:
                results = list(search.run())
            except NonFiniteError as error:
                results = [r for place in blocks for r in _undefined(place, str(error), params, len(rows))]
            yield from results


def _groups(model: ModelView) -> dict[Place, list[int]]:
    """Place → where its parameters lie in the list of all floating parameters."""
    names = [name for name, p in model.parameters_by_name().items() if p.is_floating_point() and p.numel()]
    return {place: [names.index(name) for name in members] for place, members in parameter_groups(model).items()}


@dataclass
class _Search:
    """One analysis. ``seeds``: of the searches for eigenvalues, the probes of the traces, those of the densities."""

    operator: HessianOperator
    blocks: dict[Place, HessianBlock]
    plan: BlocksPlan
    params: HessianBlocksAnalyzer.Params
    sequences: int
    host: bool
    seeds: list[int]
    known: dict[Place, Eigenpairs] = field(default_factory=dict)
    own: dict[Place, Moments] = field(default_factory=dict)

    def run(self) -> Iterator[Result]:
        """All results; with too little memory for vectors of the whole, each block's are dropped once it is done."""
        sums: dict[Place, float] = {}
        for place, block in self.blocks.items():
            yield _number(place, "parameters", block.n, self.sequences)
            yield from _gradient(place, block, self.sequences)
            if place in self.plan.too_large:
                yield from _undefined(place, self.plan.too_large[place], self.params, self.sequences, ())
                continue
            yield from self._eigenvalues(place, block)
            sums[place] = float(self.known[place].values.sum())
            if self.params.own_probes or not self.plan.together:
                self.own[place] = complement_moments(
                    vectors_at(block, self.host), self.params.own_probes or self.params.trace_probes,
                    self._stream(1, place), self.known[place].vectors,
                )  # fmt: skip
            if not self.plan.together:
                yield from self._distributions([place])
                yield from _traces(place, None, 0, self.known[place], self.own[place])
                self.known[place] = self.known[place].take([])
        if self.plan.together:
            yield from self._distributions(list(self.known))
            moments = self._shared_moments()
            for index, place in enumerate(self.known):
                yield from _traces(place, moments, index, self.known[place], self.own.get(place))
            samples = [moments.traces(index) for index in range(len(self.known))]
        else:
            samples = [self.own[place].first for place in self.known]
        yield self._total(samples, sum(sums.values()))
        for place, block in self.blocks.items():
            yield _number(place, "products", block.products, self.sequences)
        yield _number(WHOLE, "products", self.operator.products, self.sequences)
        yield _number(WHOLE, "basis_on_host", float(self.host), self.sequences)

    def _stream(self, which: int, place: Place) -> torch.Generator:
        # a stream for each block: what one block draws must not change the next
        index = list(self.blocks).index(place)
        return torch.Generator().manual_seed(streams(self.seeds[which], index + 1)[-1])

    def _eigenvalues(self, place: Place, block: HessianBlock) -> Iterator[Result]:
        plan = self.plan.bases[place]
        spectrum = bounded_eigenpairs(
            vectors_at(block, self.host), largest=plan.k, smallest=1, tolerance=self.params.tolerance,
            max_steps=plan.max_steps, max_basis=plan.basis, generator=self._stream(0, place),
        )  # fmt: skip
        self.known[place] = spectrum.pairs.take(np.flatnonzero(spectrum.pairs.converged).tolist())
        yield from _eigenvalues(place, block, spectrum, self.params.k, plan, self.sequences)

    def _distributions(self, places: list[Place]) -> Iterator[Result]:
        """Density, negative mass and effective rank; where graphs are rebuilt, the blocks go on side by side."""
        if not self.params.slq_probes:
            return
        blocks = [self.blocks[place] for place in places]
        found = block_quadratures(
            [vectors_at(block, self.host) for block in blocks],
            lambda chosen, vectors: self.operator.block_products([blocks[i] for i in chosen], vectors),
            probes=self.params.slq_probes,
            steps=[self.plan.bases[place].slq_steps for place in places],
            generators=[self._stream(2, place) for place in places],
            exact=[(self.known[place].values, self.known[place].vectors) for place in places],
            room=0 if self.operator.kept else self.plan.room,
        )
        for place, quadrature in zip(places, found, strict=True):
            yield from distribution(
                quadrature, self.params, self.operator.dtype, str(place.component), place.layer
            )  # fmt: skip

    def _shared_moments(self) -> BlockMoments:
        return block_moments(
            vectors_at(self.operator, self.host),
            [self.blocks[place].ranges for place in self.known],
            probes=self.params.trace_probes,
            generator=torch.Generator().manual_seed(self.seeds[1]),
            bases=[self.known[place].vectors for place in self.known],
            together=self.plan.together,
        )

    def _total(self, samples: list[Floats], known: float) -> Measurement:
        """The trace of the whole Hessian: the sum over the blocks, probe by probe."""
        if self.plan.too_large:
            reason = "a block has no trace, so that there is no sum: " + next(iter(self.plan.too_large.values()))
            return _number(WHOLE, "trace", None, 0, reason=reason)
        drawn = [sample for sample in samples if len(sample)]
        return _estimated(WHOLE, "trace", mean_of(np.sum(drawn, axis=0) if drawn else np.zeros(0), known))


def _traces(
    place: Place, shared: BlockMoments | None, index: int, pairs: Eigenpairs, own: Moments | None
) -> Iterator[Measurement]:
    known = float(pairs.values.sum())
    if own is not None:
        trace, square = mean_of(own.first, known), mean_of(own.second)
    else:
        assert shared is not None  # one of the two there is
        trace, square = shared.trace(index, known), shared.square(index)
    # what an approximate eigenvector leaves outside its span is its residual, counted twice in the norm
    found = float((pairs.values**2 + 2 * pairs.residuals**2).sum())
    yield _estimated(place, "trace", trace)
    yield _estimated(place, "trace_square", Estimate(square.value + found, square.stderr, square.probes))


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
            reason = plan.fewer
        yield _number(place, "eigenvalue", None, sequences, str(rank + 1), reason)
    yield Array("ritz", tuple(spectrum.ritz.tolist()), layer=place.layer, component=str(place.component))


def _undefined(
    place: Place,
    reason: str,
    params: HessianBlocksAnalyzer.Params,
    sequences: int,
    further: tuple[str, ...] = ("gradient_norm", "gradient_curvature"),
) -> Iterator[Measurement]:
    densities = DISTRIBUTION if params.slq_probes else ()
    for metric in ("smallest_eigenvalue", "trace", "trace_square", *densities, *further):
        yield _number(place, metric, None, sequences, reason=reason)
    for rank in range(1, params.k + 1):
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

"""What ``train_heldout_curvature`` does once torch is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trace_offline.activations.batch import IGNORED
from trace_offline.activations.losses import double_backward_attention
from trace_offline.analyzers._curvature import COMPONENT, streams
from trace_offline.analyzers._curvature_batch import (
    Rows,
    check_labels,
    choose_rows,
    in_dtype,
    losses_of,
    plan_batches,
    weights_of,
)
from trace_offline.analyzers._curvature_plan import BasisPlan, plan_basis, settle, vectors_at
from trace_offline.core.errors import NotApplicable
from trace_offline.core.types import Measurement, Result
from trace_offline.estimators.hutchpp import range_of, sphere_probe
from trace_offline.estimators.hvp import HessianOperator, NonFiniteError, require_gradients
from trace_offline.estimators.krylov import Floats
from trace_offline.estimators.lanczos import Eigenpairs
from trace_offline.estimators.log_ratio import Contributions, log_ratio
from trace_offline.estimators.thick_restart import bounded_eigenpairs

if TYPE_CHECKING:
    from trace_offline.activations.model import ModelView
    from trace_offline.analyzers.train_heldout_curvature import TrainHeldoutCurvatureAnalyzer
    from trace_offline.evaluation.evaluation_set import EvaluationSet

SIDES = ("train", "heldout")
_RATIOS = tuple(
    f"{name}_ratio{end}" for name in ("batch_loss", "trace", "top_eigenvalue") for end in ("", "_lower", "_upper")
)


@dataclass
class _Side:
    """One split: its rows, their groups and weights (targets), and what was found on it."""

    label: str
    rows: Rows
    groups: NDArray[np.int64]
    weights: Floats
    top: Eigenpairs | None = None
    losses: Floats | None = None
    traces: Floats | None = None
    forms: Floats | None = None

    def contributions(self, added: Floats) -> Contributions:
        return Contributions(added, self.weights, self.groups)


def measure_split(
    model: ModelView,
    evaluation: EvaluationSet,
    params: TrainHeldoutCurvatureAnalyzer.Params,
    seed: int,
    heldout: EvaluationSet | None = None,
) -> Iterator[Result]:
    """All results of the analysis; values that are not finite are missing with the reason."""
    sides = _sides(evaluation, heldout, params, seed)
    model = in_dtype(model, params.dtype)
    parameters = weights_of(model)
    asked = partial(
        plan_basis, sum(p.numel() for p in parameters), parameters[0].element_size(), k=params.k, smallest=0,
        max_steps=params.max_steps, slq_steps=1, max_basis_gb=params.max_basis_gb,
    )  # fmt: skip
    asked()  # what does not fit is said before anything is computed
    for side in sides:
        yield _number("sequences", len(side.rows), len(side.rows), side.label)
    yield _number("shared_sequences", _shared(*sides), len(sides[1].rows))
    with require_gradients(parameters), double_backward_attention():
        for side in sides:
            check_labels(model, side.rows)
        try:
            products, plan = _measure(model, parameters, sides, asked, params, seed)
        except NonFiniteError as error:
            for metric in ("batch_loss", "trace", "top_eigenvalue"):
                for side in sides:
                    yield _number(metric, None, len(side.rows), side.label, reason=str(error))
            for metric in _RATIOS:
                yield _number(metric, None, len(sides[0].rows), reason=str(error))
            return
    yield from _report(sides)
    yield _number("basis_on_host", float(plan.host), len(sides[0].rows))
    yield _number("products", products, len(sides[0].rows))


def _sources(
    evaluation: EvaluationSet, heldout: EvaluationSet | None
) -> list[tuple[EvaluationSet, NDArray[np.bool_] | None]]:
    """For each side the set its rows come from, and which of them may be taken (None: all)."""
    if heldout is not None:
        return [(evaluation, None), (heldout, None)]
    if evaluation.split is None:
        raise NotApplicable(
            "not applicable because there is nothing to compare: give the run a second evaluation set of held-out text "
            "(--heldout-set), or save_evaluation_set a split (0: rows the model was trained on, 1: rows held out)"
        )
    masks = [np.asarray(evaluation.split) == number for number in range(len(SIDES))]
    for number, mask in enumerate(masks):
        if not mask.any():
            raise NotApplicable(
                f"not applicable because the evaluation set has no row of split {number} ({SIDES[number]})"
            )
    return [(evaluation, mask) for mask in masks]


def _sides(
    evaluation: EvaluationSet,
    heldout: EvaluationSet | None,
    params: TrainHeldoutCurvatureAnalyzer.Params,
    seed: int,
) -> list[_Side]:
    sources = _sources(evaluation, heldout)
    sides = [choose_rows(each, params.max_sequences, params.max_tokens, seed, among) for each, among in sources]
    # An eigenvalue of few sequences is larger for that reason alone: compare equal numbers.
    count = min(len(rows) for rows in sides)
    found = []
    for label, rows, (source, _) in zip(SIDES, sides, sources, strict=True):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:count]).tolist()
        part = rows.take(chosen)
        groups = np.asarray(source.group)[list(part.places)]
        if len(np.unique(groups)) < 2:
            raise NotApplicable(
                f"not applicable because the {label} rows come from one group: the scatter between sequences, and so "
                "an interval, needs at least two"
            )
        found.append(_Side(label, part, groups, (part.targets != IGNORED).sum(1).double().numpy()))
    return found


def _shared(train: _Side, heldout: _Side) -> int:
    """How many held-out sequences have the very tokens of a training one."""

    def texts(rows: Rows) -> list[tuple[int, ...]]:
        pairs = zip(rows.input_ids, rows.attention_mask, strict=True)
        return [tuple(ids[mask.bool()].tolist()) for ids, mask in pairs]

    known = set(texts(train.rows))
    return sum(text in known for text in texts(heldout.rows))


def _measure(
    model: ModelView,
    parameters: list[Tensor],
    sides: list[_Side],
    asked: Callable[..., BasisPlan],
    params: TrainHeldoutCurvatureAnalyzer.Params,
    seed: int,
) -> tuple[int, BasisPlan]:
    """Fill the sides; the number of products and the plan. One side's graphs are held at a time."""
    search_seed, probe_seed = streams(seed, 2)
    products, plan = 0, None
    for side in sides:
        operator, reserve = _operator(model, parameters, side, params, None)
        with operator:
            if plan is None:  # both sides' vectors in one place, they meet in one basis
                plan, _ = settle(asked(), operator, reserve, lambda free: asked(free=free))
            spectrum = bounded_eigenpairs(
                vectors_at(operator, plan.host), largest=plan.k, tolerance=params.tolerance,
                max_steps=plan.max_steps, max_basis=plan.basis,
                generator=torch.Generator().manual_seed(search_seed),
            )  # fmt: skip
            side.top = spectrum.largest
            products += operator.products
    # One subspace for both sides, so that the same random vectors serve both and their noise cancels in the ratio.
    basis = range_of(torch.cat([side.top.vectors for side in sides if side.top is not None]))
    assert plan is not None  # there are two sides
    for side in sides:
        operator, _ = _operator(model, parameters, side, params, 1)
        vectors = vectors_at(operator, plan.host)
        with operator:
            assert side.top is not None
            side.losses = np.array(operator.losses)
            side.forms = operator.forms(side.top.vectors[0]).numpy()
            known = torch.stack([operator.forms(row) for row in basis]).sum(0).numpy()
            draw = torch.Generator().manual_seed(probe_seed)
            rest = operator.n - len(basis)
            probes = params.trace_probes if rest else 0
            table = [rest * operator.forms(sphere_probe(vectors, draw, basis)).numpy() + known for _ in range(probes)]
            side.traces = np.stack(table) if table else known[None]
            products += operator.products
            if not np.isfinite(side.traces).all():
                raise NonFiniteError("the product with a random vector is not finite")
    return products, plan


def _operator(
    model: ModelView,
    parameters: list[Tensor],
    side: _Side,
    params: TrainHeldoutCurvatureAnalyzer.Params,
    micro_batch: int | None,
) -> tuple[HessianOperator, int]:
    """The Hessian of one side, and the bytes that a product takes for itself."""
    plan = plan_batches(model, parameters, side.rows, micro_batch, params.max_graph_gb)
    losses = losses_of(model, side.rows, plan.micro_batches)
    return HessianOperator(losses, parameters, keep_graphs=plan.keep_graphs), plan.graph_bytes


def _report(sides: list[_Side]) -> Iterator[Measurement]:
    groups = [len(np.unique(side.groups)) for side in sides]
    losses: list[Contributions] = []
    traces: list[Contributions] = []
    tops: list[Contributions] = []
    for side, count in zip(sides, groups, strict=True):
        assert side.top is not None
        assert side.losses is not None
        assert side.traces is not None
        assert side.forms is not None
        losses.append(side.contributions(side.losses))
        traces.append(side.contributions(side.traces))
        tops.append(side.contributions(side.forms))
        for metric, found in (("batch_loss", losses[-1]), ("trace", traces[-1])):
            yield _number(metric, found.value, count, side.label, stderr=found.stderr)
        if side.top.converged[0]:
            value = float(side.top.values[0])
            yield _number("top_eigenvalue", value, count, side.label, stderr=tops[-1].stderr)
        else:
            yield _number("top_eigenvalue", None, count, side.label, reason="not converged; raise max_steps")
    yield from _ratio("batch_loss", losses, min(groups))
    yield from _ratio("trace", traces, min(groups))
    if all(side.top is not None and side.top.converged[0] for side in sides):
        yield from _ratio("top_eigenvalue", tops, min(groups))
    else:
        for end in ("", "_lower", "_upper"):
            reason = "a top eigenvalue did not converge; raise max_steps"
            yield _number(f"top_eigenvalue_ratio{end}", None, min(groups), reason=reason)


def _ratio(name: str, sides: list[Contributions], count: int) -> Iterator[Measurement]:
    try:
        ratio = log_ratio(sides[1], sides[0])
    except ZeroDivisionError as error:
        for end in ("", "_lower", "_upper"):
            yield _number(f"{name}_ratio{end}", None, count, reason=f"the {name.replace('_', ' ')} is {error}")
        return
    yield _number(f"{name}_ratio", ratio.value, count, stderr=ratio.stderr)
    yield _number(f"{name}_ratio_lower", ratio.lower, count)
    yield _number(f"{name}_ratio_upper", ratio.upper, count)


def _number(
    metric: str,
    value: float | None,
    n: int,
    label: str | None = None,
    *,
    stderr: float | None = None,
    reason: str | None = None,
) -> Measurement:
    number = None if value is None else float(value)
    return Measurement(metric, number, stderr, n, component=COMPONENT, label=label, reason=reason)

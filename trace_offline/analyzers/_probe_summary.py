"""What is said about a task beyond single layers: repetitions put together, depth at which a label becomes readable."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trace_offline.analyzers._measurements import measurement, missing
from trace_offline.core.types import Array, Measurement, Result
from trace_offline.estimators.centre_of_gravity import centre_of_gravity, expected_layer
from trace_offline.estimators.clustered import JACKKNIFE_GROUPS, Codes, cluster_codes, cluster_sums

DEPTH = ("expected_layer", "centre_of_gravity")


def depth(
    task: str,
    layers: Sequence[int],
    hits: Sequence[NDArray[Any]],
    chance: NDArray[Any],
    groups: Codes,
    reason: str | None = None,
) -> Iterator[Measurement]:
    """Expected layer and centre of gravity of the accuracy over ``layers``, layer None.

    ``hits``: for each layer, how right each of the n test words was (0…1); ``chance [n]``: how right the majority is;
    ``groups [n]``: their sentences. ``reason``: why there is nothing to measure, if so.
    """
    where: dict[str, Any] = {"component": "residual", "task": task}
    if len(layers) < 2:
        reason = reason or "fewer than two layers have finite hidden states"
        yield from (missing(metric, reason, **where) for metric in DEPTH)
        return
    coarse = cluster_codes(groups, JACKKNIFE_GROUPS)
    columns = np.stack([np.ones(len(groups)), chance, *hits], axis=1).astype(np.float64)
    sums = cluster_sums(columns, coarse, int(coarse.max()) + 1)
    places = np.array(layers, dtype=np.float64)
    for metric, measure, base in (
        ("expected_layer", expected_layer, "the first"),
        ("centre_of_gravity", centre_of_gravity, "the majority class"),
    ):
        found = measure(sums, places)
        nothing = f"no layer gains two standard errors on {base}" if found.value is None else None
        yield measurement(metric, found, len(groups), nothing, **where)


def combine(repeats: Sequence[Iterable[Result]]) -> Iterator[Result]:
    """One result for all repetitions, in the order of the first; arrays of counts are added.

    value = mean of the R repetitions that have one; stderr² = mean of their stderr² + (variance between them)/R. The
    test sets of repetitions overlap, so what the finite data contribute is not divided by R.
    """
    if len(repeats) == 1:
        yield from repeats[0]
        return
    measured: dict[tuple[object, ...], list[Measurement]] = {}
    arrays: dict[tuple[object, ...], list[Array]] = {}
    for results in repeats:
        for item in results:
            if isinstance(item, Measurement):
                key = (item.metric, item.layer, item.component, item.task, item.label)
                measured.setdefault(key, []).append(item)
            elif isinstance(item, Array):
                arrays.setdefault((item.name, item.layer, item.task, item.label), []).append(item)
    yield from (_mean(items) for items in measured.values())
    for group in arrays.values():
        first = group[0]
        total = np.sum([array.values for array in group], axis=0)
        yield Array(first.name, tuple(total.tolist()), first.layer, first.component, first.task, first.label)


@dataclass(frozen=True)
class _Spread:
    value: float
    stderr: float | None


def _spread(values: Sequence[float], errors: Sequence[float | None]) -> _Spread:
    mean = math.fsum(values) / len(values)
    known = [error * error for error in errors if error is not None]
    if not known and len(values) < 2:
        return _Spread(mean, None)
    within = math.fsum(known) / len(known) if known else 0.0
    between = 0.0
    if len(values) > 1:
        between = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)
    return _Spread(mean, math.sqrt(within + between))


def _mean(items: Sequence[Measurement]) -> Measurement:
    first = items[0]
    there = [(item.value, item.stderr, item.n) for item in items if item.value is not None]
    where: dict[str, Any] = {
        "layer": first.layer,
        "component": first.component,
        "task": first.task,
        "label": first.label,
    }
    if not there:
        return Measurement(first.metric, None, n=first.n, reason=first.reason, **where)
    found = _spread([value for value, _, _ in there], [error for _, error, _ in there])
    counts = [n for _, _, n in there if n is not None]
    n = round(sum(counts) / len(counts)) if counts else None
    return Measurement(first.metric, found.value, stderr=found.stderr, n=n, **where)

"""What is said about a task beyond single layers: repetitions put together, depth at which a label becomes readable."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trace_offline.analyzers._measurements import measurement, missing
from trace_offline.analyzers._probe_data import Prepared
from trace_offline.analyzers._probe_fit import LayerScores
from trace_offline.core.types import Array, Measurement, Result
from trace_offline.estimators.centre_of_gravity import centre_of_gravity, expected_layer
from trace_offline.estimators.clustered import JACKKNIFE_GROUPS, Estimate, cluster_codes, cluster_sums
from trace_offline.estimators.splits import Part

DEPTH = ("expected_layer", "centre_of_gravity")


def depth(found: Sequence[LayerScores], ready: Prepared) -> Iterator[Measurement]:
    """Expected layer and centre of gravity of the accuracy over layers, layer None."""
    where: dict[str, Any] = {"component": "residual", "task": ready.words.task}
    if len(found) < 2:
        reason = ready.reason or "fewer than two layers have finite hidden states"
        yield from (missing(metric, reason, **where) for metric in DEPTH)
        return
    test = ready.at(Part.TEST)
    groups = cluster_codes(ready.words.group[test], JACKKNIFE_GROUPS)
    answer = np.bincount(ready.label[ready.at(Part.TRAIN)]).argmax()
    columns = [np.ones(len(test)), ready.label[test] == answer, *(scores.real.correct for scores in found)]
    sums = cluster_sums(np.stack(columns, axis=1).astype(np.float64), groups, int(groups.max()) + 1)
    layers = np.array([scores.layer for scores in found], dtype=np.float64)
    yield _or_reason(
        "expected_layer",
        expected_layer(sums, layers),
        len(test),
        "no layer gains two standard errors on the first",
        where,
    )
    yield _or_reason(
        "centre_of_gravity",
        centre_of_gravity(sums, layers),
        len(test),
        "no layer gains two standard errors on the majority class",
        where,
    )


def _or_reason(metric: str, estimate: Estimate, n: int, reason: str, where: dict[str, Any]) -> Measurement:
    return measurement(metric, estimate, n, None if estimate.value is not None else reason, **where)


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

"""One line for each answer, and what measures are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from measures import ROLES, SYNTAX, TOP, TRACE_OF_HESSIAN

TITLES = {measure.key: measure.title for measure in (*SYNTAX, *ROLES, TRACE_OF_HESSIAN, TOP)}


def _order_in_short(claim: Mapping[str, Any]) -> str:
    """Measures by the geometric mean, over runs, of the step of half their rise."""
    steps = {}
    for key, events in claim["events"].items():
        found = [event["step"] for event in events.values() if isinstance(event, Mapping)]
        if found and len(found) == len(events):
            steps[key] = prod(found) ** (1 / len(found))
    order = sorted(steps, key=lambda key: steps[key])
    return "half of the rise: " + "; ".join(f"{TITLES[key]} at {steps[key]:,.0f}" for key in order)


def _counts(found: Sequence[str]) -> str:
    counted = sorted(Counter(found).items(), key=lambda item: (-item[1], item[0]))
    return "; ".join(f"{name}: {count}" for name, count in counted)


def _shapes_in_short(claim: Mapping[str, Any]) -> str:
    words, rows = (
        _counts([form for layers in claim[name].values() for form in layers.values()])
        for name in ("shapes", "trace_shapes")
    )
    return f"layers by shape: {words} / with TRACE's number: {rows}"


def _curvature_in_short(claim: Mapping[str, Any]) -> str:
    parts = [f"{TITLES[key]}: {_counts(list(runs.values()))}" for key, runs in claim["runs"].items()]
    return "runs by outcome: " + " / ".join(parts)


def _peak_in_short(claim: Mapping[str, Any]) -> str:
    peaks, turns = (
        [isinstance(event, Mapping) for event in claim["events"][name].values()] for name in ("peak", "turn")
    )
    return f"{sum(peaks)} of {len(peaks)} runs have a peak, {sum(turns)} of {len(turns)} a turn"


SHORT: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "syntax_before_roles": _order_in_short,
    "dimension_falls_and_rises": _shapes_in_short,
    "curvature_peaks_early": _curvature_in_short,
    "peak_before_turn": _peak_in_short,
}

"""From curves to answers: when something emerged, peaked or turned in each run, and what that says of each claim.

Nothing here knows models or files; curves come in, answers with their numbers come out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from measures import DIMENSION, FLATTENED, MATCHED, ROLES, SYNTAX, TOP, TRACE_OF_HESSIAN, Curve
from scipy import stats

from trace_offline.estimators.emergence import NoEvent, find_emergence
from trace_offline.estimators.event_order import order_of_events
from trace_offline.estimators.history_noise import Noise, NoiseUnknown, estimate_noise
from trace_offline.estimators.peak import find_peak

SHARE = 0.5  # emergence: half of the rise
LEVEL = 0.05  # chance to report an event where there is none
EARLY = 0.25  # a peak is early when its interval ends within this share of the training
HALF = 0.5  # a curve goes only one way when the way back is surely below this share of it
Z = 1.96
DECAY = 0.5  # a peak decays when the last level is below this share of its height

Runs = Mapping[str, Mapping[str, Curve]]


@dataclass(frozen=True)
class Event:
    """Where on the step axis something happened: between the checkpoints ``low`` and ``high``, best guess ``step``."""

    step: int
    low: int
    high: int
    value: float
    before: float
    after: float


def emergence(curve: Curve) -> Event | str:
    """First lasting crossing of half the rise, or why there is none."""
    found = _look(curve, lambda *given: find_emergence(*given, share=SHARE, level=LEVEL))
    if isinstance(found, str):
        return found
    return Event(found.step, found.low, found.high, found.threshold, found.start, found.best)


def peak(curve: Curve) -> Event | str:
    """Interior maximum above both ends by more than noise, or why there is none."""
    found = _look(curve, lambda *given: find_peak(*given, level=LEVEL))
    if isinstance(found, str):
        return found
    return Event(found.step, found.low, found.high, found.value, found.start, found.end)


def turn(curve: Curve) -> Event | str:
    """Interior minimum: where a curve that fell begins to rise."""
    found = peak({**curve, "values": [-value for value in curve["values"]]})
    if isinstance(found, str):
        return found
    return Event(found.step, found.low, found.high, -found.value, -found.before, -found.after)


def _look(curve: Curve, finder: Callable[..., Any]) -> Any:
    steps, values = (np.asarray(curve[name], float) for name in ("steps", "values"))
    stderr = np.asarray([np.nan if each is None else each for each in curve["stderr"]], float)
    try:
        # The noise of the measurement, where it is known. The change from one of these few checkpoints to the next is
        # what is asked about, and no noise.
        noise = Noise(stderr, "stderr") if (stderr > 0).all() else estimate_noise(steps, values, stderr)
        return finder(steps, values, noise)
    except (NoEvent, NoiseUnknown) as reason:
        return str(reason)


def comes_first(first: Mapping[str, Event | str], second: Mapping[str, Event | str]) -> dict[str, Any]:
    """Which of two events comes first, run by run and over all runs.

    In one run it is sure when the intervals do not overlap. Over runs: ``yes`` when the first is surely earlier in all
    of them, ``no`` when it is surely later in all, ``mixed`` when it is surely earlier in some and surely later in
    others, else ``not shown``. Runs without one of the events do not count, and are named.
    """
    runs = sorted(first.keys() & second.keys())
    pairs = {run: (first[run], second[run]) for run in runs}
    both = {run: (a, b) for run, (a, b) in pairs.items() if isinstance(a, Event) and isinstance(b, Event)}
    missing = {run: _why(a, b) for run, (a, b) in pairs.items() if run not in both}
    if not both:
        return {"verdict": "not shown", "runs": 0, "earlier": 0, "later": 0, "undecided": 0, "missing": missing}
    earlier = sum(a.high <= b.low for a, b in both.values())
    later = sum(b.high <= a.low for a, b in both.values())
    steps = [[each.step for each in events] for events in zip(*both.values(), strict=True)]
    verdict = "not shown"
    if not missing and earlier == len(both):
        verdict = "yes"
    elif not missing and later == len(both):
        verdict = "no"
    elif earlier and later:
        verdict = "mixed"
    order = asdict(order_of_events(np.asarray(steps[0], float), np.asarray(steps[1], float)))
    counts = {"runs": len(both), "earlier": earlier, "later": later, "undecided": len(both) - earlier - later}
    return {"verdict": verdict, **counts, "missing": missing, "order": order, "smallest_p": 2.0 ** (1 - len(both))}


def _why(first: Event | str, second: Event | str) -> str:
    return "; ".join(each for each in (first, second) if isinstance(each, str))


def events_of(runs: Runs, keys: Sequence[str], finder: Callable[[Curve], Event | str]) -> dict[str, dict[str, Any]]:
    """Measure → run → event or reason, for the measures that runs have."""
    return {key: {run: finder(curves[key]) for run, curves in runs.items() if key in curves} for key in keys}


def syntax_before_roles(runs: Runs) -> dict[str, Any]:
    """Claim 1: syntax against roles, asked in the same way. ``yes`` only when all comparisons say so."""
    found = events_of(runs, [measure.key for measure in (*SYNTAX, *ROLES)], emergence)
    pairs = [
        {"syntax": syntax.key, "role": role.key, **comes_first(found[syntax.key], found[role.key])}
        for syntax, role in MATCHED
        if found[syntax.key] and found[role.key]
    ]
    return {"verdict": together([pair["verdict"] for pair in pairs]), "events": found, "pairs": pairs}


def together(verdicts: Sequence[str]) -> str:
    """``yes`` or ``no`` when all say so, ``mixed`` when they contradict one another, else ``not shown``."""
    if not verdicts:
        return "not shown"
    for sure in ("yes", "no"):
        if all(verdict == sure for verdict in verdicts):
            return sure
    return "mixed" if "mixed" in verdicts or {"yes", "no"} <= set(verdicts) else "not shown"


def shape(curve: Curve) -> str:
    """``falls, then rises``, ``rises, then falls``, ``rises``, ``falls`` or ``flat``, each beyond noise."""
    if isinstance(turn(curve), Event):
        return "falls, then rises"
    if isinstance(peak(curve), Event):
        return "rises, then falls"
    if isinstance(emergence(curve), Event):
        return "rises"
    if isinstance(emergence({**curve, "values": [-value for value in curve["values"]]}), Event):
        return "falls"
    return "flat"


def only_one_way(curve: Curve) -> bool:
    """Whether one of the two excursions, down to the lowest value or up from it, is surely below half of the other.

    By the upper end of its 95 % interval; that the lowest of all is taken errs towards no.
    """
    values, errors = curve["values"], curve["stderr"]
    low = int(np.argmin(values))
    ways = []
    for end in (0, -1):
        if errors[low] is None or errors[end] is None:
            return False
        size = values[end] - values[low]
        ways.append((size, size + Z * float(np.hypot(errors[end], errors[low])) if end != low else 0.0))
    (down, most_down), (up, most_up) = ways
    return most_up < HALF * down or most_down < HALF * up


def _turns(curve: Curve, form: str) -> str:
    """``yes``, ``no`` or ``not shown``: to have seen no second half is no answer, to have excluded it is one."""
    if form == "falls, then rises":
        return "yes"
    return "no" if form == "rises, then falls" or (form in ("falls", "rises") and only_one_way(curve)) else "not shown"


def dimension_falls_and_rises(runs: Runs) -> dict[str, Any]:
    """Claim 2: the dimension of every layer from 1 on; the verdict is about all layers of all runs.

    Beside it, with no say in the verdict, the shapes of TRACE's number.
    """
    shapes, flattened = (
        {
            run: {key: shape(curve) for key, curve in curves.items() if key.startswith(f"{measure.key}@")}
            for run, curves in runs.items()
        }
        for measure in (DIMENSION, FLATTENED)
    )
    each = [_turns(runs[run][key], form) for run, layers in shapes.items() for key, form in layers.items()]
    keys = sorted({key for layers in shapes.values() for key in layers})
    return {
        "verdict": together(each),
        "shapes": shapes,
        "trace_shapes": flattened,
        "events": events_of(runs, keys, turn),
    }


def curvature_peaks_early(runs: Runs) -> dict[str, Any]:
    """Claim 3: trace and largest eigenvalue have a maximum in the first quarter and fall below half of it."""
    found = events_of(runs, [TRACE_OF_HESSIAN.key, TOP.key], peak)
    verdicts: dict[str, dict[str, str]] = {}
    for key, events in found.items():
        for run, event in events.items():
            last = runs[run][key]["steps"][-1]
            if isinstance(event, str):
                verdict = "no peak beyond noise"
            elif event.high > EARLY * last:
                verdict = "not early" if event.low > EARLY * last else "early or not is open"
            else:
                verdict = "yes" if event.after < DECAY * event.value else "early, but does not decay"
            verdicts.setdefault(key, {})[run] = verdict
    answers = {"yes": "yes", "not early": "no", "early, but does not decay": "no"}
    flat = [answers.get(verdict, "not shown") for each in verdicts.values() for verdict in each.values()]
    over = {key: over_runs([curves[key] for curves in runs.values() if key in curves]) for key in found}
    return {"verdict": together(flat), "runs": verdicts, "events": found, "over_runs": over}


def over_runs(curves: Sequence[Curve]) -> dict[str, Any] | None:
    """Where the mean of the logarithms is highest, against the first and the last step: ratios over runs.

    Student's intervals for the geometric mean ratio and two-sided p, both for as many inner steps as were looked at
    (Bonferroni). None for fewer than two runs, for fewer than three common steps, and for values that are not positive.
    """
    steps = sorted(set.intersection(*(set(curve["steps"]) for curve in curves))) if curves else []
    tables = [dict(zip(curve["steps"], curve["values"], strict=True)) for curve in curves]
    values = np.asarray([[table[step] for step in steps] for table in tables], float)
    if len(tables) < 2 or len(steps) < 3 or (values <= 0).any():
        return None
    logs = np.log(values)
    top = 1 + int(np.argmax(logs.mean(0)[1:-1]))
    found: dict[str, Any] = {"step": steps[top], "runs": len(tables)}
    rise, fall = logs[:, top] - logs[:, 0], logs[:, -1] - logs[:, top]
    for name, difference in (("top_over_start", rise), ("end_over_top", fall)):
        test = stats.ttest_1samp(difference, 0.0)
        interval = test.confidence_interval(1 - 0.05 / (len(steps) - 2))
        found[name] = {
            "ratio": float(np.exp(difference.mean())),
            "low": float(np.exp(interval.low)),
            "high": float(np.exp(interval.high)),
            "p": min(1.0, float(test.pvalue) * (len(steps) - 2)),
        }
    return found


def peak_before_turn(runs: Runs) -> dict[str, Any]:
    """Claim 4: the peak of the curvature against the turn of the last layer's dimension, and against what is learnt.

    Where the dimension of all runs only rises, or only falls, there is nothing to precede: ``no turn``.
    """
    peaks = events_of(runs, [TRACE_OF_HESSIAN.key], peak)[TRACE_OF_HESSIAN.key]
    turns = {run: turn(_last_layer(curves)) for run, curves in runs.items() if f"{DIMENSION.key}@1" in curves}
    main = comes_first(peaks, turns)
    last = {run: _last_layer(runs[run]) for run in turns}
    monotone = [run for run in turns if shape(last[run]) in ("rises", "falls") and only_one_way(last[run])]
    if turns and len(monotone) == len(turns):
        main["verdict"] = "no turn"
    learnt = events_of(runs, [measure.key for measure in (*SYNTAX, *ROLES)], emergence)
    others = {key: comes_first(peaks, events) for key, events in learnt.items() if events}
    return {**main, "events": {"peak": peaks, "turn": turns}, "learnt": others}


def _last_layer(curves: Mapping[str, Curve]) -> Curve:
    layers = [int(key.split("@")[1]) for key in curves if key.startswith(f"{DIMENSION.key}@")]
    return curves[f"{DIMENSION.key}@{max(layers)}"]


CLAIMS: dict[str, Callable[[Runs], dict[str, Any]]] = {
    "syntax_before_roles": syntax_before_roles,
    "dimension_falls_and_rises": dimension_falls_and_rises,
    "curvature_peaks_early": curvature_peaks_early,
    "peak_before_turn": peak_before_turn,
}


def judge(runs: Runs) -> dict[str, Any]:
    """All claims, as values that JSON can hold."""
    return {name: _plain(claim(runs)) for name, claim in CLAIMS.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Event):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value

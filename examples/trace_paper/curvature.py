"""The sections on curvature: its peak, and whether that comes before the turn of the dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from answers import QUESTIONS, verdicts
from claims import DECAY, EARLY
from in_short import TITLES
from tables import number, step_of, table


def curvature(results: Mapping[str, Any]) -> str:
    """The section of the third claim."""
    claim = results["claims"]["all runs"]["curvature_peaks_early"]
    rows = []
    for key, events in claim["events"].items():
        for run, event in events.items():
            values = results["curves"][run][key]["values"]
            rows.append(
                [
                    TITLES[key],
                    run,
                    step_of(event),
                    number(values[0]),
                    number(max(values)),
                    number(values[-1]),
                    claim["runs"][key][run],
                ]
            )
    head = ["measure", "run", "peak", "at step 0", "highest", "at the end", "early and decaying"]
    return f"""
## {QUESTIONS["curvature_peaks_early"]}

{verdicts(results, "curvature_peaks_early")}

Curvature of the loss on a fixed sample of held-out sentences: the trace of the Hessian (over random vectors, with
standard error) and its largest eigenvalue. *Early*: the peak's interval ends within the first {EARLY:.0%} of the steps.
*Decaying*: the last level is below {DECAY:.0%} of the peak.

![Curvature over training](images/trace_paper_curvature.svg)

{table(head, rows)}

{_over_runs(claim)}

**As TRACE does it**: the sum of five eigenvalues is called the trace (orange). It follows the sharpest directions and
says nothing of the rest of the spectrum.
"""


def _over_runs(claim: Mapping[str, Any]) -> str:
    rows = []
    for key, found in claim["over_runs"].items():
        if found is not None:
            ratios = [found[name] for name in ("top_over_start", "end_over_top")]
            shown = [f"{number(r['ratio'])} ({number(r['low'])}-{number(r['high'])})" for r in ratios]
            tests = [number(ratio["p"], 2) for ratio in ratios]
            rows.append([TITLES[key], f"{found['step']:,}", shown[0], tests[0], shown[1], tests[1]])
    if not rows:
        return ""
    head = ["measure", "highest at", "highest / first", "p", "last / highest", "p"]
    return f"""
The largest eigenvalue has no standard error; its peak in one run has to rise above the scatter between the few
checkpoints. Taken together the runs say more, where all values are positive: the step at
which their geometric mean is highest, and what it is there in proportion to the first and the last step (Student's
intervals over runs and p, both corrected for the number of steps looked at):

{table(head, rows)}"""


def peak(results: Mapping[str, Any]) -> str:
    """The section of the fourth claim."""
    claim = results["claims"]["all runs"]["peak_before_turn"]
    runs = list(results["runs"])
    rows = [
        [name, *(step_of(claim["events"][key].get(run)) for run in runs)]
        for key, name in (("peak", "peak of the trace"), ("turn", "turn of the dimension, last layer"))
    ]
    learnt = [
        [
            TITLES[key],
            f"{each['earlier']} of {each['runs']}",
            f"{each['later']} of {each['runs']}",
            number(each.get("order", {}).get("p_sign")),
        ]
        for key, each in claim["learnt"].items()
    ]
    return f"""
## {QUESTIONS["peak_before_turn"]}

{verdicts(results, "peak_before_turn")}

{table(["", *runs], rows)}

And against what is learnt: is the peak of the trace surely before, or surely after, half of the rise of each measure?

{table(["measure", "peak surely before", "peak surely after", "p"], learnt)}
"""

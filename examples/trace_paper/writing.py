"""The section on what a model writes by itself, what n-grams could do as well, and what it remembers word by word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from claims import emergence
from measures import LOSS, MISTAKES, OVER_NGRAM, REMEMBERED, REMEMBERED_MORE, WELL_FORMED, Curve
from tables import number, step_of, table

Z = 1.96
CHOSEN = (64, 128, 256, 512, 1024, 2560)  # steps of the table of mistakes, beside the last


def below_for_good(curve: Curve) -> int | None:
    """First step from which on the values stay below 0 by more than 1.96 standard errors; None where they do not."""
    found = None
    for step, value, error in zip(curve["steps"], curve["values"], curve["stderr"], strict=True):
        if error is None or value + Z * error >= 0:
            found = None
        elif found is None:
            found = int(step)
    return found


def written(results: Mapping[str, Any]) -> str:
    """The whole section as Markdown; empty where nothing of it was measured."""
    curves = results["curves"]
    runs = [run for run in results["runs"] if WELL_FORMED.key in curves[run]]
    if not runs:
        return ""
    return f"""
## What do they write, and what do they remember?

No claim of the paper's, but what the claims are about: rules, and not only frequencies or sentences known by heart.
Sentences are sampled one by one and read by the grammar that made the corpus. Unigram, bigram and trigram models are
fitted to the training sentences and judged on the same held-out words. What is remembered is how much less surprising
training sentences are than held-out ones, and how much of this a trigram model of the training sentences does not
explain.

![Sampled sentences, n-grams and memory over training](images/trace_paper_writing.svg)

{_rows(curves, runs)}

Mistakes of sampled sentences (share of sentences, mean over {len(runs)} runs; a sentence can have several):

{_mistakes(curves, runs)}
"""


def _rows(curves: Mapping[str, Mapping[str, Curve]], runs: list[str]) -> str:
    def last(key: str, run: str) -> str:
        curve = curves[run][key]
        error = curve["stderr"][-1]
        return number(curve["values"][-1]) + ("" if error is None else f" ± {Z * error:.2g}")

    rows = [["sentences without an error: half of the rise", *(step_of(_event(curves[run])) for run in runs)]]
    rows += [["sentences without an error, at the end", *(last(WELL_FORMED.key, run) for run in runs)]]
    for measure in OVER_NGRAM:
        name = measure.key.removeprefix("over_")
        steps = [below_for_good(curves[run][measure.key]) for run in runs]
        rows += [[f"better than the {name} model from", *("–" if step is None else f"{step:,}" for step in steps)]]
    rows += [["held-out loss is lowest at", *(f"{_lowest(curves[run][LOSS.key]):,}" for run in runs)]]
    for measure in (REMEMBERED, REMEMBERED_MORE):
        at = [(curves[run][measure.key], _lowest(curves[run][LOSS.key])) for run in runs]
        rows += [[f"{measure.title} (nats), there", *(_value(curve, step) for curve, step in at)]]
        rows += [[f"{measure.title} (nats), at the end", *(last(measure.key, run) for run in runs)]]
    return table(["", *runs], rows)


def _event(curves: Mapping[str, Curve]) -> dict[str, int] | None:
    found = emergence(curves[WELL_FORMED.key])
    return None if isinstance(found, str) else {"step": found.step, "low": found.low, "high": found.high}


def _lowest(curve: Curve) -> int:
    return int(min(zip(curve["values"], curve["steps"], strict=True))[1])


def _value(curve: Curve, step: int) -> str:
    """The value at the last measured checkpoint that is not later."""
    return number([value for at, value in zip(curve["steps"], curve["values"], strict=True) if at <= step][-1])


def _mistakes(curves: Mapping[str, Mapping[str, Curve]], runs: list[str]) -> str:
    steps = curves[runs[0]][WELL_FORMED.key]["steps"]
    shown = [step for step in steps if step in CHOSEN or step == steps[-1]]
    rows = []
    for measure in (WELL_FORMED, *MISTAKES):
        tables = [
            dict(zip(curves[run][measure.key]["steps"], curves[run][measure.key]["values"], strict=True))
            for run in runs
        ]
        means = [sum(each[step] for each in tables) / len(tables) for step in shown]
        rows.append([measure.title.removeprefix("sampled sentences "), *(f"{mean:.3f}" for mean in means)])
    return table(["", *(f"step {step:,}" for step in shown)], rows)

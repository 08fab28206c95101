"""The pictures of the page: every run is a line, its standard errors a band. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from measures import (
    DIMENSION,
    FLATTENED,
    LOSS,
    NEGATIVE,
    NUMBER_FAR,
    NUMBER_FROZEN,
    NUMBER_NEAR,
    NUMBER_READ,
    OVER_NGRAM,
    REMEMBERED,
    REMEMBERED_MORE,
    ROLE_FAR,
    ROLE_FROZEN,
    ROLE_NEAR,
    ROLE_READ,
    ROLES,
    SYNTAX,
    TOP,
    TOP_FIVE,
    TRACE_OF_HESSIAN,
    WELL_FORMED,
    WORD_CLASS_READ,
    WORD_CLASS_SAID,
    Curve,
)

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's colours, which those who do not see red or green tell apart.
COLOURS = {
    WORD_CLASS_SAID.key: "#56b4e9",
    WORD_CLASS_READ.key: "#0072b2",
    NUMBER_NEAR.key: "#009e73",
    NUMBER_FAR.key: "#5b8c2a",
    NUMBER_READ.key: "#5b8c2a",
    ROLE_NEAR.key: "#d55e00",
    ROLE_FAR.key: "#cc79a7",
    ROLE_READ.key: "#cc79a7",
}
LAYER_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7")
STYLES = ("-", "--", ":", "-.")
Z = 1.96
NAMES = ("learning", "dimension", "curvature", "order", "writing")

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "svg.hashsalt": "trace_paper",  # the same picture gives the same bytes
    "svg.fonttype": "none",
}

Curves = Mapping[str, Mapping[str, Curve]]


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """All pictures of ``results`` as SVG files in ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    by_layers: dict[int, dict[str, Any]] = {}
    for run, facts in results["runs"].items():
        by_layers.setdefault(facts["layers"], {})[run] = results["curves"].get(run, {})
    paths = []
    with mpl.rc_context(STYLE):
        for name, body in zip(NAMES, (_learning, _dimension, _curvature, _order, _writing), strict=True):
            figure = body(by_layers, results)
            paths.append(folder / f"trace_paper_{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None, "Creator": None}, bbox_inches="tight")
            plt.close(figure)
    return paths


def line(axes: Axes, runs: Curves, key: str, colour: str, label: str, *, scale: Sequence[float] | None = None) -> None:
    """Every run as a thin line with its band; the legend names the measure once."""
    named = False
    for number, run in enumerate(sorted(runs)):
        curve = runs[run].get(key)
        if curve is None:
            continue
        x = [step + 1 for step in curve["steps"]]
        axes.plot(
            x,
            curve["values"],
            color=colour,
            linestyle=STYLES[number % len(STYLES)],
            linewidth=1.1,
            marker=".",
            markersize=2.5,
            label=None if named else label,
        )
        named = True
        band = [(v - Z * s, v + Z * s) for v, s in zip(curve["values"], curve["stderr"], strict=True) if s is not None]
        if len(band) == len(x):
            axes.fill_between(x, *zip(*band, strict=True), color=colour, alpha=0.15, linewidth=0)


def _steps(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_xscale("log")
    ticks = (0, 1, 4, 16, 64, 256, 1024, 4096)
    axes.set_xticks([step + 1 for step in ticks], [str(step) for step in ticks], minor=False)
    axes.minorticks_off()
    axes.set_title(title)
    axes.set_ylabel(ylabel)


def _legends(axes: Sequence[Axes]) -> None:
    """Beside the last column, off the curves."""
    for each in axes:
        if each.get_legend_handles_labels()[0]:
            each.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


def _learning(models: Mapping[int, Curves], results: Mapping[str, Any]) -> Any:
    figure, grid = plt.subplots(3, len(models), figsize=(5 * len(models), 8), sharex=True, squeeze=False)
    for column, (layers, runs) in zip(grid.T, sorted(models.items()), strict=True):
        line(column[0], runs, LOSS.key, "#000000", LOSS.title)
        _steps(column[0], f"{layers} layers: held-out loss", "nats a word")
        for measure in (WORD_CLASS_SAID, NUMBER_NEAR, NUMBER_FAR, ROLE_NEAR, ROLE_FAR):
            line(column[1], runs, measure.key, COLOURS[measure.key], measure.title)
        column[1].axhline(0.5, color="grey", linewidth=0.6)
        _steps(column[1], "what it says", "share")
        for measure in (WORD_CLASS_READ, NUMBER_READ, ROLE_READ):
            line(column[2], runs, measure.key, COLOURS[measure.key], measure.title)
        for measure, frozen in ((NUMBER_READ, NUMBER_FROZEN), (ROLE_READ, ROLE_FROZEN)):
            line(column[2], _first(runs), frozen.key, _light(COLOURS[measure.key]), frozen.title)
        _steps(column[2], "what a probe of the last layer reads", "accuracy")
        column[2].set_xlabel("training step")
    figure.tight_layout()
    _legends(grid[1:, -1])
    return figure


def _first(runs: Curves) -> Curves:
    return dict(sorted(runs.items())[:1])


def _light(colour: str) -> str:
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{(each + 2 * 255) // 3:02x}" for each in parts)


def _dimension(models: Mapping[int, Curves], results: Mapping[str, Any]) -> Any:
    figure, grid = plt.subplots(2, len(models), figsize=(5 * len(models), 6), sharex=True, squeeze=False)
    for column, (layers, runs) in zip(grid.T, sorted(models.items()), strict=True):
        for axes, measure, title in (
            (column[0], DIMENSION, "single words (distinct ones only)"),
            (column[1], FLATTENED, "TRACE's way: whole rows with their padding"),
        ):
            for layer in range(1, layers + 1):
                line(axes, runs, f"{measure.key}@{layer}", LAYER_COLOURS[layer % 5], f"layer {layer}")
            _steps(axes, f"{layers} layers: {title}", "dimension (TwoNN)")
        column[1].set_xlabel("training step")
    figure.tight_layout()
    _legends(grid[:1, -1])
    return figure


def _curvature(models: Mapping[int, Curves], results: Mapping[str, Any]) -> Any:
    figure, grid = plt.subplots(3, len(models), figsize=(5 * len(models), 8), sharex=True, squeeze=False)
    for column, (layers, runs) in zip(grid.T, sorted(models.items()), strict=True):
        line(column[0], runs, TRACE_OF_HESSIAN.key, "#0072b2", TRACE_OF_HESSIAN.title)
        five = {run: {"five": _sum(curves)} for run, curves in runs.items() if _sum(curves) is not None}
        line(column[0], five, "five", "#e69f00", "TRACE's “trace”: the sum of five eigenvalues")  # type: ignore[arg-type]
        _steps(column[0], f"{layers} layers: curvature", "nats")
        line(column[1], runs, TOP.key, "#d55e00", TOP.title)
        _steps(column[1], "sharpest direction", "nats")
        line(column[2], runs, NEGATIVE.key, "#009e73", NEGATIVE.title)
        _steps(column[2], "share of the curvature that is negative", "share")
        column[2].set_xlabel("training step")
    figure.tight_layout()
    _legends(grid[:1, -1])
    return figure


def _writing(models: Mapping[int, Curves], results: Mapping[str, Any]) -> Any:
    figure, grid = plt.subplots(3, len(models), figsize=(5 * len(models), 8), sharex=True, squeeze=False)
    for column, (layers, runs) in zip(grid.T, sorted(models.items()), strict=True):
        line(column[0], runs, WELL_FORMED.key, "#0072b2", WELL_FORMED.title)
        _steps(column[0], f"{layers} layers: what they write", "share")
        for measure, colour in zip(OVER_NGRAM, LAYER_COLOURS, strict=False):
            line(column[1], runs, measure.key, colour, measure.title)
        for measure, colour in zip((REMEMBERED, REMEMBERED_MORE), LAYER_COLOURS[1:], strict=False):
            line(column[2], runs, measure.key, colour, measure.title)
        for axes, title in zip(column[1:], ("against n-grams", "what is remembered"), strict=True):
            axes.axhline(0, color="grey", linewidth=0.6)
            _steps(axes, title, "nats a word")
        column[2].set_xlabel("training step")
    figure.tight_layout()
    _legends(grid[:, -1])
    return figure


def _sum(curves: Mapping[str, Curve]) -> Curve | None:
    """Sum of the five largest eigenvalues at the steps that have all five."""
    parts = [curves.get(TOP.key if n == 0 else measure.key) for n, measure in enumerate(TOP_FIVE)]
    if any(part is None for part in parts):
        return None
    tables = [dict(zip(part["steps"], part["values"], strict=True)) for part in parts if part is not None]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return {"steps": steps, "values": [sum(t[step] for t in tables) for step in steps], "stderr": [None] * len(steps)}


def _order(models: Mapping[int, Curves], results: Mapping[str, Any]) -> Any:
    claims = results["claims"]["all runs"]
    found = claims["syntax_before_roles"]["events"]
    rows: list[tuple[str, str, Mapping[str, Any]]] = [
        (measure.title, COLOURS[measure.key], found.get(measure.key, {})) for measure in (*SYNTAX, *ROLES)
    ]
    both = claims["peak_before_turn"]["events"]
    rows += [("peak of the trace of the Hessian", "#000000", both["peak"])]
    rows += [("turn of the dimension of the last layer", "#777777", both["turn"])]
    runs = list(results["runs"])
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.14 * len(rows) * (len(runs) + 1)))
    ticks, names = [], []
    for row, (title, colour, events) in enumerate(rows):
        top = -row * (len(runs) + 1)
        for place, run in enumerate(runs):
            event = events.get(run)
            filled = results["runs"][run]["layers"] == min(models)
            if isinstance(event, Mapping):
                y = top - place
                axes.plot([event["low"] + 1, event["high"] + 1], [y, y], color=colour, linewidth=1.5, alpha=0.6)
                face = colour if filled else "white"
                axes.plot(event["step"] + 1, y, "o", color=colour, markerfacecolor=face, markersize=4)
        ticks.append(top - (len(runs) - 1) / 2)
        names.append(title)
    axes.set_yticks(ticks, names)
    _steps(axes, "when half of the rise was reached; peak and turn", "")
    marks = f"; full: {min(models)} layers, open: {max(models)}" if len(models) > 1 else ""
    axes.set_xlabel(f"training step (one line a run{marks})")
    return figure

"""Which histories to look at: rows of ``history`` → one series for each metric, layer, task and label."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from trace_offline.core.errors import UsageError, nearest
from trace_offline.estimators.krylov import Floats
from trace_offline.query.reader import Store

MAIN_METRICS: dict[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "probe": ("accuracy",),
    "intrinsic_dimension": ("twonn",),
    "hessian": ("trace",),
    "output": ("accuracy",),
    "lm-eval": ("acc", "ppl", "exact_match", "word_perplexity", "f1", "mcc", "bleu"),
}
"""What is looked at when nothing is asked for; of other analyzers only what is named."""

ALL_LABELS = "*"
_COLUMNS = ("run", "evaluation_set", "analyzer", "task", "label", "layer", "component", "metric")
_SPEC = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<where>[^\[\]]*)\])?")


@dataclass(frozen=True)
class Key:
    """What a series measures; the columns of ``history`` by these names."""

    run: str
    evaluation_set: str
    analyzer: str
    task: str | None
    label: str | None
    layer: int | None
    component: str | None
    metric: str

    def __str__(self) -> str:
        words = [f"{name} {value}" for name, value in (("task", self.task), ("label", self.label)) if value is not None]
        words += [f"layer {self.layer}"] if self.layer is not None else []
        return f"{self.analyzer}.{self.metric}" + (f" ({', '.join(words)})" if words else "")


@dataclass(frozen=True)
class Series:
    """One metric over checkpoints: ``steps [n]`` increasing, ``values [n]`` finite, ``stderr [n]`` NaN where unknown.

    ``notes``: what a reader must know (several settings mixed, several checkpoints at one step).
    """

    key: Key
    steps: Floats
    values: Floats
    stderr: Floats
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """What is asked for; empty means "no restriction", except that labels are then left out (see ``ALL_LABELS``).

    ``metrics``: ``metric`` or ``analyzer.metric``, either with ``[task=pos,layer=2,label=NOUN,component=residual]``.
    """

    metrics: Sequence[str] = ()
    analyzers: Sequence[str] = ()
    runs: Sequence[str] = ()
    tasks: Sequence[str] = ()
    labels: Sequence[str] = ()
    layers: Sequence[int] = ()
    evaluation_sets: Sequence[str] = field(default=())


def read_series(store: Path | str, selection: Selection) -> list[Series]:
    """The latest numbers of the selected series, in a fixed order.

    Raises StoreError when the store cannot be read and UsageError when nothing matches or a name is not there.
    """
    opened = Store.open(store)
    known = opened.sql(
        "select distinct run, evaluation_set, analyzer, task, label, layer, component, metric from history "
        "where is_latest and step is not null"
    ).to_pylist()
    if not known:
        raise UsageError(f"{store} has no numbers with a step; run `trace-offline analyze` or `import` first.")
    _check_names(store, known, selection)
    keys = [Key(**row) for row in known]
    chosen = {key for key in keys if _wanted(key, selection)}
    if not chosen:
        raise UsageError(
            f"{store}: nothing matches the selection. Numbers of single classes need --label NAME or --label '*'; "
            f"there are: {_listed(sorted({f'{key.analyzer}.{key.metric}' for key in keys}))}."
        )
    return _load(opened, chosen)


def _check_names(store: Path | str, known: list[dict[str, Any]], selection: Selection) -> None:
    metrics = {row["metric"] for row in known} | {f"{row['analyzer']}.{row['metric']}" for row in known}
    asked: tuple[tuple[str, Iterable[Any], set[Any]], ...] = (
        ("--metric", [_parse(text)[0] for text in selection.metrics], metrics),
        ("--analyzer", selection.analyzers, {row["analyzer"] for row in known}),
        ("--run", selection.runs, {row["run"] for row in known}),
        ("--task", selection.tasks, {row["task"] for row in known} - {None}),
        ("--label", [x for x in selection.labels if x != ALL_LABELS], {row["label"] for row in known} - {None}),
        ("--layer", selection.layers, {row["layer"] for row in known} - {None}),
        ("--evaluation-set", selection.evaluation_sets, {row["evaluation_set"] for row in known}),
    )
    for option, names, there in asked:
        for name in names:
            if name not in there:
                texts = [str(item) for item in sorted(there)]
                raise UsageError(
                    f'{option}: {store} has no "{name}".{nearest(str(name), texts)} There are: {_listed(texts)}.'
                )


def _listed(names: list[str], most: int = 20) -> str:
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def _parse(text: str) -> tuple[str, dict[str, str]]:
    """``"probe.accuracy[task=pos,layer=2]"`` → name and conditions."""
    found = _SPEC.fullmatch(text.strip())
    conditions: dict[str, str] = {}
    for part in (found["where"] or "").split(",") if found else []:
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if part.strip() and (not sign or name not in ("task", "label", "layer", "component", "evaluation_set", "run")):
            found = None
            break
        if part.strip():
            conditions[name] = value
    if found is None:
        raise UsageError(
            f'--metric: expected "metric", "analyzer.metric" or "analyzer.metric[task=pos,layer=2]", found "{text}".'
        )
    return found["name"].strip(), conditions


def _wanted(key: Key, selection: Selection) -> bool:
    for names, value in (
        (selection.analyzers, key.analyzer),
        (selection.runs, key.run),
        (selection.tasks, key.task),
        (selection.layers, key.layer),
        (selection.evaluation_sets, key.evaluation_set),
    ):
        if names and value not in names:
            return False
    labelled = False
    if selection.metrics:
        matching = [where for name, where in map(_parse, selection.metrics) if name in _names(key)]
        matching = [where for where in matching if all(str(getattr(key, x)) == y for x, y in where.items())]
        if not matching:
            return False
        labelled = any("label" in where for where in matching)
    elif key.analyzer in MAIN_METRICS:
        if key.metric not in MAIN_METRICS[key.analyzer]:
            return False
    elif not selection.analyzers:
        return False
    if selection.labels:
        return ALL_LABELS in selection.labels or key.label in selection.labels
    # The labels of imported results are filters of the answer, not classes.
    return labelled or key.label is None or key.analyzer == "lm-eval"


def _names(key: Key) -> tuple[str, str]:
    return key.metric, f"{key.analyzer}.{key.metric}"


def _load(store: Store, chosen: set[Key]) -> list[Series]:
    columns = ", ".join(_COLUMNS)
    rows = store.sql(
        f"select {columns}, step, value, stderr, params, analyzer_version from history "
        "where is_latest and step is not null and list_contains($runs, run) and list_contains($metrics, metric) "
        f"order by {', '.join(f'{name} nulls first' for name in _COLUMNS)}, step, checkpoint",
        {"runs": sorted({key.run for key in chosen}), "metrics": sorted({key.metric for key in chosen})},
    ).to_pylist()
    found = []
    for names, group in groupby(rows, key=lambda row: tuple(row[name] for name in _COLUMNS)):
        key = Key(**dict(zip(_COLUMNS, names, strict=True)))
        if key in chosen:
            found.append(_series(key, list(group)))
    return found


def _series(key: Key, rows: list[dict[str, Any]]) -> Series:
    measured = {row["step"]: row for row in rows if row["value"] is not None}  # of twin steps the last by name
    notes = []
    if len(measured) < sum(row["value"] is not None for row in rows):
        notes.append("several checkpoints share a step; the last by name is used")
    if len({(row["params"], row["analyzer_version"]) for row in rows}) > 1:
        notes.append("parameters or versions differ between checkpoints; an event may be theirs")
    ordered = [measured[step] for step in sorted(measured)]
    return Series(
        key=key,
        steps=np.array([row["step"] for row in ordered], float),
        values=np.array([row["value"] for row in ordered], float),
        stderr=np.array([np.nan if row["stderr"] is None else row["stderr"] for row in ordered], float),
        notes=tuple(notes),
    )

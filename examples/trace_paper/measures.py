"""What is measured, where it stands in the history, and how it is read: one curve for each measure and run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_offline.query.reader import Store

LAST = -1  # the last layer, whatever its number


@dataclass(frozen=True)
class Measure:
    """One number of ``history``. ``layer``: None for the whole model, ``LAST``, or "each" layer from 1 on."""

    key: str
    title: str
    analyzer: str
    metric: str
    evaluation_set: str
    task: str | None = None
    label: str | None = None
    layer: int | str | None = None
    component: str | None = None
    chance: float | None = None


# What the network knows, told by what it can be asked: syntax first, then roles.
WORD_CLASS_SAID = Measure(
    "word_class_said", "word class, in what it predicts", "output", "class_probability", "sentences", "pos"
)
WORD_CLASS_READ = Measure(
    "word_class_read", "word class, read by a probe from unseen words", "probe", "accuracy", "words", "pos", None, LAST
)
NUMBER_READ = Measure(
    "number_read", "number of the subject, read by a probe", "probe_transfer", "refit_accuracy", "sentences",
    "subject_number", layer=LAST,
)  # fmt: skip
NUMBER_NEAR, NUMBER_FAR, ROLE_NEAR, ROLE_FAR = (
    Measure(
        f"{key}_{place}", f"{title} {words}, in what it prefers", "minimal_pairs", "preferred_at_position", "changed",
        "violation", f"{label}_{place}", chance=0.5,
    )
    for key, title, label in (("number", "agreement", "agreement"), ("role", "role", "role"))
    for place, words in (("near", "with the word before"), ("far", "across other words"))
)  # fmt: skip
ROLE_READ = Measure(
    "role_read", "role, read by a probe", "probe_transfer", "refit_accuracy", "sentences", "role", layer=LAST
)
ROLE_SAID = Measure(
    "role_said", "role, in what it prefers", "minimal_pairs", "preferred_at_position", "pairs", "violation",
    "role_violation", chance=0.5,
)  # fmt: skip
SYNTAX = (WORD_CLASS_SAID, WORD_CLASS_READ, NUMBER_NEAR, NUMBER_FAR, NUMBER_READ)
ROLES = (ROLE_NEAR, ROLE_FAR, ROLE_READ)
MATCHED = (
    (WORD_CLASS_SAID, ROLE_FAR),
    (NUMBER_NEAR, ROLE_NEAR),
    (NUMBER_FAR, ROLE_FAR),
    (WORD_CLASS_READ, ROLE_READ),
    (NUMBER_READ, ROLE_READ),
)
"""Syntax and roles asked in the same way (what is predicted, what a probe reads): these decide the first claim."""

DIMENSION = Measure(
    "dimension", "intrinsic dimension (TwoNN)", "intrinsic_dimension", "twonn", "sentences", layer="each",
    component="residual",
)  # fmt: skip
FLATTENED = Measure(
    "flattened", "TRACE's dimension of whole padded rows", "intrinsic_dimension", "trace_flattened_twonn", "sentences",
    layer="each", component="trace_flattened",
)  # fmt: skip
TRACE_OF_HESSIAN = Measure("trace", "trace of the Hessian", "hessian", "trace", "sentences")
TOP = Measure("top", "largest eigenvalue", "hessian", "eigenvalue", "sentences", label="1")
TOP_FIVE = tuple(
    Measure(f"eigenvalue_{rank}", f"eigenvalue {rank}", "hessian", "eigenvalue", "sentences", label=str(rank))
    for rank in range(1, 6)
)
NEGATIVE = Measure("negative_mass", "share of negative curvature", "hessian", "negative_mass", "sentences")
LOSS = Measure("loss", "held-out loss", "loss", "loss", "sentences")
WELL_FORMED = Measure(
    "well_formed", "sampled sentences without an error", "sampled_sentences", "well_formed", "sentences"
)
MISTAKES = tuple(
    Measure(
        f"mistake_{kind}", f"sampled sentences with {words}", "sampled_sentences", "error_rate", "sentences", label=kind
    )
    for kind, words in (
        ("unknown_word", "an unknown word"),
        ("unknown_frame", "an argument that the verb does not have"),
        ("missing_role", "an argument missing"),
        ("wrong_class", "a word of a class that cannot stand there"),
        ("broken_agreement", "broken agreement"),
        ("repetition", "a repetition"),
        ("unfinished", "no proper end"),
    )
)
OVER_NGRAM = tuple(
    Measure(f"over_{name}", f"loss above that of a {name} model", "ngram", "loss_difference", "sentences", label=str(n))
    for n, name in enumerate(("unigram", "bigram", "trigram"), 1)
)
REMEMBERED, REMEMBERED_MORE = (
    Measure(key, title, "memorization", metric, "seen_and_new", task="text")
    for key, title, metric in (
        ("remembered", "held-out loss less that of training sentences", "loss_gap"),
        ("remembered_more", "the same, less that of a trigram model", "excess_loss_gap"),
    )
)
ROLE_FROZEN, NUMBER_FROZEN = (
    Measure(
        f"{key}_frozen", f"{title}, by the probe of the last checkpoint", "probe_transfer", "frozen_accuracy",
        "sentences", task, "last", LAST,
    )
    for key, title, task in (("role", "role", "role"), ("number", "number of the subject", "subject_number"))
)  # fmt: skip
MEASURES = (
    LOSS, *SYNTAX, *ROLES, DIMENSION, FLATTENED, TRACE_OF_HESSIAN, TOP, *TOP_FIVE[1:], NEGATIVE, ROLE_FROZEN,
    NUMBER_FROZEN, WELL_FORMED, *MISTAKES, *OVER_NGRAM, REMEMBERED, REMEMBERED_MORE,
)  # fmt: skip

Curve = dict[str, list[Any]]
"""``{"steps": […], "values": […], "stderr": […]}`` by increasing step; a stderr may be None."""


def read_curves(store: Path, measures: tuple[Measure, ...] = MEASURES) -> dict[str, dict[str, Curve]]:
    """Run → measure → curve. A measure of each layer gives ``key@layer``; one without any number gives no curve."""
    opened = Store.open(store)
    query = """
        select run, step, layer, value, stderr from history
        where is_latest and value is not null and analyzer = $analyzer and metric = $metric
          and evaluation_set = $evaluation_set and task is not distinct from $task
          and label is not distinct from $label and component is not distinct from coalesce($component, component)
        order by run, layer, step
    """
    found: dict[str, dict[str, Curve]] = {}
    for measure in measures:
        names = ("analyzer", "metric", "evaluation_set", "task", "label", "component")
        rows = opened.sql(query, {name: getattr(measure, name) for name in names}).to_pylist()
        last: dict[str, int] = {}
        for row in rows:
            if row["layer"] is not None:
                last[row["run"]] = max(last.get(row["run"], 0), row["layer"])
        for row in rows:
            run, layer = row["run"], row["layer"]
            wanted = {None: layer is None, LAST: layer == last.get(run), "each": bool(layer)}[measure.layer]
            if wanted:
                key = f"{measure.key}@{layer}" if measure.layer == "each" else measure.key
                curve = found.setdefault(run, {}).setdefault(key, {"steps": [], "values": [], "stderr": []})
                if row["step"] in curve["steps"]:
                    raise ValueError(f"{store}: {run} has several numbers of {key} at step {row['step']}.")
                for name in ("step", "value"):
                    curve[f"{name}s"].append(row[name])
                curve["stderr"].append(row["stderr"])
    return found

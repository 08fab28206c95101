"""Probes against scikit-learn: one fit, a whole analysis, the shipped series; and refit beside frozen accuracy.

    python benchmarks/bench_probe.py [fits] [analysis] [series] [frozen]      only these; the rows of the others stay

``fits``: 17 classes, 20,000 tokens, d = 512, one probe at a time, for seven feature matrices ("layers"; three where raw
features make scikit-learn slow), in turn with scikit-learn's LogisticRegression (lbfgs, the same penalty, its default
tolerance, as many iterations as it wants). Ours has two threads; scikit-learn is timed with two and with one, where its
small products wait for nobody, and the shorter time counts. Ours is timed up to the iteration that has the loss
where scikit-learn stops; ``seconds_to_tolerance`` is the whole fit to a relative gradient of 1e-4, ``peer_excess`` by
how much scikit-learn's loss is above the one reached then. Features are correlated (standard deviations of the
principal directions fall as a power of their rank) and standardised or raw (scales and means that differ by feature).
Labels: easy: a few leading directions and much noise, a strong penalty; middling: a class mean each; hard: all
directions and little noise, a weak penalty. Hard labels come twice: with principal directions that fall as quickly as
those of hidden states do (rank to the power −0.5), where scikit-learn takes about a hundred iterations, and with weakly
correlated features (−0.15, as for the other labels), where it takes about twenty and there is little to gain. Floor:
the passes over the data that we took, at the measured speed of the two products of one pass.

``analysis``: what is run in practice: layers × tasks × seeds × penalties × real and control labels, from features to
scores, on two threads, against the loop over scikit-learn with the same grid, warm starts and the same early end of the
grid, on one (``peer_seconds_two_threads``: on both, as it runs unless told otherwise).

``series``: the same on the shipped checkpoints, one thread, CPU seconds. scikit-learn runs at its default tolerance, at
which it stops earlier than ours. ``frozen``: the accuracy of frozen probes beside refit ones, no time.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "2"

# Libraries first: a limit on threads holds for what is loaded by then.
import numpy as np
import torch
from common import load, median_seconds, result, save, versions
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from threadpoolctl import threadpool_limits

SERIES = Path(__file__).parents[1] / "data"
TIMED_STEPS = (0, 64, 512, 4096)
PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
THREADS = 2
LAYERS, RAW_LAYERS, CLASSES, TOKENS, WIDTH = 7, 3, 17, 20_000, 512
TOLERANCE = 1e-4
LABELS = {"easy": 1e-2, "middling": 1e-4, "hard": 1e-4, "hard (weakly correlated features)": 1e-4}
"""Penalty λ by kind of labels."""

SPECTRUM, STEEP, SCALES, MEANS = 0.15, 0.5, 0.25, 0.3
"""Powers by which principal directions decay; spread of the logarithms of raw scales and of raw means."""

SIZE: dict[str, Any] = {"layers": 3, "words": 4000, "width": 512, "classes": (17, 5), "seeds": 2}
"""Of the whole analysis."""


def drawn(kind: str, labels: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``[n, D]`` of one layer and labels ``[n]``."""
    generator = np.random.default_rng([layer, len(kind), len(labels.split(" (")[0])])
    latent = generator.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    shares = 1.0 / np.arange(1, CLASSES + 1)
    y = generator.choice(CLASSES, TOKENS, p=shares / shares.sum())
    if labels == "middling":
        latent += (0.06 * generator.standard_normal((CLASSES, WIDTH)).astype(np.float32))[y]
    else:
        used, noise = (8, 1.0) if labels == "easy" else (WIDTH, 0.1)
        weights = generator.standard_normal((used, CLASSES)).astype(np.float32) / used**0.5
        y = (latent[:, :used] @ weights + noise * generator.gumbel(size=(TOKENS, CLASSES))).argmax(1)
    basis, _ = np.linalg.qr(generator.standard_normal((WIDTH, WIDTH)))
    decay = (1.0 + np.arange(WIDTH)) ** -(STEEP if labels == "hard" else SPECTRUM)
    x = (latent * decay.astype(np.float32)) @ basis.T.astype(np.float32)
    x = (x - x.mean(0)) / x.std(0)
    if kind == "raw":
        x = x * np.exp(SCALES * generator.standard_normal(WIDTH)) + MEANS * generator.standard_normal(WIDTH)
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)), torch.from_numpy(y.astype(np.int64))


def pass_seconds() -> float:
    """One pass over the features of one layer: the product for the logits and the product for the gradient."""
    x, w, p = torch.randn(TOKENS, WIDTH), torch.randn(CLASSES, WIDTH), torch.randn(CLASSES, TOKENS)
    return median_seconds(lambda: (w @ x.T, p @ x), repeats=9)


def fits() -> list[dict[str, Any]]:
    """One row for each kind of features and labels."""
    one_pass = pass_seconds()
    watched_fit(*drawn("standardised", "easy", 0), 1.0)
    rows = []
    for kind, layers in (("standardised", LAYERS), ("raw", RAW_LAYERS)):
        for labels, penalty in LABELS.items():
            found: list[dict[str, Any]] = []
            for layer in range(layers):
                x, y = drawn(kind, labels, layer)
                path, whole = watched_fit(x, y, penalty)
                features, answers = x.numpy(), y.numpy()
                tried = {}
                for threads in (1, THREADS):
                    with threadpool_limits(threads):
                        started = time.perf_counter()
                        model = LogisticRegression(C=1 / (TOKENS * penalty), max_iter=5000).fit(features, answers)
                        tried[threads] = time.perf_counter() - started
                theirs = min(tried.values())
                log_p = model.predict_log_proba(features.astype(np.float64))[np.arange(TOKENS), answers]
                objective = -log_p.mean() + 0.5 * penalty * float((model.coef_.astype(np.float64) ** 2).sum())
                reached = [place for place, (_, value) in enumerate(path) if value <= objective * (1 + 1e-7)]
                assert reached, f"{kind} {labels} {layer}: {path[-1][1]} is above scikit-learn's {objective}"
                one = {"seconds": path[reached[0]][0], "peer_seconds": theirs, "seconds_to_tolerance": whole}
                found.append(one | {"passes": reached[0] + 2, "peer_iterations": int(model.n_iter_[0])})
                found[-1]["peer_excess"] = objective / path[-1][1] - 1
                found[-1]["peer_seconds_two_threads"] = tried[THREADS]
                print(kind, labels, found[-1], flush=True)
            columns = {name: [one[name] for one in found] for name in found[0]}
            mine, peer = (statistics.median(columns[name]) for name in ("seconds", "peer_seconds"))
            rows.append(
                result(
                    f"one fit to scikit-learn's loss, {kind} features, {labels} labels", mine, "s", peer=peer,
                    peer_name="scikit-learn LogisticRegression", ratio=peer / mine,
                    floor=statistics.median(columns["passes"]) * one_pass, n=layers, threads=THREADS, penalty=penalty,
                    ratio_goal=3.0 if labels == "hard" else 1.0,
                    part="fits", versions=versions("torch", "scikit-learn"), **columns,
                )
            )  # fmt: skip
    return rows


def watched_fit(x: torch.Tensor, y: torch.Tensor, penalty: float) -> tuple[list[tuple[float, float]], float]:
    """Seconds since the start and objective after each iteration; seconds of the whole fit."""
    from trace_offline.estimators.lbfgs import Minimisation
    from trace_offline.estimators.logistic import LogisticProblems, Problem

    path: list[tuple[float, float]] = []
    advance = Minimisation.advance
    started = time.perf_counter()

    def watched(self: Minimisation) -> bool:
        more = advance(self)
        if more:
            path.append((time.perf_counter() - started, float(self._work.value[0])))
        return more

    Minimisation.advance = watched  # type: ignore[method-assign]
    try:
        LogisticProblems([x], [Problem(0, y, CLASSES)]).solve(penalty, tolerance=TOLERANCE)
        return path, time.perf_counter() - started
    finally:
        Minimisation.advance = advance  # type: ignore[method-assign]


def synthetic() -> tuple[torch.Tensor, list[Any]]:
    """Hidden states ``[layers, words, D]`` and prepared tasks, all seeds of one task after the other.

    A word is its type's vector plus noise; a layer's classes are read off some directions of it.
    """
    from trace_offline.analyzers._probe_data import Prepared, TaskWords
    from trace_offline.estimators.splits import control_labels, split_groups

    generator = np.random.default_rng(0)
    words, width = SIZE["words"], SIZE["width"]
    types = np.minimum(generator.zipf(1.3, words), 800) - 1
    vectors = generator.standard_normal((800, width)).astype(np.float32)
    latent = 0.7 * vectors[types] + 0.7 * generator.standard_normal((words, width)).astype(np.float32)
    decay = ((1.0 + np.arange(width)) ** -SPECTRUM).astype(np.float32)
    table = []
    for _ in range(SIZE["layers"]):
        basis, _ = np.linalg.qr(generator.standard_normal((width, width)))
        turned = latent + 0.3 * generator.standard_normal((words, width)).astype(np.float32)
        table.append(torch.from_numpy((turned * decay) @ basis.T.astype(np.float32)))
    group = np.arange(words) // 10
    span = np.stack([group, np.arange(words) % 10, np.arange(words) % 10 + 1], 1)
    prepared = []
    for classes in SIZE["classes"]:
        weights = generator.standard_normal((64, classes)).astype(np.float32) / 8
        label = (latent[:, :64] @ weights + 0.3 * generator.gumbel(size=(words, classes))).argmax(1)
        names = tuple(f"class {k}" for k in range(classes))
        for seed in range(SIZE["seeds"]):
            task = TaskWords(
                f"{classes} classes", names, np.arange(words), label, group, split_groups(group, seed), span
            )
            control = control_labels(types, label, seed)
            prepared.append(Prepared(task, np.arange(classes), {}, label, control, None))
    return torch.stack(table), prepared


def analysis() -> list[dict[str, Any]]:
    """One row: the loop once, and between its parts ours, in the middle of all."""
    table, prepared = synthetic()
    mine: list[float] = []
    ratios: list[float] = []
    theirs = 0.0
    for place, ready in enumerate(prepared):
        for _ in range(3):
            started = time.perf_counter()
            _, fit = ours(table, prepared)
            mine.append(time.perf_counter() - started)
        started = time.perf_counter()
        with threadpool_limits(1):
            ratios += by_sklearn(table, ready, fit, 2 * place * len(table))[1]
        theirs += time.perf_counter() - started
    started = time.perf_counter()
    for place, ready in enumerate(prepared):
        by_sklearn(table, ready, fit, 2 * place * len(table))
    two_threads = time.perf_counter() - started
    seconds = statistics.median(mine)
    what = f"{SIZE['layers']} layers, tasks of 17 and 5 classes, {SIZE['seeds']} seeds, {len(PENALTIES)} penalties"
    return [
        result(
            f"whole analysis: {what}, real and control labels, {SIZE['words']:,} words, d = {SIZE['width']}", seconds,
            "s", peer=theirs, peer_name="scikit-learn LogisticRegression in a loop", ratio=theirs / seconds,
            n=len(mine), peer_n=1, threads=THREADS, peer_threads=1, peer_seconds_two_threads=two_threads,
            objective_ratio_max=max(ratios), objective_ratio_median=float(np.median(ratios)), compared=len(ratios),
            part="analysis", versions=versions("torch", "scikit-learn"),
        )
    ]  # fmt: skip


def tables() -> tuple[Any, list[Any], dict[int, torch.Tensor]]:
    """The evaluation set, its prepared tasks, and hidden states ``[L+1, U, D]`` of every step."""
    from transformers import AutoModelForCausalLM

    from trace_offline.activations.batch import ForwardBatch
    from trace_offline.activations.hidden_table import HiddenStateTable
    from trace_offline.analyzers._probe_data import choose_words, prepare
    from trace_offline.evaluation.evaluation_set import EvaluationSet

    evaluation = EvaluationSet.load(SERIES / "tiny_evaluation")
    distinct, words = choose_words(evaluation, evaluation.tasks, 20_000, 0)
    prepared = [prepare(task, evaluation, 5, True, 0) for task in words]
    found = {}
    for folder in sorted((SERIES / "tiny_series").glob("step*"), key=lambda path: int(path.name[4:])):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        collector = HiddenStateTable(distinct[:, 0], distinct[:, 1], distinct[:, 2], evaluation.alignment)
        states: list[torch.Tensor] = []
        blocks = model.gpt_neox.layers
        blocks[0].register_forward_pre_hook(lambda _, given, s=states: s.append(given[0]))
        for block in blocks:
            block.register_forward_hook(
                lambda _, __, out, s=states: s.append(out[0] if isinstance(out, tuple) else out)
            )
        for start in range(0, evaluation.n_examples, 250):
            batch = evaluation.tokens(start, start + 250)
            states.clear()
            with torch.no_grad():
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            rows = torch.arange(start, start + len(batch.input_ids))
            collector.update(
                ForwardBatch(rows, batch.input_ids, batch.attention_mask, batch.targets, tuple(states), None)
            )
        found[int(folder.name[4:])] = collector.finish()
    return evaluation, prepared, found


def ours(table: torch.Tensor, prepared: list[Any]) -> tuple[float, Any]:
    """CPU seconds and the final fit of all tasks, in the order of tasks, layers, label sets."""
    from trace_offline.analyzers._probe_fit import FitOptions
    from trace_offline.analyzers._probe_scores import fit_tasks
    from trace_offline.estimators.logistic import LogisticProblems

    kept = []
    solve = LogisticProblems.solve

    def keep(self: Any, *args: Any, **named: Any) -> Any:
        fit = solve(self, *args, **named)
        kept.append(fit)
        return fit

    LogisticProblems.solve = keep  # type: ignore[method-assign]
    try:
        started = time.process_time()
        fit_tasks(list(table), range(len(table)), prepared, FitOptions(PENALTIES))
        return time.process_time() - started, kept[-1]
    finally:
        LogisticProblems.solve = solve  # type: ignore[method-assign]


def by_sklearn(table: torch.Tensor, ready: Any, fit: Any, first: int) -> tuple[float, list[float]]:
    """CPU seconds of the loop, and ours/theirs of the objective wherever both chose the same penalty."""
    from trace_offline.analyzers._probe_fit import standardise
    from trace_offline.estimators.splits import Part

    train, validation, _ = (ready.at(part) for part in Part)
    both = np.concatenate([train, validation])
    seconds, ratios = 0.0, []
    for layer, matrix in enumerate(table):
        started = time.process_time()
        x = standardise(matrix[torch.from_numpy(ready.words.where)][None], torch.from_numpy(train))[0].numpy()
        seconds += time.process_time() - started
        for s, y in enumerate((ready.label, ready.control)):
            started = time.process_time()
            model = LogisticRegression(warm_start=True, max_iter=500)
            best, last, risen = (np.inf, 0.0, None, None), np.inf, 0
            for penalty in PENALTIES:
                model.C = 1 / (len(train) * penalty)
                model.fit(x[train], y[train])
                nll = log_loss(y[validation], model.predict_proba(x[validation]), labels=range(len(ready.kept)))
                if nll < best[0]:
                    best = (nll, penalty, model.coef_.copy(), model.intercept_.copy())
                risen, last = (risen + 1 if nll > last else 0), nll
                if risen == 2:
                    break
            model.C = 1 / (len(both) * best[1])
            model.coef_, model.intercept_ = best[2], best[3]
            model.fit(x[both], y[both])
            seconds += time.process_time() - started
            number = first + 2 * layer + s
            if np.isclose(best[1], float(fit.penalty[number])):
                log_p = model.predict_log_proba(x[both].astype(np.float64))[np.arange(len(both)), y[both]]
                objective = -log_p.mean() + 0.5 * best[1] * float((model.coef_.astype(np.float64) ** 2).sum())
                ratios.append(float(fit.objective[number]) / objective)
    return seconds, ratios


def frozen(evaluation: Any, found: dict[int, torch.Tensor]) -> list[dict[str, Any]]:
    """The series analyzer's numbers of the last layer at every step."""
    from safetensors.torch import save_file

    from trace_offline.analyzers._probe_data import choose_words
    from trace_offline.analyzers.base import Extract, SeriesContext
    from trace_offline.analyzers.probe_transfer import ProbeTransferAnalyzer
    from trace_offline.core.types import Measurement

    analyzer, params = ProbeTransferAnalyzer(), ProbeTransferAnalyzer.Params(matrix=False)
    large, _ = choose_words(evaluation, evaluation.tasks, 20_000, 0)
    small, _ = choose_words(evaluation, evaluation.tasks, params.max_words, 0)
    places = {tuple(row): place for place, row in enumerate(large.tolist())}
    index = torch.tensor([places[tuple(row)] for row in small.tolist()])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        extracts = []
        for position, (step, table) in enumerate(found.items()):
            path = Path(folder) / f"{position}.safetensors"
            save_file({"hidden": table[-1:, index].contiguous(), "layers": torch.tensor([len(table) - 1])}, path)
            extracts.append(Extract(position, step, str(path)))
        for position, item in analyzer.compare(SeriesContext(tuple(extracts), evaluation, params, 0)):
            wanted = item.metric in ("refit_accuracy", "frozen_accuracy", "trace_confidence")
            if isinstance(item, Measurement) and wanted and item.value is not None:
                case = f"{item.task} step {extracts[position].step} {item.metric} {item.label or ''}".strip()
                more = {"stderr": item.stderr, "layer": item.layer, "versions": versions("torch")}
                rows.append(result(case, round(item.value, 4), "1", **more))
    return rows


def series() -> list[dict[str, Any]]:
    """Timed on one thread."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        _, prepared, found = tables()
        ours(found[0], prepared)
        mine = theirs = 0.0
        ratios: list[float] = []
        for step in TIMED_STEPS:
            seconds, fit = ours(found[step], prepared)
            mine += seconds
            for place, ready in enumerate(prepared):
                seconds, some = by_sklearn(found[step], ready, fit, 2 * place * len(found[step]))
                theirs += seconds
                ratios += some
        row = result(
            f"probes of {len(TIMED_STEPS)} checkpoints, 2 tasks, 5 layers, real and control labels",
            round(mine, 2),
            "CPU s",
            peer=round(theirs, 2),
            peer_name="scikit-learn LogisticRegression in a loop",
            ratio=round(theirs / mine, 2),
            objective_ratio_max=max(ratios),
            objective_ratio_median=float(np.median(ratios)),
            compared=len(ratios),
            versions=versions("torch", "scikit-learn"),
        )
        return [row]


def main() -> int:
    warnings.simplefilter("ignore")
    names = ("fits", "analysis", "series", "frozen")
    wanted = sys.argv[1:] or names
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for row in load("probe"):
        parts[row.get("part") or ("series" if row["peer"] else "frozen")].append(row)
    torch.set_num_threads(THREADS)
    with threadpool_limits(THREADS):
        for name, body in (("fits", fits), ("analysis", analysis)):
            if name in wanted:
                parts[name] = body()
    if "series" in wanted:
        parts["series"] = series()
    if "frozen" in wanted:
        evaluation, _, found = tables()
        parts["frozen"] = frozen(evaluation, found)
    save("probe", [row for rows in parts.values() for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())

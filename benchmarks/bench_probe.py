"""Probes of the shipped series: time beside a loop over scikit-learn at the same loss, refit beside frozen accuracy.

    python benchmarks/bench_probe.py

Both do the same work on one thread: every task, layer and label set (real, control), the penalty chosen by validation
NLL from the same grid with warm starts and the same early end, then a fit on training and validation words at the
penalty chosen. ``objective_ratio`` is ours divided by scikit-learn's at equal penalties: at most 1 means at least as
good a fit. scikit-learn runs at its default tolerance, at which it stops earlier than ours. CPU seconds.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from common import result, save, versions

SERIES = Path(__file__).parents[1] / "data"
TIMED_STEPS = (0, 64, 512, 4096)
PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)


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
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

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


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    evaluation, prepared, found = tables()
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
    save("probe", [row, *frozen(evaluation, found)])


if __name__ == "__main__":
    main()

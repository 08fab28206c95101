"""What one writes without trace-offline: a loop over checkpoints and the usual library for each of the five analyses.

transformers opens and runs the network, scikit-learn fits the probes, scikit-dimension estimates dimensions, PyHessian
the curvature. It is meant to be read as a script of a researcher in a hurry but not a careless one: features are
standardised, penalties chosen on validation words from the same grid with warm starts, duplicates dropped before
distances are taken, the same words, splits, control labels, points and sequences as trace-offline's defaults. The
network has all threads it is given; scikit-learn and scikit-dimension have one: with more their small products wait for
each other, and the fits take many times as long.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A limit on threads holds for libraries that are loaded by then.
import numpy as np
import skdim
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch.nn import functional

PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
BATCH = 64
BINS = 15
ONE_THREAD = ("probe", "intrinsic_dimension")


@dataclass
class Task:
    """Annotated words. ``places [M]``: row·T + position of a word's last token; ``asked [M]``: of the prediction of its
    first; ``part [M]``: 0 train, 1 validation, 2 test; ``control [M]``: one random label for each word type.
    """

    places: Any
    asked: Any
    label: Any
    part: Any
    control: Any
    classes: tuple[str, ...]


@dataclass
class Data:
    """Tokens ``[N, T]``, the tasks, ``points``: row·T + position for dimensions, ``rows`` for the curvature."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor
    tasks: dict[str, Task]
    points: Any
    rows: Any


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time of the body to a part."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started


def forward(model: Any, data: Data) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits ``[N, T, V]`` and hidden states, one ``[N·T, D]`` for each layer."""
    logits, hidden = [], []
    with torch.no_grad():
        for start in range(0, len(data.input_ids), BATCH):
            part = slice(start, start + BATCH)
            output = model(
                input_ids=data.input_ids[part], attention_mask=data.attention_mask[part], output_hidden_states=True
            )
            logits.append(output.logits)
            hidden.append(output.hidden_states)
    return torch.cat(logits), [torch.cat(layer).flatten(0, 1) for layer in zip(*hidden, strict=True)]


def calibration_error(confidence: Any, correct: Any) -> float:
    which = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return float(
        sum((which == b).mean() * abs(confidence[which == b].mean() - correct[which == b].mean()) for b in set(which))
    )


def losses(logits: torch.Tensor, data: Data) -> dict[str, float]:
    counted = data.targets != -100
    log_p = logits[counted].log_softmax(-1)
    targets = data.targets[counted]
    nll = functional.nll_loss(log_p, targets)
    confidence, predicted = log_p.exp().max(-1)
    correct = predicted == targets
    return {
        "loss": float(nll),
        "perplexity": float(nll.exp()),
        "accuracy": float(correct.float().mean()),
        "entropy": float(-(log_p.exp() * log_p).sum(-1).mean()),
        "calibration_error": calibration_error(confidence.numpy(), correct.numpy()),
    }


def outputs(logits: torch.Tensor, data: Data) -> dict[str, Any]:
    """Accuracy, loss, probability of the right class and calibration, for each class of word."""
    found: dict[str, Any] = {}
    flat, targets = logits.flatten(0, 1), data.targets.flatten()
    for name, task in data.tasks.items():
        log_p = flat[task.asked].log_softmax(-1)
        target = targets[task.asked]
        counts = np.zeros((flat.shape[-1], len(task.classes)))
        np.add.at(counts, (target.numpy(), task.label), 1)
        shares = torch.from_numpy(counts / counts.sum(1, keepdims=True).clip(1)).float()
        p_class = (log_p.exp() @ shares).numpy()
        confidence, predicted = log_p.exp().max(-1)
        correct = (predicted == target).numpy()
        nll = -log_p.gather(1, target[:, None])[:, 0].numpy()
        for k, label in enumerate(task.classes):
            mine = task.label == k
            found[f"{name} {label}"] = {
                "accuracy": correct[mine].mean(),
                "loss": nll[mine].mean(),
                "class_probability": p_class[mine, k].mean(),
                "calibration_error": calibration_error(confidence.numpy()[mine], correct[mine]),
            }
    return found


def probes(hidden: Sequence[torch.Tensor], data: Data) -> dict[str, Any]:
    """One probe for each task, layer and label set: penalty by validation loss, refit, scores on the test words."""
    found: dict[str, Any] = {}
    for name, task in data.tasks.items():
        train, validation, test = (np.flatnonzero(task.part == part) for part in range(3))
        fit = np.concatenate([train, validation])
        for layer, states in enumerate(hidden):
            x = states[task.places].numpy()
            x = StandardScaler().fit(x[train]).transform(x)
            for kind, y in (("real", task.label), ("control", task.control)):
                model = LogisticRegression(max_iter=500, warm_start=True)
                tried = []
                for penalty in PENALTIES:
                    model.set_params(C=1 / (penalty * len(train))).fit(x[train], y[train])
                    p = model.predict_proba(x[validation])
                    seen = np.isin(y[validation], model.classes_)
                    tried.append(log_loss(y[validation][seen], p[seen], labels=model.classes_))
                best = PENALTIES[int(np.argmin(tried))]
                model = LogisticRegression(max_iter=500, C=1 / (best * len(fit))).fit(x[fit], y[fit])
                predicted = model.predict(x[test])
                found[f"{name} {layer} {kind}"] = {
                    "penalty": best,
                    "accuracy": accuracy_score(y[test], predicted),
                    "macro_f1": f1_score(y[test], predicted, average="macro"),
                    "f1": f1_score(y[test], predicted, average=None),
                    "nll": log_loss(y[test], model.predict_proba(x[test]), labels=model.classes_),
                    "confusion": confusion_matrix(y[test], predicted),
                }
    return found


def dimensions(hidden: Sequence[torch.Tensor], data: Data) -> dict[int, Any]:
    found = {}
    for layer, states in enumerate(hidden):
        points = np.unique(states[data.points].numpy(), axis=0)
        variances = PCA().fit(points).explained_variance_
        shares = variances.cumsum() / variances.sum()
        found[layer] = {
            "twonn": skdim.id.TwoNN().fit(points).dimension_,
            "mle": skdim.id.MLE().fit(points, n_neighbors=20).dimension_,
            "pca_participation_ratio": variances.sum() ** 2 / (variances**2).sum(),
            "pca_90": int((shares < 0.9).sum()) + 1,
            "pca_99": int((shares < 0.99).sum()) + 1,
        }
    return found


class Logits(torch.nn.Module):
    """PyHessian calls a network with one tensor."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        """``[2, B, T]`` (ids, mask) → ``[B·T, V]``."""
        logits: torch.Tensor = self.model(input_ids=both[0], attention_mask=both[1]).logits.flatten(0, 1)
        return logits


def _eig(matrix: torch.Tensor, eigenvectors: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """What PyHessian's density asks torch for, and torch has no more: values in the first of two columns."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors


def curvature(model: torch.nn.Module, data: Data) -> dict[str, Any]:
    """Ten eigenvalues, trace, density. The tolerance of 1e-3 is that between steps of the power iteration; it cannot be
    asked for a residual.
    """
    from pyhessian import hessian

    torch.eig = _eig
    torch.manual_seed(0)
    ids, mask, targets = (part[data.rows] for part in (data.input_ids, data.attention_mask, data.targets))

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, labels, ignore_index=-100)

    at = hessian(Logits(model), loss, data=(torch.stack([ids, mask.long()]), targets.flatten()), cuda=False)
    eigenvalues, _ = at.eigenvalues(maxIter=100, tol=1e-3, top_n=10)
    return {
        "eigenvalues": eigenvalues,
        "trace": float(np.mean(at.trace(maxIter=24, tol=0))),
        "density": at.density(iter=10, n_v=8),
    }


def analyze(folders: Sequence[Path], data: Data) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The five analyses of every checkpoint; the seconds of each part over all of them."""
    from transformers import AutoModelForCausalLM

    clock, found = Clock(), []
    for folder in folders:
        with clock("load"):
            # flash attention has no second derivatives
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            model.eval()
        with clock("forward"):
            logits, hidden = forward(model, data)
        results: dict[str, Any] = {}
        for name, part in (
            ("loss", lambda: losses(logits, data)),  # noqa: B023
            ("output", lambda: outputs(logits, data)),  # noqa: B023
            ("probe", lambda: probes(hidden, data)),  # noqa: B023
            ("intrinsic_dimension", lambda: dimensions(hidden, data)),  # noqa: B023
            ("hessian", lambda: curvature(model, data)),  # noqa: B023
        ):
            with clock(name), threadpool_limits(1 if name in ONE_THREAD else None):
                results[name] = part()
        found.append(results)
    return found, dict(clock.seconds)

"""The part of the evaluation set whose loss is differentiated, cut into independent parts, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trace_offline.activations.batch import IGNORED
from trace_offline.activations.forward import BATCH_TOKENS, trimmed
from trace_offline.activations.memory import at_once
from trace_offline.analyzers._measurements import check_targets
from trace_offline.core.errors import NotApplicable, UsageError, nearest

if TYPE_CHECKING:
    from trace_offline.activations.model import ModelView
    from trace_offline.evaluation.evaluation_set import EvaluationSet


class Rows:
    """Rows of an evaluation set without padding at their right end, each read once: ids, mask, targets ``[1, T]``."""

    def __init__(self, evaluation: EvaluationSet) -> None:
        self.evaluation = evaluation
        self._read: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        if row not in self._read:
            self._read[row] = trimmed(self.evaluation.tokens(row, row + 1))
        return self._read[row]


@dataclass(frozen=True)
class Part:
    """Rows that are differentiated together, ascending; ``half``: 0 or 1."""

    rows: tuple[int, ...]
    half: int


@dataclass(frozen=True)
class RestrictedLoss:
    """The loss over the targets of one class of a task, or (``label`` None) over all of the task's."""

    task: str
    label: str | None
    n_targets: int


def choose_parts(source: Rows, max_sequences: int, count: int, seed: int) -> list[Part]:
    """A random part of the rows that have a target, cut into at most ``count`` parts of whole documents.

    Every part lies in one half: the two sides of the evaluation set's own split, or a random division of its documents.
    The same at every checkpoint. Raises NotApplicable when no row has a target.
    """
    evaluation = source.evaluation
    generator = np.random.default_rng(seed)
    order = generator.permutation(np.unique(evaluation.group))
    # Whole documents keep parts independent; one longer than all that is wanted is cut, there is no other way.
    rank = np.empty(evaluation.n_examples, dtype=np.int64)
    rank[:] = np.argsort(order)[np.searchsorted(np.sort(order), evaluation.group)]
    chosen: list[int] = []
    for row in np.argsort(rank, kind="stable").tolist():
        if bool((source[row][2] != IGNORED).any()):
            chosen.append(row)
            if len(chosen) == max_sequences:
                break
    if not chosen:
        raise NotApplicable("not applicable because no position of the evaluation set has a target: there is no loss")
    rows = np.array(chosen)
    # One document: its rows are all there is to tell noise from signal.
    unit = evaluation.group[rows] if len(np.unique(evaluation.group[rows])) > 1 else rows
    side = None if evaluation.split is None else np.asarray(evaluation.split)[rows]
    if side is None or len(np.unique(side)) < 2:
        places = {code: index for index, code in enumerate(dict.fromkeys(unit.tolist()))}
        side = np.array([places[code] % 2 for code in unit.tolist()])
    parts = []
    for half in (0, 1):
        mine = rows[side == half]
        share = max(1, round(count * len(mine) / len(rows))) if len(mine) else 0
        slots: dict[int, list[int]] = {}
        places = {code: index for index, code in enumerate(dict.fromkeys(unit[side == half].tolist()))}
        for row, code in zip(mine.tolist(), unit[side == half].tolist(), strict=True):
            slots.setdefault(places[code] % share, []).append(row)
        parts += [Part(tuple(sorted(found)), half) for _, found in sorted(slots.items())]
    return parts


def chosen_tasks(evaluation: EvaluationSet, wanted: Sequence[str]) -> tuple[str, ...]:
    """The tasks asked for, or all. Raises UsageError for one the evaluation set does not have."""
    for task in wanted:
        if task not in evaluation.tasks:
            raise UsageError(
                f'gradients.tasks: the evaluation set has no task "{task}".{nearest(task, evaluation.tasks)} '
                f"Its tasks: {', '.join(evaluation.tasks) or 'none'}."
            )
    return tuple(task for task in evaluation.tasks if not wanted or task in wanted)


class TargetClasses:
    """Which class of each task a target belongs to: the class of the word the target is a token of."""

    def __init__(self, evaluation: EvaluationSet, tasks: Sequence[str], rows: Sequence[int]) -> None:
        self.tasks = tuple(tasks)
        self.classes: dict[str, tuple[str, ...]] = {}
        self._codes: dict[str, dict[int, np.ndarray]] = {}
        # A causal target at position t is the token at t + 1.
        shift = 1 if evaluation.labels_shifted else 0
        wanted = set(rows)
        for task in tasks:
            spans = evaluation.spans(task)
            self.classes[task] = spans.classes
            found: dict[int, np.ndarray] = {}
            for row, start, end, label in zip(
                spans.row.tolist(), spans.start.tolist(), spans.end.tolist(), spans.label.tolist(), strict=True
            ):
                if row in wanted:
                    codes = found.setdefault(row, np.full(evaluation.max_length, -1))
                    codes[max(0, start - shift) : max(0, end - shift)] = label
            self._codes[task] = found

    def of(self, task: str, rows: Sequence[int], length: int) -> Tensor:
        """``int64 [rows, length]``: code of the class, −1 where there is none."""
        none = np.full(length, -1)
        found = self._codes[task]
        return torch.from_numpy(np.stack([found[row][:length] if row in found else none for row in rows]))


def restricted_losses(
    source: Rows, classes: TargetClasses, parts: Sequence[Part], max_classes: int, min_targets: int
) -> tuple[list[RestrictedLoss], list[RestrictedLoss]]:
    """The losses to differentiate, and those of classes with too few targets; most frequent classes first.

    At most ``max_classes`` a task; further classes are in neither list. Tasks themselves are there when there are two.
    """
    counts = {task: np.zeros(len(classes.classes[task]), dtype=np.int64) for task in classes.tasks}
    for part in parts:
        for row in part.rows:
            targets = source[row][2]
            counted = targets[0] != IGNORED
            for task in classes.tasks:
                codes = classes.of(task, [row], targets.shape[1])[0][counted].numpy()
                counts[task] += np.bincount(codes[codes >= 0], minlength=len(counts[task]))
    measured: list[RestrictedLoss] = []
    few: list[RestrictedLoss] = []
    for task in classes.tasks:
        ranked = np.argsort(-counts[task], kind="stable")[:max_classes].tolist()
        for code in sorted(ranked):
            n = int(counts[task][code])
            (measured if n >= max(1, min_targets) else few).append(RestrictedLoss(task, classes.classes[task][code], n))
        total = int(counts[task].sum())
        if len(classes.tasks) > 1 and total >= max(1, min_targets):
            measured.append(RestrictedLoss(task, None, total))
    return measured, few


class PartGradients:
    """Gradients of summed losses over parts of the data, one flat vector each, in the order of ``parameters``."""

    def __init__(
        self,
        model: ModelView,
        source: Rows,
        parameters: Sequence[Tensor],
        classes: TargetClasses,
        losses: Sequence[RestrictedLoss],
    ) -> None:
        self._model, self._source, self._parameters = model, source, list(parameters)
        self._classes, self._losses = classes, list(losses)
        self.size = sum(parameter.numel() for parameter in parameters)

    def of(self, part: Part) -> tuple[Tensor, np.ndarray]:
        """``[1 + losses, P]``: gradients of the loss over all targets and of each restricted one; their targets."""
        found = torch.zeros(1 + len(self._losses), self.size, dtype=torch.float32, device=self._model.device)
        targets = np.zeros(1 + len(self._losses))
        per_batch = at_once(max(1, BATCH_TOKENS // max(1, self._source.evaluation.max_length)))
        with _differentiable(self._parameters):
            for start in range(0, len(part.rows), per_batch):
                self._add(part.rows[start : start + per_batch], found, targets)
        return found, targets

    def _add(self, rows: Sequence[int], found: Tensor, n_targets: np.ndarray) -> None:
        batches = [self._source[row] for row in rows]
        length = max(ids.shape[1] for ids, _, _ in batches)
        ids, mask, targets = (
            torch.cat([functional.pad(item[slot], (0, length - item[slot].shape[1]), value=fill) for item in batches])
            for slot, fill in ((0, 0), (1, False), (2, IGNORED))
        )
        device = self._model.device
        logits = self._model.logits(ids.to(device), mask.to(device))
        check_targets(targets, logits.shape[-1])
        counted = targets != IGNORED
        chosen = logits[counted.to(device)]
        if chosen.dtype in (torch.float16, torch.bfloat16):
            chosen = chosen.float()
        nll = functional.cross_entropy(chosen, targets[counted].to(device), reduction="none")
        self._differentiate(nll.sum(), found[0], last=not self._losses)
        n_targets[0] += int(counted.sum())
        for index, loss in enumerate(self._losses, start=1):
            codes = self._classes.of(loss.task, rows, length)[counted]
            mine = codes >= 0
            if loss.label is not None:
                mine = codes == self._classes.classes[loss.task].index(loss.label)
            if bool(mine.any()):
                self._differentiate(nll[mine.to(device)].sum(), found[index], last=False)
                n_targets[index] += int(mine.sum())

    def _differentiate(self, loss: Tensor, into: Tensor, *, last: bool) -> None:
        gradients = torch.autograd.grad(loss, self._parameters, retain_graph=not last, allow_unused=True)
        start = 0
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None:
                into[start : start + parameter.numel()] += gradient.reshape(-1)
            start += parameter.numel()


@contextmanager
def _differentiable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradients on for these tensors, and put back as they were."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)

"""Which words a probe sees, in which part of the data, with which labels; the same at every checkpoint of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trace_offline.activations.batch import IGNORED
from trace_offline.core.errors import UsageError, nearest
from trace_offline.estimators.splits import Codes, Part, control_labels, sample_groups, split_groups

if TYPE_CHECKING:
    from trace_offline.evaluation.evaluation_set import EvaluationSet

_ROWS = 1024


@dataclass(frozen=True)
class TaskWords:
    """Words of one task: ``where [M]`` into the table of hidden states, ``label [M]`` into ``classes``, ``group [M]``
    (the unit that is split: sentence or word type), ``part [M]``. ``span [M, 3]``: row, start, end.
    """

    task: str
    classes: tuple[str, ...]
    where: Codes
    label: Codes
    group: Codes
    part: Codes
    span: Codes
    unit: str = "sentences"


@dataclass(frozen=True)
class Prepared:
    """A task ready to fit. ``kept [K]``: codes of the classes that are learned, ``excluded``: class name → reason.

    ``words``: those of kept classes only. ``label [M]`` in 0…K−1, ``control [M]`` likewise, or None. ``reason``: why
    the task cannot be probed at all, or None.
    """

    words: TaskWords
    kept: Codes
    excluded: dict[str, str]
    label: Codes
    control: Codes | None
    reason: str | None

    def at(self, part: Part) -> NDArray[np.intp]:
        """Indices of the words of one part."""
        return np.flatnonzero(self.words.part == part)


def chosen_tasks(evaluation: EvaluationSet, wanted: Sequence[str]) -> tuple[str, ...]:
    """The tasks asked for, or all. Raises UsageError for one the evaluation set does not have."""
    for task in wanted:
        if task not in evaluation.tasks:
            raise UsageError(
                f'probe.tasks: the evaluation set has no task "{task}".{nearest(task, evaluation.tasks)} '
                f"Its tasks: {', '.join(evaluation.tasks)}."
            )
    return tuple(task for task in evaluation.tasks if not wanted or task in wanted)


def repeat_seed(seed: int, repeat: int) -> int:
    """Seed of one repetition; the first is the seed itself."""
    return seed if repeat == 0 else int(np.random.SeedSequence([seed, repeat]).generate_state(1)[0])


def choose_words(
    evaluation: EvaluationSet,
    tasks: Sequence[str],
    max_words: int,
    seed: int,
    *,
    split_by: str = "sentence",
    view: str = "word",
    split_seed: int | None = None,
) -> tuple[Codes, list[TaskWords]]:
    """Distinct spans ``[U, 3]`` (row, start, end) whose hidden states are wanted, and the words of each task.

    ``seed`` draws the sample, ``split_seed`` (the same when None) its parts. ``view="sentence"``: hidden states of
    whole rows are wanted, so a distinct "span" is a row (start and end 0).
    """
    split_seed = seed if split_seed is None else split_seed
    chosen = []
    for task in tasks:
        spans = evaluation.spans(task)
        keep = sample_groups(evaluation.group, evaluation.group[spans.row], max_words, seed)
        span = np.stack([spans.row[keep], spans.start[keep], spans.end[keep]], axis=1)
        chosen.append((task, spans.classes, span, spans.label[keep]))
    every = np.concatenate([item[2] for item in chosen])
    if view == "sentence":
        every = every * np.array([1, 0, 0])
    distinct, which = np.unique(every, axis=0, return_inverse=True)
    places = np.split(which.reshape(-1), np.cumsum([len(item[2]) for item in chosen])[:-1])
    words = []
    for where, (task, classes, span, label) in zip(places, chosen, strict=True):
        fixed = None if evaluation.split is None else evaluation.split[span[:, 0]]
        if split_by == "word_type":
            unit = word_types(evaluation, span)
            part = split_groups(unit, split_seed)
            # a word stays where both splits agree; the others would put a type, or a sentence, on both sides
            stays = np.ones(len(unit), np.bool_) if fixed is None else (fixed == 1) == (part == Part.TEST)
            rows = (where[stays], label[stays], unit[stays], part[stays], span[stays])
        else:
            unit = evaluation.group[span[:, 0]]
            rows = (where, label, unit, split_groups(unit, split_seed, fixed=fixed), span)
        words.append(TaskWords(task, classes, *rows, unit="word types" if split_by == "word_type" else "sentences"))
    return distinct, words


def word_types(evaluation: EvaluationSet, span: Codes) -> Codes:
    """Code of the word type of each span ``[M, 3]``; a type is the tuple of its token ids.

    In a masked set a hidden token counts as the token it hides.
    """
    masked = evaluation.objective == "masked_lm"
    types: list[tuple[int, ...]] = [()] * len(span)
    for start in range(0, evaluation.n_examples, _ROWS):
        stop = min(start + _ROWS, evaluation.n_examples)
        here = np.flatnonzero((span[:, 0] >= start) & (span[:, 0] < stop))
        if not len(here):
            continue
        batch = evaluation.tokens(start, stop)
        ids = batch.input_ids.numpy()
        if masked:
            targets = batch.targets.numpy()
            ids = np.where(targets != IGNORED, targets, ids)
        for word in here:
            row, first, last = span[word]
            types[word] = tuple(ids[row - start, first:last].tolist())
    codes = {kind: code for code, kind in enumerate(sorted(set(types)))}
    return np.asarray([codes[kind] for kind in types], dtype=np.int64)


def prepare(
    words: TaskWords, evaluation: EvaluationSet, min_class_count: int, with_control: bool, seed: int
) -> Prepared:
    """Drop classes with too few training words, draw control labels, and say when there is nothing to fit."""
    train = words.part == Part.TRAIN
    counts = np.bincount(words.label[train], minlength=len(words.classes))
    excluded = {
        name: f"{counts[code]} training words, fewer than min_class_count = {min_class_count}: left out of the task"
        for code, name in enumerate(words.classes)
        if counts[code] < min_class_count
    }
    kept = np.flatnonzero(counts >= min_class_count)
    mask = np.isin(words.label, kept)
    rest = TaskWords(
        words.task,
        words.classes,
        words.where[mask],
        words.label[mask],
        words.group[mask],
        words.part[mask],
        words.span[mask],
        words.unit,
    )
    label = np.searchsorted(kept, rest.label).astype(np.int64)
    reason = _obstacle(words, rest, kept, counts, min_class_count)
    control = None
    if with_control and reason is None:
        control = control_labels(word_types(evaluation, rest.span), label, seed)
    return Prepared(rest, kept, excluded, label, control, reason)


def _obstacle(
    words: TaskWords, rest: TaskWords, kept: Codes, counts: NDArray[np.intp], min_class_count: int
) -> str | None:
    units = len(np.unique(words.group))
    sizes = {part: int((words.part == part).sum()) for part in Part}
    if not all(sizes.values()):
        absent = " or ".join(part.name.lower() for part in Part if not sizes[part])
        return (
            f"{units} {words.unit} with this task: none left for {absent}; a probe needs {words.unit} to train on, to "
            "choose the penalty on, and to test on"
        )
    if len(kept) < 2:
        found = ", ".join(f"{name} {count}" for name, count in list(zip(words.classes, counts, strict=True))[:5])
        return (
            f"fewer than two classes have min_class_count = {min_class_count} training words (found: {found}); there "
            "is nothing to tell apart"
        )
    for part in (Part.VALIDATION, Part.TEST):
        if not (rest.part == part).any():
            return f"no {part.name.lower()} word belongs to a class with min_class_count training words"
    return None

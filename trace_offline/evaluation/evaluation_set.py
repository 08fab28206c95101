"""The evaluation set as the later stages see it: token batches on demand, annotations by task, one hash.

Shape letters: N rows, T positions, B rows of a batch, M annotations of a task.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trace_offline.core.errors import EvaluationSetError, nearest
from trace_offline.evaluation import batch_file, validate
from trace_offline.evaluation import format as form
from trace_offline.evaluation.annotations import ANNOTATIONS, BATCHES, Alternatives, read_annotations
from trace_offline.evaluation.origin import TOKENIZER, Decoder
from trace_offline.evaluation.pairs import VIOLATION, Pairs
from trace_offline.evaluation.training_text import TRAINING_TEXT, TrainingText
from trace_offline.evaluation.training_text import read as read_training_text

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = validate.IGNORED

ADD_TRAINING_TEXT = (
    "Build the set with it: trace-offline evaluation-set build OUT --from FILE --tokenizer CHECKPOINT "
    "--training-text FILE, or save_evaluation_set(…, training_ids=…)."
)


@dataclass(frozen=True)
class TokenBatch:
    """Rows of the set as torch tensors ``[B, T]``: ``input_ids`` int64, ``attention_mask`` bool, ``targets`` int64.

    ``targets[b, t]``: what the prediction *at* (b, t) is compared with, −100 where nothing counts.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Spans:
    """Annotations of one task, int64 ``[M]``: ``row``, ``start``, ``end`` (exclusive), ``label`` (into ``classes``).

    Ordered by row, then start. ``classes``: the names of the labels, sorted.
    """

    row: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class EvaluationSet:
    """A frozen evaluation set on disk; token batches are read when asked for, so memory does not grow with the set.

    ``labels_shifted``: True when a label at position t is compared with the prediction at t − 1 (causal LM).
    ``alignment``: which sub-word carries a word's label (``last``, ``first``, ``mean`` over all). ``split [N]``: 0 =
    fit probes here, 1 = score here, None = no split given. ``group [N]``: rows with the same number belong together.
    ``summary``: what the builder counted (words aligned, truncated, …), empty for recorded sets. ``alternatives``:
    tokens that could stand in the place of others (None: the set has none). ``has_training_text``: see
    ``training_text()``. ``pairs``: which rows are minimal pairs (None: the set has none). ``corpus``: parameters of the
    synthetic corpus behind the text (module ``origin``), None when there is none. ``has_tokenizer``: see ``decoder()``.
    """

    folder: Path
    name: str
    hash: str
    tokenizer_hash: str | None
    objective: str
    labels_shifted: bool
    alignment: str
    special_token_ids: tuple[int, ...]
    n_examples: int
    max_length: int
    n_tokens: int
    tasks: tuple[str, ...]
    split: npt.NDArray[np.int8] | None = field(repr=False)
    group: npt.NDArray[np.int64] = field(repr=False)
    has_labels: bool = False
    tokenizer: str | None = None
    source: str = ""
    licence: str = ""
    summary: dict[str, Any] = field(default_factory=dict, repr=False)
    alternatives: Alternatives | None = field(default=None, repr=False)
    has_training_text: bool = False
    pairs: Pairs | None = field(default=None, repr=False)
    corpus: dict[str, Any] | None = field(default=None, repr=False)
    has_tokenizer: bool = False
    _example: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    _stamps: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EvaluationSet) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    @classmethod
    def load(cls, folder: Path | str) -> EvaluationSet:
        """Open the folder, check every value once (in chunks, constant memory) and compare the hash.

        Raises EvaluationSetError when the folder is missing, damaged, altered, or from a newer version.
        """
        folder = Path(folder)
        description, document = form.read_description(folder)
        stamps = _stamps(folder)
        batches = form.open_batches(folder)
        where = str(folder / BATCHES)
        names = set(batches.keys())
        for name in ("input_ids", "attention_mask"):
            if name not in names:
                raise EvaluationSetError(f"{where}: has no tensor {name}. Build the evaluation set anew.")
        shape = tuple(batches.get_slice("input_ids").get_shape())
        if len(shape) != 2 or 0 in shape:
            raise EvaluationSetError(f"{where}: input_ids must be [rows, positions] and not empty; found {shape}.")
        n, t = shape
        has_labels = "labels" in names
        validate.check_meaning(
            description.objective, description.labels_shifted, description.alignment, has_labels, str(folder)
        )
        example = batch_file.numbers(batches, names, "example", n, where)
        group = batch_file.numbers(batches, names, "group", n, where)
        split = batch_file.numbers(batches, names, "split", n, where) if "split" in names else None
        validate.check_row_numbers(n, group, split, where)  # type: ignore[arg-type]
        if len(np.unique(example)) != n:
            raise EvaluationSetError(f"{where}: example must number each row differently; some rows share a number.")
        annotations = read_annotations(folder, example).ordered()
        where_annotations = str(folder / ANNOTATIONS)
        validate.check_spans(annotations, n, t, where_annotations, description.multi_label)
        content_hash = form.ContentHash(description, n, t)
        alternatives = batch_file.alternatives(batches, names, n, where)
        n_tokens = 0
        for start, stop in form.row_chunks(n, t):
            ids, mask, labels = batch_file.read_rows(batches, start, stop, shape, has_labels, where)
            low, high = np.searchsorted(annotations.row, [start, stop])
            validate.check_spans_attended(
                annotations.row[low:high],
                annotations.start[low:high],
                annotations.end[low:high],
                ids,
                mask,
                description.special_token_ids,
                where_annotations,
                start,
                None if description.labels_shifted else labels,
            )
            if alternatives is not None:
                own = None if description.labels_shifted else labels
                validate.check_alternatives(batch_file.rows_of(alternatives, start, stop), ids, mask, own, where, start)
            n_tokens += int(mask.sum(dtype=np.int64))
            content_hash.update("input_ids", ids)
            content_hash.update("attention_mask", mask)
            if labels is not None:
                content_hash.update("labels", labels)
        content_hash.update("group", group)
        if split is not None:
            content_hash.update("split", split)
        if alternatives is not None:
            content_hash.update("alternatives", alternatives.table())
        training_text = read_training_text(folder, n, t)
        if training_text is not None:
            content_hash.update_training_text(training_text)
        pairs = batch_file.pairs(batches, names, n, split, annotations, where)
        if pairs is not None:
            content_hash.update("pair", pairs.pair)
            content_hash.update("variant", pairs.variant)
        tokenizer = folder / TOKENIZER
        if tokenizer.is_file():
            content_hash.update_text(TOKENIZER, tokenizer.read_text(encoding="utf-8"))
        found = content_hash.finish(annotations)
        if document.get("hash") not in (None, found):
            raise EvaluationSetError(
                f"{folder}: altered since it was written: {form.DESCRIPTION} says hash {document['hash']}, the content "
                f"has {found}. Numbers from it could not be compared with earlier ones; restore the folder or build "
                "the set anew."
            )
        return cls(
            folder=folder,
            name=description.name,
            hash=found,
            tokenizer_hash=description.tokenizer_hash,
            objective=description.objective,
            labels_shifted=description.labels_shifted,
            alignment=description.alignment,
            special_token_ids=description.special_token_ids,
            n_examples=n,
            max_length=t,
            n_tokens=n_tokens,
            tasks=tuple(sorted(set(annotations.task.tolist()))),
            split=None if split is None else split.astype(np.int8),
            group=group,
            has_labels=has_labels,
            tokenizer=description.tokenizer,
            source=description.source,
            licence=description.licence,
            summary=description.summary,
            alternatives=alternatives,
            has_training_text=training_text is not None,
            pairs=pairs,
            corpus=description.corpus,
            has_tokenizer=tokenizer.is_file(),
            _example=example,
            _stamps=stamps,
        )

    def tokens(self, start: int, stop: int) -> TokenBatch:
        """Rows ``start`` to ``stop`` (exclusive; may run past the end) as torch tensors.

        Raises EvaluationSetError when the range is empty or the folder was changed since it was opened.
        """
        import torch

        stop = min(stop, self.n_examples)
        if not 0 <= start < stop:
            raise EvaluationSetError(
                f"{self.folder}: rows {start} to {stop} asked for; the rows are 0 to {self.n_examples - 1}."
            )
        self._unchanged()
        batches = form.open_batches(self.folder)
        where = str(self.folder / BATCHES)
        ids, mask, labels = batch_file.read_rows(batches, start, stop, self._shape, self.has_labels, where)
        targets = self._targets(ids, mask.astype(bool), labels)
        return TokenBatch(torch.from_numpy(ids), torch.from_numpy(mask.astype(bool)), torch.from_numpy(targets))

    def _targets(
        self,
        ids: npt.NDArray[np.int64],
        mask: npt.NDArray[np.bool_],
        labels: npt.NDArray[np.int64] | None,
    ) -> npt.NDArray[np.int64]:
        if labels is None:
            labels = np.where(np.isin(ids, self.special_token_ids), IGNORED, ids)
        labels = np.where(mask, labels, IGNORED)
        if not self.labels_shifted:
            return labels
        targets = np.full_like(labels, IGNORED)
        targets[:, :-1] = np.where(mask[:, :-1], labels[:, 1:], IGNORED)
        return targets

    def spans(self, task: str) -> Spans:
        """The annotations of a task. Raises EvaluationSetError for a task the set does not have."""
        if task not in self.tasks:
            known = ", ".join(self.tasks) or "none"
            raise EvaluationSetError(
                f'{self.folder}: no annotations for task "{task}"; the tasks are: {known}.{nearest(task, self.tasks)}'
            )
        self._unchanged()
        found = read_annotations(self.folder, self._example, task).ordered()
        found = found.where(found.row < self.n_examples)
        classes = tuple(sorted(set(found.label.tolist())))
        codes = {name: code for code, name in enumerate(classes)}
        label = np.asarray([codes[name] for name in found.label.tolist()], np.int64)
        return Spans(found.row, found.start, found.end, label, classes)

    def training_text(self) -> TrainingText:
        """What the training text says about the rows. Raises EvaluationSetError when the set was built without one."""
        self._unchanged()
        found = read_training_text(self.folder, *self._shape)
        if found is None:
            raise EvaluationSetError(f"{self.folder}: knows no training text. {ADD_TRAINING_TEXT}")
        return found.first(self.n_examples)

    def decoder(self) -> Decoder:
        """From token ids to text, with the tokenizer kept with the set. Raises EvaluationSetError when it has none."""
        return Decoder(self.folder)

    def originals(self) -> EvaluationSet:
        """The set without the changed rows of its minimal pairs: what texts in general are measured on.

        The set itself when it has no pairs. The annotations that mark what to compare are left out as well.
        """
        if self.pairs is None:
            return self
        n = self.pairs.n_originals
        self._unchanged()
        annotations = read_annotations(self.folder, self._example)
        mask = form.open_batches(self.folder).get_slice("attention_mask")[:n]
        return replace(
            self,
            n_examples=n,
            n_tokens=int(mask.sum(dtype=np.int64)),
            tasks=tuple(sorted(set(annotations.where(annotations.row < n).task.tolist()) - {VIOLATION})),
            split=None if self.split is None else self.split[:n],
            group=self.group[:n],
            alternatives=None if self.alternatives is None else batch_file.rows_of(self.alternatives, 0, n),
            pairs=None,
        )

    @property
    def _shape(self) -> tuple[int, int]:
        """Rows and positions of the folder."""
        return len(self._example), self.max_length

    def _unchanged(self) -> None:
        if _stamps(self.folder) != self._stamps:
            raise EvaluationSetError(
                f"{self.folder}: changed while it was in use. An evaluation set must stay the same; restore it and run "
                "again."
            )


def check_tokenizer(evaluation: EvaluationSet, tokenizer_hash: str | None, where: str) -> bool:
    """Compare the tokenizer the set was made with and the checkpoint's; ``where`` names the checkpoint's tokenizer.

    Returns False when one of the two is unknown (nothing to compare). Raises EvaluationSetError on a mismatch.
    """
    if evaluation.tokenizer_hash is None or tokenizer_hash is None:
        return False
    if evaluation.tokenizer_hash != tokenizer_hash:
        raise EvaluationSetError(
            f'the evaluation set "{evaluation.name}" ({evaluation.folder}) was made with the tokenizer '
            f"{evaluation.tokenizer or 'of unknown name'} (hash {evaluation.tokenizer_hash}), but the checkpoint has "
            f"the tokenizer {where} (hash {tokenizer_hash}). The same token ids would mean other words. Build the "
            "evaluation set with the checkpoint's tokenizer: trace-offline evaluation-set build OUT --from FILE "
            f"--tokenizer {where}"
        )
    return True


def _stamps(folder: Path) -> tuple[tuple[int, int], ...]:
    stamps = []
    for name in (BATCHES, ANNOTATIONS):
        try:
            status = (folder / name).stat()
        except OSError as error:
            raise EvaluationSetError(f"{folder / name}: missing. Build the evaluation set anew.") from error
        stamps.append((status.st_size, status.st_mtime_ns))
    if (folder / TRAINING_TEXT).exists():
        status = (folder / TRAINING_TEXT).stat()
        stamps.append((status.st_size, status.st_mtime_ns))
    return tuple(stamps)

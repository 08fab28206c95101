"""Writing an evaluation set from the tensors a training script has at hand."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trace_offline.core.errors import EvaluationSetError
from trace_offline.evaluation import format as form
from trace_offline.evaluation import validate
from trace_offline.evaluation.annotations import Alternatives, Annotations
from trace_offline.evaluation.origin import corpus_record, tokenizer_json
from trace_offline.evaluation.pairs import Pairs
from trace_offline.evaluation.training_text import TrainingText, compare


def save_evaluation_set(
    folder: Path | str,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    labels: Any = None,
    labels_shifted: bool = True,
    annotations: Iterable[tuple[int, str, int, int, str]] | None = None,
    name: str = "evaluation",
    objective: str = "causal_lm",
    special_token_ids: Sequence[int] = (),
    tokenizer: Any = None,
    split: Any = None,
    group: Any = None,
    source: str = "",
    licence: str = "",
    alignment: str = "last",
    multi_label: Sequence[str] = (),
    alternatives: Iterable[tuple[int, int, int]] | None = None,
    training_ids: Any = None,
    training_mask: Any = None,
    pair: Any = None,
    variant: Any = None,
    corpus: Any = None,
) -> Path:
    """Write fixed evaluation batches next to the checkpoints; call once, before or after training.

    ``input_ids``: ``[N, T]`` tensor, array or list of rows (rows of different length are padded on the right).
    ``attention_mask``: the same shape, 1 = token, 0 = padding; needed when ``input_ids`` is already padded.
    ``labels``: what predictions are compared with, −100 where nothing counts; left out for next-token prediction.
    ``labels_shifted``: True (a causal LM): the label at t is compared with the prediction at t − 1; False: at t.
    ``annotations``: ``(row, task, start, end, label)``, token positions, end exclusive.
    ``special_token_ids``: tokens that never count as next-token targets; taken from ``tokenizer`` when left out.
    ``tokenizer``: tokenizer object or folder; its hash is kept so that a checkpoint with another one is noticed.
    ``split [N]``: 0 = fit probes on this row, 1 = score on it. ``group [N]``: rows that belong together.
    ``alignment``: which sub-word of an annotation carries the label: ``last``, ``first`` or ``mean``.
    ``multi_label``: tasks in which the same tokens may carry several labels.
    ``alternatives``: ``(row, position, token)``: a token that could stand in the place of the one that is there, such
    as the wrong form of a verb.
    ``training_ids``: rows of the training text (of any lengths, with the special tokens that rows of ``input_ids``
    have), and ``training_mask`` when they are padded. Their n-gram counts are kept as far as the rows of the set need
    them, and which rows occur among them; the text itself is not.

    ``pair [N]``, ``variant [N]``: minimal pairs: rows that share a number of ``pair`` (−1: none) are the original
    (variant 0) and the changed member (variant 1; these rows come last); annotations of the task ``violation`` mark the
    tokens to compare in both, with the kind of change as the label.
    ``corpus``: the parameters of the synthetic corpus that the text comes from (``CorpusParams``, ``Origin`` or their
    records); with it the tokenizer is kept, so that sampled text can be judged by the grammar.

    Calling again with the same content does nothing. Raises EvaluationSetError for content that does not hold together
    or when the folder holds a different set.
    """
    folder = Path(folder)
    where = str(folder)
    if isinstance(tokenizer, (str, Path)):
        from trace_offline.checkpoints.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(tokenizer)
    ids, given = _rows(input_ids, "input_ids", where)
    pad = getattr(tokenizer, "pad_token_id", None)
    padded_ids = _padded(ids, pad if isinstance(pad, int) else 0)
    if attention_mask is None:
        _refuse_hidden_padding(padded_ids, given, tokenizer, where)
        mask = given
    else:
        mask = given * _like(attention_mask, ids, "attention_mask", where, 0)
    special = [int(token) for token in special_token_ids] or _special_tokens(tokenizer)
    origin = corpus_record(corpus, where)
    contents = form.Contents(
        input_ids=padded_ids,
        attention_mask=mask,
        annotations=_annotations(annotations or (), where),
        labels=None if labels is None else _like(labels, ids, "labels", where, validate.IGNORED),
        group=None if group is None else _vector(group, "group", where),
        split=None if split is None else _vector(split, "split", where).astype(np.int8),
        alternatives=None if alternatives is None else _alternatives(alternatives, where),
        training_text=None
        if training_ids is None
        else _training(padded_ids, mask, special, training_ids, training_mask, tokenizer, where),
        pairs=_pairs(pair, variant, where),
        tokenizer=None if origin is None else tokenizer_json(tokenizer),
    )
    description = form.Description(
        objective=objective,
        labels_shifted=labels_shifted,
        alignment=alignment,
        special_token_ids=tuple(sorted(set(special))),
        multi_label=tuple(sorted(set(multi_label))),
        corpus=origin,
        name=name,
        tokenizer_hash=_tokenizer_hash(tokenizer),
        tokenizer=_tokenizer_name(tokenizer),
        source=source,
        licence=licence,
    )
    form.write(folder, contents, description)
    return folder


def _array(values: Any) -> npt.NDArray[Any]:
    """A tensor (of any device), array or list as a numpy array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def _whole(values: npt.NDArray[Any], what: str, where: str) -> npt.NDArray[np.int64]:
    if values.dtype.kind not in "iub":
        raise EvaluationSetError(f"{where}: {what} must hold whole numbers; found {values.dtype}.")
    return values.astype(np.int64)


def _vector(values: Any, what: str, where: str) -> npt.NDArray[np.int64]:
    return _whole(_array(values), what, where)


def _rows(values: Any, what: str, where: str) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """The rows as given, and the mask ``[N, T]`` that tells them from the padding added to make them equally long."""
    if hasattr(values, "detach") or isinstance(values, np.ndarray):
        whole = _array(values)
        if whole.ndim != 2:
            raise EvaluationSetError(f"{where}: {what} must be [rows, positions]; its shape is {whole.shape}.")
        rows = list(_whole(whole, what, where))
    else:
        rows = []
        for index, row in enumerate(values):
            found = _array(row)
            if found.ndim != 1:
                raise EvaluationSetError(
                    f"{where}: {what}, row {index}: expected a list of numbers; found {row!r:.80}."
                )
            rows.append(_whole(found, f"{what}, row {index},", where) if len(found) else np.zeros(0, np.int64))
    if not rows or not max(len(row) for row in rows):
        raise EvaluationSetError(f"{where}: {what} is empty; give at least one row of tokens.")
    mask = np.zeros((len(rows), max(len(row) for row in rows)), np.int64)
    for index, row in enumerate(rows):
        mask[index, : len(row)] = 1
    return rows, mask


def _padded(rows: list[npt.NDArray[np.int64]], value: int) -> npt.NDArray[np.int64]:
    result = np.full((len(rows), max(len(row) for row in rows)), value, np.int64)
    for index, row in enumerate(rows):
        result[index, : len(row)] = row
    return result


def _like(values: Any, rows: list[npt.NDArray[np.int64]], what: str, where: str, padding: int) -> npt.NDArray[np.int64]:
    """``values`` padded with ``padding`` as ``rows`` are; must have the same lengths row by row."""
    found, _ = _rows(values, what, where)
    if len(found) != len(rows):
        raise EvaluationSetError(f"{where}: {what} has {len(found)} rows, input_ids {len(rows)}; they must agree.")
    for index, (mine, theirs) in enumerate(zip(found, rows, strict=True)):
        if len(mine) != len(theirs):
            raise EvaluationSetError(
                f"{where}: {what}, row {index}: {len(mine)} positions; input_ids has {len(theirs)} there."
            )
    return _padded(found, padding)


def _refuse_hidden_padding(
    ids: npt.NDArray[np.int64], given: npt.NDArray[np.int64], tokenizer: Any, where: str
) -> None:
    """Padding tokens at the end of rows without an attention_mask would be measured as if they were text."""
    pad = getattr(tokenizer, "pad_token_id", None)
    if not isinstance(pad, int) or pad in (
        getattr(tokenizer, "eos_token_id", None),
        getattr(tokenizer, "bos_token_id", None),
    ):
        return
    rows = np.flatnonzero(((ids == pad) & (given == 1)).any(1))
    if len(rows):
        raise EvaluationSetError(
            f"{where}: row {rows[0]} contains the padding token ({pad}) and no attention_mask was given; pass "
            "attention_mask (1 = token, 0 = padding), or rows without padding."
        )


def _annotations(given: Iterable[tuple[int, str, int, int, str]], where: str) -> Annotations:
    rows = []
    for index, annotation in enumerate(given):
        try:
            row, task, start, end, label = annotation
            rows.append((operator.index(row), str(task), operator.index(start), operator.index(end), str(label)))
        except (TypeError, ValueError) as error:
            raise EvaluationSetError(
                f"{where}: annotation {index}: expected (row, task, start, end, label) with whole "
                f"numbers for row, start and end; found {annotation!r:.120}."
            ) from error
    return Annotations.from_tuples(rows)


def _alternatives(given: Iterable[tuple[int, int, int]], where: str) -> Alternatives:
    rows = []
    for index, alternative in enumerate(given):
        try:
            row, position, token = (operator.index(number) for number in alternative)
        except (TypeError, ValueError) as error:
            raise EvaluationSetError(
                f"{where}: alternative {index}: expected (row, position, token) as whole numbers; found "
                f"{alternative!r:.120}."
            ) from error
        rows.append((row, position, token))
    return Alternatives.from_tuples(rows)


def _pairs(pair: Any, variant: Any, where: str) -> Pairs | None:
    if (pair is None) != (variant is None):
        raise EvaluationSetError(f"{where}: minimal pairs need both pair and variant; one was given.")
    return None if pair is None else Pairs(_vector(pair, "pair", where), _vector(variant, "variant", where))


def _training(
    ids: npt.NDArray[np.int64],
    mask: npt.NDArray[np.int64],
    special: Sequence[int],
    training_ids: Any,
    training_mask: Any,
    tokenizer: Any,
    where: str,
) -> TrainingText:
    rows, given = _rows(training_ids, "training_ids", where)
    if training_mask is None:
        _refuse_hidden_padding(_padded(rows, 0), given, tokenizer, where)
        kept = given
    else:
        kept = given * _like(training_mask, rows, "training_mask", where, 0)
    texts = [row[kept[index, : len(row)].astype(bool)] for index, row in enumerate(rows)]
    if any((text < 0).any() for text in texts):
        raise EvaluationSetError(f"{where}: training_ids holds a token id below 0; leave padding out.")
    return compare(ids, mask, special, texts)


def _special_tokens(tokenizer: Any) -> list[int]:
    """Ids of the special tokens of a tokenizer of transformers or of tokenizers."""
    found = {int(token) for token in getattr(tokenizer, "all_special_ids", ())}
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if added is None and hasattr(tokenizer, "get_added_tokens_decoder"):
        added = tokenizer.get_added_tokens_decoder()
    return sorted(found | {int(identifier) for identifier, token in (added or {}).items() if token.special})


def _tokenizer_name(tokenizer: Any) -> str | None:
    """A name for messages; of a local folder only its own name, so that no path of this computer is kept."""
    if tokenizer is None:
        return None
    name = str(getattr(tokenizer, "name_or_path", "") or "")
    if not name:
        return type(tokenizer).__name__
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def _tokenizer_hash(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    from trace_offline.checkpoints.tokenizer import tokenizer_hash

    return tokenizer_hash(tokenizer)

"""Build an evaluation set from text and annotations: read → tokenize → align → write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trace_offline.core.errors import EvaluationSetError, UsageError, nearest
from trace_offline.core.hashing import file_digest
from trace_offline.evaluation import format as form
from trace_offline.evaluation.alignment import Outcome, SubwordMap
from trace_offline.evaluation.alternatives import alternative_tokens
from trace_offline.evaluation.annotations import Alternatives, Annotations
from trace_offline.evaluation.document import Document
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.evaluation.masking import choose_masked, masked_row
from trace_offline.evaluation.origin import corpus_of_files, tokenizer_json
from trace_offline.evaluation.pair_rows import arrange_pairs
from trace_offline.evaluation.pairs import VIOLATION, Member, Pairs
from trace_offline.evaluation.sources import KINDS, read_source
from trace_offline.evaluation.tokenizing import Encoded, SourceTokenizer
from trace_offline.evaluation.training_text import compare

OBJECTIVES = ("causal_lm", "masked_lm")
_ENCODED_TOGETHER = 256


@dataclass
class Row:
    """One row to be: its tokens, where it comes from, and the labels of its words."""

    ids: npt.NDArray[np.int64]
    group: int
    split: int
    labels: npt.NDArray[np.int64] | None = None
    annotations: list[tuple[str, int, int, str]] = field(default_factory=list)
    alternatives: list[tuple[int, int]] = field(default_factory=list)
    member: Member | None = None
    truncated: bool = False


@dataclass
class Tally:
    """What happened to the words of each task, and to texts too long for a row."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    classes: dict[str, Counter[str]] = field(default_factory=dict)
    lost: dict[str, Counter[str]] = field(default_factory=dict)
    alternatives: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    chunked: int = 0

    def add(self, task: str, outcome: Outcome, label: str | None = None, count: int = 1) -> None:
        """Count a word."""
        self.outcomes.setdefault(task, Counter())[outcome.value] += count
        if label is not None:
            which = self.classes if outcome is Outcome.ALIGNED else self.lost
            which.setdefault(task, Counter())[label] += count


@dataclass(frozen=True)
class Plan:
    """The choices that turn a document into rows."""

    tokenizer: SourceTokenizer
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    room: int
    objective: str
    mask_probability: float
    seed: int


def build_evaluation_set(
    out: Path | str,
    sources: Sequence[Path | str],
    *,
    tokenizer: Path | str,
    tasks: Sequence[str] | None = None,
    test_sources: Sequence[Path | str] = (),
    kind: str | None = None,
    max_length: int | None = None,
    alignment: str = "last",
    max_examples: int | None = None,
    name: str | None = None,
    licence: str = "",
    objective: str = "causal_lm",
    add_bos: bool | None = None,
    mask_probability: float = 0.15,
    seed: int = 0,
    text_unit: str = "auto",
    training_text: Sequence[Path | str] = (),
) -> EvaluationSet:
    """Write an evaluation set to the folder ``out`` and open it; counts of words and labels are in ``.summary``.

    ``sources``: plain text, CoNLL-U, JSONL, ABSynth JSON or minimal pairs (``kind``; None: guessed from name and
    content); gzip is fine. ``tasks``: which annotations; None = the usual ones of the format. ``test_sources``: more
    files of the same kind; probes are fitted on ``sources`` (split 0) and scored on these (split 1). ``tokenizer``:
    checkpoint folder or tokenizer.json. ``max_length``: tokens a row, special ones included; default: what the model
    takes, at most 1,024. Plain text longer than that is cut into several rows of one group, each starting as a text
    does; annotated text is truncated, and labels cut off are counted. ``max_examples``: the first so many texts (or
    pairs) of ``sources``, and of ``test_sources``. ``objective``: ``causal_lm``, or ``masked_lm``:
    ``mask_probability`` of the positions of each row (at least one) hold the mask token and are predicted; words that
    contain one lose their label.
    ``text_unit``: how plain text is split (``auto``, ``mark``, ``paragraph``, ``line``, ``file``).
    ``training_text``: files of what the model was trained on; counts of their n-grams and which rows occur in them are
    kept, not the text.

    Texts that occur more than once share a group, so that no split puts copies on both sides; so do minimal pairs.
    Files of ``trace_offline.corpus`` with their parameters beside them pass these on, with the tokenizer.
    Raises EvaluationSetError for unusable input, UsageError for unusable options.
    """
    _check_options(sources, tasks, kind, objective, max_length, max_examples)
    if training_text and objective != "causal_lm":
        raise UsageError(f"training_text needs the objective causal_lm; found {objective}.")
    loaded = SourceTokenizer.load(tokenizer)
    prefix, suffix = loaded.row_frame(objective, add_bos)
    if objective == "masked_lm" and loaded.mask_id is None:
        raise EvaluationSetError(f"the tokenizer {loaded.name} has no mask token; use the objective causal_lm.")
    limit = loaded.longest if max_length is None else max_length
    room = limit - len(prefix) - len(suffix)
    if room < 1:
        raise UsageError(
            f"max_length {limit} leaves no room for text beside {len(prefix) + len(suffix)} special tokens."
        )
    plan = Plan(loaded, prefix, suffix, room, objective, mask_probability, seed)
    tally = Tally()
    rows: list[Row] = []
    texts = 0
    groups: dict[tuple[int, str], int] = {}
    for split, paths in enumerate((sources, test_sources)):
        documents = [document for path in paths for document in read_source(Path(path), kind, tasks, text_unit)]
        documents = _first(documents, max_examples)
        texts += len(documents)
        if objective != "causal_lm" and any(document.member for document in documents):
            raise UsageError(
                f"minimal pairs need the objective causal_lm, found {objective}: the probability of a sentence is the "
                "product of its next-token probabilities."
            )
        rows += _rows(documents, split, plan, groups, tally, first_row=len(rows))
    rows, pairs, pair_tally = arrange_pairs(rows, loaded.special_ids)
    if pairs is not None:
        tally.outcomes.pop(VIOLATION, None)
    _check_result(rows, tally, loaded)
    repeated = len({text for split, text in groups if split} & {text for split, text in groups if not split})
    summary = _summary(rows, tally, texts, repeated, sources, test_sources)
    corpus, conflict = corpus_of_files([Path(path) for path in (*sources, *test_sources)])
    if pairs is not None:
        summary["pairs"] = pair_tally.summary()
    summary["warnings"] += [*pair_tally.warnings(), *([conflict] if conflict else [])]
    description = form.Description(
        objective=objective,
        labels_shifted=objective != "masked_lm",
        alignment=alignment,
        special_token_ids=loaded.special_ids,
        name=name or Path(out).name,
        tokenizer_hash=loaded.hash,
        tokenizer=loaded.name,
        source=", ".join(Path(path).name for path in (*sources, *test_sources)),
        licence=licence,
        corpus=corpus,
        summary=summary,
    )
    contents = _contents(rows, plan, bool(test_sources), pairs)
    if corpus is not None:
        contents = replace(contents, tokenizer=tokenizer_json(loaded.backend))
    if training_text:
        contents = _with_training_text(contents, [Path(path) for path in training_text], plan, text_unit, description)
    form.write(Path(out), contents, description)
    return EvaluationSet.load(out)


def _check_options(
    sources: Sequence[Path | str],
    tasks: Sequence[str] | None,
    kind: str | None,
    objective: str,
    max_length: int | None,
    max_examples: int | None,
) -> None:
    if isinstance(sources, (str, Path)) or isinstance(tasks, str):
        raise UsageError("build_evaluation_set: sources and tasks are lists; put a single one in a list.")
    if not sources:
        raise UsageError("build_evaluation_set: give at least one source file.")
    for what, value, known in (("kind", kind, KINDS), ("objective", objective, OBJECTIVES)):
        if value is not None and value not in known:
            raise UsageError(f'{what}: expected one of {", ".join(known)}; found "{value}".{nearest(value, known)}')
    for what, number in (("max_length", max_length), ("max_examples", max_examples)):
        if number is not None and number < 1:
            raise UsageError(f"{what} must be at least 1; found {number}.")
    if tasks is not None and len(set(tasks)) != len(tasks):
        raise UsageError("tasks: the same task is named twice.")


def _first(documents: list[Document], count: int | None) -> list[Document]:
    """The first ``count`` texts; both members of a pair count as one."""
    starts = [place for place, each in enumerate(documents) if each.member is None or each.member.variant == 0]
    return documents if count is None or len(starts) <= count else documents[: starts[count]]


def _rows(
    documents: Sequence[Document],
    split: int,
    plan: Plan,
    groups: dict[tuple[int, str], int],
    tally: Tally,
    first_row: int,
) -> list[Row]:
    rows: list[Row] = []
    originals = {
        each.member.key: each.text for each in documents if each.member is not None and not each.member.variant
    }
    for start in range(0, len(documents), _ENCODED_TOGETHER):
        part = documents[start : start + _ENCODED_TOGETHER]
        for document, encoded in zip(part, plan.tokenizer.encode([each.text for each in part]), strict=True):
            if not encoded.ids:
                raise EvaluationSetError(f"{document.where}: the tokenizer makes no token of this text; leave it out.")
            text = document.text if document.member is None else originals[document.member.key]
            group = groups.setdefault((split, text), len(groups))
            for row in _rows_of(document, encoded, plan, tally, first_row + len(rows)):
                row.group, row.split = group, split
                rows.append(row)
    return rows


def _rows_of(document: Document, encoded: Encoded, plan: Plan, tally: Tally, number: int) -> Iterator[Row]:
    """One row, or several for a long text without annotations."""
    annotated = bool(document.spans or document.unplaced or document.alternatives or document.member)
    pieces = range(0, len(encoded.ids), plan.room)
    if len(pieces) > 1:
        tally.truncated += annotated
        tally.chunked += not annotated
    for start in pieces[:1] if annotated else pieces:
        ids = np.asarray([*plan.prefix, *encoded.ids[start : start + plan.room], *plan.suffix], np.int64)
        row = Row(ids, group=-1, split=0, member=document.member, truncated=annotated and len(pieces) > 1)
        masked = np.zeros(0, np.int64)
        if plan.objective == "masked_lm":
            assert plan.tokenizer.mask_id is not None
            eligible = ~np.isin(ids, plan.tokenizer.special_ids)
            masked = choose_masked(eligible, plan.mask_probability, plan.seed, number)
            row.ids, row.labels = masked_row(ids, masked, plan.tokenizer.mask_id)
        if annotated:
            row.annotations = _annotations(document, encoded, plan, masked, tally)
            if not len(masked):
                others = alternative_tokens(document, encoded, plan.tokenizer, plan.room, tally.alternatives)
                row.alternatives = [(place + len(plan.prefix), token) for place, token in others]
        number += 1
        yield row


def _annotations(
    document: Document, encoded: Encoded, plan: Plan, masked: npt.NDArray[np.int64], tally: Tally
) -> list[tuple[str, int, int, str]]:
    special = np.isin(encoded.ids, plan.tokenizer.special_ids)
    subwords = SubwordMap.build(document.text, encoded.tokens, encoded.offsets, special.tolist())
    hidden = set((masked - len(plan.prefix)).tolist())
    found: list[tuple[str, int, int, str]] = []
    for span in document.spans:
        outcome, start, end = subwords.align(span.start, span.end, plan.room)
        whole = span.end - span.start >= len(document.text.strip())
        if outcome is Outcome.ALIGNED and hidden:
            n_hidden = len(hidden.intersection(range(start, end)))
            # A label of the whole text stays as long as some of the text can be seen.
            if n_hidden and (not whole or n_hidden == end - start):
                outcome = Outcome.MASKED
        tally.add(span.task, outcome, span.label)
        if outcome is Outcome.ALIGNED:
            found.append((span.task, start + len(plan.prefix), end + len(plan.prefix), span.label))
    for task, count in document.unplaced.items():
        tally.add(task, Outcome.UNPLACED, count=count)
    return found


def _check_result(rows: Sequence[Row], tally: Tally, tokenizer: SourceTokenizer) -> None:
    largest = max(int(row.ids.max()) for row in rows)
    if tokenizer.vocabulary is not None and largest >= tokenizer.vocabulary:
        raise EvaluationSetError(
            f"the tokenizer {tokenizer.name} gives token id {largest}, but config.json beside it says the model has "
            f"only {tokenizer.vocabulary}; they do not belong together."
        )
    for task, outcomes in tally.outcomes.items():
        if not outcomes[Outcome.ALIGNED.value]:
            counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            raise EvaluationSetError(
                f'task "{task}": none of its labels could be aligned with tokens of {tokenizer.name} ({counts}).'
            )


def _contents(rows: Sequence[Row], plan: Plan, with_split: bool, pairs: Pairs | None) -> form.Contents:
    n, t = len(rows), max(len(row.ids) for row in rows)
    ids = np.full((n, t), plan.tokenizer.pad_id or 0, np.int64)
    mask = np.zeros((n, t), np.uint8)
    labels = np.full((n, t), -100, np.int64) if plan.objective == "masked_lm" else None
    annotations: list[tuple[int, str, int, int, str]] = []
    alternatives = [(index, place, token) for index, row in enumerate(rows) for place, token in row.alternatives]
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
        mask[index, : len(row.ids)] = 1
        if labels is not None and row.labels is not None:
            labels[index, : len(row.ids)] = row.labels
        annotations += [(index, task, start, end, label) for task, start, end, label in row.annotations]
    return form.Contents(
        input_ids=ids,
        attention_mask=mask,
        annotations=Annotations.from_tuples(annotations),
        labels=labels,
        group=np.asarray([row.group for row in rows], np.int64),
        split=np.asarray([row.split for row in rows], np.int8) if with_split else None,
        alternatives=Alternatives.from_tuples(alternatives) if alternatives else None,
        pairs=pairs,
    )


def _with_training_text(
    contents: form.Contents, paths: Sequence[Path], plan: Plan, text_unit: str, description: form.Description
) -> form.Contents:
    """Compare the rows with the training texts: whole ones for n-grams, cut as rows are for equality."""
    texts, pieces = [], []
    for path in paths:
        documents = read_source(path, None, (), text_unit)
        for start in range(0, len(documents), _ENCODED_TOGETHER):
            part = documents[start : start + _ENCODED_TOGETHER]
            for encoded in plan.tokenizer.encode([document.text for document in part]):
                ids = np.asarray(encoded.ids, np.int32)
                texts.append(np.asarray([*plan.prefix, *encoded.ids, *plan.suffix], np.int32))
                pieces += [ids[place : place + plan.room] for place in range(0, len(ids), plan.room)]
    found = compare(contents.input_ids, contents.attention_mask, description.special_token_ids, texts, pieces)
    description.summary["training_text"] = {
        "texts": found.n_texts,
        "tokens": found.n_tokens,
        "rows_seen": int(found.seen.sum()),
        "sources": {path.name: file_digest(path) for path in paths},
    }
    return replace(contents, training_text=found)


def _summary(
    rows: Sequence[Row],
    tally: Tally,
    texts: int,
    repeated: int,
    sources: Sequence[Path | str],
    test_sources: Sequence[Path | str],
) -> dict[str, Any]:
    """What the builder did, for people and for ``evaluation_set.json``."""
    tasks: dict[str, Any] = {}
    warnings: list[str] = []
    for task in sorted(tally.outcomes):
        outcomes = tally.outcomes[task]
        total = sum(outcomes.values())
        tasks[task] = {
            "labels": total,
            **{outcome.value: outcomes[outcome.value] for outcome in Outcome},
            "classes": dict(sorted(tally.classes[task].items())),
            "classes_not_aligned": dict(sorted(tally.lost.get(task, Counter()).items())),
        }
        share = outcomes[Outcome.ALIGNED.value] / total
        if share < 0.9:
            warnings.append(
                f'task "{task}": only {share:.0%} of {total} labels are aligned with tokens; see the counts of '
                "shared, no_subword, truncated, masked and unplaced."
            )
        for label, lost in sorted(tally.lost.get(task, Counter()).items()):
            # Losses are rarely even: a tokenizer that joins "n't" with its verb costs one class, not all alike.
            if lost >= 10 and lost > tally.classes[task][label] / 3:
                warnings.append(
                    f'task "{task}", class "{label}": {lost} of {lost + tally.classes[task][label]} labels are not '
                    "aligned; what is measured on the rest may not stand for the class."
                )
    if repeated:
        warnings.append(f"{repeated} texts occur on both sides of the split; scores on them are not held out.")
    return {
        "texts": texts,
        "rows": len(rows),
        "rows_to_fit": sum(row.split == 0 for row in rows),
        "rows_to_score": sum(row.split == 1 for row in rows),
        "tokens": sum(len(row.ids) for row in rows),
        "texts_truncated": tally.truncated,
        "texts_in_several_rows": tally.chunked,
        "tasks": tasks,
        **({"alternatives": dict(sorted(tally.alternatives.items()))} if tally.alternatives else {}),
        "sources": {Path(path).name: file_digest(Path(path)) for path in (*sources, *test_sources)},
        "warnings": warnings,
    }

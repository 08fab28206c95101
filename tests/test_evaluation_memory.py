"""A large evaluation set costs memory in proportion to what must be kept of it, and little of that."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from trace_offline.core.errors import EvaluationSetError
from trace_offline.evaluation import annotations as columns
from trace_offline.evaluation import format as form
from trace_offline.evaluation.annotations import Annotations, ranks, read_annotations
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.evaluation.validate import check_spans
from trace_offline.recording import save_evaluation_set

ROWS, POSITIONS = 3000, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 rows with two labels on every token."""
    ids = np.random.default_rng(0).integers(4, 100, (ROWS, POSITIONS))
    labels = [
        (row, task, at, at + 1, f"{task} number {(row * at) % 7}")
        for row in range(ROWS)
        for at in range(POSITIONS)
        for task in ("kind", "role")
    ]
    out = tmp_path_factory.mktemp("memory") / "set"
    save_evaluation_set(out, ids, annotations=labels, name="large")
    return out


def peak_bytes(body: object) -> int:
    tracemalloc.start()
    try:
        body()  # type: ignore[operator]
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_opening_a_set_takes_a_bounded_number_of_bytes_for_each_annotation(folder: Path) -> None:
    EvaluationSet.load(folder)  # imports
    # three int64 and two references are 40; sorting and checking hold some columns twice. One Python string or tuple
    # for each annotation would be 100 and more.
    assert peak_bytes(lambda: EvaluationSet.load(folder)) < 240 * 2 * ROWS * POSITIONS


def test_reading_one_task_never_holds_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_PIECE", 4096)
    example = np.arange(ROWS)
    one = peak_bytes(lambda: read_annotations(folder, example, "kind"))
    assert len(read_annotations(folder, example, "kind")) == ROWS * POSITIONS
    assert one < 0.7 * peak_bytes(lambda: read_annotations(folder, example))


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_pieces_leave_no_mark(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    few = 100
    example = np.arange(ROWS)
    whole = read_annotations(folder, example)
    before = EvaluationSet.load(folder).hash
    monkeypatch.setattr(columns, "_PIECE", max(size, few))
    monkeypatch.setattr(form, "_TEXTS", size)
    assert EvaluationSet.load(folder).hash == before
    again = read_annotations(folder, example)
    for name in ("row", "task", "start", "end", "label"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))


def test_an_empty_set_of_annotations_has_the_hash_of_an_empty_list(tmp_path: Path) -> None:
    save_evaluation_set(tmp_path / "set", [[5, 6]], name="plain")
    loaded = EvaluationSet.load(tmp_path / "set")
    assert loaded.tasks == ()
    assert len(read_annotations(tmp_path / "set", np.arange(1))) == 0


def test_ranks_follow_the_order_of_characters() -> None:
    texts = np.array(["b", "a", "ü", "B", "a", ""], dtype=object)
    assert ranks(texts).tolist() == [3, 2, 4, 1, 2, 0]
    assert texts[np.argsort(ranks(texts), kind="stable")].tolist() == sorted(texts.tolist())


def by_a_set(spans: Annotations, multi_label: tuple[str, ...]) -> int | None:
    """The first repeated annotation, one after another."""
    seen = set()
    for index in range(len(spans)):
        name = spans.task[index]
        key = (spans.row[index], name, spans.start[index], spans.end[index],
               spans.label[index] if name in multi_label else None)  # fmt: skip
        if key in seen:
            return index
        seen.add(key)
    return None


@pytest.mark.parametrize("seed", range(40))
def test_repeated_annotations_are_found_as_by_looking_at_each(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, many = int(rng.integers(0, 12)), ("t1",) if seed % 2 else ()
    rows = [
        (int(rng.integers(2)), f"t{rng.integers(2)}", int(at := rng.integers(3)), int(at) + 1, "xy"[rng.integers(2)])
        for _ in range(count)
    ]
    spans = Annotations.from_tuples(rows)
    expected = by_a_set(spans, many)
    if expected is None:
        check_spans(spans, 2, 4, "here", many)
    else:
        with pytest.raises(EvaluationSetError, match=rf"^here: annotation {expected} \(row "):
            check_spans(spans, 2, 4, "here", many)

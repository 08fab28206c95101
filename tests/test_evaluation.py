"""The evaluation-set folder: what a reader sees, what it refuses."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from trace_offline.core.errors import EvaluationSetError
from trace_offline.evaluation.evaluation_set import EvaluationSet, check_tokenizer
from trace_offline.recording import save_evaluation_set

ANNOTATIONS = [(1, "pos", 1, 2, "VERB"), (0, "pos", 1, 3, "NOUN"), (0, "role", 1, 3, "Agent"), (0, "pos", 3, 4, "ADJ")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_evaluation_set(
        tmp_path / "e",
        [[1, 5, 6, 7], [1, 8], [1, 9, 2]],
        annotations=ANNOTATIONS,
        special_token_ids=[1, 2],
        split=[0, 0, 1],
        group=[4, 4, 5],
        name="tiny",
        source="made by hand",
        licence="CC0-1.0",
    )


def rewrite(folder: Path, **tensors: np.ndarray | None) -> None:
    """Replace (or, with None, remove) tensors, and drop the stored hash so that only the content is judged."""
    found = load_file(folder / "batches.safetensors") | tensors
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, folder / "batches.safetensors")
    describe(folder, hash=None)


def describe(folder: Path, **values: object) -> None:
    path = folder / "evaluation_set.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_the_reader_sees(folder: Path) -> None:
    found = EvaluationSet.load(folder)
    assert (found.name, found.objective, found.labels_shifted, found.alignment) == ("tiny", "causal_lm", True, "last")
    assert (found.n_examples, found.max_length, found.n_tokens) == (3, 4, 9)
    assert found.tasks == ("pos", "role")
    assert found.split is not None
    assert found.split.tolist() == [0, 0, 1]
    assert found.split.dtype == np.int8
    assert found.group.tolist() == [4, 4, 5]
    assert (found.source, found.licence) == ("made by hand", "CC0-1.0")
    batch = found.tokens(0, 99)
    assert batch.input_ids.dtype == torch.int64
    assert batch.attention_mask.dtype == torch.bool
    assert batch.targets.tolist() == [[5, 6, 7, -100], [8, -100, -100, -100], [9, -100, -100, -100]]
    part = found.tokens(1, 2)
    assert torch.equal(part.targets, batch.targets[1:2])
    spans = found.spans("pos")
    assert spans.classes == ("ADJ", "NOUN", "VERB")
    assert (spans.row.tolist(), spans.start.tolist(), spans.end.tolist()) == ([0, 0, 1], [1, 3, 1], [3, 4, 2])
    assert spans.label.tolist() == [1, 0, 2]
    assert spans.label.dtype == spans.row.dtype == np.int64


def test_documented_files_and_columns(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [
        "annotations.parquet",
        "batches.safetensors",
        "evaluation_set.json",
    ]
    tensors = load_file(folder / "batches.safetensors")
    assert {"input_ids", "attention_mask", "example", "group", "split"} == set(tensors)
    assert pq.read_schema(folder / "annotations.parquet").names == ["example", "task", "start", "end", "label"]
    document = json.loads((folder / "evaluation_set.json").read_text())
    assert document["format_version"] == 1
    assert document["counts"] == {
        "examples": 3,
        "max_length": 4,
        "tokens": 9,
        "annotations": {"pos": 3, "role": 1},
    }
    assert {"name", "hash", "tokenizer_hash", "source", "licence", "special_token_ids"} <= set(document)


def test_it_travels_to_other_processes_and_folders(folder: Path, tmp_path: Path) -> None:
    found = EvaluationSet.load(folder)
    assert pickle.loads(pickle.dumps(found)).tokens(0, 3).targets.tolist() == found.tokens(0, 3).targets.tolist()
    shutil.copytree(folder, tmp_path / "copy")
    assert EvaluationSet.load(tmp_path / "copy") == found


def test_labels_at_their_position(tmp_path: Path) -> None:
    folder = save_evaluation_set(
        tmp_path / "e",
        [[1, 5, 6, 7], [1, 8]],
        labels=[[-100, 5, -100, 1], [1, -100]],
        labels_shifted=False,
        objective="masked_lm",
        special_token_ids=[1],
    )
    found = EvaluationSet.load(folder)
    assert found.has_labels
    assert found.tokens(0, 2).targets.tolist() == [[-100, 5, -100, 1], [1, -100, -100, -100]], (
        "explicit labels are used as they are, special tokens included"
    )


def test_labels_before_their_position(tmp_path: Path) -> None:
    folder = save_evaluation_set(tmp_path / "e", [[1, 5, 6], [1, 8, 9]], labels=[[3, 5, -100], [3, 8, 9]])
    targets = EvaluationSet.load(folder).tokens(0, 2).targets
    assert targets.tolist() == [[5, -100, -100], [8, 9, -100]], "the label of the first position has no prediction"


@pytest.mark.parametrize(("mask", "place"), [([0, 0, 1, 1], 2), ([1, 0, 1, 1], 2), ([1, 1, 0, 1], 3)])
def test_text_behind_padding_is_refused(tmp_path: Path, mask: list[int], place: int) -> None:
    """Learned positions are counted from the first column: such a row would get those of other tokens."""
    rows = torch.tensor([[1, 2, 3, 4], [0, 0, 5, 6]])
    with pytest.raises(
        EvaluationSetError, match=f"row 1 has a token at position {place}, after padding.*pad on the right"
    ):
        save_evaluation_set(tmp_path / "e", rows, torch.tensor([[1, 1, 1, 1], mask]))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_targets_against_a_plain_loop(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    n, t = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    cells = st.lists(st.lists(st.integers(0, 5), min_size=t, max_size=t), min_size=n, max_size=n)
    ids = data.draw(cells)
    lengths = [data.draw(st.integers(1, t)) for _ in range(n)]
    mask = [[int(at < length) for at in range(t)] for length in lengths]
    shifted = data.draw(st.booleans())
    labels = [[cell - 1 if cell else -100 for cell in row] for row in data.draw(cells)]
    explicit = not shifted or data.draw(st.booleans())
    special = data.draw(st.sets(st.integers(0, 5)))
    folder = tmp_path_factory.mktemp("set") / "e"
    save_evaluation_set(
        folder,
        np.asarray(ids),
        np.asarray(mask),
        labels=np.asarray(labels) if explicit else None,
        labels_shifted=shifted,
        special_token_ids=sorted(special),
    )
    expected = [[-100] * t for _ in range(n)]
    for b in range(n):
        for at in range(t):
            source = at + 1 if shifted else at
            if source >= t or not mask[b][at] or not mask[b][source]:
                continue
            if explicit:
                expected[b][at] = labels[b][source]
            elif ids[b][source] not in special:
                expected[b][at] = ids[b][source]
    assert EvaluationSet.load(folder).tokens(0, n).targets.tolist() == expected


def test_memory_stays_bounded_and_hash_does_not_depend_on_chunks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = EvaluationSet.load(folder).hash
    monkeypatch.setattr("trace_offline.evaluation.format._CHUNK", 4)
    assert EvaluationSet.load(folder).hash == whole


def test_hash_covers_content_and_meaning_only(tmp_path: Path) -> None:
    ids = [[1, 5, 6], [1, 7, 8]]
    labels = [[-100, 5, 6], [-100, 7, 8]]
    variants: dict[str, dict] = {
        "plain": {},
        "ids": {"input_ids": [[1, 5, 6], [1, 7, 9]]},
        "mask": {"attention_mask": [[1, 1, 1], [1, 1, 0]]},
        "labels": {"labels": labels},
        "at position": {"labels": labels, "labels_shifted": False},
        "objective": {"objective": "algorithmic"},
        "alignment": {"alignment": "first"},
        "special": {"special_token_ids": [1]},
        "split": {"split": [0, 1]},
        "group": {"group": [0, 0]},
        "annotation": {"annotations": [(0, "t", 1, 2, "a")]},
        "annotation label": {"annotations": [(0, "t", 1, 2, "b")]},
        "annotation place": {"annotations": [(0, "t", 1, 3, "a")]},
    }
    hashes = {}
    for index, (what, keywords) in enumerate(variants.items()):
        folder = save_evaluation_set(tmp_path / str(index), keywords.pop("input_ids", ids), **keywords)
        hashes[what] = EvaluationSet.load(folder).hash
    assert len(set(hashes.values())) == len(variants)
    named = save_evaluation_set(tmp_path / "named", ids, name="other", source="elsewhere", licence="MIT")
    assert EvaluationSet.load(named).hash == hashes["plain"]
    order = [(0, "t", 1, 2, "a"), (1, "t", 1, 2, "b")]
    there = save_evaluation_set(tmp_path / "there", ids, annotations=order)
    back = save_evaluation_set(tmp_path / "back", ids, annotations=reversed(order))
    assert EvaluationSet.load(there).hash == EvaluationSet.load(back).hash


def test_example_numbers_lead_to_rows(folder: Path) -> None:
    rewrite(folder, example=np.asarray([30, 10, 20]))
    table = pa.table({"example": [10], "task": ["pos"], "start": [1], "end": [2], "label": ["X"]})
    pq.write_table(table, folder / "annotations.parquet")
    assert EvaluationSet.load(folder).spans("pos").row.tolist() == [1]


def test_smallest_folder_by_the_documented_contract(tmp_path: Path) -> None:
    """Two tensors, four columns, a short description: what a script without this package would write."""
    tensors = {"input_ids": np.asarray([[4, 5]], np.int32), "attention_mask": np.ones((1, 2), np.bool_)}
    save_file(tensors, tmp_path / "batches.safetensors")
    columns = {
        "example": pa.array([], pa.int64()),
        "task": pa.array([], pa.string()),
        "start": pa.array([], pa.int64()),
    }
    columns |= {"end": pa.array([], pa.int64()), "label": pa.array([], pa.string())}
    pq.write_table(pa.table(columns), tmp_path / "annotations.parquet")
    (tmp_path / "evaluation_set.json").write_text('{"format_version": 1, "name": "mine"}')
    found = EvaluationSet.load(tmp_path)
    assert (found.name, found.tasks, found.split, found.group.tolist()) == ("mine", (), None, [0])
    assert found.tokens(0, 1).targets.tolist() == [[5, -100]]


def test_an_altered_set_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "batches.safetensors")
    tensors["input_ids"][0, 1] += 1
    save_file(tensors, folder / "batches.safetensors")
    with pytest.raises(EvaluationSetError, match="altered since it was written"):
        EvaluationSet.load(folder)


@pytest.mark.parametrize("what", [{"special_token_ids": []}, {"labels_shifted": False}, {"alignment": "mean"}])
def test_an_altered_description_is_refused(folder: Path, what: dict) -> None:
    describe(folder, **what)
    with pytest.raises(EvaluationSetError, match=r"altered since it was written|needs labels"):
        EvaluationSet.load(folder)


def test_a_set_that_changes_while_it_is_used_is_noticed(folder: Path) -> None:
    found = EvaluationSet.load(folder)
    rewrite(folder, input_ids=np.asarray([[1, 5, 6, 7, 7], [1, 8, 0, 0, 0], [1, 9, 2, 0, 0]]))
    with pytest.raises(EvaluationSetError, match="changed while it was in use"):
        found.tokens(0, 1)
    with pytest.raises(EvaluationSetError, match="changed while it was in use"):
        found.spans("pos")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"attention_mask": None}, "has no tensor attention_mask"),
        ({"attention_mask": np.ones((3, 3), np.uint8)}, r"must have the shape \[3, 4\] of input_ids"),
        ({"attention_mask": np.ones((3, 4), np.float32)}, "must hold whole numbers; found float32"),
        ({"attention_mask": np.full((3, 4), 2, np.uint8)}, "row 0, position 0: attention_mask is 2"),
        ({"input_ids": np.ones(4, np.int64)}, r"must be \[rows, positions\]"),
        ({"input_ids": np.full((3, 4), -1)}, "row 0, position 0: token id -1"),
        ({"labels": np.full((3, 4), -5)}, "label -5"),
        ({"group": np.asarray([1, 2])}, "group must be whole numbers, one for each"),
        ({"split": np.asarray([0, 1, 1], np.int8)}, "group 4 lies on both sides"),
        ({"split": np.asarray([0, 0, 3], np.int8)}, "row 2: split is 3"),
        ({"example": np.asarray([7, 7, 8])}, "some rows share a number"),
        ({"example": np.asarray([7, 9, 8])}, "refers to example 0"),
        ({"attention_mask": np.asarray([[1, 1, 0, 0]] * 3, np.uint8)}, "row 0, tokens 1 to 3, covers padding"),
    ],
)
def test_damaged_tensors_are_refused(folder: Path, tensors: dict, message: str) -> None:
    rewrite(folder, **tensors)
    with pytest.raises(EvaluationSetError, match=message):
        EvaluationSet.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.rmtree(f), "there is no such evaluation set. Build one with"),
        (lambda f: (f / "evaluation_set.json").unlink(), "not an evaluation set"),
        (lambda f: (f / "evaluation_set.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "evaluation_set.json").write_text("[]"), "has no format_version"),
        (lambda f: describe(f, format_version=2), "format_version 2 is newer"),
        (lambda f: describe(f, format_version="one"), "must be a whole number"),
        (lambda f: describe(f, labels_shifted="yes"), "labels_shifted has the wrong type"),
        (lambda f: describe(f, special_token_ids=["<s>"]), "must be a list of token ids"),
        (lambda f: describe(f, alignment="middle"), "must be one of last, first, mean"),
        (lambda f: (f / "batches.safetensors").unlink(), "batches.safetensors: missing"),
        (lambda f: (f / "batches.safetensors").write_bytes(b"<html>"), "batches.safetensors: damaged"),
        (
            lambda f: (f / "batches.safetensors").write_bytes((f / "batches.safetensors").read_bytes()[:-3]),
            "batches.safetensors: damaged",
        ),
        (lambda f: (f / "annotations.parquet").unlink(), "annotations.parquet: missing"),
        (lambda f: (f / "annotations.parquet").write_bytes(b"PAR1"), "annotations.parquet: damaged"),
        (lambda f: pq.write_table(pa.table({"example": [0]}), f / "annotations.parquet"), "expected the columns"),
        (
            lambda f: pq.write_table(
                pa.table({"example": [0], "task": ["a"], "start": [1.5], "end": [2], "label": ["x"]}),
                f / "annotations.parquet",
            ),
            "column start must hold whole numbers",
        ),
        (
            lambda f: pq.write_table(
                pa.table({"example": [0], "task": ["a"], "start": [1], "end": [2], "label": [7]}),
                f / "annotations.parquet",
            ),
            "column label must hold text",
        ),
        (
            lambda f: pq.write_table(
                pa.table(
                    {"example": [0], "task": ["a"], "start": [1], "end": [2], "label": pa.array([None], pa.string())}
                ),
                f / "annotations.parquet",
            ),
            "column label has 1 missing",
        ),
    ],
)
def test_damaged_folders_are_refused(folder: Path, change: object, message: str) -> None:
    change(folder)  # type: ignore[operator]
    with pytest.raises(EvaluationSetError, match=message):
        EvaluationSet.load(folder)


def test_rows_and_tasks_that_are_not_there(folder: Path) -> None:
    found = EvaluationSet.load(folder)
    with pytest.raises(EvaluationSetError, match="rows 3 to 3 asked for; the rows are 0 to 2"):
        found.tokens(3, 9)
    with pytest.raises(EvaluationSetError, match=r'no annotations for task "pso"; the tasks are: pos, role.*"pos"'):
        found.spans("pso")


def test_tokenizer_check_names_both(tmp_path: Path) -> None:
    class Tokenizer:
        name_or_path = "org/mine"

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    known = EvaluationSet.load(save_evaluation_set(tmp_path / "a", [[1, 2]], tokenizer=Tokenizer(), name="tiny"))
    unknown = EvaluationSet.load(save_evaluation_set(tmp_path / "b", [[1, 2]]))
    assert check_tokenizer(known, known.tokenizer_hash, "run/step0")
    assert not check_tokenizer(known, None, "run/step0")
    assert not check_tokenizer(unknown, "abc", "run/step0")
    with pytest.raises(EvaluationSetError) as caught:
        check_tokenizer(known, "abc", "run/step0")
    for part in ("tiny", "org/mine", str(known.tokenizer_hash), "run/step0", "abc", "--tokenizer"):
        assert part in caught.value.message


def test_a_mask_token_with_a_label_may_be_annotated(tmp_path: Path) -> None:
    mask_token = 9
    keywords = {"labels_shifted": False, "objective": "masked_lm", "special_token_ids": [1, mask_token]}
    annotations = [(0, "topic", 1, 4, "sport")]
    ids, labels = [[1, 5, mask_token, 6]], [[-100, -100, 7, -100]]
    folder = save_evaluation_set(tmp_path / "e", ids, labels=labels, annotations=annotations, **keywords)
    assert EvaluationSet.load(folder).spans("topic").end.tolist() == [4]
    with pytest.raises(EvaluationSetError, match="covers padding or a special token"):
        save_evaluation_set(tmp_path / "f", ids, labels=[[5, -100, -100, 6]], annotations=annotations, **keywords)

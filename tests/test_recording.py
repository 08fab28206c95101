"""Saving checkpoints and evaluation sets from a training script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shared_data
from safetensors.torch import load_file, load_model

from trace_offline.core.errors import CheckpointError, EvaluationSetError, UsageError
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.recording import save_checkpoint, save_evaluation_set


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_importing_is_light() -> None:
    code = (
        "import sys, trace_offline.recording\n"
        "heavy = {'torch', 'transformers', 'duckdb', 'pyarrow', 'scipy', 'sklearn', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plain_module_is_saved_whole_with_tied_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    path = save_checkpoint(model, tmp_path / "run", 128, tokens_seen=4096)
    assert path == tmp_path / "run" / "step128"
    assert json.loads((path / "trace_offline.json").read_text()) == {
        "format_version": 1,
        "step": 128,
        "tokens_seen": 4096,
    }
    again = Tied()
    load_model(again, path / "model.safetensors")
    assert torch.equal(again.head.weight, model.head.weight)
    assert len(load_file(path / "model.safetensors")) == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ["step128"], "no temporary folder may stay"


def test_transformers_model_and_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = shared_data("stories260K_hf")
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    path = save_checkpoint(model, tmp_path, 3, tokenizer=tokenizer, name="checkpoint-{step}")
    assert path.name == "checkpoint-3"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in path.iterdir()}
    again = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    save_checkpoint(Tied(), tmp_path, 1)
    before = (tmp_path / "step1" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="already exists; checkpoints are never overwritten"):
        save_checkpoint(Tied(), tmp_path, 1)
    assert (tmp_path / "step1" / "model.safetensors").read_bytes() == before


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Breaks(Tied):
        def save_pretrained(self, folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"cannot be written.*No space left"):
        save_checkpoint(Breaks(), tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"step": -1}, "step must be a whole number"),
        ({"step": 1.5}, "step must be a whole number"),
        ({"step": 1, "tokens_seen": -3}, "tokens_seen must be"),
        ({"step": 1, "name": "model"}, "containing {step}"),
        ({"step": 1, "name": "{epoch}"}, "may use {step} only"),
        ({"step": 1, "name": "../step{step}"}, "folder name containing"),
    ],
)
def test_bad_arguments_of_save_checkpoint(tmp_path: Path, keywords: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        save_checkpoint(Tied(), tmp_path, **keywords)


def test_wrapped_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"wrapped in DataParallel; pass the model inside it"):
        save_checkpoint(torch.nn.DataParallel(Tied()), tmp_path, 1)


@pytest.mark.parametrize("form", ["list", "ragged tensors", "tensor", "numpy int32"])
def test_all_forms_of_input_give_one_set(tmp_path: Path, form: str) -> None:
    rows = [[1, 5, 6, 7], [1, 8]]
    padded = [[1, 5, 6, 7], [1, 8, 0, 0]]
    mask = [[1, 1, 1, 1], [1, 1, 0, 0]]
    arguments = {
        "list": (rows, None),
        "ragged tensors": ([torch.tensor(row) for row in rows], None),
        "tensor": (torch.tensor(padded), torch.tensor(mask, dtype=torch.bool)),
        "numpy int32": (np.asarray(padded, np.int32), np.asarray(mask)),
    }[form]
    reference = EvaluationSet.load(save_evaluation_set(tmp_path / "reference", rows))
    found = EvaluationSet.load(save_evaluation_set(tmp_path / "set", *arguments))
    assert found.hash == reference.hash
    assert (found.n_examples, found.max_length, found.n_tokens) == (2, 4, 6)
    assert found.tokens(0, 2).targets.tolist() == [[5, 6, 7, -100], [8, -100, -100, -100]]


def test_saving_again_is_harmless_but_another_set_is_refused(tmp_path: Path) -> None:
    folder = save_evaluation_set(tmp_path / "e", [[1, 2, 3]], annotations=[(0, "pos", 1, 2, "N")])
    assert save_evaluation_set(tmp_path / "e", [[1, 2, 3]], annotations=[(0, "pos", 1, 2, "N")]) == folder
    with pytest.raises(EvaluationSetError, match="a different evaluation set is already there"):
        save_evaluation_set(tmp_path / "e", [[1, 2, 4]], annotations=[(0, "pos", 1, 2, "N")])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(EvaluationSetError, match="holds something else"):
        save_evaluation_set(tmp_path / "other", [[1, 2, 3]])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "other"]


@pytest.mark.parametrize(
    ("ids", "keywords", "message"),
    [
        ([], {}, "input_ids is empty"),
        ([[]], {}, "input_ids is empty"),
        ([[1, 2], []], {}, "row 1 has no token"),
        ([[1, -1]], {}, "row 0, position 1: token id -1"),
        ([[1.0, 2.0]], {}, "must hold whole numbers; found float64"),
        (torch.ones(3, dtype=torch.long), {}, r"must be \[rows, positions\]"),
        ([[1, 2]], {"attention_mask": [[1, 2]]}, "attention_mask is 2"),
        ([[1, 2]], {"attention_mask": [[1]]}, "row 0: 1 positions; input_ids has 2"),
        ([[1, 2]], {"attention_mask": [[1, 1], [1, 1]]}, "has 2 rows, input_ids 1"),
        ([[1, 2]], {"labels": [[1, -7]]}, "label -7"),
        ([[1, 2]], {"labels_shifted": False}, "labels_shifted=False needs labels"),
        ([[1, 2]], {"labels": [[1, 2]], "objective": "masked_lm"}, "Pass labels_shifted=False"),
        ([[1, 2]], {"alignment": "middle"}, "must be one of last, first, mean"),
        ([[1, 2]], {"objective": ""}, "objective is empty"),
        ([[1, 2]], {"split": [2]}, "row 0: split is 2"),
        ([[1, 2]], {"split": [0, 1]}, "one number for each of the 1 rows"),
        ([[1, 2], [1, 3]], {"split": [0, 1], "group": [4, 4]}, "group 4 lies on both sides"),
        ([[1, 2]], {"annotations": [(1, "t", 0, 1, "a")]}, "there is no such row"),
        ([[1, 2]], {"annotations": [(0, "t", 1, 1, "a")]}, "it is empty"),
        ([[1, 2]], {"annotations": [(0, "t", 1, 3, "a")]}, "it leaves the row"),
        ([[1, 2], [1]], {"annotations": [(1, "t", 0, 2, "a")]}, "covers padding or a special token"),
        ([[1, 2]], {"annotations": [(0, "t", 0, 2, "a")], "special_token_ids": [1]}, "covers padding or a special"),
        ([[1, 2]], {"annotations": [(0, "t", 0, 1, "a"), (0, "t", 0, 1, "b")]}, "already have a label"),
        ([[1, 2]], {"annotations": [(0, "t", "a")]}, r"expected \(row, task, start, end, label\)"),
        ([[1, 2]], {"annotations": [(0, "t", 0.5, 1, "a")]}, "whole numbers for row, start and end"),
    ],
)
def test_bad_content_is_refused_with_the_reason(tmp_path: Path, ids: object, keywords: dict, message: str) -> None:
    with pytest.raises(EvaluationSetError, match=message):
        save_evaluation_set(tmp_path / "e", ids, **keywords)
    assert list(tmp_path.iterdir()) == []


class FakeTokenizer:
    """What the function looks at in a tokenizer of transformers."""

    pad_token_id = 3
    eos_token_id = 2
    bos_token_id = 1
    all_special_ids = (1, 2, 3)
    name_or_path = "/home/somebody/models/mine"

    def get_vocab(self) -> dict[str, int]:
        return {"a": 5, "b": 6}


def test_tokenizer_gives_special_tokens_hash_and_name(tmp_path: Path) -> None:
    folder = save_evaluation_set(tmp_path / "e", [[1, 5, 2, 6], [1, 6]], tokenizer=FakeTokenizer())
    found = EvaluationSet.load(folder)
    assert found.special_token_ids == (1, 2, 3)
    assert found.tokenizer == "models/mine", "no path of this computer is kept"
    assert found.tokenizer_hash
    batch = found.tokens(0, 2)
    assert batch.input_ids[1].tolist() == [1, 6, 3, 3], "padded with the tokenizer's padding token"
    assert batch.targets.tolist() == [[5, -100, 6, -100], [6, -100, -100, -100]]


def test_padding_without_a_mask_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(EvaluationSetError, match=r"row 1 contains the padding token \(3\).*pass attention_mask"):
        save_evaluation_set(tmp_path / "e", torch.tensor([[1, 5, 6], [1, 5, 3]]), tokenizer=FakeTokenizer())


def test_hash_of_a_tokenizer_object_is_that_of_the_saved_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from trace_offline.checkpoints.tokenizer import tokenizer_hash

    tokenizer = AutoTokenizer.from_pretrained(shared_data("stories260K_hf"))
    folder = save_evaluation_set(tmp_path / "e", [[1, 2, 3]], tokenizer=tokenizer)
    checkpoint = save_checkpoint(Tied(), tmp_path, 0, tokenizer=tokenizer)
    assert EvaluationSet.load(folder).tokenizer_hash == tokenizer_hash(checkpoint)


def test_callback_of_the_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from trace_offline.recording import RecordingCallback

    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    untrained = model.transformer.wte.weight.detach().clone()
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=1, report_to=[], use_cpu=True, learning_rate=1e-2
    )
    callback = RecordingCallback([[1, 2, 3]], annotations=[(0, "pos", 1, 2, "N")], name="fixed")
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert EvaluationSet.load(tmp_path / "evaluation_set").name == "fixed"
    for step in (0, 1, 2):
        record = json.loads((tmp_path / f"checkpoint-{step}" / "trace_offline.json").read_text())
        assert record["step"] == step
        assert (tmp_path / f"checkpoint-{step}" / "trainer_state.json").exists()

    def embedding(step: int) -> torch.Tensor:
        return load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")["transformer.wte.weight"]

    assert torch.equal(embedding(0), untrained)
    assert not torch.equal(embedding(2), untrained)

"""Weight files: pickles run nothing, prefixes go, tokenizers hash by content."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared_data

from trace_offline.checkpoints.pickles import load_pickle
from trace_offline.checkpoints.prefixes import strip_attribute, strip_to_fit, strip_wrappers
from trace_offline.checkpoints.tokenizer import load_tokenizer, tokenizer_folder, tokenizer_hash
from trace_offline.checkpoints.weights import check_file, find_state_dict, read_weights, refuse_not_finite
from trace_offline.core.errors import CheckpointError, UsageError
from trace_offline.core.types import Checkpoint, CheckpointState


class Poison:
    """Makes a directory when unpickled by anything that runs what a pickle says."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


class Settings:
    """A plain object such as a training script saves beside its weights."""

    def __init__(self) -> None:
        self.width = 3


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(4, 6, generator=generator)
    return {
        "a.weight": big,
        "a.view": big.t()[1:, ::2],
        "b.half": big.half(),
        "b.bf16": big.bfloat16(),
        "b.long": torch.arange(5),
        "b.scalar": torch.tensor(2.5, dtype=torch.float64),
        "c.parameter": torch.nn.Parameter(big + 1),
    }


def test_a_poisoned_pickle_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "owned"
    torch.save({"state_dict": weights(), "hyper_parameters": Poison(target)}, tmp_path / "x.ckpt")
    found = read_weights([tmp_path / "x.ckpt"])
    assert not target.exists()
    assert torch.equal(found.tensors["a.weight"], weights()["a.weight"])
    assert found.notes == (
        "x.ckpt: objects of these classes were not built, only the tensors beside them: posix.mkdir",
    )
    # the poison works where it is let to: a test that could not fail would prove nothing
    pickle.loads(pickle.dumps(Poison(target)))
    assert target.is_dir()


def test_a_poisoned_state_dict_and_legacy_files_run_nothing(tmp_path: Path) -> None:
    target = tmp_path / "owned"
    torch.save(weights() | {"evil": Poison(target)}, tmp_path / "inside.pt")
    assert set(read_weights([tmp_path / "inside.pt"]).tensors) == set(weights())
    torch.save({"model": weights(), "x": Poison(target)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"not a checkpoint that torch can read safely: .*save the state dict alone"
    ):
        read_weights([tmp_path / "legacy.pt"])
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Poison(target)))
    with pytest.raises(CheckpointError):
        read_weights([tmp_path / "bare.pt"])
    assert not target.exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cposix\nmkdir\n(X%sTtR.",
        b"\x80\x02c__builtin__\nexec\nX%sT\x85R.",
        b"(X%sTiposix\nmkdir\n.",
        b"\x80\x02(cposix\nmkdir\nX%sTo.",
        b"\x80\x02cposix\nmkdir\nX%sT\x85\x81.",
        b"\x80\x02c__builtin__\ngetattr\ncposix\nmkdir\nX%sT\x86R.",
        b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93X%sT\x85R.",
        b"\x80\x02c__builtin__\ndict\n)\x81}X\x05\x00\x00\x00itemscposix\nmkdir\nsbX%sT\x85R.",
        b"\x80\x02\x82\x01.",
    ],
)
def test_hand_made_pickles_run_nothing(payload: bytes, tmp_path: Path) -> None:
    import copyreg

    target = tmp_path / "owned"
    name = str(target).encode()
    text = payload.replace(b"X%sT", b"X" + len(name).to_bytes(4, "little") + name)
    copyreg.add_extension("os", "abort", 1)
    try:
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("x/data.pkl", text)
            archive.writestr("x/version", "3")
            archive.writestr("x/byteorder", "little")
        with pytest.raises(CheckpointError):
            read_weights([tmp_path / "x.pt"])
    finally:
        copyreg.remove_extension("os", "abort", 1)
    assert not target.exists()


def test_salvaged_tensors_equal_the_saved_ones(tmp_path: Path) -> None:
    content = {"model": OrderedDict(weights()), "config": Settings(), "step": 7, "model_args": {"n_layer": 2}}
    torch.save(content, tmp_path / "x.pt")
    found = load_pickle(tmp_path / "x.pt")
    assert any(name.endswith("Settings") for name in found.refused)
    assert found.content["step"] == 7
    assert found.content["model_args"] == {"n_layer": 2}
    for name, tensor in weights().items():
        salvaged = found.content["model"][name]
        assert salvaged.dtype == tensor.dtype
        assert torch.equal(salvaged, tensor.detach()), name


def test_salvage_checks_what_the_archive_claims(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(8)}, "config": Settings()}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive, zipfile.ZipFile(tmp_path / "y.pt", "w") as other:
        for name in archive.namelist():
            data = archive.read(name)
            other.writestr(name, data[:16] if "/data/" in name else data)
    with pytest.raises(CheckpointError, match=r"which is refused, and its tensors cannot be read without .*beyond its"):
        load_pickle(tmp_path / "y.pt")


def test_a_damaged_archive_is_explained(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="damaged or incomplete: torch cannot read it"):
        read_weights([tmp_path / "x.pt"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"\n<html><body>404</body>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"hello there, this is text", "neither safetensors nor a file of torch.save: it begins with b'hello"),
    ],
)
def test_files_that_hold_no_weights(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        check_file(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        check_file(tmp_path / "absent.pt")


def test_safetensors_under_another_name_are_recognised(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "x.pt")
    assert check_file(tmp_path / "x.pt") == "safetensors"
    assert torch.equal(read_weights([tmp_path / "x.pt"]).tensors["w"], torch.ones(2))


def test_state_dicts_are_found_where_scripts_put_them() -> None:
    state = weights()
    path = Path("x.pt")
    assert find_state_dict(state, path)[0].keys() == state.keys()
    found, beside = find_state_dict({"model": state, "optimizer": {"state": {}}, "iter_num": 3}, path)
    assert found.keys() == state.keys()
    assert beside["iter_num"] == 3
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors, found list"):
        find_state_dict([1], path)
    with pytest.raises(CheckpointError, match=r"several dictionaries of tensors \(generator, critic\)"):
        find_state_dict({"generator": state, "critic": state}, path)
    with pytest.raises(CheckpointError, match="found no tensors; the file holds: step, note"):
        find_state_dict({"step": 1, "note": "x"}, path)


def test_shards_may_not_repeat_a_tensor(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match='tensor "w" is also in another file'):
        read_weights([tmp_path / "a.pt", tmp_path / "b.pt"])


def test_not_finite_values_are_counted() -> None:
    bad = {"mask": torch.full((2, 2), -torch.inf), "w": torch.tensor([1.0, torch.nan, torch.inf])}
    with pytest.raises(CheckpointError, match=r"x: 6 of 7 weights are NaN or infinite, in mask \(4\), w \(2\)\."):
        refuse_not_finite(bad.items(), "x")
    with pytest.raises(CheckpointError, match=r"x: 1 of 7 weights are NaN, in w \(1\)\."):
        refuse_not_finite(bad.items(), "x", infinite=False)
    refuse_not_finite({"w": torch.full((9,), 3e38), "i": torch.arange(3)}.items(), "x")


def test_wrapper_prefixes() -> None:
    def strip(*names: str) -> tuple[list[str], tuple[str, ...]]:
        found, stripped = strip_wrappers(dict.fromkeys(names, 0))
        return list(found), stripped

    assert strip("module.a", "module.b.c") == (["a", "b.c"], ("module.",))
    assert strip("module.module.a.w") == (["a.w"], ("module.", "module."))
    assert strip("_orig_mod.module.a.w", "_orig_mod.module.b.w") == (["a.w", "b.w"], ("_orig_mod.", "module."))
    assert strip("layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.w") == (
        ["layers.0.w"],
        ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."),
    )
    assert strip("module.a", "b") == (["module.a", "b"], ())  # not all carry it: it is the user's own
    assert strip("a.module.b") == (["a.module.b"], ())
    with pytest.raises(CheckpointError, match=r'both called "a.w"'):
        strip("_orig_mod.a.w", "a.w")


def test_prefixes_go_only_when_names_then_fit() -> None:
    names = {"model.model.a": 0, "model.model.b": 1}
    assert strip_to_fit(names, {"model.a", "model.b"}) == ({"model.a": 0, "model.b": 1}, "model.")
    assert strip_to_fit(names, {"a", "b", "c"}) == ({"a": 0, "b": 1}, "model.model.")
    assert strip_to_fit(names, {"model.model.a"}) == (names, None)
    assert strip_to_fit(names, {"x"}) == (names, None)
    assert strip_to_fit({}, {"x"}) == ({}, None)
    assert strip_attribute({"net.a": 0, "net.b": 1}) == ({"a": 0, "b": 1}, "net.")
    assert strip_attribute({"net.a": 0, "loss.b": 1}) == ({"net.a": 0, "loss.b": 1}, None)
    assert strip_attribute({"weight": 0}) == ({"weight": 0}, None)


# --- tokenizers --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "the", "cat", "sat"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


def test_hash_sees_ids_and_nothing_else(small_tokenizer: Path, tmp_path: Path) -> None:
    first = tokenizer_hash(small_tokenizer)
    tokenizer = load_tokenizer(small_tokenizer)
    assert tokenizer_hash(tokenizer) == first
    tokenizer(["the cat", "the"], padding=True, truncation=True, max_length=1)  # leaves settings in the backend
    tokenizer.padding_side = "left"
    tokenizer.chat_template = "x"
    tokenizer.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() != (small_tokenizer / "tokenizer.json").read_bytes()
    assert tokenizer_hash(tmp_path / "again") == first
    tokenizer.add_tokens(["dog"])
    assert tokenizer_hash(tokenizer) != first
    content = json.loads((small_tokenizer / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"cat": 4, "sat": 3}
    (tmp_path / "again/tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_hash(tmp_path / "again") != first


def test_tokenizers_are_found_beside_above_and_by_flag(small_tokenizer: Path, tmp_path: Path) -> None:
    step = tmp_path / "run" / "step_5"
    step.mkdir(parents=True)
    (tmp_path / "far/away/from/all").mkdir(parents=True)
    find = Checkpoint(str(step), "hf_folder", CheckpointState.COMPLETE)
    assert tokenizer_folder(find, small_tokenizer) == small_tokenizer
    assert tokenizer_folder(find) in (None, tmp_path / "tokenizer")
    with pytest.raises(UsageError, match=r"--tokenizer: expected a folder .*found a folder without tokenizer files"):
        tokenizer_folder(find, tmp_path / "far/away/from/all")
    with pytest.raises(UsageError, match="found nothing there"):
        tokenizer_folder(find, tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no tokenizer can be loaded from it .*--tokenizer"):
        load_tokenizer(step)


def test_a_tokenizer_file_alone_is_enough(small_tokenizer: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (small_tokenizer / "tokenizer.json").rename(alone / "tokenizer.json")
    assert load_tokenizer(alone)("the cat dog").input_ids == [2, 3, 1]
    assert load_tokenizer(alone / "tokenizer.json")("the cat dog").input_ids == [2, 3, 1]


def test_copies_of_the_english_tokenizer_have_one_hash(stories_model: Path) -> None:
    copies = [stories_model, shared_data("layouts_generated", "hf_sharded")]
    copies.append(shared_data("layouts_generated", "hf_trainer_tok_best", "checkpoint-6"))
    hashes = {tokenizer_hash(folder) for folder in copies}
    assert len(hashes) == 1
    assert tokenizer_hash(shared_data("tokenizers", "gpt2_tokenizer.json")) not in hashes

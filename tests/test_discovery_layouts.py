"""Raw files, nanoGPT, Lightning, the hub cache, and what is set aside with a way out."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from checkpoint_files import NOW, aged, hf_folder, tokenizer

from trace_offline.checkpoints.discover import discover, select
from trace_offline.checkpoints.torch_archive import outline
from trace_offline.core.errors import CheckpointError
from trace_offline.core.types import Checkpoint, CheckpointState


def find(source: Path, **options: object) -> list[Checkpoint]:
    return discover(source, now=NOW, **options)  # type: ignore[arg-type]


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(4, 4, generator=generator), "bias": torch.randn(4, generator=generator)}


def nanogpt(seed: int, step: int) -> dict[str, object]:
    adam = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "iter_num": 5}]}
    return {"model": state(seed), "optimizer": adam, "model_args": {"n_layer": 1}, "iter_num": step, "config": {}}


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.path),))


def test_raw_files_in_numeric_order(tmp_path: Path) -> None:
    torch.save(state(1), tmp_path / "model_100.pt")
    torch.save(state(2), tmp_path / "model_20.pth")
    torch.save(state(3), tmp_path / "iter_0000003.bin")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer_20.pt")
    (tmp_path / "train.bin").write_bytes(b"tokens" * 100)
    (tmp_path / "export.bin").write_bytes(b"tokens" * 100)
    found = find(aged(tmp_path))
    assert [(item.step, item.layout, item.state.value) for item in found] == [
        (3, "raw", "complete"),
        (20, "raw", "complete"),
        (100, "raw", "complete"),
    ]


def test_step_from_the_folder_above(tmp_path: Path) -> None:
    for step in (10, 9):
        (tmp_path / f"step{step}-unsharded").mkdir()
        torch.save(state(step), tmp_path / f"step{step}-unsharded" / "model.pt")
        torch.save({"state": {}, "param_groups": []}, tmp_path / f"step{step}-unsharded" / "optim.pt")
        (tmp_path / str(step * 10)).mkdir()
        torch.save(state(step + 50), tmp_path / str(step * 10) / "weights.pt")
    assert [item.step for item in find(aged(tmp_path))] == [9, 10, 90, 100]


@pytest.mark.parametrize("zipped", [True, False])
def test_nanogpt_step_is_read_without_unpickling(tmp_path: Path, zipped: bool) -> None:
    torch.save(nanogpt(1, 700), tmp_path / "ckpt.pt", _use_new_zipfile_serialization=zipped)
    (found,) = find(aged(tmp_path))
    assert (found.step, found.layout, found.state.value) == (700, "nanogpt", "complete")


def test_nanogpt_with_numbered_names(tmp_path: Path) -> None:
    for step in (5, 40):
        torch.save(nanogpt(step, step), tmp_path / f"ckpt_{step}.pt")
    assert [(item.step, item.layout) for item in find(aged(tmp_path))] == [(5, "nanogpt"), (40, "nanogpt")]


def test_lightning_last_is_the_newest_step(tmp_path: Path) -> None:
    folder = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    for step in (9, 10):
        content = {"epoch": 0, "global_step": step, "pytorch-lightning_version": "2.6.6", "state_dict": state(step)}
        torch.save(content, folder / f"epoch=0-step={step}.ckpt")
    torch.save(content, folder / "last.ckpt")
    found = find(aged(tmp_path))
    assert [(item.step, item.layout, item.state.value) for item in found] == [
        (9, "lightning", "complete"),
        (10, "lightning", "complete"),
        (None, "lightning", "duplicate"),
    ]
    content["state_dict"] = state(99)
    torch.save(content, folder / "last.ckpt")
    found = find(aged(tmp_path))
    assert found[-1].state is CheckpointState.UNSUPPORTED
    assert "Step 10 is already in the series as epoch=0-step=10.ckpt, with other weights" in str(found[-1].reason)
    assert [item.step for item in select(found)] == [9, 10]


def test_nothing_is_ever_executed(tmp_path: Path) -> None:
    trap = tmp_path / "trapped"
    torch.save({"w": torch.ones(3), "trap": Trap(trap)}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(3), "trap": Trap(trap)}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Trap(trap)))
    found = find(aged(tmp_path))
    assert len(found) == 3
    assert not trap.exists()
    with pytest.raises(CheckpointError, match="does not begin like anything"):
        outline(tmp_path / "c.pt")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_outline_of_any_protocol(tmp_path: Path, protocol: int) -> None:
    torch.save(nanogpt(1, 70_000), tmp_path / "x.pt", pickle_protocol=protocol)
    found = outline(tmp_path / "x.pt")
    assert found.integer("iter_num") == 70_000
    assert found.keys == ("model", "optimizer", "model_args", "iter_num", "config")
    torch.save(state(1), tmp_path / "y.pt", pickle_protocol=protocol)
    assert outline(tmp_path / "y.pt").keys == ("weight", "bias")


def test_damaged_torch_files(tmp_path: Path) -> None:
    torch.save(state(1), tmp_path / "step1.pt")
    whole = (tmp_path / "step1.pt").read_bytes()
    (tmp_path / "step2.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "step3.pt").write_bytes(b"")
    (tmp_path / "step4.pt").write_bytes(b"PK\x03\x04" + b"x" * 300)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole_module.pt")
    torch.save({"a": torch.zeros(0)}, tmp_path / "step6.pt")
    torch.save({"state": {0: torch.ones(2)}, "param_groups": []}, tmp_path / "adam.pt")
    (tmp_path / "step7.pt.incomplete").write_bytes(b"x")
    (tmp_path / "step8.pt").symlink_to(tmp_path / "gone")
    (tmp_path / "step9.pt").write_bytes(bytes(1000))
    (tmp_path / "step10.gguf").write_bytes(b"GGUF")
    by_name = {Path(item.location).name: item for item in find(aged(tmp_path))}
    expected = {
        "step1.pt": ("complete", None),
        "step2.pt": ("unreadable", "cut short or damaged"),
        "step3.pt": ("unreadable", "is empty (0 bytes)"),
        "step4.pt": ("unreadable", "cut short or damaged"),
        "whole_module.pt": ("unsupported", "torch.save(model.state_dict()"),
        "step6.pt": ("unreadable", "no tensor data"),
        "adam.pt": ("not_a_checkpoint", "state of an optimizer"),
        "step7.pt.incomplete": ("partial", "provisional name"),
        "step8.pt": ("partial", "link to a missing file"),
        "step9.pt": ("unreadable", "zero bytes"),
        "step10.gguf": ("unsupported", "gguf_file="),
    }
    assert {name: item.state.value for name, item in by_name.items()} == {k: v[0] for k, v in expected.items()}
    for name, (_, words) in expected.items():
        assert words is None or words in str(by_name[name].reason), by_name[name].reason


UNSUPPORTED = {
    "dcp": (["step5/.metadata", "step5/__0_0.distcp"], "dcp_to_torch"),
    "fsdp": (["step5/pytorch_model_fsdp_0/.metadata", "step5/optimizer.bin"], "accelerate merge-weights"),
    "deepspeed": (["latest", "global_step5/mp_rank_00_model_states.pt"], "zero_to_fp32.py"),
    "deepspeed ": (
        ["checkpoint-5/config.json", "checkpoint-5/global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        "--tag global_step5",
    ),
    "deepspeed  ": (["global_step5/layer_00-model_00-model_states.pt"], "convert_neox_to_hf.py"),
    "megatron": (["iter_0000005/mp_rank_00/model_optim_rng.pt"], "convert_checkpoints.py export"),
    "megatron ": (["iter_0000005/metadata.json", "iter_0000005/__0_0.distcp"], "Megatron-Bridge"),
    "peft": (["checkpoint-5/adapter_config.json", "checkpoint-5/adapter_model.safetensors"], "merge_and_unload"),
    "other": (["step5/config.json", "step5/flax_model.msgpack"], "from_flax=True"),
    "other ": (["step5/consolidated.00.pth", "step5/params.json"], "convert_llama_weights_to_hf"),
}  # fmt: skip


@pytest.mark.parametrize("layout", UNSUPPORTED)
def test_set_aside_with_the_command_that_converts(tmp_path: Path, layout: str) -> None:
    names, words = UNSUPPORTED[layout]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    (found,) = find(aged(tmp_path))
    assert (found.step, found.layout, found.state.value) == (5, layout.strip(), "unsupported")
    assert words in str(found.reason)
    assert not select([found])


def hub_cache(root: Path, repo: str, revisions: dict[str, list[str]]) -> Path:
    """A cache of one repository: commit → names of the refs that point at it."""
    folder = root / f"models--{repo.replace('/', '--')}"
    for index, (commit, refs) in enumerate(revisions.items()):
        source = hf_folder(root / "source" / commit, index)
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (folder / "blobs").mkdir(exist_ok=True)
        for path in source.iterdir():
            blob = folder / "blobs" / f"{commit[:4]}-{path.name}"
            path.rename(blob)
            (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
        for ref in refs:
            (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (folder / "refs" / ref).write_text(commit)
    return aged(folder)


A, B, C, D = ("a" * 40, "b" * 40, "c" * 40, "d" * 40)


def test_hub_cache(tmp_path: Path) -> None:
    folder = hub_cache(
        tmp_path,
        "EleutherAI/pythia-70m",
        {A: ["step143000", "main"], B: ["step1000"], C: ["refs/pr/1"], D: ["step0", "step1"]},
    )
    (folder / "refs" / "step512.0123abcd.tmp").write_text(B)
    (folder / ".no_exist" / A).mkdir(parents=True)
    tokenizer(folder / "snapshots" / A)
    for source in (tmp_path, folder):
        found = find(source)
        assert [(item.step, item.state.value, item.revision) for item in found] == [
            (0, "complete", D),
            (1, "duplicate", D),
            (1000, "complete", B),
            (143000, "complete", A),
            (None, "unsupported", C),
        ]
        assert {item.layout for item in found} == {"hub_cache"}
        assert found[3].reason == "Also known as main."
        assert all(item.tokenizer == str(folder / "snapshots" / A) for item in found)
    (one,) = find(folder / "snapshots" / B)
    assert one.step == 1000
    assert [item.step for item in find(folder, revisions="step1*")] == [1, 1000, 143000]
    with pytest.raises(CheckpointError, match='matching revisions "stage\\*"'):
        find(folder, revisions="stage*")


def test_hub_cache_incomplete(tmp_path: Path) -> None:
    folder = hub_cache(tmp_path, "org/name", {A: ["step1"], B: ["step2"], C: ["step3"]})
    (folder / "blobs" / "aaaa-model.safetensors").unlink()
    (folder / "snapshots" / B / "model.safetensors").unlink()
    found = find(folder)
    assert [item.state.value for item in found] == ["partial", "partial", "complete"]
    assert "link to a file that is not there" in str(found[0].reason)
    assert "hf download org/name --revision step2" in str(found[1].reason)
    aged((folder / "blobs" / "0123.incomplete").parent)
    (folder / "blobs" / "0123.incomplete").write_bytes(b"x")
    aged(folder / "blobs" / "0123.incomplete", seconds=4)
    assert [item.state.value for item in find(folder)][1] == "being_written"


def test_step_in_an_ancestor_of_a_cache(tmp_path: Path) -> None:
    for index, step in enumerate((3000, 512)):
        hub_cache(
            tmp_path / "pythia-70m-deduped" / f"step{step}", "EleutherAI/pythia-70m-deduped", {f"{index}" * 40: []}
        )
        model = tmp_path / "pythia-70m-deduped" / f"step{step}" / "models--EleutherAI--pythia-70m-deduped"
        weights = model / "snapshots" / (f"{index}" * 40) / "model.safetensors"
        hf_folder(tmp_path / "new", step)
        (tmp_path / "new" / "model.safetensors").replace(weights.resolve())
    aged(tmp_path / "pythia-70m-deduped")
    assert [item.step for item in find(tmp_path / "pythia-70m-deduped")] == [512, 3000]
    assert [item.step for item in find(model)] == [512]


def test_one_repository_per_checkpoint(tmp_path: Path) -> None:
    for index, step in enumerate(("0k", "20k", "2000k")):
        hub_cache(tmp_path, f"google/multiberts-seed_0-step_{step}", {f"{index}" * 40: ["main"]})
        hf_folder(tmp_path / "new", index)
        blob = tmp_path / f"models--google--multiberts-seed_0-step_{step}" / "snapshots" / (f"{index}" * 40)
        (tmp_path / "new" / "model.safetensors").replace((blob / "model.safetensors").resolve())
    found = select(find(aged(tmp_path)))
    assert [item.step for item in found] == [0, 20_000, 2_000_000]

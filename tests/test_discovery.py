from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import NOW, aged, hf_folder, tokenizer, trainer_folder, weights
from conftest import shared_data
from safetensors.numpy import save_file

from trace_offline.checkpoints import duplicates
from trace_offline.checkpoints.discover import discover, select
from trace_offline.checkpoints.layouts import raw_files
from trace_offline.core.errors import CheckpointError, UsageError
from trace_offline.core.steps import parse_steps
from trace_offline.core.types import Checkpoint, CheckpointState


def find(source: Path, **options: object) -> list[Checkpoint]:
    return discover(source, now=NOW, **options)  # type: ignore[arg-type]


def table(found: list[Checkpoint]) -> list[tuple[int | None, str, str]]:
    return [(item.step, item.layout, item.state.value) for item in found]


def test_trainer_run_in_numeric_order(tmp_path: Path) -> None:
    for step in (1000, 90, 200):
        trainer_folder(tmp_path / f"checkpoint-{step}", step, step, num_input_tokens_seen=step * 512)
    tokenizer(tmp_path)
    found = find(aged(tmp_path))
    assert table(found) == [(step, "hf_trainer", "complete") for step in (90, 200, 1000)]
    assert [item.tokens_seen for item in found] == [90 * 512, 200 * 512, 1000 * 512]
    assert all(item.tokenizer == str(tmp_path) and item.reason is None for item in found)
    assert found[0].weight_files == (str(tmp_path / "checkpoint-90" / "model.safetensors"),)
    assert found[0].config == str(tmp_path / "checkpoint-90" / "config.json")
    assert found[0].size_bytes == (tmp_path / "checkpoint-90" / "model.safetensors").stat().st_size


def test_large_trainer_state_is_read_at_its_ends(tmp_path: Path) -> None:
    log = [{"epoch": 9.0, "global_step": 1, "num_input_tokens_seen": 5, "step": i} for i in range(3000)]
    trainer_folder(tmp_path / "last", 1, 700, num_input_tokens_seen=123_456, log_history=log)
    (found,) = find(aged(tmp_path))
    assert (found.step, found.tokens_seen, found.epoch) == (700, 123_456, 0.5)


def test_name_and_trainer_state_disagree(tmp_path: Path) -> None:
    trainer_folder(tmp_path / "checkpoint-8", 1, 9)
    (found,) = find(aged(tmp_path))
    assert found.step == 8
    assert "trainer_state.json says step 9, its name says 8" in str(found.reason)


def test_interrupted_and_running_saves(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        trainer_folder(tmp_path / f"checkpoint-{step}", step, step)
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    aged(tmp_path)
    aged(tmp_path / "checkpoint-3", seconds=5)
    found = find(tmp_path)
    assert table(found) == [
        (1, "hf_trainer", "complete"),
        (2, "hf_trainer", "partial"),
        (3, "hf_trainer", "being_written"),
    ]
    assert "trainer_state.json, which the Trainer writes last, is missing" in str(found[1].reason)
    assert "look again later" in str(found[2].reason)
    assert [item.state.value for item in find(tmp_path, settle_seconds=1.0)] == ["complete", "partial", "partial"]


def test_model_only_folders_are_complete(tmp_path: Path) -> None:
    hf_folder(tmp_path / "checkpoint-1", 1)
    trainer_folder(tmp_path / "checkpoint-2", 2, 2)
    aged(tmp_path)
    assert [item.state.value for item in find(tmp_path)] == ["complete", "complete"]
    aged(tmp_path / "checkpoint-1", seconds=1)
    assert [item.state.value for item in find(tmp_path)] == ["being_written", "complete"]


def test_truncated_weights(tmp_path: Path) -> None:
    for step in (1, 2):
        path = hf_folder(tmp_path / f"step{step}", step) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    aged(tmp_path)
    aged(tmp_path / "step2", seconds=3)
    old, new = find(tmp_path)
    assert (old.state, new.state) == (CheckpointState.UNREADABLE, CheckpointState.BEING_WRITTEN)
    assert "is truncated: the header promises" in str(old.reason)
    assert "changed 3 s ago" in str(new.reason)


def test_shards(tmp_path: Path) -> None:
    tensors = weights(1)
    for step in (1, 2, 3, 4):
        folder = tmp_path / f"step{step}"
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "x"}')
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for name, (tensor, value) in zip(names, tensors.items(), strict=True):
            save_file({tensor: value + step}, folder / name)
        index = {"metadata": {}, "weight_map": dict(zip(tensors, names, strict=True))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "step2" / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "step3" / "model.safetensors.index.json").unlink()
    shutil.copy(tmp_path / "step1" / "model-00001-of-00002.safetensors", tmp_path / "step4")
    one, two, three, four = find(aged(tmp_path))
    assert (one.state.value, len(one.weight_files)) == ("complete", 2)
    assert two.state.value == "partial"
    assert "1 of 2 shards are missing: model-00002-of-00002.safetensors" in str(two.reason)
    assert three.state.value == "partial"
    assert "model.safetensors.index.json, which is written last, is not" in str(three.reason)
    assert four.state.value == "complete"
    assert "shard model-00001-of-00002.safetensors is identical to that of step 1" in str(four.reason)


def test_index_may_not_reach_outside(tmp_path: Path) -> None:
    folder = tmp_path / "step1"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    (found,) = find(aged(tmp_path))
    assert found.state is CheckpointState.UNREADABLE
    assert "outside its folder" in str(found.reason)


def test_duplicate_weights_are_named_and_stay(tmp_path: Path) -> None:
    for step, seed in ((0, 0), (1, 0), (2, 2), (512, 0)):
        hf_folder(tmp_path / f"step{step}", seed, _name_or_path=f"somewhere/{step}")
    found = find(aged(tmp_path))
    assert [(item.step, item.state.value, item.duplicate_of) for item in found] == [
        (0, "complete", None),
        (1, "duplicate", 0),
        (2, "complete", None),
        (512, "duplicate", 0),
    ]
    assert "The same weights as step 0" in str(found[1].reason)
    assert found[0].fingerprint == found[1].fingerprint is not None
    assert select(found) == found
    assert [item.step for item in select(found, parse_steps("1-100"))] == [1, 2]


def test_equal_samples_but_different_weights_are_no_duplicates(tmp_path: Path) -> None:
    for step in (0, 1):
        folder = hf_folder(tmp_path / f"step{step}", 0)
        tensor = np.zeros((600, 1000), np.float32)
        tensor.reshape(-1)[1100] = step  # between the first two sampled blocks
        save_file({"a": tensor}, folder / "model.safetensors")
    assert [item.state.value for item in find(aged(tmp_path))] == ["complete", "complete"]


def test_same_weights_with_another_config_is_a_warning(tmp_path: Path) -> None:
    hf_folder(tmp_path / "step0", 0)
    hf_folder(tmp_path / "step1", 0, rotary_pct=0.5)
    found = find(aged(tmp_path))
    assert [item.state.value for item in found] == ["complete", "complete"]
    assert "same weights as step 0, with another config.json" in str(found[1].reason)


def test_final_model_of_a_run(tmp_path: Path) -> None:
    for step in (4, 8):
        trainer_folder(tmp_path / f"checkpoint-{step}", step, step)
    hf_folder(tmp_path, 8)
    found = find(aged(tmp_path))
    assert table(found) == [
        (4, "hf_trainer", "complete"),
        (8, "hf_trainer", "complete"),
        (None, "hf_folder", "duplicate"),
    ]
    assert found[-1].duplicate_of == 8
    assert [item.step for item in select(found)] == [4, 8]
    hf_folder(tmp_path, 9)
    found = find(aged(tmp_path))
    assert table(found)[-1] == (None, "hf_folder", "unsupported")
    assert 'trace_offline.json beside the weights with {"step": 500}' in str(found[-1].reason)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 12}')
    assert table(find(aged(tmp_path)))[-1] == (12, "hf_trainer", "complete")


def test_run_folder_with_a_number_is_no_step(tmp_path: Path) -> None:
    run = tmp_path / "step2-ablation_7"
    trainer_folder(run / "checkpoint-4", 4, 4)
    hf_folder(run, 9)
    assert [item.step for item in find(aged(run))] == [4, None]


def test_record_beside_the_weights_wins(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "renamed-3", 1)
    (folder / "trace_offline.json").write_text('{"format_version": 1, "step": 64, "tokens_seen": 4096}')
    (found,) = find(aged(tmp_path))
    assert (found.step, found.tokens_seen, found.reason) == (64, 4096, None)


def test_a_record_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    for text, words in (
        ('{"step": 64,}', r"Its trace_offline.json cannot be read as JSON \(.*column.*\) and was not used\. Its step"),
        ("[64]", r'Its trace_offline.json is no JSON object such as \{"step": 500\} and was not used\.'),
        ('{"step": "64"}', r"Its trace_offline.json gives a step that is no whole number of at least 0\."),
    ):
        hf_folder(tmp_path / "model", 1)
        (tmp_path / "model" / "trace_offline.json").write_text(text)
        (found,) = find(aged(tmp_path))
        assert found.step is None
        assert re.match(words, str(found.reason)), found.reason


def test_a_folder_called_runs_is_looked_into(tmp_path: Path) -> None:
    for step in (1, 2):
        hf_folder(tmp_path / "runs" / "m" / f"step{step}", step)
    (tmp_path / "runs" / "Nov21_host").mkdir()
    (tmp_path / "runs" / "Nov21_host" / "events.out.tfevents.1.host").write_bytes(b"x")
    assert table(find(aged(tmp_path))) == [(1, "hf_folder", "complete"), (2, "hf_folder", "complete")]


@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_source_is_no_folder(source: str) -> None:
    with pytest.raises(UsageError, match="SOURCE is empty"):
        discover(source)


def removing(monkeypatch: pytest.MonkeyPatch, name: str, victim: Path) -> None:
    """Remove ``victim`` at the first call of a function of trace_offline.checkpoints.duplicates."""
    real = getattr(duplicates, name)

    def remove_first(*given: object) -> object:
        shutil.rmtree(victim, ignore_errors=True)
        return real(*given)

    monkeypatch.setattr(duplicates, name, remove_first)


@pytest.mark.parametrize("moment", ["_sample", "fingerprint", "weights_digest", "_mark_shards"])
def test_a_checkpoint_removed_while_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    for step in (1, 2, 3):
        # two shards, the first the same at all steps, so that everything is compared
        folder = hf_folder(tmp_path / f"checkpoint-{step}", step)
        (folder / "model.safetensors").unlink()
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        save_file({"a": np.zeros(4, np.float32)}, folder / names[0])
        save_file({"b": np.full(4, step if step < 3 else 2, np.float32)}, folder / names[1])
        index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    aged(tmp_path)
    removing(monkeypatch, moment, tmp_path / "checkpoint-2")
    found = {item.step: item for item in find(tmp_path)}
    assert found[2].state is CheckpointState.UNREADABLE
    assert found[2].reason == "It was removed while it was looked at."
    assert found[1].state is CheckpointState.COMPLETE
    assert found[3].state.analyzable
    assert [item.step for item in select(list(found.values()))] == [1, 3]


def test_a_file_removed_between_two_looks_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save_file({"a": np.full(4, step, np.float32)}, tmp_path / f"step_{step}.safetensors")
    aged(tmp_path)
    real = raw_files.read_header

    def gone(path: Path) -> object:
        if path.name == "step_1.safetensors":
            path.unlink()
        return real(path)

    monkeypatch.setattr(raw_files, "read_header", gone)
    assert [(item.step, item.state.value) for item in find(tmp_path)] == [(1, "unreadable"), (2, "complete")]


def test_two_runs_are_not_mixed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        trainer_folder(tmp_path / "b" / f"checkpoint-{step}", step, step)
    for step in (2, 4):
        trainer_folder(tmp_path / "a" / f"checkpoint-{step}", step + 10, step)
    found = find(aged(tmp_path))
    assert [item.step for item in select(found)] == [1, 2, 3]
    others = [item for item in found if not item.state.analyzable]
    assert [item.step for item in others] == [2, 4]
    assert all("belongs to another run" in str(item.reason) for item in others)


def test_stage_that_counts_anew(tmp_path: Path) -> None:
    for index, name in enumerate(
        ("stage1-step1000-tokens4B", "stage1-step3000-tokens9B", "stage2-ingredient1-step2000")
    ):
        hf_folder(tmp_path / name, index)
    found = find(aged(tmp_path))
    assert [(item.step, item.stage, item.state.value) for item in found] == [
        (1000, "stage1", "complete"),
        (2000, "stage2-ingredient1", "unsupported"),
        (3000, "stage1", "complete"),
    ]
    assert "counts its steps from the start again" in str(found[1].reason)


def test_epochs_do_not_mix_with_steps(tmp_path: Path) -> None:
    hf_folder(tmp_path / "epoch_1", 1)
    hf_folder(tmp_path / "epoch_2", 2)
    assert [item.step for item in find(aged(tmp_path))] == [1, 2]
    hf_folder(tmp_path / "step_100", 3)
    found = find(aged(tmp_path))
    assert [item.step for item in select(found)] == [100]
    assert "gives an epoch, the others give steps" in str(found[-1].reason)


def test_one_folder_and_one_file(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "model", 1)
    (found,) = find(aged(folder))
    assert (found.step, found.state.value) == (None, "complete")
    assert "Its step is unknown" in str(found.reason)
    assert select([found]) == [found]
    (found,) = find(folder / "model.safetensors")
    assert (found.layout, found.state.value, found.location) == ("raw", "complete", str(folder / "model.safetensors"))


def test_links_to_neighbours_are_not_found_twice(tmp_path: Path) -> None:
    trainer_folder(tmp_path / "checkpoint-8", 1, 8)
    (tmp_path / "latest").symlink_to(tmp_path / "checkpoint-8")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [item.step for item in find(aged(tmp_path))] == [8]


def test_empty_and_strange_step_folders(tmp_path: Path) -> None:
    hf_folder(tmp_path / "step1", 1)
    (tmp_path / "step2").mkdir()
    (tmp_path / "step3").mkdir()
    (tmp_path / "step3" / "notes.txt").write_text("x")
    (tmp_path / "step4").mkdir()
    (tmp_path / "step4" / "config.json").write_text('{"model_type": "x"}')
    os.utime(tmp_path / "step2", (NOW - 999, NOW - 999))
    found = find(aged(tmp_path))
    assert [item.state.value for item in found] == ["complete", "partial", "not_a_checkpoint", "partial"]
    assert "no weights: found notes.txt" in str(found[2].reason)
    assert "holds no weights (found config.json)" in str(found[3].reason)


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looked for Hugging Face folders.*found no files in 1 folder"):
        find(tmp_path)
    (tmp_path / "a.csv").write_text("1")
    (tmp_path / "b.csv").write_text("1")
    with pytest.raises(CheckpointError, match=r"No checkpoints in .*found 2 × \.csv"):
        find(tmp_path)
    with pytest.raises(CheckpointError, match=r"found nothing at .*Did you mean"):
        find(tmp_path / "a.cvs")
    with pytest.raises(CheckpointError, match="write hf://EleutherAI/pythia-70m"):
        discover("EleutherAI/pythia-70m")
    with pytest.raises(CheckpointError, match=r'no layout "hf_trainr"\. Did you mean "hf_trainer"'):
        find(tmp_path, layout="hf_trainr")


def test_layout_filter(tmp_path: Path) -> None:
    trainer_folder(tmp_path / "checkpoint-1", 1, 1)
    save_file(weights(2), tmp_path / "step2.safetensors")
    assert [item.step for item in find(aged(tmp_path), layout="raw")] == [2]
    with pytest.raises(CheckpointError, match="No checkpoints in layout lightning"):
        find(tmp_path, layout="lightning")


def test_evaluation_sets_are_not_checkpoints(tmp_path: Path) -> None:
    hf_folder(tmp_path / "step1", 1)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation_set.json").write_text("{}")
    save_file({"input_ids": np.zeros((2, 2), np.int64)}, tmp_path / "evaluation" / "batches.safetensors")
    save_file({"input_ids": np.zeros((2, 2), np.int64)}, tmp_path / "probe_7.safetensors")
    assert [item.step for item in find(aged(tmp_path))] == [1]


def test_tokenizers_above_and_in_final(tmp_path: Path) -> None:
    run = tmp_path / "above" / "run"
    hf_folder(run / "step1", 1)
    tokenizer(run / "final")
    assert find(aged(run))[0].tokenizer == str(run / "final")
    tokenizer(run / "step1")
    assert find(aged(run))[0].tokenizer == str(run / "step1")
    assert find(aged(hf_folder(tmp_path / "x" / "y" / "z" / "step2", 1)))[0].tokenizer is None


def test_real_library_output() -> None:
    root = shared_data("layouts_generated")
    trainer = find(root / "hf_trainer")
    assert table(trainer) == [
        (4, "hf_trainer", "complete"),
        (8, "hf_trainer", "complete"),
        (12, "hf_trainer", "complete"),
        (None, "hf_folder", "duplicate"),
    ]
    assert trainer[-1].duplicate_of == 12
    best = find(root / "hf_trainer_tok_best")
    assert [(item.step, item.tokenizer == item.location) for item in best] == [(6, True), (8, True)]
    lightning = find(root / "lightning")
    assert table(lightning)[:4] == [(step, "lightning", "complete") for step in (5, 10, 15, 20)]
    assert table(lightning)[4] == (None, "lightning", "duplicate")
    assert "epoch=1-step=20.ckpt" in str(lightning[4].reason)
    assert table(find(root / "hf_sharded")) == [(None, "hf_folder", "complete")]
    assert len(find(root / "hf_sharded")[0].weight_files) == 4
    assert table(find(root / "hf_bf16")) == [(None, "hf_folder", "complete")]
    assert table(find(root / "accelerate" / "step_100")) == [(100, "accelerate", "complete")]
    peft = find(root / "peft_trainer")
    assert table(peft) == [(2, "peft", "unsupported"), (4, "peft", "unsupported")]
    assert "merge_and_unload" in str(peft[0].reason)
    (dcp,) = find(root / "dcp")
    assert (dcp.step, dcp.layout, dcp.state.value) == (100, "dcp", "unsupported")
    assert "python -m torch.distributed.checkpoint.format_utils dcp_to_torch" in str(dcp.reason)
    assert [item.step for item in select(find(root))] == [4, 8, 12]


def test_every_bad_file_is_classified_and_explained() -> None:
    root = shared_data("bad_files")
    by_name = {Path(item.location).name: item for item in find(root)}
    words = {
        "empty_0_tensors.safetensors": "zero tensors",
        "git_lfs_pointer_epoch_0.pt": "git lfs pull",
        "html_page_named_model.safetensors": "HTML page",
        "truncated.safetensors": "the header promises 1044992 bytes, the file has 500000",
    }
    for name, word in words.items():
        assert by_name[name].state is CheckpointState.UNREADABLE
        assert word in str(by_name[name].reason)
        (alone,) = find(root / name)
        assert (alone.state, word in str(alone.reason)) == (CheckpointState.UNREADABLE, True)
    assert by_name["nan_weights.safetensors"].state is CheckpointState.COMPLETE


def test_discovery_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    trainer_folder(tmp_path / "checkpoint-8", 1, 8)
    code = (
        "import sys; from trace_offline.checkpoints.discover import discover; "
        f"assert discover({str(tmp_path)!r})[0].step == 8; "
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_thousand_folders(tmp_path: Path) -> None:
    state = {"epoch": 1.0, "global_step": 0, "log_history": [{"loss": 1.0, "step": i} for i in range(3000)]}
    text = json.dumps(state, indent=2, sort_keys=True)
    for step in range(1000):
        folder = hf_folder(tmp_path / f"checkpoint-{step * 10}", step)
        (folder / "trainer_state.json").write_text(text)
        (folder / "optimizer.pt").write_bytes(b"x")
    aged(tmp_path)
    started = time.perf_counter()
    found = find(tmp_path)
    seconds = time.perf_counter() - started
    assert [item.step for item in found] == [step * 10 for step in range(1000)]
    assert all(item.state is CheckpointState.COMPLETE for item in found)
    assert seconds < 6, f"{seconds:.2f} s for 1,000 folders"  # about 1 s on a quiet machine

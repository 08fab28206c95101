from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import hf_folder, weights
from safetensors.numpy import save_file

from trace_offline.checkpoints import fingerprint as module
from trace_offline.checkpoints.discover import discover
from trace_offline.checkpoints.fingerprint import Cache, fingerprint, with_fingerprint
from trace_offline.checkpoints.safetensors_header import MAX_HEADER, TruncatedError, read_header
from trace_offline.core.errors import CheckpointError
from trace_offline.core.types import Checkpoint


def one(path: Path) -> Checkpoint:
    (found,) = discover(path)
    return found


def test_blind_to_metadata_names_and_versions(tmp_path: Path) -> None:
    first = fingerprint(one(hf_folder(tmp_path / "a", 1, transformers_version="4.1", torch_dtype="float32")))
    other = hf_folder(tmp_path / "b", 1, transformers_version="5.23", dtype="float32", _name_or_path="elsewhere")
    save_file(weights(1), other / "model.safetensors", metadata={"format": "pt", "step": "7"})
    assert fingerprint(one(other)) == first
    assert len(first) == 32


def test_sees_weights_shapes_types_and_configuration(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "a", 1)
    seen = {fingerprint(one(folder))}
    for tensors in (
        weights(2),
        {name: value.T for name, value in weights(1).items()},
        {name: value.view(np.int32) for name, value in weights(1).items()},
        dict(zip(reversed(weights(1)), weights(1).values(), strict=True)),
    ):
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors")
        seen.add(fingerprint(one(folder)))
    seen.add(fingerprint(one(hf_folder(tmp_path / "b", 1, hidden_size=9))))
    assert len(seen) == 6


def test_sharding_does_not_matter(tmp_path: Path) -> None:
    whole = fingerprint(one(hf_folder(tmp_path / "a", 1)))
    folder = hf_folder(tmp_path / "b", 1)
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, (tensor, value) in zip(names, weights(1).items(), strict=True):
        save_file({tensor: value}, folder / name)
    index = {"weight_map": dict(zip(weights(1), names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint(one(folder)) == whole


def test_torch_files_under_other_names(tmp_path: Path) -> None:
    state = {"w": torch.ones(5), "b": torch.zeros(2)}
    torch.save(state, tmp_path / "step1.pt")
    torch.save(state, tmp_path / "a_longer_name_2.pt")
    torch.save({**state, "b": torch.ones(2)}, tmp_path / "step3.pt")
    first, second, third = (
        fingerprint(one(tmp_path / name)) for name in ("step1.pt", "a_longer_name_2.pt", "step3.pt")
    )
    assert first == second != third


def test_infinity_in_a_configuration(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "a", 1)
    (folder / "config.json").write_text('{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}')
    assert len(fingerprint(one(folder))) == 32


def test_cache_spares_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = one(hf_folder(tmp_path / "a", 1))
    cache: Cache = {}
    first = with_fingerprint(item, cache)
    (key,) = cache
    stat = Path(item.weight_files[0]).stat()
    assert key == (item.weight_files[0], stat.st_size, stat.st_mtime_ns)
    monkeypatch.setattr(module, "_tensor_digests", lambda path: pytest.fail("the file was read again"))
    assert with_fingerprint(item, cache) == first
    monkeypatch.undo()
    save_file(weights(2), item.weight_files[0])
    assert with_fingerprint(item, cache).fingerprint != first.fingerprint


def test_changed_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = one(hf_folder(tmp_path / "a", 1))
    original = module._tensor_digests

    def meddle(path: str) -> dict[str, str]:
        parts = original(path)
        save_file(weights(3, size=64), path)
        return parts

    monkeypatch.setattr(module, "_tensor_digests", meddle)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        fingerprint(item)


def test_nothing_to_identify() -> None:
    from trace_offline.core.types import CheckpointState

    item = Checkpoint("hf://org/name@step1", "hub", CheckpointState.COMPLETE)
    with pytest.raises(CheckpointError, match="no weight files on this disk: fetch it first"):
        fingerprint(item)
    with pytest.raises(CheckpointError, match="cannot be read"):
        fingerprint(dataclasses.replace(item, weight_files=("/nonexistent/a.safetensors",)))


def header(content: object, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"abc", "8-byte header length"),
        (struct.pack("<Q", MAX_HEADER + 1) + b"x" * 50, "length of 100000001"),
        (struct.pack("<Q", 1000) + b"{}", "header alone needs 1008 bytes, the file has 10"),
        (header(b"{'a': 1}"), "no valid JSON"),
        (header([1]), "no JSON object"),
        (header({"a": 1}), "incompletely"),
        (header({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)), "impossible"),
        (header({"a": {**F32, "shape": [-2]}}, bytes(8)), "impossible"),
        (header({"a": {**F32, "shape": [3]}}, bytes(8)), "does not fit its byte range"),
        (header({"a": F32, "b": F32}, bytes(8)), "gap or overlap at byte 8"),
        (header({"a": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "gap or overlap at byte 0"),
        (header({"a": F32}, bytes(7)), "the header promises"),
        (header({"a": F32}, bytes(9)), "extra bytes"),
        (header(b"[" * 100_000), "no valid JSON"),
    ],
)
def test_bad_headers(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_header(path)
    (tmp_path / "x.safetensors").touch()
    (found,) = discover(path, now=path.stat().st_mtime + 1000)
    assert found.state.value == "unreadable"


def test_truncation_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(header({"a": F32}, bytes(7)))
    with pytest.raises(TruncatedError):
        read_header(path)
    path.write_bytes(header({"a": F32}, bytes(8)))
    assert read_header(path).tensors["a"].shape == (2,)

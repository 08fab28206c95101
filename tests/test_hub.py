from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_files import hf_folder
from hub_server import Hub, Repository, files_of, serve

from trace_offline.checkpoints import hub, hub_download
from trace_offline.checkpoints.discover import discover, select
from trace_offline.checkpoints.fingerprint import fingerprint
from trace_offline.core.errors import CheckpointError
from trace_offline.core.types import Checkpoint

NOWHERE = "http://127.0.0.1:9"
REPO = "hf://EleutherAI/pythia-tiny"


def content(tmp_path: Path, seed: int) -> dict[str, bytes]:
    files = files_of(hf_folder(tmp_path / "made" / str(seed), seed))
    return {
        **files,
        "tokenizer.json": b"{}",
        "README.md": b"#",
        "pytorch_model.bin": b"x" * 5000,
        "onnx/model.onnx": b"o",
    }


@pytest.fixture
def pythia(tmp_path: Path) -> Iterator[Hub]:
    repository = Repository()
    for seed, names in ((0, ("step0",)), (1, ("step1000",)), (2, ("step512",)), (3, ("step143000", "main"))):
        repository.commit(content(tmp_path, seed), *names)
    repository.tags["v1.0"] = repository.branches["main"]
    with serve({"EleutherAI/pythia-tiny": repository}) as running:
        yield running


def listing(server: Hub, cache: Path, source: str = REPO, **options: object) -> list[Checkpoint]:
    return hub.revisions(source, endpoint=server.endpoint, cache_dir=cache, **options)  # type: ignore[arg-type]


def test_listing_downloads_nothing(pythia: Hub, tmp_path: Path) -> None:
    found = listing(pythia, tmp_path / "cache")
    assert [item.step for item in found] == [0, 512, 1000, 143000]
    assert [item.location for item in found][1] == f"{REPO}@step512"
    assert found[3].reason == "Also known as main, v1.0."
    assert pythia.requests == ["GET /api/models/EleutherAI/pythia-tiny/refs"]
    assert not (tmp_path / "cache").exists()
    assert [item.step for item in listing(pythia, tmp_path, pattern="step1*")] == [1000, 143000]
    assert [item.step for item in listing(pythia, tmp_path, f"{REPO}@step512")] == [512]
    by_name = discover(REPO, endpoint=pythia.endpoint, cache_dir=tmp_path / "cache", revisions="step[05]*")
    assert [item.step for item in by_name] == [0, 512]


def test_fetch_takes_what_is_needed_and_nothing_twice(pythia: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = listing(pythia, cache)
    item = hub.fetch(found[1], endpoint=pythia.endpoint, cache_dir=cache)
    assert sorted(name for _, name in pythia.downloads) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (item.step, item.layout, item.location) == (512, "hub", f"{REPO}@step512")
    assert item.tokenizer is not None
    local = hf_folder(tmp_path / "again", 2)
    assert fingerprint(item) == fingerprint(discover(local)[0])
    pythia.forget()
    assert hub.fetch(found[1], endpoint=pythia.endpoint, cache_dir=cache) == item
    assert pythia.requests == []
    hub.fetch(found[2], endpoint=pythia.endpoint, cache_dir=cache)
    # config.json and tokenizer.json are the same in both revisions: only the weights travel.
    assert [name for _, name in pythia.downloads] == ["model.safetensors"]


def test_offline_when_cached(pythia: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    for item in listing(pythia, cache)[:2]:
        hub.fetch(item, endpoint=pythia.endpoint, cache_dir=cache)
    pythia.forget()
    gone = hub.revisions(REPO, endpoint=NOWHERE, cache_dir=cache)
    assert [(item.step, item.location) for item in gone] == [(0, f"{REPO}@step0"), (512, f"{REPO}@step512")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.revisions(REPO, endpoint=pythia.endpoint, cache_dir=cache) == gone
    fetched = [hub.fetch(item, endpoint=pythia.endpoint, cache_dir=cache) for item in gone]
    assert all(item.weight_files for item in fetched)
    assert [item.step for item in discover(cache)] == [0, 512]
    with pytest.raises(CheckpointError, match=r"step1\*.*is not in the cache .*HF_HUB_OFFLINE is set.*hf download"):
        hub.revisions(REPO, pattern="step1*", endpoint=pythia.endpoint, cache_dir=cache)
    assert pythia.requests == []


def test_interrupted_download_is_completed(pythia: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (found,) = listing(pythia, cache, f"{REPO}@step0")
    item = hub.fetch(found, endpoint=pythia.endpoint, cache_dir=cache)
    Path(item.weight_files[0]).resolve().unlink()
    Path(item.weight_files[0]).unlink()
    with pytest.raises(CheckpointError, match="offline"):
        hub.fetch(found, endpoint=pythia.endpoint, cache_dir=cache, local_files_only=True)
    with pytest.raises(CheckpointError, match=r"the hub cannot be reached.*Connect"):
        hub.fetch(found, endpoint=NOWHERE, cache_dir=cache)
    pythia.forget()
    assert hub.fetch(found, endpoint=pythia.endpoint, cache_dir=cache) == item
    assert [name for _, name in pythia.downloads] == ["model.safetensors"]


def test_errors_quote_the_cause(pythia: Hub, tmp_path: Path) -> None:
    cases = {
        "hf://EleutherAI/pythia-huge": "was not found: check the spelling.*401",
        f"{REPO}@step7": "has no such revision.*404",
        "hf://a/b/c": "Expected hf://org/name",
        "hf://": "Expected hf://org/name",
    }
    for source, words in cases.items():
        with pytest.raises(CheckpointError, match=words):
            listing(pythia, tmp_path, source)
    with pytest.raises(CheckpointError, match=r'no revision that matches "stage\*"; it has 6 branches and tags: main'):
        listing(pythia, tmp_path, pattern="stage*")
    with pytest.raises(CheckpointError, match=r"not in the cache .*cannot be reached.*Connect"):
        hub.revisions(REPO, endpoint=NOWHERE, cache_dir=tmp_path / "cache")


def test_same_commit_under_two_steps_is_a_duplicate(tmp_path: Path) -> None:
    repository = Repository()
    repository.commit(content(tmp_path, 0), "step0", "step1")
    repository.commit(content(tmp_path, 1), "stage1-step5", "stage2-step5")
    repository.commit(content(tmp_path, 2), "stage3-step5")
    with serve({"EleutherAI/pythia-tiny": repository}) as server:
        found = listing(server, tmp_path)
    assert [(item.step, item.state.value, item.duplicate_of) for item in found] == [
        (0, "complete", None),
        (1, "duplicate", 0),
        (5, "complete", None),
        (None, "duplicate", 5),
        (None, "unsupported", None),
    ]
    assert [item.step for item in select(found)] == [0, 1, 5]


def test_weights_chosen(tmp_path: Path) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": b"" for i in (1, 2)}
    assert hub_download.needed("r", ["config.json", *shards, "model.safetensors.index.json", "pytorch_model.bin"]) == [
        "config.json",
        *shards,
        "model.safetensors.index.json",
    ]
    assert hub_download.needed("r", ["config.json", "pytorch_model.bin", "vocab.txt"]) == [
        "config.json",
        "pytorch_model.bin",
        "vocab.txt",
    ]
    with pytest.raises(CheckpointError, match="PEFT adapter only"):
        hub_download.needed("r", ["adapter_model.safetensors", "adapter_config.json"])
    with pytest.raises(CheckpointError, match=r"found README\.md"):
        hub_download.needed("r", ["README.md"])


def test_damaged_download_is_not_used(tmp_path: Path) -> None:
    repository = Repository()
    repository.commit(
        {"config.json": json.dumps({"model_type": "x"}).encode(), "model.safetensors": b"<html>"}, "step1"
    )
    with serve({"EleutherAI/pythia-tiny": repository}) as server:
        (found,) = listing(server, tmp_path / "cache")
        with pytest.raises(
            CheckpointError, match=r"step1 is not complete on this disk: model.safetensors is an HTML page"
        ):
            hub.fetch(found, endpoint=server.endpoint, cache_dir=tmp_path / "cache")

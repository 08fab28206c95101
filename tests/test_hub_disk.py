"""Hub revisions one ahead, within a disk limit, removed after use: the disk side, without any analysis."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import CONFIG
from hub_server import Hub, Repository, serve
from safetensors.numpy import save

from trace_offline.checkpoints import hub
from trace_offline.checkpoints.hub_access import repository_folder
from trace_offline.checkpoints.hub_ledger import Ledger
from trace_offline.checkpoints.hub_use import InUse
from trace_offline.core.errors import CheckpointError, UsageError
from trace_offline.core.types import Checkpoint
from trace_offline.engine.board import Board
from trace_offline.engine.download_rules import DownloadRules, size_text
from trace_offline.engine.downloads import Downloads

REPO = "hf://org/tiny"
FLOATS = 50_000
WEIGHTS = 4 * FLOATS
REVISION = 205_000  # a little more than the weights with their header and the configuration


def content(seed: int, **more: bytes) -> dict[str, bytes]:
    values = np.random.default_rng(seed).standard_normal(FLOATS).astype(np.float32)
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": save({"weight": values}, {"format": "pt"}),
        "README.md": str(seed).encode(),
        **more,
    }


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Six revisions of the same size; the last two hold the same weights."""
    repository = Repository()
    for step in range(6):
        files = content(min(step, 4))
        repository.commit({**files, "README.md": str(step).encode()}, f"step{step}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with serve({"org/tiny": repository}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


class Desk:
    """What a run would do with the revisions; notes and losses are kept."""

    def __init__(self, tmp_path: Path, limit: str | None = None, *, remove: bool = False, jobs: int = 1) -> None:
        self.notes: list[str] = []
        self.gone: list[tuple[int | None, str]] = []
        self.ledger = tmp_path / "history.downloads.json"
        self.downloads = Downloads(
            hub.revisions(REPO),
            DownloadRules(limit, remove, self.ledger),
            lost=lambda item, reason: self.gone.append((item.step, reason)),
            note=self.notes.append,
            board=Board(tmp_path / "history.workers"),
            jobs=jobs,
        )
        self.downloads.board.open()

    def each(self) -> Iterator[Checkpoint]:
        """Revisions as they come, each to be given back by ``done``."""
        for item in self.downloads.arrivals():
            if item is None:
                time.sleep(0.005)
            else:
                self.downloads.use(item, ["a", "b"])
                yield item

    def done(self, item: Checkpoint) -> None:
        self.downloads.stored(item, ["a", "b"])

    def wait_for_next(self) -> None:
        """Until the next revision is there, or has to wait for room, or there is none."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if self.downloads._ready is not None or self.downloads._waiting or self.downloads._ended:
                return
            time.sleep(0.005)
        raise AssertionError("the download that should be ahead does not come")

    def run(self, seconds: float = 0.0, *, ahead: bool = False) -> list[int | None]:
        """The whole series, one at a time; each until the next one is ``ahead``."""
        steps = []
        try:
            for item in self.each():
                assert all(Path(name).exists() for name in item.weight_files)
                time.sleep(seconds)
                if ahead:
                    self.wait_for_next()
                steps.append(item.step)
                self.done(item)
        finally:
            self.downloads.close()
        return steps


def blobs() -> dict[str, int]:
    """What the cache holds of the repository: name → bytes, parts of files included."""
    found = {}
    for path in (repository_folder("org/tiny", None) / "blobs").glob("*"):
        try:
            found[path.name] = path.stat().st_size
        except FileNotFoundError:
            continue
    return found


def cached() -> list[str]:
    """The revisions that are complete in the cache."""
    folder = repository_folder("org/tiny", None) / "snapshots"
    return sorted(path.parent.name for path in folder.glob("*/model.safetensors") if path.exists())


class Sampler(threading.Thread):
    """The most that lay in the cache at any moment."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.revisions, self.samples = 0, 0, 0
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            sizes = blobs()
            self.most = max(self.most, sum(sizes.values()))
            self.revisions = max(self.revisions, sum(size > WEIGHTS // 2 for size in sizes.values()))
            self.samples += 1
            time.sleep(0.001)

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def body_begun(server: Hub, step: int) -> float:
    commit = server.repositories["org/tiny"].branches[f"step{step}"]
    return server.times[commit, "model.safetensors"][0]


def test_the_next_is_downloaded_while_one_is_in_use(server: Hub, tmp_path: Path) -> None:
    server.portion, server.pause = 20_000, 0.005
    desk = Desk(tmp_path)
    used: list[tuple[float, float]] = []
    for item in desk.each():
        begun = time.monotonic()
        time.sleep(0.15)
        used.append((begun, time.monotonic()))
        # the one after the next is not asked for yet
        assert len([name for _, name in server.downloads if name == "model.safetensors"]) <= len(used) + 1
        desk.done(item)
    desk.downloads.close()
    assert len(used) == 6
    for step in range(1, 5):  # step 5 has the weights of step 4
        assert used[step - 1][0] - 0.05 <= body_begun(server, step) < used[step - 1][1]
    assert len(cached()) == 6
    assert not desk.ledger.exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "hub-download"]


def test_no_more_than_jobs_in_use_and_one_ahead(server: Hub, tmp_path: Path) -> None:
    desk = Desk(tmp_path, remove=True, jobs=2)
    with Sampler() as sampler:
        held: list[Checkpoint] = []
        for item in desk.each():
            held.append(item)
            if len(held) < 2:
                continue
            desk.wait_for_next()
            desk.done(held.pop(0))
        for item in held:
            desk.done(item)
        desk.downloads.close()
    assert sampler.revisions == 3
    assert cached() == []


def test_the_number_of_workers_bounds_what_is_ahead_while_they_come_and_go(server: Hub, tmp_path: Path) -> None:
    """An executor that takes all it can get (Dask) gets one more than it has workers."""
    desk = Desk(tmp_path, remove=True, jobs=4)

    def taken() -> list[Checkpoint]:
        """All that come within half a second after the last."""
        found, last = [], time.monotonic()
        while time.monotonic() - last < 0.5:
            if (item := next(arrivals)) is None:
                time.sleep(0.005)
            else:
                desk.downloads.use(item, ["a", "b"])
                found.append(item)
                last = time.monotonic()
        return found

    arrivals = desk.downloads.arrivals()
    desk.downloads.staffed(1)
    held = taken()
    assert len(held) == 2
    desk.downloads.staffed(2)
    held += taken()
    assert len(held) == 3
    desk.downloads.staffed(1)
    desk.done(held.pop(0))
    assert taken() == []
    desk.done(held.pop(0))
    held += taken()
    assert len(held) == 2
    desk.downloads.close()


@pytest.mark.parametrize(("limit", "most"), [("450kB", 2), ("220kB", 1)])
def test_the_limit_holds_at_every_moment(server: Hub, tmp_path: Path, limit: str, most: int) -> None:
    server.portion, server.pause = 40_000, 0.002
    desk = Desk(tmp_path, limit, remove=True, jobs=3)
    with Sampler() as sampler:
        assert desk.run(0.02, ahead=True) == [0, 1, 2, 3, 4, 5]
    assert sampler.samples > 50
    assert sampler.revisions == most
    assert WEIGHTS <= sampler.most <= int(limit[:-2]) * 1000
    assert (desk.gone, desk.downloads.full, desk.downloads.warnings) == ([], None, [])
    assert blobs() == {}
    assert cached() == []
    assert not desk.ledger.exists()
    refs = repository_folder("org/tiny", None) / "refs"
    assert [path for path in refs.rglob("*") if path.is_file()] == []


def test_without_removal_the_limit_ends_the_downloads(server: Hub, tmp_path: Path) -> None:
    commit = server.repositories["org/tiny"].branches["step3"]
    (three,) = [item for item in hub.revisions(REPO) if item.step == 3]
    hub.fetch(three)
    desk = Desk(tmp_path, "420kB")
    # what lies there already is analyzed, whether it comes before or after
    assert desk.run() == [0, 1, 3]
    assert [item.step for item in desk.downloads.skipped] == [2, 4, 5]
    assert desk.downloads.full == desk.notes[-1]
    assert "--hub-disk-limit 420kB is reached: downloads take 400.23 kB, and" in desk.notes[-1]
    assert "hf://org/tiny@step2 needs 200.12 kB more. Add --remove-downloads, so that" in desk.notes[-1]
    assert "or give a larger limit; the same command goes on from here." in desk.notes[-1]
    assert len(cached()) == 3

    # the option that the text names makes room, of what these runs downloaded only
    again = Desk(tmp_path, "420kB", remove=True)
    assert again.run() == [0, 1, 2, 3, 4, 5]
    assert cached() == [commit]
    assert not again.ledger.exists()


def test_a_revision_larger_than_the_limit(server: Hub, tmp_path: Path) -> None:
    desk = Desk(tmp_path, "100kB", remove=True)
    with pytest.raises(
        UsageError,
        match=r"hf://org/tiny@step0 takes 200\.\d+ kB, more than --hub-disk-limit 100kB allows for all downloads "
        r"together\. Give at least 200\.\d+ kB; with twice that",
    ):
        desk.run()
    assert (blobs(), desk.ledger.exists()) == ({}, False)

    repository = server.repositories["org/tiny"]
    large = {"pytorch_model.bin": b"", **content(9)}
    large["model.safetensors"] += bytes(300_000)
    repository.commit(large, "step2")
    desk = Desk(tmp_path, "450kB", remove=True)
    assert desk.run() == [0, 1, 3, 4, 5]
    ((step, reason),) = desk.gone
    assert step == 2
    assert "takes 500" in reason
    assert "more than --hub-disk-limit 450kB allows" in reason


def test_a_download_that_fails_ahead_is_tried_again_in_its_turn(server: Hub, tmp_path: Path) -> None:
    repository = server.repositories["org/tiny"]
    server.refuse[repository.branches["step2"]] = 1
    server.refuse[repository.branches["step3"]] = 99
    desk = Desk(tmp_path, "1MB", remove=True)
    assert desk.run(0.05) == [0, 1, 2, 4, 5]
    ((step, reason),) = desk.gone
    assert step == 3
    assert "hf://org/tiny@step3 cannot be fetched" in reason
    assert "403" in reason
    tried = [line for line in server.requests if line.startswith("GET") and "model.safetensors" in line]
    assert sum(repository.branches["step2"] in line for line in tried) == 2
    assert sum(repository.branches["step3"] in line for line in tried) == 2
    assert (blobs(), desk.ledger.exists()) == ({}, False)


def test_what_was_there_before_stays(server: Hub, tmp_path: Path) -> None:
    found = hub.revisions(REPO)
    hub.fetch(found[1])
    # of step 2 the user has the configuration only; of step 5 nothing, but its weights are those of step 4
    from huggingface_hub import hf_hub_download

    hf_hub_download(
        "org/tiny", "config.json", revision="step2", endpoint=server.endpoint, cache_dir=tmp_path / "home/hub"
    )
    before = blobs()
    assert Desk(tmp_path, remove=True).run() == [0, 1, 2, 3, 4, 5]
    assert blobs() == before
    assert cached() == [found[1].revision]
    folder = repository_folder("org/tiny", None)
    left = sorted(path.relative_to(folder / "snapshots").as_posix() for path in folder.glob("snapshots/*/*"))
    assert left == sorted(
        [
            f"{found[1].revision}/config.json",
            f"{found[1].revision}/model.safetensors",
            f"{found[2].revision}/config.json",
        ]
    )
    assert {path.name: path.read_text() for path in (folder / "refs").iterdir()} == {
        "step1": found[1].revision,
        "step2": found[2].revision,
    }
    assert hub.is_on_disk(found[1])


def test_a_blob_that_a_later_revision_shares_is_downloaded_once_and_goes_with_the_last(
    server: Hub, tmp_path: Path
) -> None:
    desk = Desk(tmp_path, remove=True, jobs=1)
    weights = None
    for item in desk.each():
        if item.step == 4:
            desk.wait_for_next()
            weights = Path(item.weight_files[0]).resolve()
            desk.done(item)
            assert weights.exists()  # step 5, which is ahead, links to it
            continue
        desk.done(item)
    desk.downloads.close()
    assert weights is not None
    assert not weights.exists()
    assert len([name for _, name in server.downloads if name == "model.safetensors"]) == 5


def test_a_file_that_the_user_links_to_afterwards_stays(server: Hub, tmp_path: Path) -> None:
    desk = Desk(tmp_path, remove=True)
    for item in desk.each():
        if item.step == 4:
            other = repository_folder("org/tiny", None) / "snapshots" / ("f" * 40)
            other.mkdir()
            weights = Path(item.weight_files[0])
            (other / "model.safetensors").symlink_to(os.path.relpath(weights.resolve(), other))
        desk.done(item)
    desk.downloads.close()
    assert (other / "model.safetensors").stat().st_size > WEIGHTS
    assert cached() == ["f" * 40]


def test_what_another_run_uses_stays_for_now(server: Hub, tmp_path: Path) -> None:
    found = hub.revisions(REPO)
    folder = repository_folder("org/tiny", None)
    other = InUse()
    other.take(folder, str(found[2].revision))
    desk = Desk(tmp_path, "450kB", remove=True)
    assert desk.run() == [0, 1, 2, 3, 4, 5]
    (warning,) = desk.downloads.warnings
    assert warning == (
        "hf://org/tiny@step2 stays in the hub cache for now: another run uses it. The next run removes it."
    )
    assert cached() == [found[2].revision]
    assert list(Ledger.open(desk.ledger).entries) == [(str(folder), found[2].revision)]

    desk = Desk(tmp_path, "220kB", remove=True)
    steps = desk.run()  # no room for a second one, but for those that are there
    assert steps == [2]
    assert desk.downloads.full is not None
    assert (
        "What is there cannot be removed now, because another run uses it or the system refused" in desk.downloads.full
    )
    other.close()
    assert Desk(tmp_path, "220kB", remove=True).run() == [0, 1, 2, 3, 4, 5]
    assert (cached(), desk.ledger.exists()) == ([], False)


_KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_hub_disk import Desk
desk = Desk(Path({folder!r}), "450kB", remove=True)
for item in desk.each():
    if item.step == 2:
        print("now", flush=True)
        time.sleep(60)
    desk.done(item)
"""


def test_a_killed_run_leaves_nothing_that_the_next_cannot_remove(server: Hub, tmp_path: Path) -> None:
    code = _KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    server.portion, server.pause = 20_000, 0.05
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "now"
        until = time.monotonic() + 20
        while not any(name.endswith(".incomplete") for name in blobs()) and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(0.1)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
    assert any(name.endswith(".incomplete") for name in blobs())
    # step 2, which was in use, and step 3, of which a part had arrived
    assert len(json.loads((tmp_path / "history.downloads.json").read_text())["downloads"]) == 2

    server.pause = 0.0
    desk = Desk(tmp_path, "450kB", remove=True)
    with Sampler() as sampler:
        assert desk.run() == [0, 1, 2, 3, 4, 5]
    assert sampler.most <= 450_000
    assert (blobs(), cached(), desk.ledger.exists()) == ({}, [], False)


def test_a_run_that_ends_early_breaks_its_download_off(server: Hub, tmp_path: Path) -> None:
    server.portion, server.pause = 2_000, 0.05  # five seconds for one
    desk = Desk(tmp_path, "1MB", remove=True)
    arrivals = desk.downloads.arrivals()
    assert next(arrivals) is None
    until = time.monotonic() + 20
    while not any(name.endswith(".incomplete") for name in blobs()) and time.monotonic() < until:
        time.sleep(0.01)
    begun = time.monotonic()
    desk.downloads.close()
    assert time.monotonic() - begun < 10
    server.pause = 0.0


def test_what_is_said_of_a_download(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 20_000)
    server.portion, server.pause = 20_000, 0.15
    desk = Desk(tmp_path)
    seen = set()
    for item in desk.downloads.arrivals():
        if item is not None:
            break
        seen.add(desk.downloads.state())
        time.sleep(0.01)
    desk.downloads.close()
    said = [text for text in seen if text and text.endswith(" of 200 kB)")]
    assert len(said) > 3
    assert all(text.startswith("downloading step 0 (") for text in said)
    assert desk.notes[0].startswith("downloading step 0")
    assert Board(tmp_path / "history.workers").read_download() is None


def test_damaged_ledgers_and_silent_hubs_are_named(server: Hub, tmp_path: Path) -> None:
    path = tmp_path / "history.downloads.json"
    path.write_text("{")
    with pytest.raises(
        CheckpointError, match=r"history\.downloads\.json should list what was downloaded.*Remove it to"
    ):
        Desk(tmp_path, remove=True)
    path.unlink()
    server.silent = True
    desk = Desk(tmp_path, remove=True)
    assert desk.run() == []
    assert (
        "the hub does not say how large config.json is, so --hub-disk-limit and --remove-downloads" in desk.gone[0][1]
    )
    assert len(desk.gone) == 6
    assert Desk(tmp_path).run() == [0, 1, 2, 3, 4, 5]


def test_a_cache_cleared_by_hand_is_noticed(server: Hub, tmp_path: Path) -> None:
    import shutil

    desk = Desk(tmp_path, "450kB")
    assert desk.run() == [0, 1]
    shutil.rmtree(repository_folder("org/tiny", None))
    desk = Desk(tmp_path, "450kB")
    assert desk.run() == [0, 1]


def test_sizes_are_rounded_up() -> None:
    assert [size_text(size) for size in (12, 1000, 1001, 2_345_678_901)] == [
        "12 bytes", "1 kB", "1.01 kB", "2.35 GB",
    ]  # fmt: skip

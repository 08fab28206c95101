"""The bytes of the next checkpoint are in memory before anybody opens it."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from trace_offline.core.types import Checkpoint, CheckpointState
from trace_offline.engine import readahead
from trace_offline.engine.readahead import one_ahead, read_ahead
from trace_offline.engine.unit import Unit, WorkSettings

MEGABYTE = 1 << 20
SETTINGS = WorkSettings("e", "hash", "cpu", "float32", 0, 1)


def checkpoint(path: Path, size: int) -> Checkpoint:
    return Checkpoint(str(path), "raw", CheckpointState.COMPLETE, weight_files=(str(path),), size_bytes=size)


def written(path: Path, megabytes: int) -> Checkpoint:
    with path.open("wb") as stream:
        for _ in range(megabytes):
            stream.write(os.urandom(MEGABYTE))
        stream.flush()
        os.fsync(stream.fileno())
    return checkpoint(path, megabytes * MEGABYTE)


def in_memory(path: Path) -> float:
    """Share of the file's pages that the page cache holds."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        with mmap.mmap(stream.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as view:
            pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
            start = ctypes.c_char.from_buffer(view)
            failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), pages)
            del start
    if failed:
        pytest.skip("this system does not say which pages of a file it holds")
    return sum(page & 1 for page in pages) / len(pages)


def forgotten(path: Path) -> None:
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(path) > 0.05:
        pytest.skip("this file system keeps files in memory whatever it is told")


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux page cache")


@linux
def test_the_whole_file_is_read(tmp_path: Path) -> None:
    item = written(tmp_path / "a.pt", 48)
    forgotten(tmp_path / "a.pt")
    thread = read_ahead(item)
    assert thread is not None
    thread.join(60)
    assert in_memory(tmp_path / "a.pt") == 1.0


@linux
def test_one_unit_ahead_and_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, int] = {}
    plain = readahead._read

    def counted(files: tuple[str, ...], stop: threading.Event) -> None:
        plain(files, stop)
        # said when it is through: the system may already have taken some of it back
        read.update({name: os.path.getsize(name) for name in files if not stop.is_set()})

    monkeypatch.setattr(readahead, "_read", counted)
    items = [written(tmp_path / f"{name}.pt", 12) for name in "abc"]
    for item in items:
        forgotten(Path(item.location))
    units = one_ahead([Unit(item, (), SETTINGS) for item in items])
    assert next(units).checkpoint is items[0]
    until = time.monotonic() + 60
    while not read and time.monotonic() < until:
        time.sleep(0.02)
    held = [in_memory(Path(item.location)) for item in items]
    assert read == {items[1].location: items[1].size_bytes}
    assert held[1] >= 0.9  # that the whole of a file is read is shown above; short of memory, some of it goes again
    assert held[0] < 0.05
    assert held[2] < 0.05
    assert [unit.checkpoint for unit in units] == items[1:]


def test_what_cannot_be_read_or_held_is_left_alone(tmp_path: Path) -> None:
    assert read_ahead(checkpoint(tmp_path / "a.pt", 1 << 60)) is None
    thread = read_ahead(checkpoint(tmp_path / "gone.pt", 10))
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()


def test_leaving_early_ends_the_reading(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.pt")

    def feed() -> None:
        with (tmp_path / "endless.pt").open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(b"x" * MEGABYTE)
            except BrokenPipeError:
                return

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    first, second = checkpoint(tmp_path / "none.pt", 1), checkpoint(tmp_path / "endless.pt", 1)
    units = one_ahead([Unit(item, (), SETTINGS) for item in (first, second)])
    next(units)
    assert any(thread.name == "read-ahead" for thread in threading.enumerate())
    units.close()
    feeder.join(20)
    assert not feeder.is_alive()

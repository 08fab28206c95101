"""Free memory of the device and the host, and doing with half as much after a device ran out of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Memory:
    """Free bytes on the device (None: the device is the host, whose memory the user bounds) and on the host."""

    device: int | None
    host: int | None = None


def free_memory(device: torch.device) -> Memory:
    """What is free now on a CUDA device, counting what PyTorch's allocator holds and does not use, and beside it."""
    if device.type != "cuda":
        return Memory(None)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Memory(int(free) + unused, host_memory())


def host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that programs can still take on this machine and in this container; None where the system does not say."""
    found = [int(line.split()[1]) * 1024 for line in _lines(root / "proc/meminfo") if line.startswith("MemAvailable:")]
    group = root / "sys/fs/cgroup"
    limit, used = _lines(group / "memory.max"), _lines(group / "memory.current")
    if limit and used and limit[0].isdigit():
        found.append(max(int(limit[0]) - int(used[0]), 0))
    return min(found, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []


_FULL = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Did a GPU run out of memory? PyTorch's allocator has an error of its own, CUDA and its libraries have texts."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _FULL)


def release() -> None:
    """Give back what nobody uses any more, after a device ran out of memory."""
    gc.collect()  # graphs and tracebacks hold each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@dataclass
class Halved:
    """``asked``: somebody took half as much at once because of it."""

    asked: bool = False


_halved: ContextVar[Halved | None] = ContextVar("halved", default=None)


@contextmanager
def halved() -> Iterator[Halved]:
    """Inside, who cuts work into batches takes half of what it would take."""
    mark = Halved()
    token = _halved.set(mark)
    try:
        yield mark
    finally:
        _halved.reset(token)


def is_halved() -> bool:
    """Should half as much be taken at once? Asking means doing so."""
    mark = _halved.get()
    if mark is None:
        return False
    mark.asked = True
    return True


def at_once(count: int) -> int:
    """``count`` rows, or half of them (rounded up) inside ``halved``."""
    return (count + 1) // 2 if count > 1 and is_halved() else count

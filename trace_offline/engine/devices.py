"""Which GPUs there are, and one for each worker, settled before CUDA starts in it.

The process of a run never opens a GPU unless it computes itself: devices are counted through the driver's management
library (NVML), and a worker is bound by the environment variable that CUDA reads when it starts. The names found in
that variable are kept as they are, so that what Slurm, Docker or the user chose (numbers, UUIDs, MIG slices) stands.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_offline.core.errors import UsageError, nearest

VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICES = ("auto", "cpu", "cuda")

_MIG = "MIG-"
_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_NAP_SECONDS = 0.1


def parse_device(text: str) -> tuple[int, ...]:
    """The places named by ``cuda:N`` or ``cuda:N,M``; empty for ``auto``, ``cpu``, ``cuda``. Raises UsageError."""
    if text in DEVICES:
        return ()
    if not re.fullmatch(r"cuda:\d+(,\d+)*", text):
        raise UsageError(
            f'--device: "{text}" is not known.{nearest(text, DEVICES)} There are: {", ".join(DEVICES)}, cuda:N, and '
            "cuda:N,M for several."
        )
    places = tuple(int(part) for part in text.removeprefix("cuda:").split(","))
    if len(set(places)) != len(places):
        raise UsageError(f"--device {text}: names a GPU twice.")
    return places


def gpu_names(count: int, setting: str | None) -> tuple[str, ...]:
    """Names of the ``count`` GPUs that CUDA shows when CUDA_VISIBLE_DEVICES is ``setting`` (None: it is not set).

    CUDA shows one process one MIG slice only; as each worker is a process of its own, all that are named are there.
    """
    if setting is None:
        return tuple(str(place) for place in range(count))
    named = tuple(part.strip() for part in setting.split(",") if part.strip())
    if named and all(name.startswith(_MIG) for name in named):
        return named
    return named[:count]


def visible_gpus(*, surely: bool = False) -> tuple[str, ...]:
    """Names of the GPUs this process may use, without opening one.

    ``surely``: ask PyTorch even where no driver has made a device; importing it takes a second or two.
    """
    if not surely and sys.platform == "linux" and not any(Path(node).exists() for node in _NODES):
        return ()
    setting = os.environ.get(VISIBLE)
    if setting is not None and setting.startswith(_MIG):
        return gpu_names(0, setting)  # counting slices would start CUDA
    import torch

    return gpu_names(torch.cuda.device_count(), setting)


def check_device(asked: str) -> None:
    """Raise UsageError for a device that is not known or not here."""
    places = parse_device(asked)
    if not asked.startswith("cuda"):
        return
    names = visible_gpus(surely=True)
    if not names:
        raise UsageError(
            f"--device {asked}: PyTorch sees no CUDA device here. Use --device cpu, or install a CUDA build of PyTorch."
        )
    if places and max(places) >= len(names):
        raise UsageError(
            f"--device {asked}: expected GPUs from cuda:0 to cuda:{len(names) - 1}, those that {VISIBLE} and the "
            f"driver show here; found cuda:{max(places)}."
        )


def check_tf32(dtype: str, device: str) -> None:
    """Raise UsageError where TF32 is asked for and nothing could compute in it."""
    if dtype == "tf32" and device == "cpu":
        raise UsageError("--dtype tf32 is a way in which GPUs multiply, and this runs on the CPU. Use --dtype float32.")


@dataclass(frozen=True)
class Placement:
    """Where units run. ``device``: what a worker with a GPU of its own is told; ``inline``: what this process is.

    ``gpus``: names of the GPUs to share out; empty without GPUs and where workers are not ours (Dask).
    """

    device: str
    inline: str
    gpus: tuple[str, ...] = ()


def place(asked: str, names: Sequence[str]) -> Placement:
    """The placement for ``--device``, checked before, when these GPUs are visible."""
    if asked == "cpu" or not names:
        return Placement("cpu", "cpu")
    places = parse_device(asked)
    chosen = tuple(names[place] for place in places) or tuple(names)
    return Placement("cuda", f"cuda:{places[0]}" if places else "cuda", chosen)


@dataclass(frozen=True)
class Slots:
    """``count`` places for workers, the i-th on GPU ``gpus[i mod len(gpus)]``; who holds one has its file locked."""

    folder: str
    count: int
    gpus: tuple[str, ...]

    @classmethod
    def of(cls, gpus: Sequence[str], count: int) -> Slots | None:
        """The slots of this process's workers; None without GPUs."""
        return cls(_slot_folder(), count, tuple(gpus)) if gpus else None

    def name_of(self, index: int) -> str:
        """The GPU of a slot."""
        return self.gpus[index % len(self.gpus)]

    def bind(self) -> None:
        """In a worker: wait for a free slot, hold it as long as the process lives, show CUDA its GPU alone.

        The system frees the lock of a worker that dies, however it dies. A worker beyond ``count`` (joblib starts two
        processes even for one job) stands by here, before it takes any work.
        """
        from filelock import FileLock, Timeout

        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            raise RuntimeError("CUDA was started in this worker before its GPU was chosen")
        while True:
            for index in range(self.count):
                lock = FileLock(Path(self.folder) / f"{index}.lock")
                try:
                    lock.acquire(blocking=False)
                except Timeout:
                    continue
                _held.append(lock)
                os.environ[VISIBLE] = self.name_of(index)
                return
            time.sleep(_NAP_SECONDS)


_held: list[Any] = []


@functools.cache
def _slot_folder() -> str:
    """A folder for as long as this process lives: the same for all its runs, which share their workers."""
    folder = tempfile.mkdtemp(prefix="trace-offline-gpus-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def resolve_device(name: str) -> str:
    """``auto`` → ``cuda`` when there is one, else ``cpu``."""
    if name != "auto":
        return name
    return "cuda" if visible_gpus() else "cpu"


def has_gpu(device: str) -> bool:
    """Whether a resolved device is a GPU, beside which the CPU can do other work."""
    return device.startswith("cuda")


def open_device(device: str) -> None:
    """Start the device. Raises UsageError when PyTorch cannot use the GPU that the driver shows."""
    if not device.startswith("cuda"):
        return
    import torch

    try:
        torch.zeros(1, device=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"PyTorch cannot use the GPU ({device}, {VISIBLE}={os.environ.get(VISIBLE, 'not set')}): {reason} Use "
            "--device cpu, or a PyTorch that fits the driver."
        ) from error


@functools.cache
def device_facts(device: str) -> dict[str, str]:
    """What of a GPU can change a number, stored with every analysis; nothing for the CPU."""
    if not device.startswith("cuda"):
        return {}
    import torch

    return {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda or torch.version.hip)}

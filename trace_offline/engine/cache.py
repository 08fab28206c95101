"""The activation cache: hidden states of earlier passes, so that an analysis of them needs no network.

One file for each network and evaluation set, in a folder that several stores may share. Its name holds a digest of what
decides the numbers (weights, configuration, factory, evaluation set, number type, device, threads, versions of the
libraries) and a digest of its own bytes, which is verified before anything is read. Files are replaced whole; the ones
used least recently make room for new ones.
"""

from __future__ import annotations

import inspect
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_offline.core.beside import beside
from trace_offline.core.errors import UsageError
from trace_offline.core.hashing import canonical_json, digest, file_digest
from trace_offline.engine.unit import Unit, WorkSettings, model_fingerprint

if TYPE_CHECKING:
    from trace_offline.activations.kept import Kept, Recorder

AUTO, OFF = "auto", "off"
DEFAULT_SIZE = "20GB"
RECORDER = "/cache"
"""Name of the recorder among the collectors; no analyzer's collector is called so."""

_SUFFIX = ".safetensors"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_LOCK_SECONDS = 120
_ABANDONED_SECONDS = 24 * 3600


def parse_size(text: str, option: str = "--cache-size") -> int:
    """``20GB``, ``500 MiB`` or plain bytes → bytes. Raises UsageError, naming the option, for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or int(float(match[1]) * factor) < 1:
        raise UsageError(f'{option}: expected a size such as 20GB, 500MB or 2GiB; found "{text}".')
    return int(float(match[1]) * factor)


def cache_folder(cache: str | None, size: str | None, store: Path) -> Path | None:
    """Where the cache is: ``auto`` (or a size alone) beside the store, a folder, or None when it is off."""
    if cache == OFF or (cache is None and size is None):
        return None
    return beside(store.absolute(), ".cache") if cache in (None, AUTO) else Path(str(cache)).absolute()


@dataclass(frozen=True)
class ActivationCache:
    """The files of a folder, together at most ``most_bytes``. Safe to use from many processes at once."""

    folder: Path
    most_bytes: int

    def find(self, key: str) -> tuple[Kept | None, str | None]:
        """(what is kept under this key, or None; a note when a damaged file was removed)."""
        from safetensors import SafetensorError

        from trace_offline.activations.kept import Kept

        note = None
        for path in sorted(self.folder.glob(f"{key}.*{_SUFFIX}"), key=_age, reverse=True):
            try:
                if file_digest(path) != path.name.split(".")[1]:
                    path.unlink(missing_ok=True)
                    note = f"{path}: the checksum is wrong; the file was removed and its activations computed again."
                    continue
                kept = Kept.open(path)
                os.utime(path)
            except FileNotFoundError:
                continue  # made room for another since it was listed
            except (OSError, SafetensorError) as error:
                note = f"{path}: cannot be read from the activation cache ({error}); computed again."
                continue
            if kept is not None and all(_digest_of(name) == value for name, value in kept.sources.items()):
                return kept, note
        return None, note

    def keep(self, key: str, recorder: Recorder, sources: Mapping[str, str]) -> str | None:
        """Write what was recorded in place of what is there; a note when that cannot be."""
        from safetensors import SafetensorError  # a full disk is one, no OSError

        if recorder.too_large:
            return (
                f"the hidden states of one checkpoint take more than --cache-size ({self.most_bytes:,} bytes): not "
                "kept. Give more room, or read fewer tokens."
            )
        fresh = self.folder / f"{key}.{socket.gethostname()}-{os.getpid()}.new"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            recorder.save(fresh, sources)
            if fresh.stat().st_size > self.most_bytes:
                return f"a checkpoint's activations and index take more than --cache-size ({self.most_bytes:,} bytes)."
            target = self.folder / f"{key}.{file_digest(fresh)}{_SUFFIX}"
            with self._locked():
                for old in self.folder.glob(f"{key}.*{_SUFFIX}"):
                    old.unlink(missing_ok=True)
                self._make_room(fresh.stat().st_size)
                os.replace(fresh, target)
        except (OSError, TimeoutError, SafetensorError) as error:
            return f"the activation cache {self.folder} cannot be written ({error}); the run goes on without it."
        finally:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
        return None

    def _make_room(self, needed: int) -> None:
        """Remove the files used least recently until ``needed`` bytes fit; and what killed workers left."""
        for left in self.folder.glob("*.new"):
            if time.time() - _age(left) > _ABANDONED_SECONDS:
                left.unlink(missing_ok=True)
        sizes: dict[Path, int] = {}
        for path in sorted(self.folder.glob(f"*{_SUFFIX}"), key=_age):
            with suppress(FileNotFoundError):  # a damaged one that its reader removed
                sizes[path] = path.stat().st_size
        total = sum(sizes.values())
        for path in sizes:
            if total + needed <= self.most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= sizes[path]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        import filelock

        # filelock's Timeout is a TimeoutError.
        with filelock.FileLock(self.folder / ".lock", timeout=_LOCK_SECONDS):
            yield


class LazyModel:
    """Stands for a network whose hidden states are kept; opened only when more is asked of it than is known."""

    def __init__(self, kept: Kept, device: str, dtype: str, load: Callable[[], Any]) -> None:
        self.n_layers, self.device, self.dtype = kept.n_layers, device, dtype
        self._load = load
        self._opened: Any = None

    def opened(self) -> Any:
        """The network itself."""
        if self._opened is None:
            self._opened = self._load()
        return self._opened

    def __getattr__(self, name: str) -> Any:
        return getattr(self.opened(), name)


@dataclass
class UnitActivations:
    """The shared pass of one unit, with the cache where it is on. ``notes``: what a user should know of it."""

    cache: ActivationCache | None = None
    key: str = ""
    device: str = "cpu"
    dtype: str = "float32"
    kept: Kept | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, unit: Unit, device: str) -> UnitActivations:
        """What is kept for the checkpoint of this unit."""
        settings = unit.settings
        found = cls(device=device, dtype=settings.dtype)
        if settings.cache is None or not _is_identified(unit):
            return found
        found.cache = ActivationCache(Path(settings.cache), settings.cache_bytes)
        found.key = cache_key(unit, device)
        found.kept, note = found.cache.find(found.key)
        found.notes += [note] if note else []
        return found

    def model(self, load: Callable[[], Any], *, hidden_only: bool) -> Any:
        """The network, opened now, or later where ``hidden_only`` analyses may be served without it."""
        return LazyModel(self.kept, self.device, self.dtype, load) if self.kept and hidden_only else load()

    def run_pass(
        self, model: Any, evaluation: Any, collectors: Mapping[str, Any], rows_at_most: int | None = None
    ) -> dict[str, BaseException]:
        """``run_pass`` over the network, or from what is kept when that is enough; what is new is kept."""
        from trace_offline.activations.forward import run_pass
        from trace_offline.activations.kept import Recorder, replay
        from trace_offline.activations.places import Places

        if self.cache is None:
            return run_pass(model, evaluation, collectors, rows_at_most=rows_at_most)
        asked = Places.read_by(collectors.values(), evaluation.n_examples)
        covered = self.kept is not None and self.kept.places.covers(asked)
        if isinstance(model, LazyModel):
            if self.kept and covered and not any(item.needs_logits for item in collectors.values()):
                return replay(self.kept, evaluation, collectors, self.device)
            model = model.opened()
        sources = code_of(model.module)
        if covered or not len(asked) or sources is None:
            return run_pass(model, evaluation, collectors, rows_at_most=rows_at_most)
        wanted = asked | self.kept.places if self.kept else asked
        recorder = Recorder(wanted, self.cache.most_bytes)
        broken = run_pass(model, evaluation, {**collectors, RECORDER: recorder}, rows_at_most=rows_at_most)
        if broken.pop(RECORDER, None) is None and not recorder.empty:
            note = self.cache.keep(self.key, recorder, sources)
            self.notes += [note] if note else []
        return broken


def cache_key(unit: Unit, device: str) -> str:
    """Everything that decides the hidden states of a checkpoint, down to the last bit."""
    settings: WorkSettings = unit.settings
    assert unit.checkpoint.fingerprint is not None  # see _is_identified
    model = model_fingerprint(unit.checkpoint.fingerprint, settings)
    return digest("activations", model, settings.evaluation_hash, settings.dtype, _machine(device, settings.threads))


def code_of(module: Any) -> dict[str, str] | None:
    """File → digest, of the code of every class in a network; None when some of it is in no file."""
    found = {}
    for kind in {type(part) for part in module.modules()}:
        try:
            name = inspect.getsourcefile(kind)
        except TypeError:
            name = None
        value = None if name is None else _digest_of(name)
        if name is None or value is None:
            return None
        found[name] = value
    return found


def _is_identified(unit: Unit) -> bool:
    """Does the fingerprint stand for all that the network is made of, and for the files as they are now?

    Not when code comes with the checkpoint, nor when the configuration may lie where the fingerprint does not look.
    """
    checkpoint, settings = unit.checkpoint, unit.settings
    if checkpoint.fingerprint is None or not unit.stamps or settings.trust_remote_code:
        return False
    if settings.model_factory is not None or checkpoint.config is not None:
        return True
    folder = Path(checkpoint.weight_files[0]).parent
    above = (folder, *list(folder.parents)[:2])
    return checkpoint.layout == "nanogpt" and not any((place / "config.json").exists() for place in above)


def _machine(device: str, threads: int) -> str:
    """What else the last bit of a sum depends on."""
    from importlib.metadata import version

    import torch

    parts: list[Any] = [torch.backends.cpu.get_cpu_capability(), threads, torch.get_float32_matmul_precision()]
    if device.startswith("cuda"):
        parts = [torch.cuda.get_device_name(device), torch.get_float32_matmul_precision()]
    libraries = [version(package) for package in ("torch", "transformers", "trace-offline")]
    return canonical_json([device.split(":")[0], *parts, *libraries])


def _age(path: Path) -> float:
    """When a file was used last; 0 when it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _digest_of(name: str) -> str | None:
    try:
        return file_digest(Path(name))
    except OSError:
        return None

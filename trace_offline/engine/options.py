"""What a user asks of a run, checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_offline.core.errors import UsageError, nearest
from trace_offline.core.hashing import file_digest
from trace_offline.core.steps import StepSelection
from trace_offline.engine.cache import AUTO, DEFAULT_SIZE, OFF, parse_size
from trace_offline.engine.devices import Placement, check_device, check_tf32, parse_device, place, visible_gpus

DTYPES = ("float32", "tf32", "float64", "bfloat16", "float16")
EXECUTORS = ("inline", "joblib", "dask")
NOW, LATER, ONLY = "now", "later", "only"


@dataclass(frozen=True)
class Shard:
    """Every ``count``-th checkpoint, beginning with the ``index``-th (from 1)."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``i/n`` with 1 ≤ i ≤ n. Raises UsageError for anything else."""
        left, slash, right = text.partition("/")
        if slash and left.strip().isdecimal() and right.strip().isdecimal() and 1 <= int(left) <= int(right):
            return cls(int(left), int(right))
        raise UsageError(f'--shard: expected i/n with i from 1 to n, such as 3/16; found "{text}".')


@dataclass(frozen=True)
class AnalyzeOptions:
    """One `analyze`. ``params``: analyzer → parameter → value, only what differs from the defaults.

    ``executor``: inline, joblib or dask; None chooses inline for one job without a timeout, else joblib.
    ``cache``: ``auto`` (a folder beside the store), ``off`` or a folder; a ``cache_size`` alone means ``auto``.
    ``hub_disk_limit``: the most that downloads from the hub may take (``50GB``); ``remove_downloads``: each goes after
    its analyses are stored.
    ``among``: only these checkpoints (``checkpoint_id``), where no ``steps`` are named.
    ``rotating``: the training deletes old checkpoints; one that is gone before it was read is no failure, and
    comparisons count those that are gone since. ``compare``: ``now``; ``later`` only extracts what comparisons need;
    ``only`` compares what is extracted and measures nothing.
    ``named``: whether the user named the run (None: if ``run`` is given), so that its weights may have been replaced.
    """

    source: str
    evaluation_set: Path
    store: Path
    analyzers: tuple[str, ...] = ()
    params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    run: str | None = None
    steps: StepSelection | None = None
    revisions: str | None = None
    device: str = "auto"
    jobs: int | None = None
    dtype: str = "float32"
    seed: int = 0
    model_factory: str | None = None
    blocks: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    force: bool = False
    heldout_set: Path | None = None
    executor: str | None = None
    timeout: float | None = None
    scheduler: str | None = None
    shard: Shard | None = None
    rotating: bool = False
    compare: str = NOW
    among: frozenset[str] | None = None
    cache: str | None = None
    cache_size: str | None = None
    hub_disk_limit: str | None = None
    remove_downloads: bool | None = None
    named: bool | None = None

    def check(self) -> None:
        """Raise UsageError for a value that cannot be used."""
        if self.dtype not in DTYPES:
            raise UsageError(
                f'--dtype: "{self.dtype}" is not known.{nearest(self.dtype, DTYPES)} There are: {", ".join(DTYPES)}.'
            )
        parse_device(self.device)
        if self.executor != "dask":  # its workers look for themselves
            check_device(self.device)
        if self.model_factory is not None:
            from trace_offline.checkpoints.factory import load_factory

            load_factory(self.model_factory)
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"--jobs: expected 1 or more, found {self.jobs}.")
        parse_size(self.cache_size or DEFAULT_SIZE)
        if self.hub_disk_limit is not None:
            parse_size(self.hub_disk_limit, "--hub-disk-limit")
        self._check_executor()

    def _check_executor(self) -> None:
        if self.executor is not None and self.executor not in EXECUTORS:
            raise UsageError(
                f'--executor: "{self.executor}" is not known.{nearest(self.executor, EXECUTORS)} '
                f"There are: {', '.join(EXECUTORS)}."
            )
        if self.timeout is not None and not self.timeout > 0:
            raise UsageError(f"--timeout: expected seconds above 0, found {self.timeout:g}.")
        if self.executor == "inline" and self.timeout is not None:
            raise UsageError(
                "--executor inline cannot end an analysis that hangs, because it runs in the same process. Leave out "
                "--timeout, or use --executor joblib."
            )
        if self.executor == "inline" and (self.jobs or 1) > 1:
            raise UsageError(f"--executor inline is one process; --jobs {self.jobs} needs --executor joblib.")
        if (self.executor == "dask") != (self.scheduler is not None):
            raise UsageError(
                "--executor dask and --scheduler ADDRESS go together, such as --executor dask --scheduler "
                "tcp://10.0.0.1:8786."
            )

    def stored(self) -> dict[str, Any]:
        """What ``rerun`` needs to repeat this run; goes into the ``runs`` table."""
        return {
            "revisions": self.revisions,
            "dtype": self.dtype,
            "seed": self.seed,
            "device": self.device,
            "jobs": self.jobs,
            "model_factory": self.model_factory,
            "blocks": self.blocks,
            "tokenizer": self.tokenizer and str(Path(self.tokenizer).absolute()),
            "trust_remote_code": self.trust_remote_code,
            "heldout_set": self.heldout_set and str(Path(self.heldout_set).absolute()),
            "cache": self.cache if self.cache in (None, AUTO, OFF) else str(Path(self.cache).absolute()),
            "cache_size": self.cache_size,
            "hub_disk_limit": self.hub_disk_limit,
            "remove_downloads": self.remove_downloads,
        }


def factory_digest(model_factory: str | None) -> str:
    """Hash of the source file of a factory, so that an edited factory is another model; empty without a factory."""
    if model_factory is None:
        return ""
    import inspect

    from trace_offline.checkpoints.factory import load_factory

    source = inspect.getsourcefile(inspect.unwrap(load_factory(model_factory)))
    return file_digest(Path(source)) if source else ""


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def choose_device(options: AnalyzeOptions) -> Placement:
    """Where the units of a run are computed; Dask's workers resolve ``auto`` where they are.

    Raises UsageError for TF32 without a GPU.
    """
    if options.executor == "dask":
        return Placement(options.device, options.device)
    names = () if options.device == "cpu" else visible_gpus(surely=options.device != "auto")
    found = place(options.device, names)
    check_tf32(options.dtype, found.device)
    return found


def choose_jobs(asked: int | None, gpus: int, largest_bytes: int) -> tuple[int, int]:
    """(worker processes, threads of each). One process for each of ``gpus``, where there are any.

    Depends on the machine and the models only, never on how much work is left: the number of threads can change the
    last digit of a sum, and a resumed run must give what an uninterrupted one gives. A worker with a GPU has two lanes
    (``engine.beside``), each with so many threads, whether or not both have work.
    """
    available = cores()
    if asked is not None:
        jobs = asked
    elif gpus:
        jobs = gpus
    else:
        # A worker holds the weights, their gradients and a Krylov basis: about eight copies of the weights, plus the
        # libraries themselves.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        jobs = max(1, min(available, int(0.6 * memory / (8 * largest_bytes + 1.5e9))))
    lanes = 2 if gpus else 1
    return jobs, max(1, min(available // (jobs * lanes), _asked_threads() or available))


def _asked_threads() -> int | None:
    """``OMP_NUM_THREADS``, by which users of shared machines say how many threads a process may have."""
    asked = os.environ.get("OMP_NUM_THREADS", "").strip()
    return int(asked) if asked.isdecimal() and int(asked) > 0 else None

"""What the fault drills share: analyzers that leave traces and obey orders, runs that are made to be killed, witnesses.

The analyzers are a plug-in of their own, found by whatever process imports it. Each writes a line into ``ran`` when it
runs, so that a test can tell what was computed twice, and its numbers are the sum of the weights it was shown, so that
a test can tell whose they are. An order is a file that one analysis finds when it runs.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_offline import Store
from trace_offline.engine.board import Board

TESTS = Path(__file__).parent
HISTORY = "select * exclude (analysis_id) from history where is_latest order by all"
ARRAYS = "select * exclude (analysis_id) from arrays where is_latest order by all"
LAYERS = 7
"""Measurements of one analysis of the plug-in; each has one array and one artifact besides."""
PLUG_INS = ("first", "second", "third")

_PLUG_IN = """
import os, resource, shutil, signal, time
from pathlib import Path
from trace_offline import Analyzer, Array, Artifact, Measurement, MetricSpec

def obey(name, step):
    order = Path(os.environ["DRILL"], "orders", f"{name}-{step}")
    if not order.exists():
        return
    verb, *words = order.read_text().split()
    if "once" in words:
        order.unlink()
    if verb == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if verb == "hang":
        time.sleep(600)
    if verb == "eat":
        before = resource.getrlimit(resource.RLIMIT_AS)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**24, before[1]))
        try:
            bytearray(2**30)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
    if verb == "truncate":
        os.truncate(words[0], 1000)
    if verb == "overwrite":  # in place, as a training that saves under the same name
        content = Path(words[0]).read_bytes()
        with open(words[1], "r+b") as file:
            file.write(content)
    if verb == "replace":  # another file under the same name
        shutil.copyfile(words[0], words[1] + ".tmp")
        os.replace(words[1] + ".tmp", words[1])
    if verb == "remove":
        shutil.rmtree(words[0])

class Drilled(Analyzer):
    version = "1"
    summary = reference = "a drill"
    metrics = (MetricSpec("weight", "1", "sum of the weights"),)

    def measure(self, context):
        with open(Path(os.environ["DRILL"], "ran"), "a") as file:
            file.write(f"{self.name} {context.step}\\n")
        obey(self.name, context.step)
        time.sleep(float(os.environ.get("DRILL_PAUSE", 0)))
        total = sum(each.double().sum().item() for each in context.model.module.parameters())
        for layer in range(7):
            yield Measurement("weight", total * (layer + 1), layer=layer)
        # Roots do not compress.
        yield Array("weights", tuple(total * k**0.5 for k in range(int(os.environ.get("DRILL_ARRAY", 2)))))
        yield Artifact("witness", repr(total).encode(), ".txt")

class First(Drilled):
    name = "first"

class Second(Drilled):
    name = "second"

class Third(Drilled):
    name = "third"

if os.environ.get("DRILL_GPU"):  # the CPU plays the GPU: what runs on the host gets a lane of its own
    import trace_offline.engine.worker
    trace_offline.engine.worker.has_gpu = lambda device: True
    Second.on_host = Third.on_host = True
"""

# Imports everything once, then forks a run for every line it reads; says its process, and later how it ended.
_SERVER = """
import json, os, resource, signal, sys, traceback
import torch
torch.set_num_threads(1)
from tiny_models import gpt_neox
import trace_offline.checkpoints.loading, trace_offline.engine.analyze, trace_offline.engine.worker
from trace_offline import TraceOfflineError, analyze
from trace_offline.analyzers.registry import registry
gpt_neox()
registry()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def run(asked):
    os.setsid()
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, null), (1, null), (2, log)):
        os.dup2(source, target)
    os.environ.update(asked["environment"])
    if asked["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["largest_file"],) * 2)
    try:
        summary = analyze(**asked["options"])
        for text in (*summary.problems, *summary.warnings, *summary.set_aside):
            print(text, file=sys.stderr)
        return summary.exit_code
    except TraceOfflineError as error:
        print("Error:", error.message, file=sys.stderr)
        return 2
    except BaseException:
        traceback.print_exc()
        return 70

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = run(json.loads(line))
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _installed() -> Path:
    """The plug-in, installed in a folder of its own."""
    site = Path(tempfile.mkdtemp(prefix="drills-"))
    atexit.register(shutil.rmtree, site, ignore_errors=True)
    info = site / "drill_party-1.dist-info"
    info.mkdir()
    (site / "drill_party.py").write_text(_PLUG_IN)
    (site / "drill_server.py").write_text(_SERVER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: drill-party\nVersion: 1\n")
    names = "".join(f"{name} = drill_party:{name.capitalize()}\n" for name in PLUG_INS)
    (info / "entry_points.txt").write_text(f"[trace_offline.analyzers]\n{names}")
    return site


def environment(folder: Path, **more: str) -> dict[str, str]:
    """What a process needs to find the plug-in, and the plug-in to find its folder."""
    paths = [str(_installed()), str(TESTS), str(TESTS.parent)]
    return {"PYTHONPATH": os.pathsep.join(paths), "DRILL": str(folder), "OMP_NUM_THREADS": "1", **more}


@dataclass
class Drill:
    """One drill: a folder with the orders, the trace of what ran, and the log of the runs."""

    folder: Path
    more: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "orders").mkdir(parents=True, exist_ok=True)

    def order(self, analyzer: str, step: int, text: str) -> None:
        """What this analysis does when it runs."""
        (self.folder / "orders" / f"{analyzer}-{step}").write_text(text)

    def ran(self) -> Counter[tuple[str, int]]:
        """How often each (analyzer, step) ran."""
        path = self.folder / "ran"
        lines = path.read_text().splitlines() if path.exists() else []
        return Counter((name, int(step)) for name, step in (line.split() for line in lines))

    def said(self) -> str:
        """What the runs of the server wrote to stderr."""
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def start(self, source: Path, evaluation: Path, store: Path, largest_file: int | None = None, **more: Any) -> Run:
        """A run of the public ``analyze`` in a process and session of its own."""
        options = {"source": source, "evaluation_set": evaluation, "store": store, "analyzers": PLUG_INS, "jobs": 1}
        asked = {
            "options": {**options, **more}, "log": str(self.folder / "log"), "largest_file": largest_file,
            "environment": {**environment(self.folder), "DRILL_PAUSE": "0", "DRILL_ARRAY": "2", **self.more},
        }  # fmt: skip
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(asked, default=str) + "\n")
        server.stdin.flush()
        return Run(int(server.stdout.readline()))

    def run(self, source: Path, evaluation: Path, store: Path, **more: Any) -> int:
        """The exit code of a run that nobody disturbs."""
        return self.start(source, evaluation, store, **more).wait()

    def command(self, source: Path, evaluation: Path, store: Path, *more: str) -> subprocess.Popen[str]:
        """The same through the real command line, in a session of its own."""
        order = [
            *(sys.executable, "-m", "trace_offline.cli.main", "analyze", str(source)),
            *("--evaluation-set", str(evaluation), "--store", str(store)),
            *(part for name in PLUG_INS for part in ("--analyzer", name)),
            *more,
        ]
        whole = {**os.environ, **environment(self.folder), **self.more}
        return subprocess.Popen(order, stderr=subprocess.PIPE, text=True, env=whole, start_new_session=True)


@dataclass
class Run:
    """A run that the server forked; only one at a time."""

    pid: int
    code: int | None = None

    def wait(self) -> int:
        """How it ended; negative: the signal that ended it."""
        if self.code is None:
            stream = _server().stdout
            assert stream is not None
            self.code = int(stream.readline())
        return self.code

    def kill(self) -> bool:
        """End it and all it started with SIGKILL; False when it had ended by itself."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            # Not its own session yet, or over.
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL


@functools.cache
def _server() -> subprocess.Popen[str]:
    whole = {**os.environ, **environment(_installed())}
    server = subprocess.Popen(
        [sys.executable, str(_installed() / "drill_server.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=whole,
    )  # fmt: skip

    def close() -> None:
        server.kill()
        server.wait()
        for stream in (server.stdin, server.stdout):
            if stream is not None:
                stream.close()

    atexit.register(close)
    return server


def save_steps(folder: Path, steps: range) -> None:
    """Tiny checkpoints, each with weights of its own."""
    import torch
    from tiny_models import gpt_neox

    from trace_offline.recording import save_checkpoint

    model = gpt_neox()
    for step in steps:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1e-3 * (step + 1))
        save_checkpoint(model, folder, step)


@dataclass
class Witness:
    """A reader that remembers what it was shown, and finds it unchanged whenever it looks again.

    ``seen``: analysis → (when it was finished, its numbers); ``ran``: how often it had run when it was first seen.
    """

    store: Path
    drill: Drill
    seen: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    ran: dict[tuple[str, int], int] = field(default_factory=dict)

    def look(self) -> int:
        """Check and remember; how many analyses are there."""
        if not self.store.exists():
            assert not self.seen
            return 0
        store = Store.open(self.store)
        ran = self.drill.ran()
        found = contents(store)
        for key, content in self.seen.items():
            assert found.get(key) == content, f"{key} was acknowledged and is lost or changed"
        for name, step in places(store):
            times = self.ran.setdefault((name, step), ran[name, step])
            assert ran[name, step] == times, f"{name} at step {step} was computed again after it was acknowledged"
        self.seen = found
        return len(found)


def places(store: Store) -> list[tuple[str, int]]:
    """(analyzer, step) of the plug-in's analyses that are there."""
    rows = store.sql("select analyzer, step from status where status = 'ok'").to_pylist()
    return [(row["analyzer"], row["step"]) for row in rows if row["analyzer"] in PLUG_INS]


def contents(store: Store) -> dict[str, tuple[Any, ...]]:
    """Of every good analysis what a reader sees; asserts that none is there twice or by half."""
    rows = store.sql(
        """with numbers as (
          select analysis, count(*) as n, list_sort(list((layer, component, task, metric, value))) as v
          from measurements group by analysis),
        vectors as (select analysis, count(*) as n, list_sort(list((layer, name, "values"))) as v
          from array_values group by analysis),
        files as (select analysis, count(*) as n, list_sort(list((name, path, sha256))) as v
          from artifacts group by analysis)
        select a.analysis_id, a.analyzer, a.finished_at, numbers.n as n_numbers, vectors.n as n_arrays,
          files.n as n_files, numbers.v::varchar as numbers, vectors.v::varchar as arrays, files.v::varchar as files
        from analyses a left join numbers using (analysis) left join vectors using (analysis)
        left join files using (analysis) where a.status = 'ok'"""
    ).to_pylist()
    found = {}
    for row in rows:
        assert row["analysis_id"] not in found
        if row["analyzer"] in PLUG_INS:
            assert (row["n_numbers"], row["n_arrays"], row["n_files"]) == (LAYERS, 1, 1), row
        found[row["analysis_id"]] = (row["finished_at"], row["numbers"], row["arrays"], row["files"])
    return found


def same_content(store: Path, whole: Path) -> None:
    """Assert that two stores hold the same history."""
    one, two = Store.open(store), Store.open(whole)
    assert one.sql(HISTORY).num_rows > 0
    assert one.sql(HISTORY).equals(two.sql(HISTORY))
    assert one.sql(ARRAYS).equals(two.sql(ARRAYS))
    one.check()


def nothing_left(store: Path) -> None:
    """Assert that a run left nothing beside the store but what belongs to it."""
    assert not Board.of(store).folder.exists()
    assert not Path(f"{store}.lock").exists()
    assert not list(store.parent.rglob("*.new"))
    assert not Path(f"{store}.wal").exists()


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own of this size at ``place``; skips with the reason where none can be mounted."""
    import pytest

    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root on Linux to mount a small file system")
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "drill", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def enlarge(place: Path, size: str) -> None:
    """Make room on a disk of ``small_disk``."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


def until(condition: Any, seconds: float = 120.0) -> None:
    """Wait until ``condition()`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)

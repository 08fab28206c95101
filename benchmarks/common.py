"""What every benchmark shares: the machine's name, medians, and the result file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor kind and cores, without anything that identifies a host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores}-core {platform.machine()} CPU"


def versions(*names: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def median_seconds(body: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> float:
    for _ in range(warmup):
        body()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        body()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def alternating(
    bodies: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each body, ``repeats`` of them, taken in turn so that a drifting machine meets all of them alike.

    ``clock``: ``time.process_time`` counts the processor's seconds, which a shared machine stretches less.
    """
    for body in list(bodies.values()) * warmup:
        body()
    times: dict[str, list[float]] = {name: [] for name in bodies}
    for _ in range(repeats):
        for name, body in bodies.items():
            started = clock()
            body()
            times[name].append(clock() - started)
    return times


def result(case: str, ours: float, unit: str, **more: Any) -> dict[str, Any]:
    """One row; ``peer``, ``floor`` and ``ratio`` are null where there is nothing to compare with."""
    row: dict[str, Any] = {"case": case, "ours": ours, "peer": None, "peer_name": None, "floor": None, "ratio": None}
    row |= {"unit": unit, "device": machine(), "date": datetime.date.today().isoformat()} | more
    row.setdefault("versions", versions("duckdb"))
    return row


def load(name: str) -> list[dict[str, Any]]:
    """The committed rows, for a benchmark that measures some of its cases again; none when there is no file yet."""
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return rows


def save(name: str, rows: list[dict[str, Any]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['case']}: {row['ours']:.4g} {row['unit']}" + (f" (limit {row['limit']})" if "limit" in row else "")
        )

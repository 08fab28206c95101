"""A store of ten million numbers: README queries, append, rerun, merge, compact.

10 runs × 150 steps × 24 layers × 280 metrics. The queries are read out of README.md, so that what is measured is what
the reader is told to type. Peers: the same numbers in one Parquet file read, filtered and rewritten with pandas, and
one JSON file for each checkpoint and metric.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from common import alternating, result, save, versions
from many_numbers import LAYERS, RUNS, STEPS, halves_in, identity, layer_rows, outcomes, steps_of_a_run

from trace_offline import Store
from trace_offline.core.types import Outcome
from trace_offline.store.compact import compact
from trace_offline.store.merge import merge
from trace_offline.store.writer import Writer

LIBRARIES = ("duckdb", "pyarrow", "pandas")
RERUN = "intrinsic_dimension"


def readme_queries() -> list[str]:
    """The SQL blocks of README.md."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    return [block.split("```", 1)[0].strip() for block in text.split("```sql\n")[1:]]


COLUMNS = ["run", "step", "layer", "analyzer", "component", "task", "label", "metric", "value", "stderr", "n"]


def flat(store: Store, path: Path) -> None:
    """What a user without a database would keep: one Parquet file with every number in a row."""
    pq.write_table(store.sql(f"select {', '.join(COLUMNS)} from history where is_latest"), path)


def _learned(path: Path) -> pd.DataFrame:
    curve = pd.read_parquet(
        path, columns=["run", "task", "layer", "step", "value", "label"],
        filters=[("analyzer", "==", "probe"), ("metric", "==", "macro_f1")],
    )  # fmt: skip
    curve = curve[curve.label.isna()]
    keys = ["run", "task", "layer"]
    bar = 0.9 * curve.groupby(keys).value.transform("max")
    return curve[curve.value >= bar].groupby(keys).step.min().reset_index()


def _one_metric(path: Path, columns: list[str], metric: str, **equal: str) -> pd.DataFrame:
    filters = [("metric", "==", metric), *((name, "==", value) for name, value in equal.items())]
    found = pd.read_parquet(path, columns=[*columns, "label"], filters=filters)
    found = found if "label" in equal else found[found.label.isna()]
    return found[columns].sort_values(columns[:2])


def _sharpest(path: Path) -> pd.DataFrame:
    found = pd.read_parquet(
        path, columns=["run", "step", "value"], filters=[("metric", "==", "eigenvalue"), ("label", "==", "1")]
    )
    return found.loc[found.groupby("run").value.idxmax()]


PANDAS: tuple[Callable[[Path], pd.DataFrame], ...] = (
    lambda path: _one_metric(path, ["step", "layer", "value"], "macro_f1", task="role"),
    _learned,
    lambda path: _one_metric(path, ["layer", "step", "value", "stderr", "n"], "twonn", component="residual"),
    _sharpest,
)
"""The queries of README.md, in their order, on the Parquet file."""


def query_rows(store: Store, empty: Store, parquet: Path | None, when: str, numbers: int) -> list[dict[str, Any]]:
    """Every query of README.md: ours, pandas on Parquet, and the same query where there is nothing to read."""
    rows = []
    queries = readme_queries()
    assert len(queries) == len(PANDAS), "README.md has other queries now; give each its pandas here"
    for query, pandas in zip(queries, PANDAS, strict=True):
        bodies: dict[str, Callable[[], Any]] = {
            "ours": lambda q=query: store.sql(q),
            "floor": lambda q=query: empty.sql(q),
        }
        found = store.sql(query).num_rows
        if parquet is not None:
            assert found == len(pandas(parquet)), query
            bodies["peer"] = lambda p=pandas: p(parquet)
        seconds = {name: statistics.median(each) for name, each in alternating(bodies, 3).items()}
        text = " ".join(query.split())
        row = result(
            f"README query{when}: {text[:90]}", **seconds, unit="s", limit=0.3, numbers=numbers, rows=found,
            floor_name="the same query on an empty store", versions=versions(*LIBRARIES),
        )  # fmt: skip
        if parquet is not None:
            row |= {"peer_name": "pandas on one Parquet file", "ratio": seconds["peer"] / seconds["ours"]}
        rows.append(row)
    return rows


def json_row(store: Store, folder: Path) -> dict[str, Any]:
    """One curve from one JSON file for each checkpoint and metric, as pico-analyze keeps its numbers."""
    shutil.rmtree(folder, ignore_errors=True)
    curve = (
        "select step, layer, value from history where run = 'run0' and metric = 'macro_f1' and task = 'role' "
        "and label is null and is_latest order by step, layer"
    )
    for step, layer, value in zip(*(column.to_pylist() for column in store.sql(curve).columns), strict=True):
        place = folder / "run0" / f"step_{step}"
        place.mkdir(parents=True, exist_ok=True)
        with (place / "macro_f1.jsonl").open("a") as stream:
            stream.write(json.dumps({"layer": layer, "task": "role", "label": None, "value": value}) + "\n")

    def read() -> list[tuple[int, int, float]]:
        rows = []
        for path in (folder / "run0").glob("*/macro_f1.jsonl"):
            step = int(path.parent.name.removeprefix("step_"))
            for line in path.open():
                item = json.loads(line)
                if item["task"] == "role" and item["label"] is None:
                    rows.append((step, item["layer"], item["value"]))
        return sorted(rows)

    assert read() == [tuple(row.values()) for row in store.sql(curve).to_pylist()]
    seconds = {
        name: statistics.median(each)
        for name, each in alternating({"ours": lambda: store.sql(curve), "peer": read}).items()
    }
    return result(
        "one metric of one run, all layers and steps, sorted store", **seconds, unit="s",
        peer_name="one JSON file for each checkpoint and metric, this metric and task only",
        ratio=seconds["peer"] / seconds["ours"], versions=versions(*LIBRARIES),
    )  # fmt: skip


def write_seconds(folder: Path, count: int) -> float:
    """Floor of whatever writes ``count`` bytes: one file, written and synchronised."""
    content = np.random.default_rng(0).bytes(count)
    target = folder / "floor.bin"
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with target.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        times.append(time.perf_counter() - started)
    target.unlink()
    return statistics.median(times)


def append_rows(path: Path, folder: Path, numbers: int) -> list[dict[str, Any]]:
    """Recording analyses that are new, one transaction each: small ones, and the largest of the shape."""
    rows = []
    fresh = 0
    with Writer.open(path) as writer:
        for size, times in ((1, 40), (None, 20)):
            template = outcomes(0, 1000, "probe", size)
            count = len(template.measurements)

            def record(template: Outcome = template) -> None:
                nonlocal fresh
                fresh += 1
                outcome = replace(template, analysis_id=f"new{fresh:029x}")
                writer.record(outcome, identity(f"new-{fresh}", "probe"))

            frame = pd.DataFrame([{name: getattr(m, name) for name in COLUMNS[2:] if name != "analyzer"}
                                  for m in template.measurements])  # fmt: skip

            def shard(frame: pd.DataFrame = frame) -> None:
                nonlocal fresh
                fresh += 1
                target = folder / f"{fresh}.parquet"
                with target.with_suffix(".new").open("wb") as stream:
                    frame.to_parquet(stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(target.with_suffix(".new"), target)

            before = path.stat().st_size
            seconds = {
                name: statistics.median(each)
                for name, each in alternating({"ours": record, "peer": shard}, times).items()
            }
            rows.append(
                result(
                    f"append one analysis of {count:,} number{'s' if count > 1 else ''}", **seconds, unit="s",
                    peer_name="one synchronised Parquet file each", floor=write_seconds(folder, 16 * count),
                    floor_name="its values and errors, written and synchronised",
                    ratio=seconds["peer"] / seconds["ours"], numbers=numbers, rows=count,
                    grown=path.stat().st_size - before, versions=versions(*LIBRARIES),
                )
            )  # fmt: skip
        with writer.transaction() as con:
            con.execute("delete from measurements where analysis in (select analysis from analyses "
                        "where analysis_id like 'new%')")  # fmt: skip
            con.execute("delete from analyses where analysis_id like 'new%'")
    return rows


def rerun_row(path: Path, parquet: Path, folder: Path, numbers: int) -> dict[str, Any]:
    """One analyzer of one run measured again: its old numbers replaced, one transaction an analysis."""
    steps = steps_of_a_run()
    again = [(outcomes(0, step, RERUN), identity(f"0-{step}", RERUN)) for step in steps]
    count = sum(len(outcome.measurements) for outcome, _ in again)

    def ours() -> None:
        with Writer.open(path) as writer:
            for outcome, known in again:
                writer.record(outcome, known)

    def peer() -> None:
        frame = pd.read_parquet(parquet)
        old = (frame.run == "run0") & (frame.analyzer == RERUN)
        pd.concat([frame[~old], frame[old].assign(value=0.5)]).to_parquet(folder / "again.parquet")
        os.replace(folder / "again.parquet", parquet)

    seconds = {name: statistics.median(each) for name, each in alternating({"ours": ours, "peer": peer}, 1, 0).items()}
    return result(
        f"rerun: {len(steps)} analyses of one analyzer replaced", **seconds, unit="s",
        peer_name="Parquet file read, changed and written with pandas", floor=write_seconds(folder, 16 * count),
        floor_name="the values and errors, written and synchronised", ratio=seconds["peer"] / seconds["ours"],
        numbers=numbers, rows=count, versions=versions(*LIBRARIES),
    )  # fmt: skip


def merge_row(halves: list[Path], target: Path, folder: Path) -> dict[str, Any]:
    files = [folder / f"{path.stem}.parquet" for path in halves]
    for path, file in zip(halves, files, strict=True):
        flat(Store.open(path), file)

    def ours() -> None:
        target.unlink(missing_ok=True)
        merge(halves, target)

    def peer() -> None:
        pd.concat([pd.read_parquet(file) for file in files]).to_parquet(folder / "both.parquet")

    seconds = {name: statistics.median(each) for name, each in alternating({"ours": ours, "peer": peer}, 1, 0).items()}
    size = target.stat().st_size
    return result(
        "merge two stores of five million numbers", **seconds, unit="s",
        peer_name="two Parquet files joined with pandas", floor=write_seconds(folder, size),
        floor_name="the bytes of the result, written and synchronised",
        ratio=seconds["peer"] / seconds["ours"], bytes=size, versions=versions(*LIBRARIES),
    )  # fmt: skip


def compact_row(path: Path, folder: Path) -> dict[str, Any]:
    """No peer: a file that is only ever appended to has nothing to give back."""
    before = path.stat().st_size
    started = time.perf_counter()
    compact(path)
    seconds = time.perf_counter() - started
    return result(
        "compact ten million numbers", seconds, "s", floor=write_seconds(folder, path.stat().st_size),
        floor_name="the bytes of the result, written and synchronised", before=before, after=path.stat().st_size,
        versions=versions(*LIBRARIES),
    )  # fmt: skip


def measure(folder: Path, runs: int = RUNS) -> Iterator[dict[str, Any]]:
    """All rows. ``folder``: where files go; halves that are there are taken."""
    halves = halves_in(folder, runs)
    numbers = runs * STEPS * LAYERS * len(layer_rows())
    path, parquet = folder / "all.duckdb", folder / "flat.parquet"
    yield merge_row(halves, path, folder)
    (folder / "empty.duckdb").unlink(missing_ok=True)
    Writer.open(folder / "empty.duckdb").close()
    store, empty = Store.open(path), Store.open(folder / "empty.duckdb")
    assert store.scalar("select count(*) from history") == numbers
    yield from append_rows(path, folder, numbers)
    flat(store, parquet)
    size, flat_size = path.stat().st_size, parquet.stat().st_size
    yield from query_rows(store, empty, parquet, "", numbers)
    yield rerun_row(path, parquet, folder, numbers)
    yield compact_row(path, folder)
    assert store.scalar("select count(*) from history") == numbers
    yield from query_rows(store, empty, None, " (compacted)", numbers)
    yield json_row(store, folder / "json")
    yield result(
        "size of the store", size / 1e6, "MB", peer=flat_size / 1e6, peer_name="one Parquet file",
        floor=numbers * 16 / 1e6, floor_name="its values and errors", ratio=flat_size / size,
        numbers=numbers, compacted=path.stat().st_size / 1e6, versions=versions(*LIBRARIES),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the files here, and take those that are there")
    parser.add_argument("--prepare", action="store_true", help="only make the two stores")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        if asked.prepare:
            halves_in(folder)
        else:
            rows: list[dict[str, Any]] = []
            for row in measure(folder):
                rows.append(row)
                save("store", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The Dask executor on a local cluster: the same rows, and one crash for a worker that always dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SmallSeries

from trace_offline import Store, analyze
from trace_offline.core.errors import UsageError
from trace_offline.core.types import AnalysisStatus, Checkpoint, CheckpointState, Outcome
from trace_offline.engine import worker
from trace_offline.engine.unit import AnalysisRequest, Unit, WorkSettings

distributed = pytest.importorskip("distributed", reason="needs the optional extra dask")

# The library warns about its own sockets and about ports that are taken.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import dask

    folder = tmp_path_factory.mktemp("dask")
    tests = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1, "temporary-directory": str(folder)}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(folder)
        ) as cluster,
    ):
        yield cluster.scheduler_address


def unit(number: int, names: tuple[str, ...]) -> Unit:
    checkpoint = Checkpoint(f"step{number}", "hf_folder", CheckpointState.COMPLETE, step=number)
    requests = tuple(AnalysisRequest(f"{number}-{name}", name, "1", {}) for name in names)
    return Unit(checkpoint, requests, WorkSettings("e", "e", "cpu", "float32", 0, 1))


def body(work: Unit) -> list[Outcome]:
    listener = worker._listening[-1]
    done = []
    for request in work.requests:
        listener.tell(work.key, "step", request.analyzer, (request.analysis_id,))
        time.sleep(0.2)  # the event must be out before the worker dies
        if request.analyzer == "dies" and work.checkpoint.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if request.analyzer == "hangs" and work.checkpoint.step == 1:
            time.sleep(600)
        done.append(Outcome(request.analysis_id, AnalysisStatus.OK))
    return done


@pytest.mark.slow
def test_a_worker_that_always_dies_and_one_that_hangs_cost_one_analysis_each(scheduler: str) -> None:
    from trace_offline.engine.cluster import run_dask

    units = [unit(number, ("first", "hangs", "dies", "last")) for number in range(5)]
    found: dict[str, Outcome] = {}
    for _, outcomes in run_dask(iter(units), body, scheduler, 8.0):
        for outcome in outcomes:
            assert outcome.analysis_id not in found
            found[outcome.analysis_id] = outcome
    assert len(found) == 20
    bad = {key: str(outcome.message) for key, outcome in found.items() if outcome.status is not AnalysisStatus.OK}
    assert sorted(bad) == ["1-hangs", "2-dies"]
    assert "longer than --timeout 8 allows" in bad["1-hangs"]
    assert "KilledWorker" in bad["2-dies"]


@pytest.mark.slow
def test_all_executors_give_identical_rows(small_series: SmallSeries, tmp_path: Path, scheduler: str) -> None:
    ways: dict[str, dict[str, Any]] = {
        "inline": {"executor": "inline", "jobs": 1},
        "joblib": {"executor": "joblib", "jobs": 2},
        "dask": {"executor": "dask", "scheduler": scheduler, "jobs": 2},
    }
    sql = "select * exclude (analysis_id) from history order by all"
    tables = {}
    for name, options in ways.items():
        store = tmp_path / f"{name}.duckdb"
        summary = analyze(
            small_series.run, small_series.evaluation, store, analyzers=("loss", "output", "weights"), **options
        )
        assert summary.exit_code == 0, summary.problems
        tables[name] = Store.open(store).sql(sql)
    assert tables["inline"].num_rows > 100
    assert tables["joblib"].equals(tables["inline"])
    assert tables["dask"].equals(tables["inline"])


def threads_of(work: Unit) -> list[Outcome]:
    return [Outcome(request.analysis_id, AnalysisStatus.OK, str(work.settings.threads)) for request in work.requests]


@pytest.mark.slow
def test_a_unit_has_the_threads_of_its_worker_and_the_run_is_told_how_many_there_are(tmp_path: Path) -> None:
    import dask

    from trace_offline.engine.cluster import run_dask

    told: list[int] = []
    with (
        dask.config.set({"temporary-directory": str(tmp_path)}),
        distributed.LocalCluster(n_workers=1, threads_per_worker=3, processes=False, dashboard_address=None) as cluster,
    ):
        ended = list(run_dask(iter([unit(0, ("loss",))]), threads_of, cluster.scheduler_address, None, told.append))
    assert [[outcome.message for outcome in outcomes] for _, outcomes in ended] == [["3"]]
    assert set(told) == {1}


def test_no_scheduler_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from trace_offline.engine import cluster

    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 0.5)
    with pytest.raises(UsageError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9.*dask scheduler"):
        list(cluster.run_dask(iter([]), body, "tcp://127.0.0.1:9", None))

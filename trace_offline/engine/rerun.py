"""The verb ``rerun``: one analyzer over the whole history again, from nothing but the store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trace_offline.analyzers.base import Scope
from trace_offline.analyzers.registry import registry
from trace_offline.core.errors import StoreError, TraceOfflineError, UsageError, nearest
from trace_offline.core.steps import StepSelection
from trace_offline.engine.analyze import NothingSelected, Summary, analyze
from trace_offline.engine.heldout import uses_heldout
from trace_offline.engine.interrupt import StopRequest
from trace_offline.engine.options import AnalyzeOptions
from trace_offline.engine.progress import Progress
from trace_offline.engine.unit import HELDOUT
from trace_offline.query.reader import Store
from trace_offline.store.writer import revision_patterns

_KEPT = ("revisions", "dtype", "seed", "device", "jobs", "model_factory", "blocks", "tokenizer", "trust_remote_code",
         "cache", "cache_size", "hub_disk_limit", "remove_downloads")  # fmt: skip

# One row for each way a run was analyzed, and whether this analyzer took part in it.
_REQUESTS = """
select q.run, r.source, e.hash, e.name, e.path, q.dtype, q.seed, q.options,
  exists (select 1 from planned p join checkpoints c using (checkpoint_id) where c.run = q.run and p.analyzer = ?
    and p.evaluation_set = q.evaluation_set and p.dtype = q.dtype and p.seed = q.seed) as took_part
from requests q join runs r using (run) join evaluation_sets e on e.hash = q.evaluation_set order by q.asked_at
"""


def rerun(
    store: Path,
    analyzer: str,
    params: Mapping[str, Any] | None = None,
    *,
    run: str | None = None,
    steps: StepSelection | None = None,
    force: bool = False,
    source: str | None = None,
    evaluation_set: Path | None = None,
    heldout_set: Path | None = None,
    device: str | None = None,
    jobs: int | None = None,
    cache: str | None = None,
    cache_size: str | None = None,
    hub_disk_limit: str | None = None,
    remove_downloads: bool | None = None,
    executor: str | None = None,
    timeout: float | None = None,
    scheduler: str | None = None,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> list[Summary]:
    """Run one analyzer again over every run of a store (or the one named).

    Each run is repeated as it was asked for: on each of its evaluation sets, with its number type, seed, factory, and
    with each pattern of revisions. Where the analyzer took part in some of these, only those; where in none, all.
    Without ``steps`` the checkpoints are those that the analyzer was asked to measure there, or, where it has not run
    yet, those that any analyzer was; comparisons are made over the whole series. Parameters start from those of the
    analyzer's latest analysis there, however it ended; ``params`` changes single ones. What is stored with these very
    parameters is left alone unless ``force``. ``source``, ``evaluation_set`` and ``heldout_set`` say where the files
    are now, when they moved. An analyzer that looks at a second evaluation set gets the one of its latest analysis
    there (none, if that had none); where it has not run yet, the one that the run was last asked with.

    A run that cannot be repeated (its files are gone) is reported in its summary and leaves the others alone; when
    there is only one, the error is raised.
    """
    registry().get(analyzer)
    opened = Store.open(store)
    rows = _requests(opened, analyzer, run)
    if source is not None and len({row["run"] for row in rows}) > 1:
        raise UsageError("--source moves one run; name it with --run.")
    if evaluation_set is not None and len({row["hash"] for row in rows}) > 1:
        names = ", ".join(sorted({row["name"] for row in rows}))
        raise UsageError(f"--evaluation-set moves one evaluation set, but these were used: {names}. Use analyze.")
    summaries: list[Summary] = []
    for row in rows:
        if summaries and summaries[-1].interrupted:
            break
        kept = json.loads(row["options"])
        latest = _latest(opened, row, analyzer)
        patterns = revision_patterns(kept)
        options = AnalyzeOptions(
            source=source or row["source"],
            evaluation_set=evaluation_set or Path(row["path"]),
            store=store,
            analyzers=(analyzer,),
            params={analyzer: {**_own_params(latest or {}, analyzer), **(params or {})}},
            run=row["run"],
            named=run is not None,
            steps=steps,
            among=_places(opened, row, analyzer),
            force=force,
            executor=executor,
            timeout=timeout,
            scheduler=scheduler,
            heldout_set=heldout_set or _heldout_path(opened, latest, kept, analyzer),
            **{
                **{name: value for name, value in kept.items() if name in _KEPT},
                **_given(
                    device=device,
                    jobs=jobs,
                    cache=cache,
                    cache_size=cache_size,
                    hub_disk_limit=hub_disk_limit,
                    remove_downloads=remove_downloads,
                ),
            },
        )
        begun, before = len(summaries), _sequence(opened)
        for pattern in patterns:
            if len(summaries) > begun and summaries[-1].interrupted:
                break
            among = options.among
            if among is not None and len(summaries) > begun:
                among -= _measured_since(opened, before, analyzer)  # patterns may overlap
            try:
                summaries.append(analyze(replace(options, revisions=pattern, among=among), progress, stop))
            except TraceOfflineError as error:
                if isinstance(error, NothingSelected) and len(summaries) > begun:
                    continue
                if len(rows) == len(patterns) == 1 or isinstance(error, StoreError):
                    raise
                problem = f"{row['run']} on {row['name']}: {error.message}"
                summaries.append(Summary(row["run"], store, 0, failed=1, problems=[problem]))
    return summaries


def _requests(store: Store, analyzer: str, run: str | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = store.sql(_REQUESTS, [analyzer]).to_pylist()
    if run is not None:
        names = sorted({row["run"] for row in rows})
        if run not in names:
            raise UsageError(f'--run: the store has no run "{run}".{nearest(run, names)} It has: {", ".join(names)}.')
        rows = [row for row in rows if row["run"] == run]
    if not rows:
        raise StoreError(f"{store.path} holds no run yet; use `trace-offline analyze` first.")
    took_part = {row["run"] for row in rows if row["took_part"]}
    return [row for row in rows if row["took_part"] or row["run"] not in took_part]


def _places(store: Store, row: Mapping[str, Any], analyzer: str) -> frozenset[str] | None:
    """The checkpoints that were asked for, revisions that could not be had included; None for a comparison."""
    if registry().get(analyzer).scope is not Scope.CHECKPOINT:
        return None
    found = store.sql(
        "select p.checkpoint_id from planned p join checkpoints c using (checkpoint_id) where c.run = ? "
        "and p.evaluation_set = ? and p.dtype = ? and p.seed = ? and (p.analyzer = ? or not ?) "
        "union select checkpoint_id from checkpoints where run = ? and fingerprint is null "
        "and state in ('complete', 'duplicate')",
        [row["run"], row["hash"], row["dtype"], row["seed"], analyzer, row["took_part"], row["run"]],
    )
    return frozenset(found.column(0).to_pylist()) or None


def _sequence(store: Store) -> int:
    return int(store.scalar("select coalesce(max(sequence), 0) from analyses"))


def _measured_since(store: Store, sequence: int, analyzer: str) -> frozenset[str]:
    found = store.sql(
        "select p.checkpoint_id from planned p join analyses a using (analysis_id) where a.analyzer = ? "
        "and a.sequence > ?",
        [analyzer, sequence],
    )
    return frozenset(found.column(0).to_pylist())


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _latest(store: Store, row: Mapping[str, Any], analyzer: str) -> dict[str, Any] | None:
    """Stored parameters of the latest analysis, or of the latest that was planned; None where there is none yet."""
    found = store.scalar(
        "select p.params from planned p left join analyses a using (analysis_id) join checkpoints c "
        "using (checkpoint_id) where c.run = ? and p.analyzer = ? and p.evaluation_set = ? and p.dtype = ? "
        "and p.seed = ? order by a.sequence desc nulls last, p.planned_at desc limit 1",
        [row["run"], analyzer, row["hash"], row["dtype"], row["seed"]],
    )
    return None if found is None else dict(json.loads(found))


def _own_params(stored: Mapping[str, Any], analyzer: str) -> dict[str, Any]:
    """Without those a newer version of the analyzer no longer has."""
    known = registry().get(analyzer).Params.model_fields
    return {name: value for name, value in stored.items() if name in known}


def _heldout_path(
    store: Store, latest: Mapping[str, Any] | None, kept: Mapping[str, Any], analyzer: str
) -> Path | None:
    if not uses_heldout(registry(), analyzer):
        return None
    if latest is None:
        return Path(kept["heldout_set"]) if kept.get("heldout_set") else None
    if HELDOUT not in latest:
        return None
    path = store.scalar("select path from evaluation_sets where hash = ?", [latest[HELDOUT]])
    return None if path is None else Path(path)

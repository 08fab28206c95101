"""The verb ``rerun``: one analyzer over the whole history again, from nothing but the store."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_offline.analyzers.registry import registry
from trace_offline.core.errors import StoreError, UsageError, nearest
from trace_offline.core.steps import StepSelection
from trace_offline.engine.analyze import Summary, analyze
from trace_offline.engine.options import AnalyzeOptions
from trace_offline.engine.progress import Progress
from trace_offline.query.reader import Store


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
    device: str | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> list[Summary]:
    """Run one analyzer again over every run of a store (or the one named).

    Parameters start from those of the analyzer's latest analysis of that run; ``params`` changes single ones. What is
    already stored with these very parameters is left alone unless ``force``. ``source`` and ``evaluation_set`` say
    where the files are now, when they moved.
    """
    registry().get(analyzer)
    opened = Store.open(store)
    rows = opened.sql("select run, source, evaluation_set_path, options from runs order by created_at").to_pylist()
    if run is not None:
        names = [row["run"] for row in rows]
        if run not in names:
            raise UsageError(f'--run: the store has no run "{run}".{nearest(run, names)} It has: {", ".join(names)}.')
        rows = [row for row in rows if row["run"] == run]
    if not rows:
        raise StoreError(f"{store} holds no run yet; use `trace-offline analyze` first.")
    if source is not None and len(rows) > 1:
        raise UsageError("--source moves one run; name it with --run.")
    summaries = []
    for row in rows:
        kept = json.loads(row["options"])
        before = _latest_params(opened, row["run"], analyzer)
        options = AnalyzeOptions(
            source=source or row["source"],
            evaluation_set=evaluation_set or Path(row["evaluation_set_path"]),
            store=store,
            analyzers=(analyzer,),
            params={analyzer: {**before, **(params or {})}},
            run=row["run"],
            steps=steps,
            force=force,
            **{name: value for name, value in kept.items() if name in _KEPT},
        )
        options = dataclasses.replace(options, device=device or options.device, jobs=jobs or options.jobs)
        summaries.append(analyze(options, progress))
    return summaries


_KEPT = ("revisions", "dtype", "seed", "device", "jobs", "model_factory", "blocks", "tokenizer", "trust_remote_code")


def _latest_params(store: Store, run: str, analyzer: str) -> dict[str, Any]:
    """Parameters of the latest analysis, without those a newer version of the analyzer no longer has."""
    found = store.scalar(
        "select a.params from analyses a join planned p using (analysis_id) join checkpoints c using (checkpoint_id) "
        "where c.run = ? and a.analyzer = ? and a.status in ('ok', 'not_applicable') order by a.sequence desc limit 1",
        [run, analyzer],
    )
    known = registry().get(analyzer).Params.model_fields
    return {name: value for name, value in json.loads(found or "{}").items() if name in known}

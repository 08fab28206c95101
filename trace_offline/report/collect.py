"""From a store to the numbers of a page: which charts there are, their series, and what could not be measured.

The result is plain JSON: ``runs`` (header), ``sections`` (one for each run, evaluation set and analyzer, with its
charts), ``troubles`` and ``missing`` (tables of reasons), ``notes``. Only the latest word on each checkpoint is shown.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_offline.core.errors import UsageError, nearest
from trace_offline.store.connection import check_version, connection

if TYPE_CHECKING:
    import duckdb

MOST_NUMBERS = 300_000
"""Numbers a page holds at most, about 10 MB. Above that first classes, then checkpoints are left out, with a note."""

_STEPPED = "from history where is_latest and run = $run and step is not null"
_NUMBERED = (
    "from (select * replace (dense_rank() over (order by checkpoint) - 1 as step) from history "
    "where is_latest and run = $run) where true"
)


def collect(store_path: Path, run: str | None = None, *, most_numbers: int = MOST_NUMBERS) -> dict[str, Any]:
    """Everything the page shows, as JSON-ready values.

    Raises StoreError when the store cannot be read and UsageError for a run it does not have.
    """
    with connection(store_path, read_only=True) as con:
        check_version(con, store_path)
        names = [row["run"] for row in _rows(con, "select run from runs order by run")]
        if run is not None and run not in names:
            raise UsageError(
                f'{store_path} has no run "{run}".{nearest(run, names)} Its runs: {", ".join(names) or "none"}.'
            )
        data: dict[str, Any] = {"store": store_path.name, "runs": [], "sections": [], "troubles": [], "missing": []}
        data["notes"] = []
        for name in names if run is None else [run]:
            data["runs"].append(_header(con, name))
            data["sections"] += _sections(con, name, most_numbers, data["notes"])
            data["troubles"] += _troubles(con, name)
            data["missing"] += _missing(con, name)
    return data


def _rows(con: duckdb.DuckDBPyConnection, query: str, **parameters: Any) -> list[dict[str, Any]]:
    cursor = con.execute(query, parameters) if parameters else con.execute(query)
    columns = [column[0] for column in cursor.description or ()]
    return [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]


def _header(con: duckdb.DuckDBPyConnection, run: str) -> dict[str, Any]:
    """What a reader must know before the first chart: model, checkpoints, evaluation sets, versions."""
    about = _rows(con, "select source, model_type from runs where run = $run", run=run)[0]
    checkpoints = _rows(
        con,
        "select count(*) as n, min(step) as first, max(step) as last, max(tokens_seen) as tokens, "
        "count(*) filter (where state = 'duplicate') as duplicates, "
        "count(*) filter (where state not in ('complete', 'duplicate')) as set_aside "
        "from checkpoints where run = $run",
        run=run,
    )[0]
    sets = _rows(
        con,
        "select distinct e.name, e.hash, e.n_examples, e.n_tokens, e.objective, e.licence from evaluation_sets e "
        "where e.hash in (select a.evaluation_set from analyses a join status s using (analysis_id) "
        "where s.run = $run) order by all",
        run=run,
    )
    stamps = _rows(
        con,
        "select distinct a.versions, a.dtype, a.device, a.seed from analyses a join status s using (analysis_id) "
        "where s.run = $run and a.status = 'ok'",
        run=run,
    )
    found: dict[str, set[str]] = {}
    for stamp in stamps:
        for library, version in json.loads(stamp["versions"] or "{}").items():
            found.setdefault(library, set()).add(str(version))
        for key in ("dtype", "device", "seed"):
            found.setdefault(key, set()).add(str(stamp[key]))
    versions = {key: ", ".join(sorted(values)) for key, values in sorted(found.items())}
    # A page is made to be passed on: it names the folder, not where on this machine it lies.
    about["source"] = about["source"] if "://" in about["source"] else Path(about["source"]).name
    return {"run": run, **about, "checkpoints": checkpoints, "evaluation_sets": sets, "versions": versions}


def _sections(con: duckdb.DuckDBPyConnection, run: str, most: int, notes: list[str]) -> list[dict[str, Any]]:
    numbers = _numbers(con, run, notes)
    condition, parameters = _within(con, numbers, run, most, notes)
    rows = con.execute(
        "select evaluation_set, analyzer, task, component, metric, label, layer, step, tokens_seen, value, stderr, n "
        f"{numbers} {condition} order by evaluation_set, analyzer, task nulls first, component nulls first, metric, "
        "label nulls first, layer nulls first, step, checkpoint",
        parameters,
    ).fetchall()
    settings = _rows(
        con,
        "select evaluation_set, analyzer, analyzer_version as version, params, count(distinct step) as steps, "
        f"min(step) as first, max(step) as last {numbers} "
        "group by all order by evaluation_set, analyzer, first, params",
        run=run,
    )
    tokens = {row[7]: row[8] for row in rows if row[8] is not None}
    grouped: dict[tuple[str, str], dict[tuple[Any, ...], dict[tuple[Any, ...], dict[int, tuple[Any, ...]]]]] = {}
    for evaluation_set, analyzer, task, component, metric, label, layer, step, _, value, stderr, n in rows:
        charts = grouped.setdefault((evaluation_set, analyzer), {})
        series = charts.setdefault((task, component, metric, label is not None), {})
        series.setdefault((label, layer), {})[step] = (value, stderr, n)
    sections = []
    for (evaluation_set, analyzer), charts in sorted(grouped.items(), key=lambda item: _place(*item[0])):
        described = _described(analyzer)
        order = {name: place for place, name in enumerate(described["metrics"])}
        keys = sorted(
            charts, key=lambda key: (key[3], key[0] or "", key[1] or "", order.get(key[2], len(order)), key[2])
        )
        same = [row for row in settings if (row["evaluation_set"], row["analyzer"]) == (evaluation_set, analyzer)]
        sections.append(
            {
                "run": run,
                "evaluation_set": evaluation_set,
                "analyzer": analyzer,
                "summary": described["summary"],
                "reference": described["reference"],
                "settings": [{**row, "params": json.loads(row["params"])} for row in same],
                "charts": [_chart(key, charts[key], described["metrics"], tokens) for key in keys],
            }
        )
    return sections


def _place(evaluation_set: str, analyzer: str) -> tuple[str, int, str]:
    """Built-in analyzers in their own order, others after them by name."""
    from trace_offline.analyzers.registry import DEFAULT

    return evaluation_set, DEFAULT.index(analyzer) if analyzer in DEFAULT else len(DEFAULT), analyzer


def _numbers(con: duckdb.DuckDBPyConnection, run: str, notes: list[str]) -> str:
    """Where the numbers of a run come from (SQL): by step, or by checkpoint where no step is known."""
    stepless, steps, checkpoints = con.execute(
        "select count(distinct checkpoint) filter (where step is null), count(distinct step), "
        "count(distinct checkpoint) filter (where step is not null) "
        "from history where is_latest and run = $run",
        {"run": run},
    ).fetchone() or (0, 0, 0)
    if stepless and not steps:
        notes.append(
            f"{run}: no step is known for any checkpoint; they are numbered from 0 in the order of their names."
        )
        return _NUMBERED
    if stepless:
        notes.append(f"{run}: {stepless} checkpoints without a step are not drawn.")
    if checkpoints > steps:
        notes.append(f"{run}: several checkpoints share a step; the last one by name is drawn.")
    return _STEPPED


def _within(
    con: duckdb.DuckDBPyConnection, numbers: str, run: str, most: int, notes: list[str]
) -> tuple[str, dict[str, Any]]:
    """The condition that keeps a page within ``most`` numbers, and its parameters; what it leaves out is noted."""
    total, unlabelled = con.execute(f"select count(*), count(*) - count(label) {numbers}", {"run": run}).fetchone() or (
        0,
        0,
    )
    if total <= most:
        return "", {"run": run}
    notes.append(
        f"{run}: {total:,} numbers are too many for one page, so those of single classes and ranks are left out; "
        "`trace-offline query` gives them all."
    )
    if unlabelled <= most:
        return "and label is null", {"run": run}
    steps = [row[0] for row in con.execute(f"select distinct step {numbers} order by step", {"run": run}).fetchall()]
    keep = max(2, len(steps) * most // unlabelled)
    chosen = sorted({steps[round(i * (len(steps) - 1) / (keep - 1))] for i in range(keep)})
    notes.append(f"{run}: {len(chosen)} of {len(steps)} steps are shown, evenly chosen, to keep the page small.")
    return "and label is null and list_contains($steps, step)", {"run": run, "steps": chosen}


def _described(analyzer: str) -> dict[str, Any]:
    """Summary, reference and metrics (name → unit, meaning) of an installed analyzer; empty for one that is not."""
    from trace_offline.analyzers.registry import registry

    kind = registry().analyzers.get(analyzer)
    if kind is None:
        return {"summary": "", "reference": "", "metrics": {}}
    metrics = {spec.name: {"unit": spec.unit, "meaning": spec.meaning} for spec in kind.metrics}
    return {"summary": kind.summary, "reference": kind.reference, "metrics": metrics}


def _chart(
    key: tuple[Any, ...],
    found: dict[tuple[Any, ...], dict[int, tuple[Any, ...]]],
    metrics: dict[str, dict[str, str]],
    tokens: dict[int, int],
) -> dict[str, Any]:
    """One chart: steps, and for each series (label, layer) the values, standard errors and numbers of observations."""
    task, component, metric, labelled = key
    steps = sorted({step for values in found.values() for step in values})
    series = []
    for (label, layer), values in sorted(found.items(), key=lambda item: _natural(*item[0])):
        columns = [values.get(step, (None, None, None)) for step in steps]
        series.append(
            {
                "label": label,
                "layer": layer,
                "value": [_short(column[0]) for column in columns],
                "stderr": [_short(column[1]) for column in columns],
                "n": [column[2] for column in columns],
            }
        )
    return {
        "task": task,
        "component": component,
        "metric": metric,
        "labelled": labelled,
        "unit": metrics.get(metric, {}).get("unit", ""),
        "meaning": metrics.get(metric, {}).get("meaning", ""),
        "steps": steps,
        "tokens": [tokens.get(step) for step in steps] if tokens else None,
        "series": series,
        "constant": len(steps) > 1 and all(_constant(line["value"]) for line in series),
    }


def _natural(label: str | None, layer: int | None) -> tuple[Any, ...]:
    """Ranks "2" < "10" as numbers, classes by name; then layers by depth."""
    number = label is not None and label.isdecimal()
    return (not number, int(label) if number and label else 0, label or "", -1 if layer is None else layer)


def _short(value: float | None) -> float | None:
    """Seven significant digits: more than any picture shows, half the bytes."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.7g}")


def _constant(values: list[float | None]) -> bool:
    known = [value for value in values if value is not None]
    return len(known) == len(values) and min(known) == max(known)


def _troubles(con: duckdb.DuckDBPyConnection, run: str) -> list[dict[str, Any]]:
    """What did not come out, grouped by reason: analyses, and checkpoints set aside or served under two steps."""
    analyses = _rows(
        con,
        "select run, analyzer as what, evaluation_set, status, coalesce(message, '') as reason, "
        "list(distinct step order by step) as steps, count(*) as n from status "
        "where run = $run and status <> 'ok' group by all order by status, what, reason",
        run=run,
    )
    checkpoints = _rows(
        con,
        "select run, 'checkpoint ' || checkpoint as what, '' as evaluation_set, state as status, "
        "coalesce(reason, '') as reason, [step] as steps, 1 as n from checkpoints "
        "where run = $run and state <> 'complete' order by step nulls last, checkpoint",
        run=run,
    )
    return analyses + checkpoints


def _missing(con: duckdb.DuckDBPyConnection, run: str) -> list[dict[str, Any]]:
    """Numbers that have no value, grouped by reason."""
    return _rows(
        con,
        "select run, evaluation_set, analyzer, metric, component, task, layer, reason, count(*) as n, "
        "list(distinct step order by step) as steps from history where is_latest and run = $run and value is null "
        "group by all order by analyzer, component, task, layer, reason, metric",
        run=run,
    )

"""Joining stores: shards of one run, or runs measured apart, become one history."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from trace_offline.core.beside import beside
from trace_offline.core.errors import StoreError, UsageError
from trace_offline.store.connection import PATIENCE_SECONDS, check_version, is_conflict
from trace_offline.store.writer import Writer

_KEYED = ("requests", "planned", "fingerprints")
"""Tables whose rows are facts: a row that is there already stays as it is."""


@dataclass
class Merged:
    """What a merge added; ``kept``: analyses that the target had already."""

    store: Path
    sources: int = 0
    runs: int = 0
    checkpoints: int = 0
    analyses: int = 0
    kept: int = 0


def merge(sources: Sequence[Path], target: Path) -> Merged:
    """Bring everything that ``sources`` hold into ``target``, which is made when it does not exist.

    An analysis is identified by its hash, so the same one from two stores is kept once; a successful one wins over a
    failed one. What was measured last is the latest word, whichever store it comes from. Each source is read in one
    transaction of the target: a merge that is killed leaves whole sources or nothing of them, and can be repeated.

    Raises UsageError when two stores give one run other weights at the same step, StoreError for a file that is no
    store, comes from a newer release, or cannot be read.
    """
    sources = [path.absolute() for path in sources]
    target = target.absolute()
    if len(set(sources)) != len(sources) or target in sources:
        raise UsageError(f"merge: every store must be named once, and none may be the target {target}.")
    for path in sources:
        if not path.is_file():
            raise StoreError(f"No store at {path}. Expected a .duckdb file made by `trace-offline analyze`.")
    merged = Merged(target)
    with Writer.open(target) as writer:
        for path in sources:
            _merge_one(writer, path, merged)
    return merged


def _merge_one(writer: Writer, source: Path, merged: Merged) -> None:
    with writer.transaction() as con:
        _attach(con, source)
        check_version(con, source, "src")
        tables = {
            str(name)
            for (name,) in con.execute("select table_name from duckdb_tables() where database_name = 'src'").fetchall()
        }
        _refuse_other_weights(con, source)
        merged.runs += _count(con, "select count(*) from src.runs where run not in (select run from runs)")
        merged.checkpoints += _count(
            con,
            "select count(*) from src.checkpoints where checkpoint_id not in (select checkpoint_id from checkpoints)",
        )
        con.execute(
            """insert into runs select * from src.runs on conflict (run) do update set
            model_type = coalesce(runs.model_type, excluded.model_type)"""
        )
        _evaluation_sets(con)
        _checkpoints(con)
        for table in _KEYED:
            con.execute(f"insert or ignore into {table} by name select * from src.{table}")
        files = _analyses(con, writer.path, merged)
        if "events" in tables:
            con.execute("insert into events by name select * from src.events except select * from events")
        # Before the commit, so that a stored path always exists.
        _copy_files(source, writer.path, files)
    merged.sources += 1


def _attach(con: duckdb.DuckDBPyConnection, source: Path) -> None:
    """Attach read-only, with patience while a run writes to the source."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    quoted = str(source).replace("'", "''")
    while True:
        try:
            con.execute(f"attach '{quoted}' as src (read_only)")
            return
        except duckdb.Error as error:
            if is_conflict(error) and time.monotonic() < deadline:
                con.rollback()
                time.sleep(0.1)
                con.begin()
                continue
            raise StoreError(f"{source} cannot be opened as a store: {str(error).splitlines()[0]}") from error


def _count(con: duckdb.DuckDBPyConnection, sql: str) -> int:
    row = con.execute(sql).fetchone()
    assert row is not None  # an aggregate always has one row
    return int(row[0])


def _refuse_other_weights(con: duckdb.DuckDBPyConnection, source: Path) -> None:
    differing = con.execute(
        """select s.run, s.step from src.checkpoints s join checkpoints t using (checkpoint_id)
        where s.state in ('complete', 'duplicate') and t.state in ('complete', 'duplicate')
        and s.fingerprint <> t.fingerprint order by s.run, s.step limit 1"""
    ).fetchone()
    if differing:
        raise UsageError(
            f'merge: {source} has a run "{differing[0]}" whose weights at step {differing[1]} are not those of the '
            "same run in the target. Two different series must not share one name: analyze one of them again with "
            "--run NAME, or merge it into a store of its own."
        )


def _evaluation_sets(con: duckdb.DuckDBPyConnection) -> None:
    """New sets, under a name that no other set of the target has."""
    con.execute(
        """insert into evaluation_sets select * replace (
          case when name in (select name from evaluation_sets) then name || '-' || left(hash, 8) else name end as name)
        from src.evaluation_sets where hash not in (select hash from evaluation_sets)"""
    )


def _checkpoints(con: duckdb.DuckDBPyConnection) -> None:
    """A fingerprint wins over none, a checkpoint that can be analyzed over one that was set aside."""
    con.execute(
        """insert into checkpoints select * from src.checkpoints on conflict (checkpoint_id) do update set
        fingerprint = coalesce(checkpoints.fingerprint, excluded.fingerprint),
        state = case when checkpoints.state in ('complete', 'duplicate') then checkpoints.state else excluded.state end,
        reason = case when checkpoints.state in ('complete', 'duplicate') then checkpoints.reason
          else excluded.reason end"""
    )


def _analyses(con: duckdb.DuckDBPyConnection, target: Path, merged: Merged) -> dict[str, str]:
    """Analyses with their numbers; returns path in the source → path in the target of the files that belong to them."""
    con.execute(
        """create temp table coming as select s.analysis as old_key, t.analysis is not null as replaces,
          coalesce(t.analysis, (row_number() over (order by t.analysis nulls last, s.analysis)
            + (select coalesce(max(analysis), 0) from analyses))::integer) as new_key
        from src.analyses s left join analyses t using (analysis_id)
        where t.analysis is null or (s.status = 'ok' and t.status <> 'ok')"""
    )
    for table in ("measurements", "array_values", "artifacts"):
        con.execute(f"delete from {table} where analysis in (select new_key from coming where replaces)")
    # Updated in place: a row deleted and inserted again within one transaction trips over its own unique key.
    con.execute(
        """update analyses set status = s.status, message = s.message, seconds = s.seconds, device = s.device,
        versions = s.versions, finished_at = s.finished_at
        from src.analyses s join coming c on c.old_key = s.analysis
        where c.replaces and analyses.analysis = c.new_key"""
    )
    con.execute(
        """insert into analyses by name select s.* replace (c.new_key as analysis)
        from src.analyses s join coming c on c.old_key = s.analysis where not c.replaces"""
    )
    for table in ("measurements", "array_values"):
        con.execute(
            f"""insert into {table} by name select s.* replace (c.new_key as analysis)
            from src.{table} s join coming c on c.old_key = s.analysis"""
        )
    files = {}
    for key, name, path, sha256 in con.execute(
        "select c.new_key, a.name, a.path, a.sha256 from src.artifacts a join coming c on c.old_key = a.analysis"
    ).fetchall():
        # PATH is "STORE.artifacts/ANALYSIS/FILE", relative to the store's folder.
        moved = "/".join((beside(target, ".artifacts").name, *Path(path).parts[-2:]))
        files[str(path)] = moved
        con.execute("insert into artifacts values (?, ?, ?, ?)", [key, name, moved, sha256])
    # The order of ``sequence`` says which analysis is the latest; over stores only the clock can tell.
    con.execute(
        """update analyses set sequence = ranked.place from
        (select analysis, row_number() over (order by finished_at, sequence, analysis) as place from analyses) ranked
        where ranked.analysis = analyses.analysis"""
    )
    added = _count(con, "select count(*) from coming")
    merged.analyses += added
    merged.kept += _count(con, "select count(*) from src.analyses") - added
    con.execute("drop table coming")
    return files


def _copy_files(source: Path, target: Path, artifacts: dict[str, str]) -> None:
    """Artifacts, and the extracts that comparisons of a series are made of."""
    wanted = {source.parent / old: target.parent / new for old, new in artifacts.items()}
    extracts = beside(source, ".extracts")
    for path in extracts.rglob("*"):
        if path.is_file() and not path.name.endswith(".new"):
            wanted[path] = beside(target, ".extracts") / path.relative_to(extracts)
    for old, new in wanted.items():
        if new.exists():
            continue
        new.parent.mkdir(parents=True, exist_ok=True)
        fresh = new.with_name(f"{new.name}.{os.getpid()}.new")
        try:
            shutil.copyfile(old, fresh)
            os.replace(fresh, new)
        except FileNotFoundError as error:
            raise StoreError(
                f"{source} names the file {old}, which is gone; rerun its analyzer --force there."
            ) from error
        finally:
            fresh.unlink(missing_ok=True)

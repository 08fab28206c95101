"""The single writer of a store: one transaction per analysis, so that a killed run loses nothing acknowledged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb
import filelock

from trace_offline.core.beside import beside
from trace_offline.core.errors import StoreError
from trace_offline.core.hashing import canonical_json
from trace_offline.core.types import AnalysisStatus, Checkpoint, Outcome
from trace_offline.store.connection import Waiting, check_version, connection
from trace_offline.store.lock import holder, sign
from trace_offline.store.rows import array_table, checkpoint_row, measurement_table
from trace_offline.store.schema import CREATE, MIGRATIONS, SCHEMA_VERSION, STORAGE_VERSION


def _now() -> datetime:
    # Naive UTC: fetching TIMESTAMP WITH TIME ZONE needs pytz, which DuckDB does not bring.
    return datetime.now(UTC).replace(tzinfo=None)


class Writer:
    """Holds the store's own lock file for its lifetime and DuckDB's lock only for the length of a transaction."""

    def __init__(self, path: Path, lock: filelock.FileLock) -> None:
        self.path = path
        self._lock = lock
        self._waiting: Waiting | None = None
        self._held: duckdb.DuckDBPyConnection | None = None

    @classmethod
    def open(cls, path: Path, *, create: bool = True) -> Writer:
        """Lock the store for writing; create it or bring it to the current schema when needed.

        Raises StoreError when another run writes to it, when it cannot be written, or when it comes from a newer
        release.
        """
        path = path.absolute()
        if not path.parent.is_dir():
            raise StoreError(f"The folder {path.parent} for the store does not exist; make it first.")
        if path.is_dir():
            raise StoreError(f"{path} is a folder; --store expects a file such as history.duckdb.")
        if not create and not path.exists():
            raise StoreError(f"No store at {path}. Run `trace-offline analyze … --store {path.name}` first.")
        lock = filelock.FileLock(f"{path}.lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise StoreError(
                f"Another run is writing to {path} ({holder(lock) or 'it'} holds {path.name}.lock). Wait for it to "
                "end, or give --store another file."
            ) from None
        except OSError as error:
            if _is_full(str(error)):
                raise StoreError(write_failure(path, error)) from error
            raise StoreError(
                f"The store {path} cannot be locked for writing: {error.strerror or error}. Choose a place you may "
                "write to with --store."
            ) from error
        sign(lock)
        writer = cls(path, lock)
        try:
            writer._sweep()
            if not path.exists():
                writer._create()
            writer._migrate()
        except BaseException:
            writer.close()
            raise
        return writer

    @contextmanager
    def patient(self, waiting: Waiting) -> Iterator[None]:
        """Inside, a transaction waits as long as somebody else holds the file, and ``waiting`` is told of it.

        For while work is under way that would be lost: a reader that stays must not end a run.
        """
        self._waiting = waiting
        try:
            yield
        finally:
            self._waiting = None

    def close(self) -> None:
        """Release the lock file. The file itself is removed so that nothing is left behind."""
        if self._lock.is_locked:
            # Unlinked while still held: a process that waits on the old inode finds the path gone and makes a new one.
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sweep(self) -> None:
        """Remove what killed runs left half written beside the store; nobody else writes there now."""
        for folder in (".artifacts", ".extracts"):
            for left in beside(self.path, folder).rglob("*.new"):
                left.unlink(missing_ok=True)

    def _create(self) -> None:
        # Built beside its final name and renamed, so that a killed creation never leaves half a store.
        fresh = self.path.with_name(self.path.name + ".new")
        # A log without its store belongs to one that was removed after a run was killed; DuckDB would refuse the two.
        for left in (fresh, *(path.with_name(f"{path.name}.wal") for path in (fresh, self.path))):
            left.unlink(missing_ok=True)
        try:
            con = duckdb.connect(":memory:")
            try:
                quoted = str(fresh).replace("'", "''")
                con.execute(f"attach '{quoted}' as fresh (storage_version '{STORAGE_VERSION}')")
                con.execute("use fresh")
                con.execute(CREATE)
                con.execute("insert into meta values ('schema_version', ?)", [str(SCHEMA_VERSION)])
                con.execute("use memory")
                con.execute("detach fresh")
            finally:
                con.close()
            os.replace(fresh, self.path)
        except (duckdb.Error, OSError) as error:
            fresh.unlink(missing_ok=True)
            raise StoreError(write_failure(self.path, error)) from error

    def _migrate(self) -> None:
        with self.transaction() as con:
            version = check_version(con, self.path)
            while version < SCHEMA_VERSION:
                con.execute(MIGRATIONS[version])
                version += 1
                con.execute("update meta set value = ? where key = 'schema_version'", [str(version)])

    @contextmanager
    def together(self) -> Iterator[None]:
        """The transactions inside share one opening of the file; each is committed by itself.

        To open and close it costs more than to store an analysis. Nobody else can read meanwhile: keep it short.
        """
        try:
            with self._connection(read_only=False) as con:
                self._held = con
                try:
                    yield
                finally:
                    self._held = None
        except duckdb.Error as error:
            raise StoreError(write_failure(self.path, error)) from error

    @contextmanager
    def transaction(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """One transaction; rolled back when the body raises. DuckDB errors become StoreError."""
        try:
            with nullcontext(self._held) if self._held else self._connection(read_only=False) as con:
                con.begin()
                try:
                    yield con
                except BaseException:
                    _rollback(con)
                    raise
                con.commit()
        except (duckdb.Error, OSError) as error:
            raise StoreError(write_failure(self.path, error)) from error

    def register_run(
        self, run: str, source: str, evaluation_hash: str, options: Mapping[str, Any], model_type: str | None = None
    ) -> None:
        """Record where a run came from and what was asked of it, so that ``rerun`` needs nothing but the store.

        Of several ways to ask for one thing the latest options count, but all patterns of revisions are kept.
        """
        asked = [options["dtype"], options["seed"], options["model_factory"] or "", options["blocks"] or ""]
        with self.transaction() as con:
            earlier = con.execute(
                "select options from requests where run = ? and evaluation_set = ? and dtype = ? and seed = ? "
                "and model_factory = ? and blocks = ?",
                [run, evaluation_hash, *asked],
            ).fetchone()
            patterns = revision_patterns(json.loads(earlier[0])) if earlier else []
            pattern = options.get("revisions")
            options = {**options, "every_revisions": [*(item for item in patterns if item != pattern), pattern]}
            con.execute(
                """insert into runs values (?, ?, ?, ?) on conflict (run) do update set source = excluded.source,
                model_type = coalesce(excluded.model_type, runs.model_type)""",
                [run, source, model_type, _now()],
            )
            con.execute(
                """insert into requests values (?, ?, ?, ?, ?, ?, ?, ?) on conflict do update set
                options = excluded.options, asked_at = excluded.asked_at""",
                [run, evaluation_hash, *asked, canonical_json(options), _now()],
            )

    def register_evaluation_set(self, row: Mapping[str, Any]) -> str:
        """Insert or refresh an evaluation set; keys are the columns of ``evaluation_sets``. Returns its name here.

        ``history`` shows the name, so a name that another set has already gets the first digits of the hash.
        """
        columns = ("hash", "name", "path", "n_examples", "n_tokens", "tokenizer_hash", "objective", "source", "licence")
        with self.transaction() as con:
            known = con.execute("select name from evaluation_sets where hash = ?", [row["hash"]]).fetchone()
            taken = con.execute(
                "select 1 from evaluation_sets where name = ? and hash <> ?", [row["name"], row["hash"]]
            ).fetchone()
            name = str(known[0]) if known else f"{row['name']}-{row['hash'][:8]}" if taken else str(row["name"])
            values = {**row, "name": name}
            con.execute(
                f"""insert into evaluation_sets ({", ".join(columns)}) values (?,?,?,?,?,?,?,?,?)
                on conflict (hash) do update set path = excluded.path""",
                [values.get(column) for column in columns],
            )
        return name

    def register_checkpoints(
        self, run: str, named: Iterable[tuple[str, Checkpoint]], *, everything: bool = False
    ) -> None:
        """Insert or refresh checkpoints given as (short name, checkpoint), in one transaction.

        A known fingerprint is kept when discovery brings none (a hub revision that is not downloaded now).
        ``everything``: this is all that was found; what was set aside earlier is forgotten.
        """
        rows = [checkpoint_row(run, name, checkpoint) for name, checkpoint in named]
        if not rows:
            return
        marks = ", ".join("?" * 15)
        with self.transaction() as con:
            if everything:
                con.execute(
                    "delete from checkpoints where run = ? and state not in ('complete', 'duplicate') "
                    "and checkpoint_id not in (select checkpoint_id from planned)",
                    [run],
                )
            con.executemany(
                f"""insert into checkpoints values ({marks}) on conflict (checkpoint_id) do update set
                checkpoint = excluded.checkpoint, tokens_seen = excluded.tokens_seen, epoch = excluded.epoch,
                layout = excluded.layout, location = excluded.location, revision = excluded.revision,
                state = excluded.state, reason = excluded.reason,
                fingerprint = coalesce(excluded.fingerprint, checkpoints.fingerprint),
                size_bytes = excluded.size_bytes, duplicate_of = excluded.duplicate_of""",
                rows,
            )

    def plan(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Record which analyses belong to which checkpoints (idempotent)."""
        columns = (
            "checkpoint_id", "analysis_id", "fingerprint", "analyzer", "analyzer_version", "params", "evaluation_set",
            "dtype", "seed",
        )  # fmt: skip
        values = [[row[name] for name in columns] + [_now()] for row in rows]
        if not values:
            return
        with self.transaction() as con:
            con.executemany(f"insert or ignore into planned values ({', '.join('?' * 10)})", values)

    def unplan(self, analyses: Iterable[str]) -> None:
        """Forget planned analyses that cannot be made any more, where nothing was stored for them."""
        keys = list(analyses)
        if keys:
            with self.transaction() as con:
                con.execute(
                    "delete from planned where analysis_id in (select unnest(?)) "
                    "and analysis_id not in (select analysis_id from analyses)",
                    [keys],
                )

    def record(self, outcome: Outcome, identity: Mapping[str, Any]) -> None:
        """Store one outcome, replacing an earlier one of the same identity, in one transaction.

        ``identity`` holds fingerprint, analyzer, analyzer_version, params (canonical JSON), evaluation_set, dtype,
        seed. Artifacts are written beside the store before the transaction, so that a stored path always exists.
        """
        artifacts = self._write_artifacts(outcome)
        with self.transaction() as con:
            old = con.execute(
                "select analysis, status from analyses where analysis_id = ?", [outcome.analysis_id]
            ).fetchone()
            if old and old[1] == "ok" and outcome.status in (AnalysisStatus.FAILED, AnalysisStatus.CRASHED):
                # Good numbers are not given up for a failure to make them again.
                text = f"a later attempt {outcome.status.value}: {outcome.message}"
                con.execute("update analyses set message = ? where analysis = ?", [text, old[0]])
                return
            fresh = con.execute(
                "select coalesce(max(analysis), 0) + 1, coalesce(max(sequence), 0) + 1 from analyses"
            ).fetchone()
            assert fresh is not None  # an aggregate always has one row
            ending = [
                outcome.status.value, outcome.message, outcome.seconds, outcome.device,
                json.dumps(outcome.versions, sort_keys=True), int(fresh[1]), _now(),
            ]  # fmt: skip
            if old:
                key = int(old[0])
                for table in ("measurements", "array_values", "artifacts"):
                    con.execute(f"delete from {table} where analysis = ?", [key])
                con.execute(
                    "update analyses set status = ?, message = ?, seconds = ?, device = ?, versions = ?, sequence = ?, "
                    "finished_at = ? where analysis = ?",
                    [*ending, key],
                )
            else:
                key = int(fresh[0])
                con.execute(
                    f"insert into analyses values ({', '.join('?' * 16)})",
                    [
                        key, outcome.analysis_id, identity["fingerprint"], identity["analyzer"],
                        identity["analyzer_version"], identity["params"], identity["evaluation_set"],
                        identity["dtype"], identity["seed"], *ending,
                    ],
                )  # fmt: skip
            if outcome.status is AnalysisStatus.OK:
                rows = measurement_table(key, outcome.measurements)
                con.register("new_measurements", rows)
                con.execute("insert into measurements select * from new_measurements")
                con.unregister("new_measurements")
                if outcome.arrays:
                    con.register("new_arrays", array_table(key, outcome.arrays))
                    con.execute("insert into array_values select * from new_arrays")
                    con.unregister("new_arrays")
                for name, path, sha256 in artifacts:
                    con.execute("insert into artifacts values (?, ?, ?, ?)", [key, name, path, sha256])

    def _write_artifacts(self, outcome: Outcome) -> list[tuple[str, str, str]]:
        written = []
        folder = beside(self.path, ".artifacts") / outcome.analysis_id
        try:
            for artifact in outcome.artifacts:
                folder.mkdir(parents=True, exist_ok=True)
                target = folder / f"{artifact.name}{artifact.suffix}"
                fresh = target.with_name(target.name + ".new")
                fresh.write_bytes(artifact.content)
                os.replace(fresh, target)
                relative = target.relative_to(self.path.parent).as_posix()
                written.append((artifact.name, relative, hashlib.sha256(artifact.content).hexdigest()))
        except OSError as error:
            raise StoreError(write_failure(self.path, error)) from error
        return written

    def remember_fingerprints(self, known: Mapping[tuple[str, int, int], str]) -> None:
        """Keep file digests by (path, size, mtime_ns), so that the next run need not read the files again."""
        rows = [[path, size, mtime, value] for (path, size, mtime), value in known.items()]
        if rows:
            with self.transaction() as con:
                con.executemany("insert or replace into fingerprints values (?, ?, ?, ?)", rows)

    def read(self, sql: str, values: list[Any] | None = None) -> list[tuple[Any, ...]]:
        """Rows of a query on the store, through a short read-only connection."""
        with nullcontext(self._held) if self._held else self._connection(read_only=True) as con:
            return con.execute(sql, values or []).fetchall()

    def _connection(self, *, read_only: bool) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        return connection(self.path, read_only=read_only, waiting=self._waiting)


def revision_patterns(options: Mapping[str, Any]) -> list[str | None]:
    """Every ``--revisions`` a run was asked for with, the latest last (None: without), from its stored options."""
    return list(options.get("every_revisions") or [options.get("revisions")])


def _rollback(con: duckdb.DuckDBPyConnection) -> None:
    # A connection that is already dead (full disk) cannot roll back; closing it discards the transaction all the same.
    with suppress(duckdb.Error):
        con.rollback()


def _is_full(text: str) -> bool:
    signs = ("No space left", "File too large", "quota exceeded", "not enough")
    return any(sign.lower() in text.lower() for sign in signs)


def write_failure(path: Path, error: BaseException, what: str = "the store") -> str:
    """What went wrong on writing, and what to do next."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    full = _is_full(text)
    advice = (
        "The disk is full (or a quota is reached): free some space and run the same command again; "
        "everything stored so far is safe and will not be computed twice."
        if full
        else "Everything stored so far is safe; mend the cause and run the same command again."
    )
    return f"Could not write to {what} {path}: {text.rstrip('.')}. {advice}"

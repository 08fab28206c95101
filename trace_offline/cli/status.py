"""``trace-offline status``."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

# The last word on each checkpoint and analyzer: what failed once and went well since is history.
_TROUBLES = """
select run, step, analyzer, status, message from status
qualify finished_at = max(finished_at) over (partition by run, step, checkpoint, evaluation_set, analyzer)
  and status in ('failed', 'crashed')
order by run, step, analyzer
"""


def running(store: Path) -> list[str]:
    """Lines about a run that is going on: how far it is, and what each worker does now. Empty when there is none."""
    from trace_offline.engine.board import Board

    board = Board.of(store)
    now, lines = time.time(), []
    progress = board.read_progress()
    if progress is not None:
        if progress["host"] == socket.gethostname() and not _alive(progress["pid"]):
            return ["The run that wrote here last was killed; the same command goes on from where it was."]
        left = progress["seconds_left"]
        done = progress["done"] + progress["failed"]
        rate = 60 * done / max(1e-9, progress["at"] - progress["started"])
        lines.append(
            f"{progress['run']}: {progress['done']} analyses done, {progress['failed']} failed, {progress['left']} "
            f"left, {rate:.1f} a minute" + ("" if left is None else f", about {timedelta(seconds=round(left))} to go")
        )
    if (download := board.read_download()) is not None:
        lines.append(download)
    lines += [
        f"worker {item.pid} on {item.host}: {item.checkpoint}, {item.task}, for {now - item.since:.0f} s"
        for item in board.read()
    ]
    return lines


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def show(path: Path, *, as_json: bool) -> int:
    """Print what is planned, done and failed; exit code 0, or 1 when something failed."""
    from trace_offline.query.formats import render
    from trace_offline.query.reader import Store

    store = Store.open(path)
    now = running(store.path)
    troubles = store.sql(_TROUBLES)
    if as_json:
        rows = store.sql("select * from status order by run, step, analyzer").to_pylist()
        print(json.dumps(rows, indent=1, default=str))
        for line in now:
            print(line, file=sys.stderr)
        return 1 if troubles.num_rows else 0
    overview = store.sql(
        "select run, analyzer, count(*) filter (where status = 'ok') as ok, "
        "count(*) filter (where status = 'not_applicable') as not_applicable, "
        "count(*) filter (where status = 'failed') as failed, count(*) filter (where status = 'crashed') as crashed, "
        "count(*) filter (where status = 'planned') as planned, round(sum(seconds), 1) as seconds "
        "from status group by all order by run, analyzer"
    )
    sys.stdout.write(render(overview, "table").decode())
    if now:
        sys.stdout.write("\nNow\n" + "\n".join(now) + "\n")
    if troubles.num_rows:
        sys.stdout.write("\nFailed\n" + render(troubles, "table").decode())
    idle = store.sql(
        "select run, analyzer, message, count(*) as checkpoints from status where status = 'not_applicable' "
        "group by all order by run, analyzer"
    )
    if idle.num_rows:
        sys.stdout.write("\nNot applicable\n" + render(idle, "table").decode())
    aside = store.sql(
        "select run, checkpoint, state, reason from checkpoints where state not in ('complete', 'duplicate') "
        "order by run, checkpoint"
    )
    if aside.num_rows:
        sys.stdout.write("\nSet aside\n" + render(aside, "table").decode())
    return 1 if troubles.num_rows else 0

"""``trace-offline status``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# The last word on each checkpoint and analyzer: what failed once and went well since is history.
_TROUBLES = """
select run, step, analyzer, status, message from status
qualify finished_at = max(finished_at) over (partition by run, step, checkpoint, evaluation_set, analyzer)
  and status in ('failed', 'crashed')
order by run, step, analyzer
"""


def show(path: Path, *, as_json: bool) -> int:
    """Print what is planned, done and failed; exit code 0, or 1 when something failed."""
    from trace_offline.query.formats import render
    from trace_offline.query.reader import Store

    store = Store.open(path)
    troubles = store.sql(_TROUBLES)
    if as_json:
        rows = store.sql("select * from status order by run, step, analyzer").to_pylist()
        print(json.dumps(rows, indent=1, default=str))
        return 1 if troubles.num_rows else 0
    overview = store.sql(
        "select run, analyzer, count(*) filter (where status = 'ok') as ok, "
        "count(*) filter (where status = 'not_applicable') as not_applicable, "
        "count(*) filter (where status = 'failed') as failed, count(*) filter (where status = 'crashed') as crashed, "
        "count(*) filter (where status = 'planned') as planned, round(sum(seconds), 1) as seconds "
        "from status group by all order by run, analyzer"
    )
    sys.stdout.write(render(overview, "table").decode())
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

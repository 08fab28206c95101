"""``trace-offline demo``: the main job on the shipped series."""

from __future__ import annotations

import sys
from pathlib import Path

from trace_offline.core.errors import UsageError

SERIES, EVALUATION = "tiny_series", "tiny_evaluation"

HISTORY = """
select step,
  max(value) filter (where metric = 'loss' and analyzer = 'loss') as loss,
  max(value) filter (where metric = 'macro_f1' and task = 'pos' and label is null) as best_pos_f1,
  max(value) filter (where metric = 'macro_f1' and task = 'role' and label is null) as best_role_f1,
  max(value) filter (where metric = 'control_accuracy' and task = 'role') as best_role_control,
  max(value) filter (where metric = 'twonn' and component = 'residual' and layer = top) as top_twonn,
  max(value) filter (where metric = 'eigenvalue' and label = '1') as top_eigenvalue,
  max(value) filter (where metric = 'trace') as hessian_trace
from history, (select max(layer) as top from history) where is_latest group by step order by step
"""


def find_data(given: Path | None) -> Path:
    """The folder with the shipped series: as given, in the current folder, or in the checkout beside the package."""
    places = [given] if given else [Path("data"), Path(__file__).parents[2] / "data"]
    for place in places:
        if (place / SERIES).is_dir() and (place / EVALUATION).is_dir():
            return place
    looked = ", ".join(str(place) for place in places)
    raise UsageError(
        f"The shipped series was not found (looked in {looked} for {SERIES}/ and {EVALUATION}/). Run the demo in a "
        "checkout of trace-offline, or name its data folder with --data."
    )


def run_demo(store: Path, data: Path | None, jobs: int | None) -> int:
    """Analyze the shipped series, print a table of its history; the exit code."""
    from trace_offline.cli.analysis import ending_well, finish
    from trace_offline.engine.analyze import analyze
    from trace_offline.engine.options import AnalyzeOptions
    from trace_offline.engine.progress import default_progress
    from trace_offline.query.formats import render
    from trace_offline.query.reader import Store

    folder = find_data(data)
    options = AnalyzeOptions(str(folder / SERIES), folder / EVALUATION, store, device="cpu", jobs=jobs)
    with ending_well() as stop:
        summary = analyze(options, default_progress(), stop)
    code = finish([summary], as_json=False)
    sys.stdout.write(render(Store.open(store).sql(HISTORY), "table").decode())
    print(
        f'\nAsk more: trace-offline query {store} "select step, layer, value from history '
        "where metric = 'macro_f1' and task = 'role' and label is null order by step, layer\"",
        file=sys.stderr,
    )
    return code

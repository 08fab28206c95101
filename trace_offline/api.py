"""The verbs of the command line as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_offline.core.steps import parse_steps

if TYPE_CHECKING:
    from trace_offline.engine.analyze import Summary
    from trace_offline.events.find import FoundEvents


def analyze(
    source: str | Path,
    evaluation_set: str | Path,
    store: str | Path,
    *,
    analyzers: Sequence[str] = (),
    params: Mapping[str, Mapping[str, Any]] | None = None,
    steps: str | None = None,
    progress: bool = False,
    **options: Any,
) -> Summary:
    """Analyze every checkpoint of ``source`` on ``evaluation_set`` into ``store``; a no-op for what is there already.

    ``analyzers``: names (default: the five built in); ``params``: analyzer → parameter → value; ``steps``: as on the
    command line ("0,512,1000-5000"); ``options``: run, revisions, device, jobs, dtype, seed, model_factory, blocks,
    tokenizer, trust_remote_code, force, cache ("auto" or a folder: keep hidden states for reruns), cache_size ("20GB"),
    hub_disk_limit ("50GB": the most that downloads from the hub may take), remove_downloads (after use), executor,
    timeout, heldout_set (a second evaluation set, of text held out of training, for the
    analyzers that compare the two). Returns how it ended. Raises TraceOfflineError for unusable input.
    """
    from trace_offline.engine.analyze import analyze as run
    from trace_offline.engine.options import AnalyzeOptions
    from trace_offline.engine.progress import Silent, default_progress

    asked = AnalyzeOptions(
        source=str(source),
        evaluation_set=Path(evaluation_set),
        store=Path(store),
        analyzers=tuple(analyzers),
        params=params or {},
        steps=parse_steps(steps) if steps else None,
        **options,
    )
    return run(asked, default_progress() if progress else Silent())


def rerun(
    store: str | Path,
    analyzer: str,
    params: Mapping[str, Any] | None = None,
    *,
    steps: str | None = None,
    progress: bool = False,
    **options: Any,
) -> list[Summary]:
    """Run one analyzer again over a whole history, changing single parameters; nothing else is touched.

    ``options``: run, force, source, evaluation_set, heldout_set, device, jobs, cache, cache_size, hub_disk_limit,
    remove_downloads. Returns one summary for each run of the store.
    """
    from trace_offline.engine.progress import Silent, default_progress
    from trace_offline.engine.rerun import rerun as again

    return again(
        Path(store),
        analyzer,
        params,
        steps=parse_steps(steps) if steps else None,
        progress=default_progress() if progress else Silent(),
        **options,
    )


def find_events(
    store: str | Path,
    metrics: Sequence[str] = (),
    *,
    analyzers: Sequence[str] = (),
    runs: Sequence[str] = (),
    tasks: Sequence[str] = (),
    labels: Sequence[str] = (),
    layers: Sequence[int] = (),
    evaluation_sets: Sequence[str] = (),
    **settings: Any,
) -> FoundEvents:
    """Find emergence, convergence, peaks, regress and change points and put them into the table ``events``.

    ``metrics``: ``metric``, ``analyzer.metric`` or ``analyzer.metric[task=pos,layer=2]`` (default: the main metrics);
    ``settings``: share, tolerance, confidence, direction, model, kinds. Returns what was found, and why the rest was
    not; ``.to_arrow()`` gives the rows. Raises TraceOfflineError for a selection that matches nothing.
    """
    from trace_offline.events.find import Settings
    from trace_offline.events.find import find_events as find
    from trace_offline.events.selection import Selection

    selection = Selection(metrics, analyzers, runs, tasks, labels, layers, evaluation_sets)
    return find(store, selection, Settings(**settings))

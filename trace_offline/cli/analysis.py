"""``trace-offline analyze`` and ``rerun``: options in, summary out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_offline.cli.config import RunConfig, merge_settings, read_config, split_assignment
from trace_offline.core.errors import UsageError
from trace_offline.core.steps import parse_steps

if TYPE_CHECKING:
    from trace_offline.engine.analyze import Summary
    from trace_offline.engine.interrupt import StopRequest
    from trace_offline.engine.options import AnalyzeOptions

_SHOWN_PROBLEMS = 12
_SLOW_SECONDS = 10.0
_INTERRUPTED = "Interrupted. What was finished is stored; the same command goes on from there."


def run_analyze(given: Mapping[str, Any], assignments: list[str], config: Path | None, *, as_json: bool) -> int:
    """Check the options, run, print the summary; the exit code."""
    from trace_offline.engine.analyze import analyze
    from trace_offline.engine.progress import default_progress

    options = _options("analyze", given, assignments, config)
    with ending_well() as stop:
        summary = analyze(options, default_progress(), stop)
    return finish([summary], as_json=as_json)


def run_watch(
    given: Mapping[str, Any],
    assignments: list[str],
    config: Path | None,
    *,
    interval: float,
    quiet: float | None,
    as_json: bool,
) -> int:
    """Check the options, watch, print the summary; the exit code."""
    from trace_offline.engine.progress import default_progress
    from trace_offline.engine.watch import Watch

    options = _options("watch", given, assignments, config)
    with ending_well() as stop:
        summary = Watch(options, interval, quiet, default_progress(), stop).run()
    return finish([summary], as_json=as_json)


def _options(verb: str, given: Mapping[str, Any], assignments: list[str], config: Path | None) -> AnalyzeOptions:
    merged, params = merge_settings(given, assignments, read_config(config) if config else RunConfig())
    for name, option in (("source", "SOURCE"), ("evaluation_set", "--evaluation-set"), ("store", "--store")):
        if name not in merged:
            raise UsageError(f"{verb} needs {option}. See: trace-offline {verb} --help")
    from trace_offline.engine.options import AnalyzeOptions, Shard

    if "steps" in merged:
        merged["steps"] = parse_steps(merged["steps"])
    if "shard" in merged:
        merged["shard"] = Shard.parse(merged["shard"])
    merged["analyzers"] = tuple(merged.get("analyzers", ()))
    return AnalyzeOptions(**merged, params=params)


def run_rerun(
    store: Path, analyzer: str, assignments: list[str], *, steps: str | None, as_json: bool, **options: Any
) -> int:
    """One analyzer again over the history; the exit code."""
    params = {}
    for text in assignments:
        name, value = split_assignment(text)
        params[name.removeprefix(f"{analyzer}.")] = value
    from trace_offline.engine.progress import default_progress
    from trace_offline.engine.rerun import rerun

    chosen = parse_steps(steps) if steps else None
    with ending_well() as stop:
        summaries = rerun(store, analyzer, params, steps=chosen, progress=default_progress(), stop=stop, **options)
    return finish(summaries, as_json=as_json)


@contextmanager
def ending_well() -> Iterator[StopRequest]:
    """Ctrl-C and SIGTERM end a run with one message and exit code 130; what was finished is stored."""
    from trace_offline.engine.interrupt import StopRequest, interruptible

    stop = StopRequest()
    try:
        with interruptible(stop):
            yield stop
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        from trace_offline.engine.executors import end_workers

        end_workers()


def finish(summaries: list[Summary], *, as_json: bool) -> int:
    """Print how it ended (stderr; JSON on stdout when asked) and return the exit code."""
    for summary in summaries:
        for line in _lines(summary):
            print(line, file=sys.stderr)
    if as_json:
        print(json.dumps([_plain(summary) for summary in summaries], indent=1))
    return max((summary.exit_code for summary in summaries), default=0)


def _plain(summary: Summary) -> dict[str, Any]:
    import dataclasses

    return {**dataclasses.asdict(summary), "store": str(summary.store)}


def _lines(summary: Summary) -> list[str]:
    lines = [f"warning: {text}" for text in summary.warnings]
    lines += [f"set aside: {text}" for text in summary.set_aside]
    lines += [f"removed by the training before it could be read: {text}" for text in summary.removed]
    shown = summary.problems[:_SHOWN_PROBLEMS]
    lines += shown
    if len(summary.problems) > len(shown):
        lines.append(f"… and {len(summary.problems) - len(shown)} more; see: trace-offline status {summary.store}")
    done = summary.ok + summary.not_applicable + summary.failed + summary.crashed
    if done == 0 and not summary.problems and not summary.interrupted:
        lines.append(
            f"{summary.run}: nothing to do: all {summary.already_done + summary.shared} analyses of "
            f"{summary.checkpoints} checkpoints are already in {summary.store}."
        )
        return lines
    parts = [f"{summary.ok} analyses ok"]
    for count, word in (
        (summary.not_applicable, "not applicable"),
        (summary.failed, "failed"),
        (summary.crashed, "crashed"),
        (summary.already_done, "already there"),
        (summary.shared, "shared with a step of the same weights"),
    ):
        if count:
            parts.append(f"{count} {word}")
    lines.append(
        f"{summary.run}: {', '.join(parts)}; {summary.checkpoints} checkpoints in {summary.seconds:.1f} s "
        f"→ {summary.store}"
    )
    slow = [
        f"{name} {analyzer} {seconds:.0f} s" for name, analyzer, seconds in summary.slowest if seconds >= _SLOW_SECONDS
    ]
    if slow:
        lines.append(f"slowest: {', '.join(slow)}")
    if summary.interrupted:
        lines.append(_INTERRUPTED)
    return lines

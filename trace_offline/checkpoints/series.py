"""From finds to one ordered series: one checkpoint a step, one run, everything else set aside with the reason."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from trace_offline.checkpoints.duplicates import mark_duplicates
from trace_offline.checkpoints.fingerprint import Cache
from trace_offline.checkpoints.layouts.base import Find
from trace_offline.checkpoints.naming import natural_key, parse_name
from trace_offline.core.steps import StepSelection
from trace_offline.core.types import Checkpoint, CheckpointState

_HOW_TO_GIVE_A_STEP = (
    'give it one by a name such as "step500", or by a file trace_offline.json beside the weights with {"step": 500}'
)


def arrange(finds: list[Find], cache: Cache | None = None) -> list[Checkpoint]:
    """Order by step, mark duplicates, keep one run and one checkpoint a step. Finds without a step come last."""
    finds = _one_unit(_one_run(_one_stage(sorted(finds, key=_preference))))
    usable = [find for find in finds if find.checkpoint.state is CheckpointState.COMPLETE]
    stepped = sorted((find for find in usable if find.checkpoint.step is not None), key=_order)
    stepless = [find for find in usable if find.checkpoint.step is None]
    rest = [find.checkpoint for find in finds if find.checkpoint.state is not CheckpointState.COMPLETE]
    # Later finds of a step stand after all first ones, so that a duplicate always names a step that stays.
    seen: set[int] = set()
    firsts: list[Find] = []
    again: list[Find] = []
    for find in stepped:
        step = find.checkpoint.step
        assert step is not None
        (again if step in seen else firsts).append(find)
        seen.add(step)
    marked = mark_duplicates([find.checkpoint for find in (*firsts, *again, *stepless)], cache)
    kept = marked[: len(firsts)]
    by_step = {item.step: item for item in kept}
    extra = [_second_of_step(item, by_step) for item in marked[len(firsts) : len(firsts) + len(again)]]
    loose = marked[len(firsts) + len(again) :]
    alone = len(loose) == 1 and not kept
    extra += [_without_step(item, alone=alone, any_step=bool(kept)) for item in loose]
    return sorted([*kept, *extra, *rest], key=_final_order)


def select(checkpoints: list[Checkpoint], steps: StepSelection | None = None) -> list[Checkpoint]:
    """The checkpoints to analyze, in order: usable ones of the selected steps.

    A single checkpoint whose step nobody knows is the whole series; without ``steps`` it is returned.
    """
    usable = [item for item in checkpoints if item.state.analyzable]
    stepped = [item for item in usable if item.step is not None]
    if not stepped:
        return [item for item in usable if item.state is CheckpointState.COMPLETE][:1] if steps is None else []
    return [item for item in stepped if item.step is not None and (steps is None or item.step in steps)]


def _preference(find: Find) -> tuple[object, ...]:
    """Which of several finds of one step is the checkpoint: nearest the top, named by its step, the plain weights."""
    item = find.checkpoint
    path = Path(item.location)
    named = parse_name(path.name).step is not None
    shadow = any(word in path.stem.lower() for word in ("ema", "last", "best", "final", "latest"))
    return (
        item.state is not CheckpointState.COMPLETE,
        find.final,
        not named,
        shadow,
        len(path.parts),
        natural_key(str(path)),
    )


def _order(find: Find) -> int:
    assert find.checkpoint.step is not None
    return find.checkpoint.step


def _final_order(item: Checkpoint) -> tuple[object, ...]:
    return (item.step is None, item.step or 0, not item.state.analyzable, natural_key(item.location))


def _one_stage(finds: list[Find]) -> list[Find]:
    """Training in stages: when a later stage counts its steps anew, its checkpoints are another series."""
    ranges: dict[tuple[str, str], tuple[int, int]] = {}
    for find in finds:
        item = find.checkpoint
        if item.stage is not None and item.step is not None:
            low, high = ranges.get((find.run, item.stage), (item.step, item.step))
            ranges[find.run, item.stage] = (min(low, item.step), max(high, item.step))
    clashing: dict[tuple[str, str], str] = {}
    kept: list[tuple[str, str]] = []
    for key in sorted(ranges, key=lambda pair: (pair[0], natural_key(pair[1]))):
        rival = next(
            (
                old
                for old in kept
                if old[0] == key[0] and ranges[key][0] <= ranges[old][1] and ranges[old][0] <= ranges[key][1]
            ),
            None,
        )
        if rival is None:
            kept.append(key)
        else:
            clashing[key] = rival[1]
    result = []
    for find in finds:
        item = find.checkpoint
        rival_stage = clashing.get((find.run, item.stage)) if item.stage is not None else None
        if rival_stage is not None and item.state is CheckpointState.COMPLETE:
            find = find.but(state=CheckpointState.UNSUPPORTED).remark(
                f"{item.stage} counts its steps from the start again, so it is another series than {rival_stage}: "
                f"analyze it on its own, with --revisions '{item.stage}-*' or by naming its folder."
            )
        result.append(find)
    return result


def _one_unit(finds: list[Find]) -> list[Find]:
    """Epochs order a series that has nothing else; beside real steps they would be taken for steps."""
    usable = [find for find in finds if find.checkpoint.state is CheckpointState.COMPLETE]
    if not any(find.checkpoint.step is not None and not find.by_epoch for find in usable):
        return finds
    return [
        find.but(
            state=CheckpointState.UNSUPPORTED,
            step=None,
            reason=f"Its name gives an epoch, the others give steps, so its place among them is unknown: "
            f"{_HOW_TO_GIVE_A_STEP}.",
        )
        if find.by_epoch and find.checkpoint.state is CheckpointState.COMPLETE
        else find
        for find in finds
    ]


def _one_run(finds: list[Find]) -> list[Find]:
    """Two runs in one folder share steps but not weights; mixing them would make one history of two models."""
    runs: dict[str, list[Find]] = defaultdict(list)
    for find in finds:
        if find.checkpoint.state is CheckpointState.COMPLETE and find.checkpoint.step is not None and not find.final:
            runs[find.run].append(find)
    if len(runs) < 2:
        return finds
    # The run nearest the top, then the longest, then by name.
    order = sorted(runs, key=lambda run: (run.count("/"), -len(runs[run]), natural_key(run)))
    taken: dict[int, str] = {}
    shapes_taken: set[str] = set()
    other: dict[str, str] = {}
    doubtful: set[str] = set()
    for run in order:
        steps = {find.checkpoint.step for find in runs[run] if find.checkpoint.step is not None}
        shapes = {find.layout_digest for find in runs[run] if find.layout_digest}
        shared = sorted(steps & taken.keys())
        if shared:
            other[run] = f"step {shared[0]} is also in {_run_name(taken[shared[0]])}"
        elif _kind(runs[run][0]) != _kind(runs[order[0]][0]):
            other[run] = f"it is stored in another way than {_run_name(order[0])}"
        elif shapes_taken and shapes and not shapes_taken & shapes:
            other[run] = f"its tensors have other names or shapes than those of {_run_name(order[0])}"
        else:
            if taken and not _is_part(run):
                doubtful.add(run)
            taken |= dict.fromkeys(steps, run)
            shapes_taken |= shapes
    result = []
    for find in finds:
        why = other.get(find.run)
        if why and find.checkpoint.state is CheckpointState.COMPLETE and not find.final:
            find = find.but(state=CheckpointState.UNSUPPORTED).remark(
                f"It belongs to another run ({_run_name(find.run)}: {why}): analyze that run on its own, by naming it."
            )
        elif find.run in doubtful and find.checkpoint.state is CheckpointState.COMPLETE and not find.final:
            find = find.remark(
                f"Warning: it lies in {_run_name(find.run)}, earlier finds in {_run_name(order[0])}: if these are two "
                "runs, analyze each on its own."
            )
        result.append(find)
    return result


def _kind(find: Find) -> str:
    layout = find.checkpoint.layout
    return "hf" if layout in ("hf_folder", "hf_trainer") else layout


def _is_part(run: str) -> bool:
    """A folder such as ``epoch_2`` or ``stage1`` between the run and its checkpoints."""
    parsed = parse_name(Path(run).name, bare_numbers=False)
    return parsed.step is not None or parsed.epoch is not None or parsed.stage is not None


def _run_name(run: str) -> str:
    return run.removeprefix("hub:")


def _second_of_step(item: Checkpoint, by_step: dict[int | None, Checkpoint]) -> Checkpoint:
    first = by_step[item.step]
    name = Path(first.location).name
    if item.state is CheckpointState.DUPLICATE and item.duplicate_of == item.step:
        return _aside(
            item, CheckpointState.DUPLICATE, f"The same weights as {name}, which stands for step {item.step}."
        )
    if not item.state.analyzable:
        return item
    return _aside(
        item,
        CheckpointState.UNSUPPORTED,
        f"Step {item.step} is already in the series as {name}, with other weights: a series has one checkpoint a step. "
        "Name this one alone to analyze it, or move it away.",
    )


def _without_step(item: Checkpoint, *, alone: bool, any_step: bool) -> Checkpoint:
    if item.state is CheckpointState.DUPLICATE:
        if item.duplicate_of is not None:
            return _aside(
                item, item.state, f"The same weights as step {item.duplicate_of}, under a name without a step."
            )
        return _aside(item, item.state, "The same weights as another find without a step.")
    if not item.state.analyzable:
        return item
    if alone:
        return _remarked(item, f"Its step is unknown; {_HOW_TO_GIVE_A_STEP}.")
    why = (
        "Its step is unknown, so it has no place in the series"
        if any_step
        else "Several models and no step to order them"
    )
    return _aside(item, CheckpointState.UNSUPPORTED, f"{_plain(item)}{why}: {_HOW_TO_GIVE_A_STEP}.")


def _plain(item: Checkpoint) -> str:
    return f"{item.reason} " if item.reason else ""


def _remarked(item: Checkpoint, text: str) -> Checkpoint:
    return replace(item, reason=f"{_plain(item)}{text}")


def _aside(item: Checkpoint, state: CheckpointState, reason: str) -> Checkpoint:
    """Out of the series: a step belongs to one checkpoint only, so this one loses its own."""
    duplicate_of = item.duplicate_of if state is CheckpointState.DUPLICATE else None
    return replace(item, state=state, step=None, reason=reason, duplicate_of=duplicate_of)

"""What every layout shares: a find, the search it belongs to, and where its step comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trace_offline.checkpoints.completeness import Clock
from trace_offline.checkpoints.listing import Listing
from trace_offline.checkpoints.naming import ParsedName, StepSource, parse_name
from trace_offline.checkpoints.tokenizer_folders import TokenizerFinder
from trace_offline.core.types import Checkpoint, CheckpointState

SIDECAR = "trace_offline.json"
"""Optional file beside the weights: ``{"step": …, "tokens_seen": …, "stage": …, "epoch": …}``; it wins over names."""
_WHOLE_FILE = 1 << 16
_ENDS = 1 << 12
_JSON_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?=[,\s}])")


@dataclass(frozen=True, slots=True)
class Find:
    """One find before the series is put in order. ``run``: the folder (or repository) of its series.

    ``final``: the run's own folder, with checkpoints below it. ``by_epoch``: its step is really an epoch.
    """

    checkpoint: Checkpoint
    run: str
    layout_digest: str | None = None
    final: bool = False
    by_epoch: bool = False

    def but(self, **changes: Any) -> Find:
        """The same find with other checkpoint fields."""
        return replace(self, checkpoint=replace(self.checkpoint, **changes))

    def remark(self, text: str | None) -> Find:
        """Add a sentence to the reason."""
        if not text:
            return self
        reason = self.checkpoint.reason
        return self.but(reason=f"{reason} {text}" if reason else text)


@dataclass(frozen=True, slots=True)
class Search:
    """One search: where it began, its clock, and the tokenizers seen so far."""

    root: Path
    clock: Clock
    tokenizers: TokenizerFinder = field(default_factory=TokenizerFinder)
    trainer_runs: dict[Path, bool] = field(default_factory=dict)

    def is_trainer_run(self, run: Path) -> bool:
        """Has any checkpoint-N folder of this run a trainer_state.json? Looked up once a run."""
        if run not in self.trainer_runs:
            self.trainer_runs[run] = any(True for _ in run.glob("checkpoint-*/trainer_state.json"))
        return self.trainer_runs[run]


@dataclass(frozen=True, slots=True)
class Identity:
    """Where in the run a find belongs, as far as anything says so."""

    step: int | None = None
    tokens_seen: int | None = None
    stage: str | None = None
    epoch: float | None = None
    note: str | None = None
    by_epoch: bool = False

    def fields(self) -> dict[str, Any]:
        """As keyword arguments of Checkpoint."""
        return {"step": self.step, "tokens_seen": self.tokens_seen, "stage": self.stage, "epoch": self.epoch}


Recogniser = Callable[[Listing, Search, bool], Find | None]
"""``(folder, search, has_nested) → find or None``; has_nested: checkpoints were found below this folder."""


def identify(
    path: Path,
    search: Search,
    *,
    own_name: bool = True,
    sidecar: Path | None = None,
    trainer_state: dict[str, Any] | None = None,
    content: Callable[[], dict[str, Any]] | None = None,
    numbered_parent: bool = False,
) -> Identity:
    """Step, tokens, stage and epoch of ``path``; first that knows wins.

    Sidecar file, explicit step in the name, HF Trainer's state, numbers inside the file, step in a folder above (up to
    where the search began), then whatever else orders the name: an epoch, an index, a number.
    """
    told, problem = _sidecar(sidecar)
    name = parse_name(path.name) if own_name else ParsedName()
    above = _ancestor(path, search.root, numbered_parent=numbered_parent)
    state = trainer_state or {}
    explicit = name.step if name.source in (StepSource.STEP, StepSource.CHECKPOINT) else None
    note: str | None = None
    source: StepSource | None = None
    step: int | None
    if told.get("step") is not None:
        step = told["step"]
    elif explicit is not None:
        step = explicit
        if _whole(state.get("global_step")) not in (None, step):
            note = f"Its trainer_state.json says step {state['global_step']}, its name says {step}; the name is used."
    else:
        inside = content() if content else {}
        step = _whole(state.get("global_step"))
        if step is None:
            step = _whole(inside.get("step"))
        if step is None and above.source in (StepSource.STEP, StepSource.CHECKPOINT):
            step = above.step
        if step is None:
            step, note, source = name.step, name.note, name.source
        if step is None:
            step, note, source = above.step, above.note, above.source
    seen = state.get("num_input_tokens_seen")
    epoch = told.get("epoch", name.epoch)
    if epoch is None and isinstance(state.get("epoch"), (int, float)):
        epoch = float(state["epoch"])
    return Identity(
        step=step,
        tokens_seen=_first(told.get("tokens_seen"), name.tokens_seen, _whole(seen) or None, above.tokens_seen),
        stage=_first(told.get("stage"), name.stage, above.stage),
        epoch=epoch,
        note=" ".join(text for text in (note, problem) if text) or None,
        by_epoch=source is StepSource.EPOCH,
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _ancestor(path: Path, root: Path, *, numbered_parent: bool) -> ParsedName:
    """What the nearest folder above says, up to and including the search's root.

    Bare numbers there are versions or sizes more often than steps; ``numbered_parent`` lets them count right above.
    """
    if path == root:
        return ParsedName()
    for folder in path.parents:
        bare = numbered_parent and folder == path.parent and folder.name.isdigit()
        parsed = parse_name(folder.name, bare_numbers=bare)
        if parsed.step is not None:
            return parsed
        if folder == root:
            break
    return ParsedName()


def _sidecar(path: Path | None) -> tuple[dict[str, Any], str | None]:
    """(what the file says, why it says less than it should)."""
    if path is None:
        return {}, None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"Its {SIDECAR} cannot be read as JSON ({error}) and was not used."
    if not isinstance(content, dict):
        return {}, f'Its {SIDECAR} is no JSON object such as {{"step": 500}} and was not used.'
    told: dict[str, Any] = {key: _whole(content.get(key)) for key in ("step", "tokens_seen")}
    wrong = [key for key, value in told.items() if value is None and content.get(key) is not None]
    problem = f"Its {SIDECAR} gives a {wrong[0]} that is no whole number of at least 0." if wrong else None
    if isinstance(content.get("stage"), str):
        told["stage"] = content["stage"]
    if isinstance(content.get("epoch"), (int, float)):
        told["epoch"] = float(content["epoch"])
    return told, problem


def read_trainer_state(path: Path) -> dict[str, Any] | None:
    """The plain facts of ``trainer_state.json``; None when it is cut short.

    Late states carry the whole log, megabytes of it: of large ones only both ends are read (keys are sorted, so
    ``global_step`` stands before the log and ``num_input_tokens_seen`` after it).
    """
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            if size <= _WHOLE_FILE:
                content = json.loads(stream.read())
                return content if isinstance(content, dict) else None
            head = stream.read(_ENDS).decode("utf-8", "replace").partition('"log_history"')[0]
            stream.seek(size - _ENDS)
            tail = stream.read().decode("utf-8", "replace")
    except (OSError, ValueError):
        return None
    if not tail.rstrip().endswith("}"):
        return None
    facts: dict[str, Any] = {}
    for text, key, kind in ((head, "epoch", float), (head, "global_step", int), (tail, "num_input_tokens_seen", int)):
        # Two spaces of indent: a key of the state itself, not of an entry of its log.
        _, found, rest = text.rpartition(f'\n  "{key}": ')
        number = _JSON_NUMBER.match(rest) if found else None
        if number:
            facts[key] = kind(number[0])
    return facts


def total_size(listing: Listing, names: tuple[str, ...] | list[str]) -> int:
    """Bytes of these files."""
    return sum(listing.files[name].size for name in names if name in listing.files)


def set_aside(
    listing_path: Path, layout: str, state: CheckpointState, reason: str, identity: Identity, **fields: Any
) -> Checkpoint:
    """A checkpoint that will not be analyzed, with the sentence that says why."""
    return Checkpoint(
        location=str(listing_path), layout=layout, state=state, reason=reason, **identity.fields(), **fields
    )

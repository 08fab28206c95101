"""The events of a history: found series by series, stored in the table ``events``, each with the way it was found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from trace_offline.core.errors import UsageError, nearest
from trace_offline.estimators.change_points import find_change_points
from trace_offline.estimators.convergence import find_convergence
from trace_offline.estimators.emergence import NoEvent, enough_points, find_emergence
from trace_offline.estimators.history_noise import NoiseUnknown
from trace_offline.estimators.peak import find_peak
from trace_offline.estimators.regress import find_regress
from trace_offline.events.orientation import Oriented, orient
from trace_offline.events.selection import Key, Selection, Series, read_series
from trace_offline.store.writer import Writer

if TYPE_CHECKING:
    import duckdb

KINDS = ("emergence", "convergence", "peak", "regress", "change_point")
# Four independent looks at the same noise share the error: rise (emergence, convergence), fall, extrema, segments.
_LOOKS = 4
_SCHEMA = pa.schema(
    [
        ("run", pa.string()), ("analyzer", pa.string()), ("task", pa.string()), ("label", pa.string()),
        ("layer", pa.int16()), ("component", pa.string()), ("metric", pa.string()), ("kind", pa.string()),
        ("step", pa.int64()), ("step_low", pa.int64()), ("step_high", pa.int64()), ("detail", pa.string()),
        ("evaluation_set", pa.string()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How events are found.

    ``share``: of the rise (fall) that must be crossed; ``tolerance``: of the range, for convergence; ``confidence`` of
    the intervals, and 1 - the probability that pure noise gives any event; ``direction``: auto, rises or falls;
    ``model`` of change points: slope or mean.
    """

    share: float = 0.25
    tolerance: float = 0.05
    confidence: float = 0.95
    direction: str = "auto"
    model: str = "slope"
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        for name in ("share", "tolerance", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"--{name}: expected a number between 0 and 1, found {getattr(self, name):g}.")
        if self.model not in ("slope", "mean"):
            raise UsageError(f'--model: expected slope or mean, found "{self.model}".')
        for kind in self.kinds:
            if kind not in KINDS:
                raise UsageError(f'--kind: "{kind}" is not known.{nearest(kind, KINDS)} There are: {", ".join(KINDS)}.')

    @property
    def level(self) -> float:
        """Probability of a false event for each look."""
        return (1 - self.confidence) / _LOOKS


@dataclass(frozen=True)
class Event:
    """One event of one series. ``detail``: how it was found, with ``text`` for a reader."""

    key: Key
    kind: str
    step: int
    step_low: int
    step_high: int
    detail: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """The columns of the table ``events``."""
        return {
            **asdict(self.key), "kind": self.kind, "step": self.step, "step_low": self.step_low,
            "step_high": self.step_high, "detail": json.dumps(self.detail, sort_keys=True, allow_nan=False),
        }  # fmt: skip


@dataclass
class FoundEvents:
    """``events`` in the order of series and kind; ``without``: (series, kind or None for all, reason)."""

    events: list[Event] = field(default_factory=list)
    without: list[tuple[Key, str | None, str]] = field(default_factory=list)
    series: int = 0

    def to_arrow(self) -> pa.Table:
        """The rows of the table ``events``."""
        return pa.Table.from_pylist([event.row() for event in self.events], schema=_SCHEMA)


def find_events(store: str | Path, selection: Selection, settings: Settings) -> FoundEvents:
    """Find the events of the selected series and put them into ``events`` in place of what was there for them.

    Raises StoreError when the store cannot be written and UsageError for a selection that matches nothing.
    """
    path = Path(store)
    chosen = read_series(path, selection)
    found = FoundEvents(series=len(chosen))
    for series in chosen:
        _look(series, settings, found)
    with Writer.open(path, create=False) as writer, writer.transaction() as con:
        _replace(con, [series.key for series in chosen], settings.kinds, found.to_arrow())
    return found


def _replace(con: duckdb.DuckDBPyConnection, keys: Sequence[Key], kinds: Sequence[str], rows: pa.Table) -> None:
    con.register("looked_at", pa.Table.from_pylist([asdict(key) for key in keys], schema=_key_schema()))
    same = " and ".join(f"e.{name} is not distinct from l.{name}" for name in _key_schema().names)
    con.execute(
        f"delete from events e where list_contains(?, e.kind) and exists (select 1 from looked_at l where {same})",
        [list(kinds)],
    )
    con.unregister("looked_at")
    con.register("found_events", rows)
    con.execute("insert into events by name select * from found_events")
    con.unregister("found_events")


def _key_schema() -> pa.Schema:
    wanted = ("run", "evaluation_set", "analyzer", "task", "label", "layer", "component", "metric")
    return pa.schema([_SCHEMA.field(name) for name in wanted])


def _look(series: Series, settings: Settings, found: FoundEvents) -> None:
    try:
        enough_points(series.values)
        oriented = orient(series, settings.direction)
    except (NoEvent, NoiseUnknown) as reason:
        found.without.append((series.key, None, str(reason)))
        return
    for kind in settings.kinds:
        try:
            some = list(_of_kind(kind, series, oriented, settings))
        except NoEvent as reason:
            found.without.append((series.key, kind, str(reason)))
            continue
        if not some:
            found.without.append((series.key, kind, "none beyond noise"))
        found.events += some


def _of_kind(kind: str, series: Series, oriented: Oriented, settings: Settings) -> Iterator[Event]:
    finder = {
        "emergence": emergence_of, "convergence": _convergence, "peak": _peaks, "regress": _regress,
        "change_point": _change_points,
    }[kind]  # fmt: skip
    common = {
        "direction": oriented.direction, "direction_from": oriented.source, "noise": oriented.noise.source,
        "scale": "log" if oriented.logarithmic else "linear", "points": len(series.values),
        "confidence": settings.confidence, **({"notes": list(series.notes)} if series.notes else {}),
    }  # fmt: skip
    for step, low, high, detail in finder(series, oriented, settings):
        yield Event(series.key, kind, step, low, high, {**common, **detail})


Found = Iterator[tuple[int, int, int, dict[str, Any]]]


def emergence_of(series: Series, oriented: Oriented, settings: Settings) -> Found:
    """The emergence of an oriented series; raises NoEvent."""
    one = find_emergence(
        series.steps, oriented.values, oriented.noise, share=settings.share, level=settings.level,
        tails=oriented.tails, confidence=settings.confidence,
    )  # fmt: skip
    start, best, threshold = map(oriented.plain, (one.start, one.best, one.threshold))
    text = f"{oriented.direction} from {start:.4g} to {best:.4g}; {settings.share:.0%} of it, {threshold:.4g}, crossed"
    detail = {"share": settings.share, "start": start, "best": best, "threshold": threshold, "stderrs": one.ratio}
    yield one.step, one.low, one.high, {**detail, "text": text}


def _convergence(series: Series, oriented: Oriented, settings: Settings) -> Found:
    one = find_convergence(
        series.steps, oriented.values, oriented.noise, level=settings.level, share=settings.tolerance,
        confidence=settings.confidence,
    )  # fmt: skip
    final = oriented.plain(one.final)
    text = f"stays within {settings.tolerance:.0%} of its range of {final:.4g}"
    text += ", as far as the noise lets one see" if one.noise_limited else ""
    detail = {"final": final, "tolerance": one.tolerance, "tolerance_share": settings.tolerance}
    yield one.step, one.low, one.high, {**detail, "noise_limited": one.noise_limited, "text": text}


def _regress(series: Series, oriented: Oriented, settings: Settings) -> Found:
    one = find_regress(
        series.steps, oriented.values, oriented.noise, share=settings.share, level=settings.level,
        tails=oriented.tails, confidence=settings.confidence,
    )  # fmt: skip
    best, end = oriented.plain(one.best), oriented.plain(one.end)
    # What improves is known by name or given; of other metrics only the direction of the change is.
    extreme = "best" if oriented.source != "net change" else "highest" if oriented.sign > 0 else "lowest"
    text = (
        f"from its {extreme}, {best:.4g} at step {one.best_step}, back to {end:.4g}; {settings.share:.0%} of it passed"
    )
    detail = {
        "share": settings.share, "best": best, "best_step": one.best_step, "end": end, "stderrs": one.ratio,
        "fall_stderr": one.fall_stderr,
    }  # fmt: skip
    yield one.step, one.low, one.high, {**detail, "text": text}


def _peaks(series: Series, oriented: Oriented, settings: Settings) -> Found:
    """The maximum and the minimum of the metric itself, whichever of them is good."""
    reasons = []
    for name, sign in (("maximum", oriented.sign), ("minimum", -oriented.sign)):
        try:
            one = find_peak(
                series.steps, sign * oriented.values, oriented.noise, level=settings.level, tails=2,
                confidence=settings.confidence,
            )  # fmt: skip
        except NoEvent as reason:
            reasons.append(f"{name}: {reason}")
            continue
        value, start, end = (oriented.plain(sign * level) for level in (one.value, one.start, one.end))
        text = f"{name} {value:.4g}, between {start:.4g} at the start and {end:.4g} at the end"
        detail = {"extremum": name, "value": value, "start": start, "end": end, "stderrs": one.ratio}
        yield one.step, one.low, one.high, {**detail, "text": text}
    if len(reasons) == 2:
        raise NoEvent("; ".join(reasons))


def _change_points(series: Series, oriented: Oriented, settings: Settings) -> Found:
    scale = "log value" if oriented.logarithmic else "value"
    for one in find_change_points(
        series.steps, oriented.sign * oriented.values, oriented.noise, level=settings.level, model=settings.model
    ):
        what = f"slope ({scale} per e-fold of steps)" if settings.model == "slope" else f"mean ({scale})"
        text = f"{what} from {one.before:.4g} to {one.after:.4g}"
        detail = {"model": settings.model, "before": one.before, "after": one.after, "gain": one.gain}
        yield one.step, one.low, one.high, {**detail, "text": text}

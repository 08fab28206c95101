"""Finding analyzers: built-ins and third parties come through the same entry-point group."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from trace_offline.analyzers.base import Analyzer
from trace_offline.core.errors import UsageError, nearest
from trace_offline.core.params import Params

GROUP = "trace_offline.analyzers"
DEFAULT = ("loss", "probe", "intrinsic_dimension", "hessian", "output")


@dataclass(frozen=True)
class Registry:
    """``analyzers`` by name; ``broken``: what could not be loaded, with the reason."""

    analyzers: dict[str, type[Analyzer]]
    broken: dict[str, str]

    def get(self, name: str) -> type[Analyzer]:
        """The analyzer class. Raises UsageError for an unknown or broken one, naming the nearest."""
        if name in self.analyzers:
            return self.analyzers[name]
        if name in self.broken:
            raise UsageError(f'The analyzer "{name}" is installed but cannot be loaded: {self.broken[name]}')
        known = ", ".join(sorted(self.analyzers))
        raise UsageError(f'There is no analyzer "{name}".{nearest(name, self.analyzers)} There are: {known}.')


def _load(entry: EntryPoint) -> type[Analyzer]:
    kind = entry.load()
    if not (isinstance(kind, type) and issubclass(kind, Analyzer)):
        raise TypeError(f"{entry.value} is no subclass of trace_offline.analyzers.base.Analyzer")
    for attribute in ("name", "version", "summary", "reference"):
        if not isinstance(getattr(kind, attribute, None), str):
            raise TypeError(f"{entry.value} has no {attribute}")
    if kind.name != entry.name:
        raise TypeError(f'{entry.value} calls itself "{kind.name}" but is registered as "{entry.name}"')
    if not issubclass(kind.Params, Params):
        raise TypeError(f"{entry.value}.Params is no subclass of trace_offline.core.params.Params")
    kind.Params()  # every parameter needs a default that satisfies its own bounds
    return kind


def load_registry(entries: tuple[EntryPoint, ...]) -> Registry:
    """Load entry points; one that fails is set aside with its reason and costs the others nothing."""
    analyzers: dict[str, type[Analyzer]] = {}
    broken: dict[str, str] = {}
    for entry in entries:
        try:
            analyzers[entry.name] = _load(entry)
        except Exception as error:  # a third party's import can fail in any way; it is reported, never hidden
            broken[entry.name] = f"{type(error).__name__}: {error}"
    return Registry(dict(sorted(analyzers.items())), broken)


@functools.cache
def registry() -> Registry:
    """All analyzers installed in this environment."""
    return load_registry(tuple(entry_points(group=GROUP)))

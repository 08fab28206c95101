"""Parameters of analyzers: frozen, bounded, documented; unknown names and bad values become clear errors."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from trace_offline.core.errors import UsageError, nearest


class Params(BaseModel):
    """Base of every analyzer's parameters. Give each field a default, bounds and a description."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)


P = TypeVar("P", bound=Params)


def parse_params(kind: type[P], owner: str, values: Mapping[str, Any]) -> P:
    """Values (from TOML, JSON or ``--set``) → a frozen ``kind``.

    Raises UsageError naming the parameter, what was found, what is allowed, and the nearest known name.
    """
    known = kind.model_fields
    for name in values:
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise UsageError(f'{owner} has no parameter "{name}".{nearest(name, known)} Its parameters: {listed}.')
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            name = ".".join(str(part) for part in item["loc"]) or "parameters"
            lines.append(f"{owner}.{name}: {item['msg']} (found {item.get('input')!r})")
        raise UsageError("; ".join(lines) + f". See: trace-offline analyzers {owner}") from None


def parse_scalar(text: str) -> Any:
    """The value part of ``--set name=value``: a TOML value where it parses as one, else the bare string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text

"""A run described in a TOML file; command-line options win over it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trace_offline.core.errors import UsageError, nearest
from trace_offline.core.params import parse_scalar


class RunConfig(BaseModel):
    """The keys of a configuration file.

    >>> RunConfig(source="runs/a", analyzer={"probe": {"max_words": 5000}}).analyzer["probe"]
    {'max_words': 5000}
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str | None = None
    evaluation_set: Path | None = None
    store: Path | None = None
    analyzers: list[str] | None = None
    run: str | None = None
    steps: str | None = None
    revisions: str | None = None
    device: str | None = None
    jobs: int | None = None
    dtype: str | None = None
    seed: int | None = None
    model_factory: str | None = None
    blocks: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool | None = None
    force: bool | None = None
    heldout_set: Path | None = None
    executor: str | None = None
    timeout: float | None = None
    scheduler: str | None = None
    shard: str | None = None
    cache: str | None = None
    cache_size: str | None = None
    hub_disk_limit: str | None = None
    remove_downloads: bool | None = None
    analyzer: dict[str, dict[str, Any]] = {}


def read_config(path: Path) -> RunConfig:
    """Parse and check a file. Raises UsageError naming the key, what was found, and the nearest known key."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--config: there is no file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config: {path} is not valid TOML: {error}") from error
    for name in values:
        if name not in RunConfig.model_fields:
            known = ", ".join(RunConfig.model_fields)
            raise UsageError(f'{path}: unknown key "{name}".{nearest(name, RunConfig.model_fields)} Known: {known}.')
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']} (found {item.get('input')!r})"
            for item in error.errors(include_url=False)
        ]
        raise UsageError(f"{path}: {'; '.join(lines)}") from None


def merge_settings(
    given: Mapping[str, Any], assignments: list[str], config: RunConfig
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(options with the command line winning, parameters by analyzer)."""
    merged = {name: value for name, value in config.model_dump(exclude={"analyzer"}).items() if value is not None}
    merged.update({name: value for name, value in given.items() if value is not None and value != []})
    params = {name: dict(values) for name, values in config.analyzer.items()}
    for text in assignments:
        name, value = split_assignment(text)
        analyzer, dot, parameter = name.partition(".")
        if not dot or not parameter:
            raise UsageError(f'--set: expected ANALYZER.PARAM=VALUE, such as probe.max_words=5000; found "{text}".')
        params.setdefault(analyzer, {})[parameter] = value
    return merged, params


def split_assignment(text: str) -> tuple[str, Any]:
    """``name=value`` → (name, TOML value or bare string)."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f'--set: expected NAME=VALUE, found "{text}".')
    return name.strip(), parse_scalar(value.strip())

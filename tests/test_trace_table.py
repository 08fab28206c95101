"""The table of TRACE's features names only what exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from trace_offline.analyzers.registry import registry
from trace_offline.cli.main import app

PAGE = (Path(__file__).parents[1] / "docs" / "trace.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| TRACE names"))
]
ANALYZERS = [row for row in ROWS if len(row) == 4]
COMMANDS = [row for row in ROWS if len(row) == 2]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_was_read() -> None:
    assert len(ANALYZERS) >= 30
    assert len(COMMANDS) >= 10
    assert len(ANALYZERS) + len(COMMANDS) == len(ROWS)


@pytest.mark.parametrize("row", ANALYZERS, ids=[row[0] for row in ANALYZERS])
def test_the_analyzer_its_metrics_and_its_parameters_exist(row: list[str]) -> None:
    (analyzer,) = names(row[1])
    kind = registry().get(analyzer)
    metrics = names(row[2])
    assert metrics
    assert set(metrics) <= {metric.name for metric in kind.metrics}
    assert set(names(row[3])) <= set(kind.Params.model_fields)


@pytest.mark.parametrize("row", COMMANDS, ids=[row[0] for row in COMMANDS])
def test_the_command_exists_with_its_options(row: list[str]) -> None:
    import typer

    (command,) = names(row[1])
    words = shlex.split(command)
    assert words.pop(0) == "trace-offline"
    found = typer.main.get_command(app)
    while hasattr(found, "commands"):
        found = found.commands[words.pop(0)]
    options = {option for parameter in found.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options

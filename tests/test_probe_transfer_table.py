"""The table of frozen probes on the shipped series is the committed result of its benchmark."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS = {
    "pos: refit": "pos step {} refit_accuracy",
    "frozen at first": "pos step {} frozen_accuracy first",
    "frozen at last": "pos step {} frozen_accuracy last",
    "TRACE, NOUN": "pos step {} trace_confidence NOUN",
    "TRACE, DET": "pos step {} trace_confidence DET",
    "role: refit": "role step {} refit_accuracy",
    "role: frozen at last": "role step {} frozen_accuracy last",
    "TRACE, Agent": "role step {} trace_confidence Agent",
    "TRACE, Theme": "role step {} trace_confidence Theme",
}


def test_the_table_of_frozen_probes_is_the_committed_result() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "probe.json").read_text(encoding="utf-8"))
    found = {row["case"]: row["ours"] for row in rows}
    lines = (ROOT / "docs" / "analyzers" / "probe_transfer.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| step | pos: refit |"))
    assert lines[start].count("|") == len(COLUMNS) + 2
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    assert len(table) >= 8
    for step, *cells in table:
        for case, cell in zip(COLUMNS.values(), cells, strict=True):
            assert cell == f"{found[case.format(step)]:.3f}", case.format(step)


def test_the_committed_numbers_mislead_as_the_page_says() -> None:
    """Late, and rising or falling against what can be read: nouns at step 0, where nothing is known of context."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "probe.json").read_text(encoding="utf-8"))
    found = {row["case"]: row["ours"] for row in rows}
    assert found["pos step 32 refit_accuracy"] > 0.9 > found["pos step 1024 frozen_accuracy last"]
    assert found["pos step 0 trace_confidence NOUN"] > 0.95
    assert found["pos step 4096 trace_confidence NOUN"] < 0.4

"""Write docs/benchmarks.md from the committed results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEAD = """# Speed

Results are committed in `benchmarks/results/`, each naming its machine; `make bench` measures them again, and
`python benchmarks/table.py` writes this page from them. Medians; a shared machine, so ratios say more than seconds.
"""


UNITS = ("s", "CPU s", "MB", "gradients", "products", "training steps")


def number(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def goal(row: dict[str, Any]) -> str:
    """What the row is held to: the most it may be, the least ratio to the peer, or both."""
    parts = [f"≤ {number(float(row['limit']))}"] if row.get("limit") is not None else []
    return ", ".join(parts + ([f"ratio ≥ {row['ratio_goal']:g}"] if "ratio_goal" in row else []))


def page() -> str:
    parts = [HEAD]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        # what is no time and no size has a page of its own in docs/analyzers
        rows = [row for row in json.loads(path.read_text()) if row.get("unit") in UNITS]
        if not rows:
            continue
        parts.append(f"\n## {path.stem.replace('_', ' ')}\n\n{rows[0]['device']}, {rows[0]['date']}.\n")
        parts.append("| case | ours | unit | goal | peer | peer's | floor | ratio |\n|---|---|---|---|---|---|---|---|")
        for row in rows:
            cells = [row["case"].replace("|", "\\|"), number(float(row["ours"])), row["unit"], goal(row)]
            cells += [row["peer_name"] or "", number(row["peer"]), number(row["floor"]), number(row["ratio"])]
            parts.append("| " + " | ".join(cells) + " |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    target = ROOT / "docs" / "benchmarks.md"
    if "--check" in sys.argv:
        sys.exit(target.read_text() != page())
    target.write_text(page())

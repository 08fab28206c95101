"""``trace-offline analyzers``."""

from __future__ import annotations

import json
import sys
from typing import Any

from trace_offline.analyzers.base import Analyzer


def show(name: str | None, *, as_json: bool) -> int:
    """Print all analyzers, or one in full; exit code 0."""
    from trace_offline.analyzers.registry import registry

    found = registry()
    for broken, reason in found.broken.items():
        print(f"warning: the analyzer {broken} is installed but cannot be loaded: {reason}", file=sys.stderr)
    chosen = [found.get(name)] if name else list(found.analyzers.values())
    if as_json:
        described = [describe(kind) for kind in chosen]
        print(json.dumps(described[0] if name else described, indent=1, default=str))
        return 0
    if name is None:
        width = max(len(kind.name) for kind in chosen)
        for kind in chosen:
            print(f"{kind.name.ljust(width)}  {kind.summary}")
        print("\nOne in full: trace-offline analyzers NAME", file=sys.stderr)
        return 0
    print(_full(describe(chosen[0])))
    return 0


def describe(kind: type[Analyzer]) -> dict[str, Any]:
    """An analyzer as plain data: parameters with defaults, bounds and meaning; metrics with units."""
    schema = kind.Params.model_json_schema()
    bounds = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum")
    defaults = kind.Params().model_dump(mode="json")
    return {
        "name": kind.name,
        "version": kind.version,
        "summary": kind.summary,
        "reference": kind.reference,
        "scope": kind.scope.value,
        "needs": sorted(need.value for need in kind.needs),
        "parameters": [
            {
                "name": name,
                "default": defaults[name],
                "meaning": field.get("description", ""),
                **{bound: field[bound] for bound in bounds if bound in field},
            }
            for name, field in schema.get("properties", {}).items()
        ],
        "metrics": [{"name": item.name, "unit": item.unit, "meaning": item.meaning} for item in kind.metrics],
    }


def _full(item: dict[str, Any]) -> str:
    lines = [f"{item['name']} {item['version']} (scope {item['scope']})", item["summary"], ""]
    lines.append(f"Needs: {', '.join(item['needs']) or 'nothing'}")
    lines += ["", "Parameters"]
    for parameter in item["parameters"]:
        limits = {k: v for k, v in parameter.items() if k not in ("name", "default", "meaning")}
        shown = ", ".join(f"{key} {value}" for key, value in limits.items())
        default = json.dumps(parameter["default"])
        lines.append(f"  {parameter['name']} = {default}{f'  [{shown}]' if shown else ''}")
        lines.append(f"      {parameter['meaning']}")
    if not item["parameters"]:
        lines.append("  none")
    lines += ["", "Metrics"]
    width = max((len(metric["name"]) for metric in item["metrics"]), default=0)
    lines += [f"  {m['name'].ljust(width)}  {m['meaning']} [{m['unit']}]" for m in item["metrics"]]
    lines += ["", f"Reference: {item['reference']}"]
    return "\n".join(lines)

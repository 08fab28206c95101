"""The measurements of a corpus as lines to read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What ``trace-offline corpus inspect`` prints without ``--json``."""
    length = found["length"]
    repeated = found["sentences"] - found["distinct_sentences"]
    yield f"{found['file']} ({found['form']})"
    yield (
        f"{found['sentences']} sentences, {repeated} of them repeat an earlier one; {found['words']} words, "
        f"{found['word_types']} different; {length['min']} to {length['max']} words a sentence, mean "
        f"{length['mean']:.2f}"
    )
    for name in ("complexity", "frames", "clause_frames", "roles", "pos"):
        rows = found[name]
        if rows is None:
            continue
        yield ""
        yield f"{name.replace('_', ' ')}:"
        for each, row in rows.items():
            asked = f"  asked {row['asked']:.4f}" if "asked" in row else ""
            yield f"  {each:<16} {row['count']:>9}  {row['share']:.4f}{asked}"
    yield ""
    yield "Zipf exponent:"
    for name, row in found["zipf"].items():
        yield _line(name, row)
    yield ""
    yield "entropy in bits:"
    for name, row in found["entropy"].items():
        yield _line(name, row)
    if found["collocations"] is None:
        return
    yield ""
    yield "collocations:"
    for name, row in found["collocations"].items():
        if row["bits"] is None:
            yield f"  {name}: {row['reason']}"
            continue
        yield _line(f"{name}: shared bits", row["bits"])
        if "strength" in row:
            yield _line(f"{name}: strength", row["strength"])
        shown = ", ".join(f"{' + '.join(each['words'])} {each['pmi']:.1f}" for each in row["strongest"][:3])
        if shown:
            yield f"  {name}: most bits in common: {shown}"


def _line(name: str, row: dict[str, Any]) -> str:
    if row["value"] is None:
        return f"  {name:<28} not measured: {row['reason']}"
    told = "".join(f"  {key} {row[key]:.4f}" for key in ("expected", "asked") if row.get(key) is not None)
    return f"  {name:<28} {row['value']:>8.4f} ± {row['stderr']:.4f}  (n = {row['n']}){told}"

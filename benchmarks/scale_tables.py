"""The tables of docs/scale.md, from the committed results."""

from __future__ import annotations

from common import load


def table() -> str:
    """The model beside measurement."""
    rows = load("scale")
    lines = [f"{rows[0]['device']}, {rows[0]['date']}.", "", "| what | measured, s | model, s | model / measured |",
             "|---|---|---|---|"]  # fmt: skip
    lines += [f"| {row['case']} | {row['ours']:.3g} | {row['peer']:.3g} | {row['ratio']:.2f} |" for row in rows]
    return "\n".join(lines)


def prediction_tables() -> str:
    """The Pythia suite: each network, then the whole on several machines."""
    rows = load("scale_prediction")
    lines = [
        "| network | parameters | file, GB | four analyzers, s | of it pass, s | one product, s | with `hessian`, s | "
        "Lanczos vectors in 1 TB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if "parameters" in row):
        lines.append(
            f"| {row['case']} | {row['parameters']:.3g} | {row['bytes_read'] / 1e9:.3g} | {row['ours']:.3g} | "
            f"{row['components']['pass']:.3g} | {row['product_seconds']:.3g} | {row['seconds_with_hessian']:.3g} | "
            f"{row['hessian_vectors']} |"
        )
    lines += [
        "",
        "| machine | four analyzers, h | with `hessian`, h | reading over 10 Gbit/s, h |",
        "|---|---|---|---|",
    ]
    for row in (row for row in rows if "gpus" in row):
        hours = [row[name] / 3600 for name in ("compute", "with_hessian", "reading")]
        lines.append(f"| {row['case']} | " + " | ".join(f"{value:.3g}" for value in hours) + " |")
    return "\n".join(lines)


def saturation_table() -> str:
    """How many GPUs keep the single writer busy, for each network."""
    lines = ["| network | numbers | writing, ms | GPUs that keep the writer busy |", "|---|---|---|---|"]
    for row in load("scale_prediction"):
        if not row.get("workers_to_saturate"):
            continue
        milliseconds = 1e3 * row["write_seconds"]
        lines.append(
            f"| {row['case']} | {row['numbers']:.0f} | {milliseconds:.3g} | {row['workers_to_saturate']:.3g} |"
        )
    return "\n".join(lines)

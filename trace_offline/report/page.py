"""The page: one HTML file with its data, its style and its scripts inside; it asks nobody for anything.

A content security policy, written into the page, forbids every request and every script but the ones it was made
with (by their hashes), so that no text in a store can become code.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from trace_offline.core.errors import UsageError
from trace_offline.report.collect import collect


def write_report(store_path: Path, output: Path, *, run: str | None = None) -> Path:
    """Draw the latest numbers of every analyzer over training steps; returns the absolute path of the page.

    ``run``: only this run of the store. An existing ``output`` is replaced as a whole or not at all.

    Raises StoreError when the store cannot be read, UsageError for an unknown run, a store without any analysis, or an
    ``output`` that cannot be written.
    """
    output = output.absolute()
    if output == store_path.absolute():
        raise UsageError(f"--output names the store itself ({output}); name a new file such as report.html.")
    if output.is_dir():
        raise UsageError(f"--output: expected a file such as {output / 'report.html'}, found the folder {output}.")
    data = collect(store_path, run)
    if not data["sections"] and not data["troubles"]:
        raise UsageError(
            f"{store_path} holds no analysis yet, so there is nothing to draw. Expected the store of a "
            "`trace-offline analyze` that has finished at least one checkpoint."
        )
    text = render(data)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _replace(output, text)
    except OSError as error:
        raise UsageError(f"--output: cannot write {output}: {error.strerror or error}. Name another place.") from error
    return output


def render(data: dict[str, Any], now: datetime.datetime | None = None) -> str:
    """The page for ``collect``'s data. ``now``: the time printed at its foot."""
    from importlib.metadata import version

    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    library, script = _asset("vendor", "echarts.min.js"), _asset("templates", "report.js")
    environment = Environment(
        loader=PackageLoader("trace_offline.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["steps"] = step_list
    moment = now or datetime.datetime.now(datetime.UTC)
    return environment.get_template("report.html.j2").render(
        data=data,
        title=", ".join(item["run"] for item in data["runs"]),
        version=version("trace-offline"),
        made=moment.strftime("%Y-%m-%d %H:%M UTC"),
        policy=Markup(
            f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src 'unsafe-inline'; "
            "img-src data: blob:; base-uri 'none'; form-action 'none'"
        ),
        style=Markup(_asset("templates", "report.css")),
        library=Markup(library),
        script=Markup(script),
        payload=Markup(embed(data)),
    )


def embed(data: Any) -> str:
    """JSON that can stand inside a script element: no ``<``, ``>`` or ``&``, no line separators of JavaScript."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def step_list(steps: list[int | None], most: int = 12) -> str:
    """``0, 1, 2, … 512 (14 steps)``: every step where they are few, the ends where they are many."""
    known = [f"{step:,}" for step in steps if step is not None]
    if len(known) <= most:
        return ", ".join(known) or "–"
    return f"{', '.join(known[: most // 2])}, … {', '.join(known[-most // 2 + 2 :])} ({len(known)} steps)"


def _asset(*parts: str) -> str:
    """A file of this package as it will stand in the page; browsers hash it with line feeds."""
    text = files("trace_offline.report").joinpath(*parts).read_text(encoding="utf-8")
    text = text.replace("\r\n", "\n")
    if "</script" in text.lower():
        raise ValueError(f"{'/'.join(parts)} contains an end tag of script and cannot be inlined")
    return text


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _replace(output: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        # mkstemp makes files private; a report is made to be passed on, so it gets the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(output)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

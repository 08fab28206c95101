"""What docs/corpus.md says can be typed, can be typed; names in its tables exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from trace_offline.cli.main import app
from trace_offline.corpus import KINDS, Pair
from trace_offline.corpus.forms import FORMS
from trace_offline.corpus.grammar import COMPLEXITIES, ROLES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "corpus.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return [block.split("```", 1)[0].strip() for block in PAGE.split(f"```{language}\n")[1:]]


def test_the_commands_of_the_page_work_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ROOT / "data" / "tiny_series"
    if not tokenizer.exists():
        pytest.skip("needs the shipped series in data/")
    checkpoint = sorted(folder for folder in tokenizer.iterdir() if (folder / "config.json").exists())[-1]
    monkeypatch.chdir(tmp_path)
    lines = next(block for block in blocks("") if "corpus generate" in block).splitlines()
    assert len(lines) == 4
    for line in lines:
        words = [str(checkpoint) if word == "CHECKPOINT" else word for word in shlex.split(line)[1:]]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (line, done.output, done.exception)
    assert {path.name for path in tmp_path.iterdir()} == {
        "corpus.jsonl", "corpus.jsonl.params.json", "pairs.jsonl", "held_out",
    }  # fmt: skip


def test_the_example_in_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[0], "docs/corpus.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"(\w+) became (\w+)", printed[-1])
    one, two = printed[-1].split(" became ")
    assert one.rstrip("s") == two.rstrip("s") or {one, two} == {"is", "are"}
    assert all(len(line.split()) == 3 for line in printed[:-1])


def test_the_page_names_all_there_is() -> None:
    root = typer.main.get_command(app)
    generate = root.commands["corpus"].commands["generate"]  # type: ignore[attr-defined]
    options = {option for parameter in generate.params for option in (*parameter.opts, *parameter.secondary_opts)}
    named = set(re.findall(r"`(--[a-z-]+)", PAGE))
    assert options - {"--sentences", "--seed", "--agreement", "output"} <= named
    assert named - {"--json", "--kind"} <= options
    for name in (*FORMS, *KINDS, *COMPLEXITIES):
        assert f"`{name}`" in PAGE, name
    assert all(role in PAGE for role in ROLES)
    assert set(json.loads(blocks("json")[0])) == set(Pair.__dataclass_fields__)

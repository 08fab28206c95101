"""Documentation that a test keeps true: commands, queries, analyzer pages, the analyzer in the tutorial."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from conftest import SmallSeries

from trace_offline import Store, analyze
from trace_offline.analyzers.registry import GROUP, load_registry, registry
from trace_offline.cli.analyzers import describe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = (
    "What it measures", "Formula", "Parameters", "Metrics", "Cost", "How to read it", "When not to trust it",
    "References",
)  # fmt: skip


def blocks(text: str, language: str) -> list[str]:
    return [block.split("```", 1)[0].strip() for block in text.split(f"```{language}\n")[1:]]


@pytest.fixture(scope="module")
def store(small_series: SmallSeries, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("docs") / "s.duckdb"
    few = {"hessian": {"k": 1, "slq_probes": 2, "slq_steps": 3, "trace_probes": 2, "max_sequences": 2}}
    analyze(small_series.run, small_series.evaluation, path, params=few, jobs=1, steps="0-1")
    return path


@pytest.mark.parametrize("query", blocks(README, "sql"))
def test_queries_of_the_readme_find_something(query: str, store: Path) -> None:
    # the small series is annotated with one task only
    table = Store.open(store).sql(query.replace("'role'", "'parity'"))
    assert table.num_rows >= 1
    assert table.num_columns > 1


def commands() -> list[list[str]]:
    """Every trace-offline command of the README's code blocks."""
    found = []
    for block in blocks(README, ""):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("trace-offline "):
                found.append(shlex.split(line, comments=True)[1:])
    return found


def test_commands_of_the_readme_exist_with_their_options() -> None:
    import typer

    from trace_offline.cli.main import app

    root = typer.main.get_command(app)
    listed = commands()
    assert len(listed) >= 8
    for words in listed:
        command = root
        while hasattr(command, "commands"):
            assert words[0] in command.commands, words
            command, words = command.commands[words[0]], words[1:]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if re.match(r"--[a-z]", word)} <= known, words


@pytest.mark.parametrize("name", sorted(registry().analyzers))
def test_every_analyzer_has_a_page_that_names_all_it_has(name: str) -> None:
    path = ROOT / "docs" / "analyzers" / f"{name}.md"
    assert path.exists(), f"docs/analyzers/{name}.md is missing"
    text = path.read_text(encoding="utf-8")
    assert tuple(re.findall(r"^## (.+)$", text, re.MULTILINE)) == SECTIONS
    item = describe(registry().get(name))
    for entry in [*item["parameters"], *item["metrics"]]:
        assert f"`{entry['name']}`" in text, entry["name"]


def test_no_page_without_its_analyzer() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "analyzers").glob("*.md")}
    assert pages <= set(registry().analyzers)


def test_no_analyzer_of_this_package_is_broken() -> None:
    assert not registry().broken


def test_the_analyzer_of_the_tutorial_works(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "writing_an_analyzer.md").read_text(encoding="utf-8")
    (tmp_path / "my_package.py").write_text(blocks(text, "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    found = load_registry((EntryPoint("largest_probability", "my_package:Confidence", GROUP),))
    assert not found.broken
    for module in ("analyze", "worker"):
        monkeypatch.setattr(f"trace_offline.engine.{module}.registry", lambda: found, raising=False)
    monkeypatch.setattr("trace_offline.analyzers.registry.registry", lambda: found)
    summary = analyze(
        small_series.run, small_series.evaluation, tmp_path / "s.duckdb", analyzers=("largest_probability",), jobs=1
    )
    assert summary.exit_code == 0, summary.problems
    value = Store.open(tmp_path / "s.duckdb").scalar("select max(value) from history")
    assert 1 / 80 < value <= 1


def test_links_of_the_documentation_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "data" / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} → {target}"

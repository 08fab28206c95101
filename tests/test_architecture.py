"""The house rules a machine can check: which way imports point, what stays lazy, how long a module is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trace_offline

PACKAGE = Path(trace_offline.__file__).parent

# A stage may import the stages before it in this list, and itself.
# The corpus is data and needs the core only; analyzers judge sampled sentences by the grammar that made it.
ORDER = [
    "core", "corpus", "estimators", "checkpoints", "evaluation", "activations", "analyzers", "recording", "store",
    "query", "importers", "events", "engine", "report", "web", "api", "cli",
]  # fmt: skip
# The training side stands apart: nothing of the analysis may creep into a training script, and the corpus is data.
ALONE = {"corpus": {"core"}, "recording": {"core", "evaluation", "checkpoints"}, "query": {"core", "store"}}
MODULES = sorted(PACKAGE.rglob("*.py"))


def stage_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_stages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("trace_offline.")}
    return found


@pytest.mark.parametrize("path", [p for p in MODULES if stage_of(p) != "__init__"], ids=lambda p: str(p.name))
def test_imports_point_one_way(path: Path) -> None:
    stage = stage_of(path)
    assert stage in ORDER, f"{path} belongs to no known stage"
    allowed = ALONE.get(stage, set(ORDER[: ORDER.index(stage)])) | {stage}
    assert imported_stages(path) <= allowed, f"{path.name} imports {imported_stages(path) - allowed}"


def test_the_check_itself_sees_a_wrong_import(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from trace_offline.cli import main\n")
    assert imported_stages(wrong) == {"cli"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_grows_past_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def loaded_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(' '.join(m for m in ('torch', 'transformers', 'duckdb') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import trace_offline", set()),
        ("import trace_offline.cli.main", set()),
        ("import trace_offline.core.types, trace_offline.core.params", set()),
        ("from trace_offline import Store, UsageError, Analyzer", {"duckdb"}),
        ("from trace_offline import discover", set()),
        ("from trace_offline.recording import save_checkpoint, save_evaluation_set", {"torch"}),
    ],
)
def test_heavy_libraries_stay_out(code: str, allowed: set[str]) -> None:
    assert loaded_after(code) <= allowed


def test_the_lazy_check_notices_torch() -> None:
    assert "torch" in loaded_after("import torch")


@pytest.mark.parametrize("name", trace_offline.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(trace_offline, name).__doc__


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trace_offline.nothing  # noqa: B018

"""The page of pictures: right numbers, nothing from elsewhere, no text that becomes code."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import re
import shutil
import stat
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import duckdb
import pytest

from trace_offline.core.errors import StoreError, UsageError
from trace_offline.report import write_report
from trace_offline.report.collect import collect
from trace_offline.report.page import embed, render, step_list
from trace_offline.store.schema import CREATE, SCHEMA_VERSION

STEPS = (0, 1, 16, 512)
EVIL = "</script><script>alert(1)</script><!--\u2028&amp;"
NOW = datetime.datetime(2026, 1, 2, 3, 4)


class Builder:
    """A store made row by row with the real schema."""

    def __init__(self, path: Path) -> None:
        self.con = duckdb.connect(str(path))
        self.con.execute(CREATE)
        self.con.execute("insert into meta values ('schema_version', ?)", [str(SCHEMA_VERSION)])
        self.con.execute(
            "insert into evaluation_sets values ('eval-hash-0123456', 'stories', 'p', 100, 5000, null, 'causal_lm', "
            "'', 'CC0-1.0')"
        )
        self.n = 0

    def run(self, name: str, steps: tuple[int, ...] = STEPS, states: dict[int, tuple[str, str]] | None = None) -> None:
        self.con.execute("insert into runs values (?, ?, 'gpt_neox', ?)", [name, f"/somewhere/private/{name}", NOW])
        for step in steps:
            state, reason = (states or {}).get(step, ("complete", None))
            self.con.execute(
                "insert into checkpoints values (?, ?, ?, ?, ?, null, null, 'hf_folder', ?, null, ?, ?, ?, 1, null)",
                [f"{name}@{step}", name, f"step{step}", step, step * 100, f"/x/{step}", state, reason, f"f{step}"],
            )

    def analysis(
        self,
        run: str,
        step: int,
        analyzer: str,
        numbers: list[tuple[Any, ...]],
        status: str = "ok",
        message: str | None = None,
        params: str = "{}",
    ) -> None:
        """``numbers``: (layer, component, task, label, metric, value, stderr, n, reason)."""
        self.n += 1
        identity = [f"a{self.n}", f"f{step}", analyzer, "1", params, "eval-hash-0123456", "float32", 0]
        self.con.execute(
            "insert into analyses values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1.5, 'cpu', "
            '\'{"torch": "2.13.0"}\', ?, ?)',
            [self.n, *identity, status, message, self.n, NOW],
        )
        self.con.execute("insert into planned values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [f"{run}@{step}", *identity, NOW])
        if numbers:
            self.con.executemany(
                "insert into measurements values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [(self.n, *row) for row in numbers]
            )

    def planned(self, run: str, step: int, analyzer: str) -> None:
        self.con.execute(
            "insert into planned values (?, 'later', ?, ?, '1', '{}', 'eval-hash-0123456', 'float32', 0, ?)",
            [f"{run}@{step}", f"f{step}", analyzer, NOW],
        )


def layer_value(step: int, layer: int) -> float:
    return 0.5 + 0.1 * layer + step / 10_000


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "history.duckdb"
    built = Builder(path)
    built.run(
        "pilot", (*STEPS, 2048), states={2048: ("unreadable", "weights are an HTML page"), 16: ("duplicate", "as 1")}
    )
    for step in STEPS:
        built.analysis(
            "pilot",
            step,
            "loss",
            [
                (None, None, None, None, "loss", 6.0 - step / 200, 0.01, 5000, None),
                (None, None, None, None, "perplexity", 123456.789123, None, 5000, None),
            ],
        )
        rows = [
            (layer, "residual", "pos", None, "macro_f1", layer_value(step, layer), 0.02, 400, None)
            for layer in range(3)
        ]
        rows += [
            (layer, "residual", "pos", label, "f1", 0.3 * layer, None, 10, None)
            for layer in range(3)
            for label in ("NOUN", "VERB", EVIL)
        ]
        built.analysis("pilot", step, "probe", rows)
        ranks = [(None, "all", None, str(rank), "eigenvalue", 10.0 / rank, None, None, None) for rank in (1, 2, 10)]
        if step < 512:
            built.analysis("pilot", step, "hessian", ranks)
        few = "only 31 distinct points among 2,000 tokens; at least 50 are needed"
        built.analysis(
            "pilot",
            step,
            "intrinsic_dimension",
            [
                (0, "residual", None, None, "twonn", None, None, 31, few),
                (1, "residual", None, None, "twonn", 5.0 + step / 512, 0.3, 1900, None),
            ],
        )
    built.analysis("pilot", 512, "hessian", [], "failed", f"out of memory {EVIL}")
    built.analysis("pilot", 0, "third_party", [(None, None, None, None, "score", 1.0, None, None, None)])
    built.planned("pilot", 512, "output")
    # A rerun with another parameter: the older numbers are no longer the latest.
    built.analysis("pilot", 512, "loss", [(None, None, None, None, "loss", 2.5, 0.02, 900, None)], params='{"bins": 7}')
    built.con.close()
    return path


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text of each script and of the rest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in ("meta", "input", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)


def section(data: dict[str, Any], analyzer: str) -> dict[str, Any]:
    (found,) = [item for item in data["sections"] if item["analyzer"] == analyzer]
    return found


def chart(data: dict[str, Any], analyzer: str, metric: str) -> dict[str, Any]:
    (found,) = [item for item in section(data, analyzer)["charts"] if item["metric"] == metric]
    return found


# --- the numbers


def test_series_are_those_of_the_store(store: Path) -> None:
    data = collect(store)
    found = chart(data, "probe", "macro_f1")
    assert (found["task"], found["component"], found["labelled"], found["constant"]) == (
        "pos",
        "residual",
        False,
        False,
    )
    assert found["steps"] == list(STEPS)
    assert found["tokens"] == [step * 100 for step in STEPS]
    assert [line["layer"] for line in found["series"]] == [0, 1, 2]
    for line in found["series"]:
        assert line["value"] == pytest.approx([layer_value(step, line["layer"]) for step in STEPS], rel=1e-6)
        assert line["stderr"] == [0.02] * 4
        assert line["n"] == [400] * 4


def test_only_the_latest_analysis_of_a_checkpoint_is_drawn(store: Path) -> None:
    data = collect(store)
    found = chart(data, "loss", "loss")
    assert found["series"][0]["value"] == pytest.approx([6.0, 5.995, 5.92, 2.5])
    assert found["series"][0]["n"] == [5000, 5000, 5000, 900]
    settings = section(data, "loss")["settings"]
    assert [(row["params"], row["steps"], row["first"]) for row in settings] == [({}, 3, 0), ({"bins": 7}, 1, 512)]
    assert "The parameters differ between steps" in render(data)


def test_classes_and_ranks_are_in_their_natural_order(store: Path) -> None:
    data = collect(store)
    ranks = chart(data, "hessian", "eigenvalue")
    assert [line["label"] for line in ranks["series"]] == ["1", "2", "10"]
    assert ranks["labelled"]
    assert ranks["constant"]  # the same at all steps: behind the fold
    assert ranks["steps"] == [0, 1, 16]
    classes = chart(data, "probe", "f1")
    assert [(line["label"], line["layer"]) for line in classes["series"]] == [
        (label, layer) for label in (EVIL, "NOUN", "VERB") for layer in range(3)
    ]


def test_sections_follow_the_analyzers_and_carry_their_words(store: Path) -> None:
    data = collect(store)
    assert [item["analyzer"] for item in data["sections"]] == [
        "loss",
        "probe",
        "intrinsic_dimension",
        "hessian",
        "third_party",
    ]
    assert chart(data, "loss", "loss")["unit"] == "nats"
    assert chart(data, "intrinsic_dimension", "twonn")["meaning"]
    assert chart(data, "third_party", "score")["unit"] == ""  # not installed: drawn all the same
    assert not chart(data, "third_party", "score")["constant"]  # one point is no constant


def test_missing_values_stay_missing_and_say_why(store: Path) -> None:
    data = collect(store)
    lines = chart(data, "intrinsic_dimension", "twonn")["series"]
    assert lines[0]["value"] == [None] * 4
    assert None not in lines[1]["value"]
    (row,) = data["missing"]
    assert (row["analyzer"], row["metric"], row["layer"], row["n"]) == ("intrinsic_dimension", "twonn", 0, 4)
    assert row["steps"] == list(STEPS)
    assert row["reason"].startswith("only 31 distinct points")
    assert "only 31 distinct points among 2,000 tokens" in " ".join(Page(render(data)).words)


def test_troubles_are_listed(store: Path) -> None:
    rows = {(row["what"], row["status"]): row for row in collect(store)["troubles"]}
    assert rows["hessian", "failed"]["reason"] == f"out of memory {EVIL}"
    assert rows["hessian", "failed"]["steps"] == [512]
    assert rows["output", "planned"]["n"] == 1
    assert rows["checkpoint step2048", "unreadable"]["reason"] == "weights are an HTML page"
    assert rows["checkpoint step16", "duplicate"]["reason"] == "as 1"
    assert len(rows) == 4


def test_a_store_where_all_went_well_says_so(tmp_path: Path) -> None:
    built = Builder(tmp_path / "s.duckdb")
    built.run("calm", (5,))
    built.analysis("calm", 5, "loss", [(None, None, None, None, "loss", 1.0, None, 1, None)])
    built.con.close()
    words = " ".join(Page(render(collect(tmp_path / "s.duckdb"))).words)
    assert "Every planned analysis succeeded." in words
    assert "Single numbers" not in words


def test_header(store: Path) -> None:
    words = " ".join(" ".join(Page(render(collect(store), NOW)).words).split())
    for part in (
        "5, steps 0 to 2,048, 204,800 tokens, 1 with the weights of another step, 1 set aside",
        "gpt_neox",
        "stories: 100 rows, 5,000 tokens, causal_lm, CC0-1.0, hash eval-hash-01",
        "device cpu, dtype float32, seed 0, torch 2.13.0",
        "Made 2026-01-02 03:04 UTC by trace-offline",
    ):
        assert part in words
    assert "private" not in render(collect(store))  # where the folder lay is nobody's business


def test_runs(store: Path, tmp_path: Path) -> None:
    both = tmp_path / "two.duckdb"
    shutil.copy(store, both)
    built = Builder.__new__(Builder)
    built.con, built.n = duckdb.connect(str(both)), 1000
    built.run("second", (7,))
    built.analysis("second", 7, "loss", [(None, None, None, None, "loss", 3.0, None, None, None)])
    built.con.close()
    assert {item["run"] for item in collect(both)["sections"]} == {"pilot", "second"}
    alone = collect(both, "second")
    assert [item["run"] for item in alone["sections"]] == ["second"]
    assert alone["troubles"] == []
    page = Page(render(collect(both)))
    assert "loss (second)" in [" ".join(word.split()) for word in page.words]
    with pytest.raises(UsageError, match=r'has no run "secnd"\. Did you mean "second"\? Its runs: pilot, second\.'):
        collect(both, "secnd")


def test_a_large_history_is_thinned_and_the_page_says_so(tmp_path: Path) -> None:
    path = tmp_path / "large.duckdb"
    built = Builder(path)
    steps = tuple(range(0, 1000, 10))
    built.run("long", steps)
    for step in steps:
        built.analysis(
            "long",
            step,
            "loss",
            [(layer, None, None, None, "loss", step + layer, None, None, None) for layer in range(4)]
            + [(None, None, None, label, "loss", 1.0, None, None, None) for label in "ab"],
        )
    built.con.close()
    assert len(section(collect(path), "loss")["charts"]) == 2
    assert collect(path)["notes"] == []
    data = collect(path, most_numbers=450)
    (only,) = section(data, "loss")["charts"]
    assert len(only["steps"]) == 100
    (note,) = data["notes"]
    assert note.startswith("long: 600 numbers are too many for one page, so those of single classes and ranks")
    data = collect(path, most_numbers=80)
    (only,) = section(data, "loss")["charts"]
    assert len(only["steps"]) == 20
    assert (only["steps"][0], only["steps"][-1]) == (0, 990)
    assert data["notes"][1].startswith("long: 20 of 100 steps are shown")
    assert data["notes"][1] in " ".join(Page(render(data)).words)


def test_checkpoints_without_a_step(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    built = Builder(path)
    built.run("models", (1, 2))

    def change(sql: str) -> None:
        with duckdb.connect(str(path)) as con:
            con.execute(sql)

    for step in (1, 2):
        built.analysis("models", step, "loss", [(None, None, None, None, "loss", float(step), None, 1, None)])
    built.con.close()
    change("update checkpoints set step = null, checkpoint = 'model-' || step")
    data = collect(path)
    assert (chart(data, "loss", "loss")["steps"], chart(data, "loss", "loss")["series"][0]["value"]) == ([0, 1], [1, 2])
    assert data["notes"] == [
        "models: no step is known for any checkpoint; they are numbered from 0 in the order of their names."
    ]
    assert data["notes"][0] in " ".join(Page(render(data)).words)
    change("update checkpoints set step = 5 where checkpoint = 'model-2'")
    data = collect(path)
    assert chart(data, "loss", "loss")["steps"] == [5]
    assert data["notes"] == ["models: 1 checkpoints without a step are not drawn."]
    change("update checkpoints set step = 5")
    data = collect(path)
    assert chart(data, "loss", "loss")["series"][0]["value"] == [2]
    assert data["notes"] == ["models: several checkpoints share a step; the last one by name is drawn."]


# --- the page


def test_the_page_stands_alone(store: Path, tmp_path: Path) -> None:
    """Nothing is fetched: no address in an attribute or style, and a policy that would forbid it."""
    text = write_report(store, tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert name != "src"
            assert not name.startswith("on")
            if name == "href":
                assert str(value).startswith("#")
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    own = files("trace_offline.report").joinpath("templates", "report.js").read_text(encoding="utf-8")
    for word in ("http:", "https:", "fetch(", "XMLHttpRequest", "import(", "eval(", "innerHTML", "localStorage"):
        assert word not in own


def test_the_policy_admits_the_two_scripts_and_nothing_else(store: Path, tmp_path: Path) -> None:
    page = Page(write_report(store, tmp_path / "report.html").read_text(encoding="utf-8"))
    (policy,) = [
        str(attributes["content"])
        for tag, attributes in page.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["base-uri"] == rules["form-action"] == "'none'"
    runnable = [text for attributes, text in page.scripts if "type" not in attributes]
    assert len(runnable) == 2
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in runnable]
    assert rules["script-src"] == " ".join(hashes)


def test_text_from_a_store_never_becomes_markup(store: Path, tmp_path: Path) -> None:
    text = write_report(store, tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.scripts) == 3
    assert "alert(1)</script>" not in text
    ((_, payload),) = [script for script in page.scripts if script[0].get("type") == "application/json"]
    assert not set("<>&\u2028\u2029") & set(payload)
    data = json.loads(payload)
    assert data == json.loads(json.dumps(collect(store)))
    assert EVIL in {line["label"] for line in chart(data, "probe", "f1")["series"]}
    assert f"out of memory {EVIL}" in "".join(page.words)


def test_embed_refuses_what_is_not_json() -> None:
    assert json.loads(embed({"a": EVIL, "b": [None, 1.5]})) == {"a": EVIL, "b": [None, 1.5]}
    with pytest.raises(ValueError, match="JSON compliant"):
        embed([float("nan")])


def test_the_vendored_library_is_the_published_one() -> None:
    folder = files("trace_offline.report").joinpath("vendor")
    manifest = json.loads(folder.joinpath("manifest.json").read_text(encoding="utf-8"))
    names = {item.name for item in folder.iterdir() if item.is_file()} - {"manifest.json"}
    assert names == set(manifest["sha256"]) == {"echarts.min.js", "LICENSE", "LICENSE-d3", "NOTICE"}
    for name, expected in manifest["sha256"].items():
        assert hashlib.sha256(folder.joinpath(name).read_bytes()).hexdigest() == expected
    assert manifest["version"] in folder.joinpath("echarts.min.js").read_text(encoding="utf-8")
    assert "Apache License" in folder.joinpath("LICENSE").read_text(encoding="utf-8")


def test_steps_as_text() -> None:
    assert step_list([0, 1, 512]) == "0, 1, 512"
    assert step_list([None]) == "–"
    assert step_list(list(range(0, 40_000, 2_000))) == (
        "0, 2,000, 4,000, 6,000, 8,000, 10,000, … 32,000, 34,000, 36,000, 38,000 (20 steps)"
    )


# --- files


def test_the_file_is_replaced_whole_and_readable_by_others(store: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "folder" / "report.html"
    assert write_report(store, output, run="pilot") == output
    assert stat.S_IMODE(output.stat().st_mode) & 0o400
    output.write_text("old")
    write_report(str(store), str(output))
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [item.name for item in output.parent.iterdir()] == ["report.html"]


def test_what_cannot_be_written_or_read(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"--output: cannot write .*report\.html.*Name another place"):
        write_report(store, tmp_path / "file" / "report.html")
    with pytest.raises(UsageError, match=r"--output: expected a file such as .*report\.html, found the folder"):
        write_report(store, tmp_path)
    with pytest.raises(UsageError, match="names the store itself"):
        write_report(store, store)
    with pytest.raises(StoreError, match="No store at"):
        write_report(tmp_path / "none.duckdb", tmp_path / "r.html")
    Builder(tmp_path / "empty.duckdb").con.close()
    with pytest.raises(UsageError, match="holds no analysis yet"):
        write_report(tmp_path / "empty.duckdb", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


# --- in a browser, where there is one


def test_a_browser_draws_every_chart(store: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium or google-chrome on the PATH to draw the page")
    output = write_report(store, tmp_path / "report.html")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    seen = subprocess.run(
        [
            browser,
            *flags.split(),
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=8000",
            "--window-size=1360,9000",
            "--enable-logging=stderr",
            "--dump-dom",
            output.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not re.search(r"CONSOLE.*(Error|Refused|violates)", seen.stderr, re.IGNORECASE), seen.stderr
    drawn = re.findall(r"<figure>.*?</figure>", seen.stdout, re.DOTALL)
    charts = [item for part in collect(store)["sections"] for item in part["charts"]]
    assert len(drawn) == len(charts)
    # Those behind the fold of constants wait until it is opened.
    assert sum("<svg" in figure for figure in drawn) == sum(not item["constant"] for item in charts)
    (macro,) = [figure for figure in drawn if ">macro_f1<" in figure]
    for word in ("layer 0", "layer 2", "training step (logarithmic)", ">512<"):
        assert word in macro

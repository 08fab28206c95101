"""TRACE's question, asked of saved checkpoints: do syntax, roles, dimension and curvature develop in phases?

    python examples/trace_paper/run.py --output runs             # two and four layers, three seeds each
    python examples/trace_paper/run.py --output runs --reduced   # everything in small, under ten minutes
    python examples/trace_paper/run.py --output runs --publish   # also writes docs/trace_paper.md and its numbers

Trains what is missing, builds the evaluation sets, analyzes every run, joins them in one history, decides each claim,
draws the pictures and writes the page. Every stage goes on where it was interrupted and does nothing twice. Runs have
files of their own until they are joined, so that several can be trained and analyzed side by side (``--only``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from claims import judge
from measures import read_curves
from page import write_page
from pictures import draw
from sets import build_sets
from train import Setting, train

from trace_offline.api import analyze
from trace_offline.store.merge import merge

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
# Which of the checkpoints are measured, beside the last: the more an analysis costs, the fewer.
CHEAP = (0, 16, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2560)
PROBED = (0, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536)
WORDS = (0, 64, 128, 192, 256, 384, 640)
CURVED = (0, 16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2560)
HESSIANS = (0, 16, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2560)
# At step 0 as much curves down as up, and the trace needs many random vectors.
HESSIAN = {
    "k": 5, "tolerance": 0.01, "max_steps": 40, "slq_probes": 2, "slq_steps": 8, "trace_probes": 96,
    "max_sequences": 32,
}  # fmt: skip
DIMENSION = {"max_samples": 1000, "gride_to": 0, "trace_flattened": True}
FIT = {"penalties": (0.01,), "tolerance": 2e-3}


@dataclass(frozen=True)
class Part:
    """Analyzers that share one pass over one evaluation set."""

    evaluation_set: str
    params: dict[str, dict[str, Any]]
    steps: tuple[int, ...]


def parts(setting: Setting) -> tuple[Part, ...]:
    """What is measured on a run, the cheap first."""
    probed = {"layers": (setting.layers,), "tasks": ("role", "subject_number"), "references": ("last",)}
    return (
        Part("sentences", {name: {} for name in ("loss", "output", "agreement")}, CHEAP),
        Part("changed", {"minimal_pairs": {}}, CHEAP),
        Part("sentences", {"probe_transfer": {**probed, "matrix": False, **FIT}}, PROBED),
        Part("sentences", {"intrinsic_dimension": DIMENSION}, CURVED),
        Part("words", {"probe": {"control": False, "split_by": "word_type", "max_words": 1500, **FIT}}, WORDS),
        Part("sentences", {"hessian": HESSIAN}, HESSIANS),
        Part("sentences", {"ngram": {}}, CHEAP),
        Part("seen_and_new", {"memorization": {}}, CHEAP),
        Part("sentences", {"sampled_sentences": {"sentences": 400}}, CURVED),
    )


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    setting: Setting
    sentences: int
    words: int
    pairs: int


FULL = Scale(Setting(), sentences=2000, words=500, pairs=300)
REDUCED = Scale(
    Setting(sentences=6000, nouns=60, verbs_per_frame=4, adjectives=10, adverbs=8, epochs=10, warmup=80),
    sentences=500,
    words=200,
    pairs=100,
)


def measured_steps(setting: Setting, part: Part) -> tuple[int, ...]:
    """The checkpoints that a part looks at."""
    kept = setting.kept()
    return tuple(step for step in kept if step in part.steps or step == kept[-1])


def analyze_run(folder: Path, store: Path, setting: Setting, sets: dict[str, Path], jobs: int | None) -> None:
    """All parts for one run; the CPU time they take, over all interruptions, is kept in ``analysis.json`` beside it."""
    clock = folder / setting.name / "analysis.json"
    took = json.loads(clock.read_text(encoding="utf-8"))["cpu_seconds"] if clock.exists() else 0.0
    for part in parts(setting):
        started = sum(os.times()[:4])  # of this process and of its workers
        summary = analyze(
            folder / setting.name,
            sets[part.evaluation_set],
            store,
            analyzers=tuple(part.params),
            params=part.params,
            steps=",".join(map(str, measured_steps(setting, part))),
            run=setting.name,
            jobs=jobs,
        )
        print(
            f"{setting.name}: {', '.join(part.params)}: {summary.ok} done, {summary.already_done} were there, "
            f"{summary.failed + summary.crashed} failed",
            flush=True,
        )
        if summary.ok:
            took += sum(os.times()[:4]) - started
            clock.write_text(json.dumps({"cpu_seconds": round(took, 1)}) + "\n", encoding="utf-8")
        for problem in summary.problems:
            print(f"  {problem}", flush=True)
        if summary.failed or summary.crashed:
            raise SystemExit(f"{setting.name}: some analyses failed; look at: trace-offline status {store}")


def collect(store: Path, trained: Sequence[dict[str, Any]], scale: Scale) -> dict[str, Any]:
    """Everything the page says, as JSON: curves, answers, the runs and where they were made."""
    names = {run["name"] for run in trained}
    curves = {run: rounded(each) for run, each in read_curves(store).items() if run in names}
    return {
        "machine": f"{cores()}-core {platform.machine()} CPU",
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("trace-offline", "torch", "transformers", "numpy", "scipy")},
        "scale": asdict(replace(scale, setting=replace(scale.setting, layers=0, seed=0))),
        "runs": {
            run["name"]: {
                "layers": run["setting"]["layers"],
                "seed": run["setting"]["seed"],
                "parameters": run["parameters"],
                "steps": run["steps"],
                "tokens_seen": run["tokens_seen"],
                "training_cpu_seconds": run.get("cpu_seconds"),
                "analysis_cpu_seconds": run["analysis"]["cpu_seconds"],
            }
            for run in trained
        },
        "corpus": trained[0]["corpus"],
        "curves": curves,
        "claims": {
            f"{layers} layers": judge({run: each for run, each in curves.items() if run.startswith(f"L{layers}-")})
            for layers in sorted({run["setting"]["layers"] for run in trained})
        }
        | {"all runs": judge(curves)},
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def rounded(value: Any) -> Any:
    """Numbers with five digits, so that the file can be read and compared."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def publish_times(results: dict[str, Any], path: Path) -> None:
    """What the reduced form took, seed by seed, as JSON: the page is not about it."""
    kept = ("layers", "seed", "training_cpu_seconds", "analysis_cpu_seconds")
    runs = {name: {key: run[key] for key in kept} for name, run in results["runs"].items()}
    total = sum(run[key] for run in runs.values() for key in kept[2:])
    found = {key: results[key] for key in ("machine", "date", "versions", "scale")}
    found |= {"runs": runs, "cpu_seconds_of_everything": round(total, 1)}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def publish(results: dict[str, Any], numbers: Path, page: Path) -> None:
    """Write the results into the folder ``numbers``, page and pictures into the folder ``page``."""
    for folder in (numbers, page):
        folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, separators=(",", ":"))
    (numbers / "trace_paper.json").write_text(text + "\n", encoding="utf-8")
    draw(results, page / "images")
    (page / "trace_paper.md").write_text(write_page(json.loads(text)), encoding="utf-8")
    print(f"written: {page / 'trace_paper.md'} and {numbers / 'trace_paper.json'}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, analyze and answer; every stage resumes.")
    parser.add_argument("--output", type=Path, required=True, help="folder for corpus, runs, sets and history")
    parser.add_argument("--models", default="2,4", help="numbers of layers (default 2,4)")
    parser.add_argument("--seeds", default="0,1,2", help="seeds (default 0,1,2)")
    parser.add_argument("--reduced", action="store_true", help="everything in small: two layers, three seeds")
    parser.add_argument("--jobs", type=int, default=None, help="processes of the analysis (default: one a core)")
    parser.add_argument(
        "--publish", action="store_true", help="write page and numbers (reduced: its times) into the project"
    )
    parser.add_argument("--only", metavar="RUN", help="train and analyze this run (such as L2-seed0) and stop")
    parser.add_argument("--page-only", action="store_true", help="train and analyze nothing, only decide and draw")
    given = parser.parse_args()
    scale = REDUCED if given.reduced else FULL
    layers = [2] if given.reduced else [int(each) for each in given.models.split(",")]
    seeds = [int(each) for each in given.seeds.split(",")]
    settings = [replace(scale.setting, layers=each, seed=seed) for each in layers for seed in seeds]
    folder: Path = given.output
    store = folder / "history.duckdb"
    stores = {setting.name: folder / f"{setting.name}.duckdb" for setting in settings}

    trained = []
    for setting in [each for each in settings if given.only in (None, each.name)]:
        if given.page_only and not (folder / setting.name / "analysis.json").exists():
            raise SystemExit(f"{setting.name} has not been analyzed; leave --page-only out.")
        result = train(folder, setting)
        if not given.page_only:
            sets = build_sets(folder, setting, sentences=scale.sentences, words=scale.words, pairs=scale.pairs)
            analyze_run(folder, stores[setting.name], setting, sets, given.jobs)
        analysis = json.loads((folder / setting.name / "analysis.json").read_text(encoding="utf-8"))
        trained.append({**result, "analysis": analysis})
    if given.only:
        return
    merge(list(stores.values()), store)
    results = collect(store, trained, scale)
    publish(results, *((HERE / "results", DOCS) if given.publish and not given.reduced else (folder / "page",) * 2))
    if given.publish and given.reduced:
        publish_times(results, HERE / "results" / "reduced.json")


if __name__ == "__main__":
    main()

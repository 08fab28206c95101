"""The example that repeats TRACE's paper: training resumes exactly, claims are judged rightly, the page is true."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from planted_histories import noise, sigmoid
from safetensors.torch import load_file

from trace_offline.core.types import AnalysisStatus, Checkpoint, CheckpointState, Measurement, Outcome
from trace_offline.store.rows import checkpoint_id
from trace_offline.store.writer import Writer

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "trace_paper"
RESULTS = EXAMPLE / "results" / "trace_paper.json"
PAGE = ROOT / "docs" / "trace_paper.md"
STEPS = np.array([0, 16, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2560, 4710], float)
SEEDS = ("L2-seed0", "L2-seed1", "L2-seed2")


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """Imports a module of the example by name, as its own scripts do."""
    names = [path.stem for path in EXAMPLE.glob("*.py")]
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(EXAMPLE))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLE))
    for name in names:
        sys.modules.pop(name, None)
        if before[name] is not None:
            sys.modules[name] = before[name]  # type: ignore[assignment]


@pytest.fixture(scope="module")
def train(example: Any) -> ModuleType:
    return example("train")


@pytest.fixture(scope="module")
def claims(example: Any) -> ModuleType:
    return example("claims")


def tiny(train: ModuleType, **changes: object) -> Any:
    sizes = {"nouns": 20, "verbs_per_frame": 2, "adjectives": 4, "adverbs": 3}
    small = {"sentences": 100, "width": 12, "heads": 2, "inner": 16, "epochs": 4, "batch": 16, "warmup": 5}
    return train.Setting(**{**small, **sizes, **changes})


def test_a_killed_run_ends_with_the_same_weights(train: ModuleType, tmp_path: Path) -> None:
    setting = tiny(train)
    whole = train.train(tmp_path / "a", setting)
    assert train.train(tmp_path / "b", setting, stop_after=9)["steps"] == 9  # after the checkpoint of step 8
    assert not (tmp_path / "b" / setting.name / "training.json").exists()
    again = train.train(tmp_path / "b", setting)
    kept = setting.kept()
    assert kept == (0, 1, 2, 4, 8, 16, 20)
    for step in kept:
        one, two = (load_file(tmp_path / side / setting.name / f"step{step}" / "model.safetensors") for side in "ab")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    timeless = [{k: v for k, v in result.items() if k != "cpu_seconds"} for result in (whole, again)]
    assert timeless[0] == timeless[1]
    assert train.train(tmp_path / "b", setting) == again  # finished: nothing to do


def test_seeds_change_weights_and_order_but_not_the_corpus(train: ModuleType, tmp_path: Path) -> None:
    first, second = tiny(train), tiny(train, seed=1)
    found = [train.train(tmp_path, each, stop_after=0)["corpus"]["train_sha256"] for each in (first, second)]
    assert found[0] == found[1]
    weights = [load_file(tmp_path / each.name / "step0" / "model.safetensors") for each in (first, second)]
    assert not torch.equal(weights[0]["transformer.wte.weight"], weights[1]["transformer.wte.weight"])
    data = torch.arange(80)[:, None]
    orders = [torch.cat([train.batch_of(step, data, each) for step in range(5)]) for each in (first, second)]
    assert not torch.equal(orders[0], orders[1])
    for order in orders:  # an epoch is every sentence once
        assert torch.equal(order.sort(0).values, data)
    later = torch.cat([train.batch_of(step, data, first) for step in range(5, 10)])
    assert not torch.equal(later, orders[0])


def test_held_out_sentences_are_new_and_short_enough(train: ModuleType, tmp_path: Path) -> None:
    setting = tiny(train, sentences=400)
    record = train.write_corpus(tmp_path, setting)
    seen, held_out = (train.read_words(tmp_path / f"{name}.jsonl") for name in ("train", "held_out"))
    assert (len(seen), len(held_out)) == (record["train"], record["held_out"])
    assert record["train"] == 320
    assert record["held_out"] + record["held_out_dropped_as_repeats"] == 80
    assert not {tuple(words) for words in seen} & {tuple(words) for words in held_out}
    assert max(map(len, seen + held_out)) <= setting.longest
    with pytest.raises(SystemExit, match=r"holds another corpus.*Use another folder"):
        train.write_corpus(tmp_path, replace(setting, nouns=30))


def test_halves_give_the_gradient_of_the_whole_batch(train: ModuleType) -> None:
    setting = tiny(train, dropout=0.0)
    torch.manual_seed(0)
    model = train.make_model(setting, 30, 10)
    ids = torch.zeros(7, 10, dtype=torch.long)
    for row, length in enumerate((3, 10, 5, 4, 9, 3, 7)):
        ids[row, :length] = torch.randint(4, 30, (length,))
    loss, count = train.backward(model, ids)
    mine = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    targets = torch.where(ids[:, 1:] == train.PAD, -100, ids[:, 1:])
    logits = model(input_ids=ids, attention_mask=ids != train.PAD).logits[:, :-1]
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    whole.backward()
    assert count == int((targets != -100).sum())
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for left, right in zip(mine, model.parameters(), strict=True):
        assert torch.allclose(left, right.grad, atol=1e-6)


def test_tasks_are_read_off_the_clauses(example: Any) -> None:
    record = {
        "words": ["the", "dogs", "near", "the", "cat", "chase", "a", "bird", "with", "a", "net"],
        "roles": [None, "Agent", None, None, None, None, None, "Patient", None, None, "Instrument"],
        "clauses": [{"subject": 1, "verb": 5, "plural": True}],
    }
    found = example("sets").annotated(record)
    expected = [None] * 11
    assert found["subject_number"] == [*expected[:4], "plural", *expected[5:]]  # at "cat", which is singular
    assert found["roles"] == [*expected[:7], "Patient", None, None, "Instrument"]  # not the subject's
    plain = {"words": ["dogs", "run"], "roles": ["Agent", None], "clauses": [{"subject": 0, "verb": 1, "plural": True}]}
    assert example("sets").annotated(plain)["subject_number"] == [None, None]  # the noun itself would tell


def plant(path: Path, example: Any, planted: dict[str, dict[str, tuple[np.ndarray, float]]]) -> None:
    """A store with these curves: run → measure (``key`` or ``key@layer``) → values at every fourth of STEPS, stderr."""
    known = {measure.key: measure for measure in example("measures").MEASURES}
    with Writer.open(path) as writer:
        for run, curves in planted.items():
            rows: dict[tuple[str, str], dict[int, list[Measurement]]] = {}
            for key, (values, error) in curves.items():
                measure = known[key.split("@")[0]]
                layer = int(key.split("@")[1]) if "@" in key else {None: None}.get(measure.layer, 2)
                numbers = rows.setdefault((measure.evaluation_set, measure.analyzer), {})
                for step, value in zip(STEPS.astype(int)[::4].tolist(), values[::4].tolist(), strict=True):
                    numbers.setdefault(step, []).append(
                        Measurement(
                            measure.metric, value, error, 100, layer, measure.component, measure.task, measure.label
                        )
                    )
            for (name, analyzer), numbers in rows.items():
                options = {"dtype": "float32", "seed": 0, "model_factory": None, "blocks": None}
                writer.register_run(run, "x", name, options)
                writer.register_evaluation_set(
                    {"hash": name, "name": name, "path": name, "n_examples": 3, "n_tokens": 30}
                )
                for step, measurements in numbers.items():
                    item = Checkpoint(
                        f"{run}/step{step}", "hf_folder", CheckpointState.COMPLETE, step, fingerprint=f"{run}{step}"
                    )
                    identity = f"{run}-{step}-{analyzer}-{name}"
                    row = {
                        "checkpoint_id": checkpoint_id(run, item), "analysis_id": identity,
                        "fingerprint": f"{run}{step}", "analyzer": analyzer, "analyzer_version": "1", "params": "{}",
                        "evaluation_set": name, "dtype": "float32", "seed": 0,
                    }  # fmt: skip
                    writer.register_checkpoints(run, [(f"step{step}", item)])
                    writer.plan([row])
                    writer.record(Outcome(identity, AnalysisStatus.OK, measurements=tuple(measurements)), row)


def bump(centre: float, width: float) -> np.ndarray:
    return np.exp(-(((np.log1p(STEPS) - np.log1p(centre)) / width) ** 2))


def story(seed: int, *, syntax: float, roles: float, curvature: float, dip: float | None) -> dict[str, Any]:
    """Curves of one run: when syntax and roles emerge, curvature peaks and the dimension turns (None: it falls)."""
    rng = np.random.default_rng(seed)

    def noisy(values: np.ndarray, error: float) -> tuple[np.ndarray, float]:
        return values + error * noise(len(values), rng), error

    found = {
        key: noisy(0.5 + 0.4 * sigmoid(STEPS, syntax, 0.15), 0.01)
        for key in ("word_class_said", "word_class_read", "number_read", "number_near", "number_far")
    }
    found |= {
        key: noisy(0.3 + 0.5 * sigmoid(STEPS, roles, 0.15), 0.01) for key in ("role_read", "role_near", "role_far")
    }
    falls = 8 - 3 * sigmoid(STEPS, 64, 0.3)
    for layer in (1, 2):
        turned = falls + (3 * sigmoid(STEPS, dip, 0.2) if dip is not None else 0.0)
        found[f"dimension@{layer}"] = noisy(turned, 0.03)
    found["trace"] = noisy(5 + 60 * bump(curvature, 0.8), 1.0)
    found["top"] = noisy(1 + 20 * bump(curvature, 0.8), 0.3)
    return found


def judged(example: Any, planted: dict[str, Any]) -> dict[str, Any]:
    """The answers to planted curves."""
    return example("claims").judge({run: as_curves(curves) for run, curves in planted.items()})


def as_curves(planted: dict[str, tuple[np.ndarray, float]]) -> dict[str, Any]:
    steps = STEPS.astype(int).tolist()
    return {
        key: {"steps": steps, "values": values.tolist(), "stderr": [error] * len(values)}
        for key, (values, error) in planted.items()
    }


def test_curves_come_out_of_a_store_as_they_went_in(example: Any, tmp_path: Path) -> None:
    """Also with layers to choose from: probes count at the last, dimensions at each but the embedding."""
    run = story(0, syntax=200, roles=700, curvature=64, dip=1000)
    run = {key: run[key] for key in ("number_far", "role_read", "dimension@1", "dimension@2", "top")}
    below = {"dimension@0": (np.full(len(STEPS), 30.0), 1.0)}
    plant(tmp_path / "s.duckdb", example, {"L2-seed0": run | below})
    expected = {key: {name: numbers[::4] for name, numbers in curve.items()} for key, curve in as_curves(run).items()}
    assert example("measures").read_curves(tmp_path / "s.duckdb") == {"L2-seed0": expected}


def test_planted_phases_are_found(example: Any) -> None:
    runs = {
        run: story(i, syntax=200 + 10 * i, roles=700 + 20 * i, curvature=64, dip=1000) for i, run in enumerate(SEEDS)
    }
    found = judged(example, runs)
    assert {name: claim["verdict"] for name, claim in found.items()} == dict.fromkeys(found, "yes")
    pair = found["syntax_before_roles"]["pairs"][0]
    assert (pair["runs"], pair["earlier"], pair["smallest_p"]) == (3, 3, 0.25)
    assert pair["order"]["ratio"] == pytest.approx(0.3, abs=0.05)
    for run in SEEDS:
        event = found["syntax_before_roles"]["events"]["number_far"][run]
        assert event["low"] <= 200 + 10 * SEEDS.index(run) <= event["high"]
    assert set(found["dimension_falls_and_rises"]["shapes"]["L2-seed0"].values()) == {"falls, then rises"}


def test_the_opposite_story_is_told_as_such(example: Any) -> None:
    runs = {run: story(i, syntax=700, roles=200, curvature=2560, dip=None) for i, run in enumerate(SEEDS)}
    found = judged(example, runs)
    assert found["syntax_before_roles"]["verdict"] == "no"
    assert found["dimension_falls_and_rises"]["verdict"] == "no"
    assert set(found["dimension_falls_and_rises"]["shapes"]["L2-seed1"].values()) == {"falls"}
    assert found["curvature_peaks_early"]["verdict"] == "no"
    assert set(found["curvature_peaks_early"]["runs"]["trace"].values()) == {"not early"}
    assert found["peak_before_turn"]["verdict"] == "no turn"


def test_at_the_same_time_is_not_shown(example: Any) -> None:
    runs = {run: story(i, syntax=400, roles=405, curvature=128, dip=None) for i, run in enumerate(SEEDS)}
    found = judged(example, runs)["syntax_before_roles"]
    assert found["verdict"] == "not shown"
    assert all(pair["earlier"] == pair["later"] == 0 for pair in found["pairs"])


def test_one_dissenting_seed_is_enough_for_no_yes(example: Any) -> None:
    runs = {
        run: story(i, syntax=200 if i else 700, roles=700 if i else 200, curvature=64, dip=1000)
        for i, run in enumerate(SEEDS)
    }
    assert judged(example, runs)["syntax_before_roles"]["verdict"] == "mixed"


def test_a_peak_that_was_measured_counts_although_checkpoints_are_far_apart(claims: ModuleType) -> None:
    """Coarse jumps between a dozen checkpoints are what is asked about, and no noise of the measurement."""
    curve = {
        "steps": [0, 64, 128, 256, 384, 512, 768, 1024, 2560, 4710],
        "values": [197.0, 1450.0, 1400.0, 1632.0, 1100.0, 1300.0, 700.0, 300.0, 320.0, 254.0],
        "stderr": [150.0, 70.0, 60.0, 60.0, 50.0, 60.0, 40.0, 20.0, 20.0, 18.0],
    }
    found = claims.peak(curve)
    assert (found.step, found.before, found.after) == (256, 197.0, 254.0)
    assert "noise" in claims.peak({**curve, "stderr": [900.0] * 10})


def test_a_way_back_that_was_not_seen_is_not_excluded(claims: ModuleType, example: Any) -> None:
    steps = STEPS.astype(int).tolist()
    fall = (21 - 17 * sigmoid(STEPS, 100, 0.3)).tolist()
    open_end = {"steps": steps, "values": [*fall[:-1], 9.0], "stderr": [0.6] * (len(steps) - 1) + [3.0]}
    closed = {"steps": steps, "values": fall, "stderr": [0.6] * len(steps)}
    assert (claims.shape(open_end), claims.only_one_way(open_end)) == ("falls", False)
    assert (claims.shape(closed), claims.only_one_way(closed)) == ("falls", True)
    rising = {"steps": steps, "values": (-np.array(fall)).tolist(), "stderr": [0.6] * len(steps)}
    assert (claims.shape(rising), claims.only_one_way(rising)) == ("rises", True)
    assert not claims.only_one_way({**rising, "stderr": [None] * len(steps)})
    for curve, verdict in ((open_end, "not shown"), (closed, "no")):
        runs = {run: {"dimension@1": curve, "dimension@2": curve} for run in SEEDS}
        assert claims.dimension_falls_and_rises(runs)["verdict"] == verdict
        assert claims.peak_before_turn(runs)["verdict"] == ("no turn" if verdict == "no" else "not shown")


def test_intervals_over_runs_allow_for_the_choice_of_the_step(claims: ModuleType) -> None:
    """Of noise alone, with the highest of eight steps chosen, few of the 95 % intervals may exclude 1."""
    rng = np.random.default_rng(0)
    excluded = 0
    for _ in range(400):
        curves = [
            {"steps": list(range(10)), "values": np.exp(rng.normal(0, 0.3, 10)).tolist(), "stderr": [None] * 10}
            for _ in range(3)
        ]
        found = claims.over_runs(curves)["top_over_start"]
        excluded += found["low"] > 1 or found["high"] < 1
        assert (found["low"] > 1 or found["high"] < 1) == (found["p"] < 0.05)
    assert excluded <= 32  # at most 5 % wanted: 20 of 400, and 2.7 standard deviations


def test_better_for_good_needs_every_later_checkpoint(example: Any) -> None:
    below = example("writing").below_for_good
    curve = {"steps": [0, 1, 2, 4, 8], "values": [3.0, -1.0, 0.1, -1.0, -2.0], "stderr": [0.1] * 5}
    assert below(curve) == 4
    assert below({**curve, "values": [3.0, -1.0, -1.0, -1.0, -0.1]}) is None  # within the noise at the end
    assert below({**curve, "stderr": [0.1, 0.1, 0.1, 0.1, None]}) is None


def test_noise_alone_gives_no_event(claims: ModuleType) -> None:
    rng = np.random.default_rng(0)
    curve = {
        "steps": STEPS.tolist(),
        "values": rng.normal(0.5, 0.01, len(STEPS)).tolist(),
        "stderr": [0.01] * len(STEPS),
    }
    assert "no rise beyond noise" in claims.emergence(curve)
    assert isinstance(claims.peak(curve), str)
    assert isinstance(claims.turn(curve), str)
    assert claims.shape(curve) == "flat"


def test_verdicts_together(claims: ModuleType) -> None:
    assert claims.together([]) == "not shown"
    assert claims.together(["yes", "yes"]) == "yes"
    assert claims.together(["no", "no"]) == "no"
    assert claims.together(["yes", "no"]) == "mixed"
    assert claims.together(["yes", "not shown"]) == "not shown"


def test_every_measure_exists(example: Any) -> None:
    from trace_offline.analyzers.registry import registry

    known = registry().analyzers
    for measure in example("measures").MEASURES:
        assert measure.metric in {spec.name for spec in known[measure.analyzer].metrics}, measure


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_page_tells_the_committed_numbers(example: Any, results: dict[str, Any]) -> None:
    assert PAGE.read_text(encoding="utf-8") == example("page").write_page(results)
    for picture in re.findall(r"\]\((images/[^)]+)\)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / picture).is_file(), picture


def test_the_committed_answers_follow_from_the_committed_curves(claims: ModuleType, results: dict[str, Any]) -> None:
    fresh = claims.judge(results["curves"])
    committed = results["claims"]["all runs"]
    assert {name: claim["verdict"] for name, claim in fresh.items()} == {
        name: claim["verdict"] for name, claim in committed.items()
    }
    assert fresh["syntax_before_roles"]["events"] == committed["syntax_before_roles"]["events"]


def test_the_committed_runs_are_the_papers(train: ModuleType, results: dict[str, Any]) -> None:
    assert {run["seed"] for run in results["runs"].values() if run["layers"] == 2} >= {0, 1, 2}
    assert results["scale"]["setting"]["sentences"] == 25_000
    assert all(run["steps"] == train.Setting().steps == 4710 for run in results["runs"].values())
    assert "CPU" in results["machine"]

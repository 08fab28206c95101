"""Probes of tasks whose words carry several labels: independent yes/no problems."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one, run
from scipy.stats import norm
from sklearn.metrics import f1_score

from trace_offline.analyzers._probe_data import choose_words
from trace_offline.analyzers.base import Context
from trace_offline.analyzers.probe import ProbeAnalyzer
from trace_offline.analyzers.probe_weights import load_probe
from trace_offline.core.errors import EvaluationSetError
from trace_offline.core.types import Artifact
from trace_offline.estimators.splits import Part
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.recording import save_evaluation_set

ROWS, LENGTH, WIDTH = 300, 5, 8


def case(rare: bool = False):
    """Every word carries "any"-labels at random: x (half), y (a third), and sometimes z; x and y are in the states."""
    rng = np.random.default_rng(0)
    holds = rng.random((ROWS, LENGTH, 3)) < (0.5, 0.33, 0.002 if rare else 0.4)
    words = []
    for r in range(ROWS):
        for t in range(LENGTH):
            named = [label for k, label in enumerate("xyz") if holds[r, t, k]]
            words += [(r, t, t + 1, label) for label in named or ["w"]]
    states = torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    states[..., 0] += torch.from_numpy(4.0 * holds[..., 0]).float()
    states[..., 1] += torch.from_numpy(2.0 * holds[..., 1]).float()
    evaluation = FakeEvaluation(torch.from_numpy(rng.integers(0, 5000, (ROWS, LENGTH))), {"roles": words})
    return evaluation, states, holds


def test_every_label_is_a_problem_of_its_own() -> None:
    evaluation, states, _ = case()
    found, arrays = run(ProbeAnalyzer(), evaluation, hidden=(states,))
    where = {"layer": 0, "task": "roles"}
    assert {array.label for array in arrays} == set("wxyz")
    f1 = {label: one(found, "f1", label=label, **where) for label in "xyz"}
    assert f1["x"].value > 0.95
    assert 0.6 < f1["y"].value < f1["x"].value
    accuracy, majority = one(found, "accuracy", **where), one(found, "majority_accuracy", **where)
    assert accuracy.value > majority.value + 5 * accuracy.stderr
    assert one(found, "selectivity", **where).value == pytest.approx(
        accuracy.value - one(found, "control_accuracy", **where).value
    )
    assert one(found, "support", label="x", **where).value == pytest.approx(0.5 * accuracy.n, rel=0.15)
    assert one(found, "expected_layer", task="roles").reason == "fewer than two layers have finite hidden states"


def test_numbers_equal_those_of_each_label_probed_alone() -> None:
    """The task split into tasks of its own, on the same sentences, gives the same decisions."""
    evaluation, states, holds = case()
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=(states,), tolerance=1e-6, control=False)
    single = FakeEvaluation(
        evaluation.input_ids,
        {
            label: [(r, t, t + 1, "yes" if holds[r, t, k] else "no") for r in range(ROWS) for t in range(LENGTH)]
            for k, label in enumerate("xyz")
        },
    )
    alone, _ = run(ProbeAnalyzer(), single, hidden=(states,), tolerance=1e-6, control=False)
    for label in "xyz":
        where = {"layer": 0, "task": "roles", "label": label}
        assert one(found, "f1", **where).value == pytest.approx(
            one(alone, "f1", layer=0, task=label, label="yes").value, abs=2e-3
        )
        assert one(found, "penalty", **where).value == one(alone, "penalty", layer=0, task=label).value
        assert one(found, "confidence", **where).value == pytest.approx(
            one(alone, "confidence", layer=0, task=label, label="yes").value, rel=1e-3
        )


def test_kept_probes_give_the_same_f1(tmp_path) -> None:
    evaluation, states, holds = case()

    class Keeping(ProbeAnalyzer):
        kept: list

        def measure(self, context: Context):
            self.kept = list(super().measure(context))
            yield from self.kept

    analyzer = Keeping()
    found, _ = run(analyzer, evaluation, hidden=(states,), weights=True)
    path = tmp_path / "probes.safetensors"
    path.write_bytes(next(item.content for item in analyzer.kept if isinstance(item, Artifact)))
    loaded = load_probe(path)
    assert loaded.tasks == ("roles=w", "roles=x", "roles=y", "roles=z")
    _, (words,) = choose_words(evaluation, ("roles",), 20_000, 0)
    test = np.isin(np.arange(ROWS), words.group[words.part == Part.TEST])
    said = np.array(loaded.predict("roles=x", 0, states[test].flatten(0, 1))) == "yes"
    expected = f1_score(holds[test][..., 0].reshape(-1), said)
    assert one(found, "f1", layer=0, task="roles", label="x").value == pytest.approx(expected)
    share = (said == holds[test][..., 0].reshape(-1)).mean()
    assert share == pytest.approx(norm.cdf(2.0), abs=0.03)


def test_rare_labels_are_left_out_with_the_reason_and_mlp_works() -> None:
    evaluation, states, _ = case(rare=True)
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=(states,), kind="mlp", hidden_width=8, control=False)
    where = {"layer": 0, "task": "roles"}
    assert "fewer than min_class_count = 5: left out" in one(found, "f1", label="z", **where).reason
    assert one(found, "f1", label="x", **where).value > 0.9
    assert one(found, "penalty", label="x", **where).reason == "a probe with a hidden layer has no penalty"
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=(states,), min_class_count=5000)
    assert "no label has min_class_count = 5000" in one(found, "accuracy", **where).reason


def test_the_whole_way_from_a_saved_set(tmp_path) -> None:
    evaluation, states, _ = case()
    annotations = [(r, "roles", start, end, label) for r, start, end, label in evaluation.annotations["roles"]]
    with pytest.raises(EvaluationSetError, match="already have a label for this task"):
        save_evaluation_set(tmp_path / "plain", evaluation.input_ids, annotations=annotations)
    twice = [*annotations, annotations[0]]
    with pytest.raises(EvaluationSetError, match="already have this label; keep one"):
        save_evaluation_set(tmp_path / "twice", evaluation.input_ids, annotations=twice, multi_label=["roles"])
    folder = save_evaluation_set(
        tmp_path / "several", evaluation.input_ids, annotations=annotations, multi_label=["roles"]
    )
    loaded = EvaluationSet.load(folder)
    assert len(loaded.spans("roles").row) == len(annotations)
    found, _ = run(ProbeAnalyzer(), loaded, hidden=(states,))
    expected, _ = run(ProbeAnalyzer(), evaluation, hidden=(states,))
    assert found == expected


def test_confusion_code_depth_and_random_vectors() -> None:
    evaluation, states, _ = case()
    layers = (torch.randn(states.shape, generator=torch.Generator().manual_seed(5)), states)
    found, arrays = run(ProbeAnalyzer(), evaluation, hidden=layers, codelength=True, random_baseline=True)
    where = {"layer": 1, "task": "roles"}
    test = one(found, "accuracy", **where).n
    confusion = {a.label: np.reshape(a.values, (2, 2)) for a in arrays if a.layer == 1 and a.name == "confusion"}
    assert set(confusion) == set("wxyz")
    for label, counts in confusion.items():
        assert counts.sum() == test
        assert counts[1].sum() == one(found, "support", label=label, **where).value
        f1 = 2 * counts[1, 1] / (2 * counts[1, 1] + counts[0, 1] + counts[1, 0])
        assert one(found, "f1", label=label, **where).value == pytest.approx(f1)
    right = sum(np.trace(counts) for counts in confusion.values())
    assert one(found, "accuracy", **where).value == pytest.approx(right / test / 4)

    code = one(found, "codelength", **where)
    single = FakeEvaluation(
        evaluation.input_ids,
        {
            label: [(r, t, t + 1, "yes" if label in said else "no") for (r, t), said in carried(evaluation).items()]
            for label in "wxyz"
        },
    )
    alone, _ = run(ProbeAnalyzer(), single, hidden=layers, codelength=True, control=False)
    total = sum(one(alone, "codelength", layer=1, task=label).value for label in "wxyz")
    assert code.value == pytest.approx(total, rel=1e-3)
    assert one(found, "compression", **where).value == pytest.approx(4 * code.n / code.value)
    assert code.value < one(found, "control_codelength", **where).value
    shares = [one(found, "codelength", layer=0, task="roles").value, code.value]
    assert shares[0] > shares[1]

    depth = one(found, "expected_layer", task="roles")
    assert depth.value == pytest.approx(1.0)
    random, majority = one(found, "random_accuracy", task="roles"), one(found, "majority_accuracy", **where)
    assert abs(random.value - majority.value) < 4 * random.stderr + 0.02  # hardly a word occurs twice
    assert random.n == test


def carried(evaluation: FakeEvaluation) -> dict[tuple[int, int], set[str]]:
    """Labels of each word."""
    found: dict[tuple[int, int], set[str]] = {}
    for row, start, _, label in evaluation.annotations["roles"]:
        found.setdefault((row, start), set()).add(label)
    return found


def test_words_decide_labels_so_random_vectors_find_them_and_depth_is_the_first_layer() -> None:
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, 12, (200, LENGTH)))
    words = [
        (r, t, t + 1, label)
        for r in range(200)
        for t in range(LENGTH)
        for label in ("xy", "x", "y")[int(ids[r, t]) % 3]
    ]
    evaluation = FakeEvaluation(ids, {"roles": words})
    table = torch.nn.functional.one_hot(ids, 12).float() * 4
    found, _ = run(ProbeAnalyzer(), evaluation, hidden=(table, table), random_baseline=True)
    assert one(found, "random_accuracy", task="roles").value > 0.97
    assert "on the first" in one(found, "expected_layer", task="roles").reason
    assert one(found, "centre_of_gravity", task="roles").value == pytest.approx(0.5)

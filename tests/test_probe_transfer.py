"""The analyzer ``probe_transfer`` on representations that move in known ways."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one, run
from safetensors.torch import save_file

from trace_offline.activations.batch import ForwardBatch
from trace_offline.analyzers.base import Context, Extract, SeriesContext
from trace_offline.analyzers.probe import ProbeAnalyzer
from trace_offline.analyzers.probe_transfer import ProbeTransferAnalyzer
from trace_offline.core.errors import NotApplicable, UsageError
from trace_offline.core.params import parse_params
from trace_offline.core.types import Array, Measurement

WIDTH = 10
Layers = tuple[torch.Tensor, ...]


def case(rows: int = 200, length: int = 5) -> tuple[FakeEvaluation, torch.Tensor]:
    """Three classes; hidden states that hold the class in the first three features."""
    rng = np.random.default_rng(0)
    label = rng.choice(3, size=(rows, length), p=(0.5, 0.3, 0.2))
    words = [(r, t, t + 1, "abc"[label[r, t]]) for r in range(rows) for t in range(length)]
    evaluation = FakeEvaluation(torch.from_numpy(rng.integers(0, 5000, (rows, length))), {"tag": words})
    states = torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(0))
    states[..., :3] += 3.0 * torch.nn.functional.one_hot(torch.from_numpy(label), 3)
    return evaluation, states


def noise(like: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def extract(evaluation: FakeEvaluation, hidden: Layers, params: dict[str, object]) -> dict[str, torch.Tensor]:
    analyzer = ProbeTransferAnalyzer()
    chosen = parse_params(analyzer.Params, analyzer.name, params)
    model = SimpleNamespace(n_layers=len(hidden) - 1, device="cpu", dtype="float32")
    context = Context(model, evaluation, chosen, 0)  # type: ignore[arg-type]
    collector = analyzer.collectors(context)["words"]
    n = evaluation.n_examples
    tokens = evaluation.tokens(0, n)
    collector.update(
        ForwardBatch(torch.arange(n), tokens.input_ids, tokens.attention_mask, tokens.targets, hidden, None)
    )
    context.collected = {"words": collector.finish()}
    return dict(analyzer.extract(context))


def compare(
    folder: Path, evaluation: FakeEvaluation, checkpoints: list[Layers], **params: object
) -> tuple[list[list[Measurement]], list[tuple[int, Array]]]:
    analyzer = ProbeTransferAnalyzer()
    extracts = []
    for position, hidden in enumerate(checkpoints):
        path = folder / f"{position}.safetensors"
        save_file(extract(evaluation, hidden, params), path)
        extracts.append(Extract(position, 10 * position, str(path)))
    chosen = parse_params(analyzer.Params, analyzer.name, params)
    results = list(analyzer.compare(SeriesContext(tuple(extracts), evaluation, chosen, 0)))  # type: ignore[arg-type]
    known = {spec.name for spec in analyzer.metrics}
    measured: list[list[Measurement]] = [[] for _ in checkpoints]
    for position, item in results:
        if isinstance(item, Measurement):
            assert item.metric in known
            assert (item.value is None) == (item.reason is not None)
            measured[position].append(item)
    return measured, [(position, item) for position, item in results if isinstance(item, Array)]


def test_a_checkpoint_against_itself_is_the_ordinary_probe_exactly(tmp_path: Path) -> None:
    evaluation, states = case()
    series = [(noise(states, 1), states), (states, states + 0.5 * noise(states, 2)), (states, noise(states, 3))]
    found, arrays = compare(tmp_path, evaluation, series, references=["first", "10", "last"])
    for position, hidden in enumerate(series):
        ordinary, _ = run(ProbeAnalyzer(), evaluation, hidden=hidden, max_words=2000)
        name = ("first", "10", "last")[position]
        for layer in (0, 1):
            where = {"layer": layer, "task": "tag"}
            accuracy = one(ordinary, "accuracy", **where)
            assert one(found[position], "refit_accuracy", **where) == Measurement(
                "refit_accuracy", accuracy.value, accuracy.stderr, accuracy.n, layer, "residual", "tag"
            )
            for metric, plain in (("accuracy", "accuracy"), ("macro_f1", "macro_f1"), ("confidence", "confidence")):
                frozen = one(found[position], f"frozen_{metric}", label=name, **where)
                expected = one(ordinary, plain, **where)
                assert (frozen.value, frozen.stderr) == (expected.value, expected.stderr)
    for position, array in arrays:
        assert position == 2
        matrix = np.reshape(array.values, (3, 3))
        for k in range(3):
            assert matrix[k, k] == one(found[k], "refit_accuracy", layer=array.layer, task="tag").value


def test_a_representation_that_turns_is_still_readable_but_not_by_the_old_probe(tmp_path: Path) -> None:
    evaluation, states = case()
    turn = torch.linalg.qr(noise(torch.zeros(WIDTH, WIDTH), 5))[0]
    found, arrays = compare(tmp_path, evaluation, [(states,), (states @ turn,)])
    where = {"layer": 0, "task": "tag"}
    first, second = (one(found[k], "refit_accuracy", **where).value for k in (0, 1))
    assert second == pytest.approx(first, abs=0.03)
    assert first > 0.9
    assert one(found[1], "frozen_accuracy", label="first", **where).value < 0.65
    assert one(found[0], "frozen_accuracy", label="last", **where).value < 0.65
    matrix = np.reshape(arrays[0][1].values, (2, 2))
    assert matrix[0, 1] == one(found[1], "frozen_accuracy", label="first", **where).value
    assert matrix[1, 0] == one(found[0], "frozen_accuracy", label="last", **where).value


def test_gain_over_the_first_checkpoint_is_the_paired_difference(tmp_path: Path) -> None:
    evaluation, states = case()
    series = [(noise(states, 1), states), (states, states + 0.3 * noise(states, 2)), (noise(states, 1), states)]
    found, _ = compare(tmp_path, evaluation, series)
    for layer in (0, 1):
        where = {"layer": layer, "task": "tag"}
        for same in (0, 2):  # the first checkpoint itself, and equal weights later
            gain = one(found[same], "gain_over_first", **where)
            assert (gain.value, gain.stderr) == (0.0, 0.0)
        first, second = (one(found[k], "refit_accuracy", **where) for k in (0, 1))
        gain = one(found[1], "gain_over_first", **where)
        assert gain.value == pytest.approx(second.value - first.value)
        assert gain.n == second.n
    # both probes of layer 1 err on much the same words: the error is smaller than that of two independent numbers
    assert gain.stderr < 0.9 * np.hypot(first.stderr, second.stderr)
    clear = one(found[1], "gain_over_first", layer=0, task="tag")
    assert clear.value > 0.3
    assert clear.value > 5 * clear.stderr


def test_gain_needs_the_first_checkpoint(tmp_path: Path) -> None:
    evaluation, states = case(60)
    broken = states.clone()
    broken[0, 0, 0] = torch.nan
    found, _ = compare(tmp_path, evaluation, [(broken,), (states,)])
    where = {"layer": 0, "task": "tag"}
    assert one(found[0], "gain_over_first", **where).reason == "hidden states of layer 0 are not finite"
    assert one(found[1], "gain_over_first", **where).reason == "there is no probe of this layer at the first checkpoint"
    assert one(found[1], "refit_accuracy", **where).value > 0.8


def test_the_same_checkpoint_twice_is_neutral(tmp_path: Path) -> None:
    evaluation, states = case(80)
    found, arrays = compare(tmp_path, evaluation, [(states,), (states.clone(),)])
    where = {"layer": 0, "task": "tag"}
    own = one(found[0], "refit_accuracy", **where).value
    assert one(found[1], "gain_over_first", **where).value == 0.0
    for name in ("first", "last"):
        assert [one(found[k], "frozen_accuracy", label=name, **where).value for k in (0, 1)] == [own, own]
    assert arrays[0][1].values == (own,) * 4


def test_traces_confidence_does_not_look_at_the_labels(tmp_path: Path) -> None:
    """States shuffled over the words: nothing can be read any more, and TRACE's number does not notice."""
    evaluation, states = case()
    order = torch.randperm(states[..., 0].numel(), generator=torch.Generator().manual_seed(1))
    shuffled = states.flatten(0, 1)[order].view_as(states)
    found, _ = compare(tmp_path, evaluation, [(shuffled,), (states,)])
    where = {"layer": 0, "task": "tag"}
    assert one(found[0], "frozen_accuracy", label="last", **where).value < 0.5
    assert one(found[1], "frozen_accuracy", label="last", **where).value > 0.9
    for label in "abc":
        there, gone = (one(found[k], "trace_confidence", label=label, **where) for k in (1, 0))
        assert gone.value == pytest.approx(there.value, abs=4 * (gone.stderr + there.stderr))
    for position in (0, 1):
        total = sum(one(found[position], "trace_confidence", label=label, **where).value for label in "abc")
        assert total == pytest.approx(1.0)


def test_a_series_of_one_and_a_broken_layer(tmp_path: Path) -> None:
    evaluation, states = case()
    found, arrays = compare(tmp_path, evaluation, [(states,)])
    where = {"layer": 0, "task": "tag"}
    value = one(found[0], "refit_accuracy", **where).value
    assert one(found[0], "frozen_accuracy", label="first", **where).value == value
    assert arrays[0][1].values == (value,)
    broken = states.clone()
    broken[0, 0, 0] = torch.nan
    found, arrays = compare(tmp_path, evaluation, [(states,), (broken,)])
    assert one(found[1], "refit_accuracy", **where).reason == "hidden states of layer 0 are not finite"
    assert (
        "no probe of this layer at the last checkpoint"
        in one(found[0], "frozen_accuracy", label="last", **where).reason
    )
    assert one(found[0], "frozen_accuracy", label="first", **where).value == value
    assert one(found[0], "trace_confidence", label="a", **where).value is None
    assert not arrays


def test_layers_tasks_and_what_an_extract_depends_on(tmp_path: Path) -> None:
    evaluation, states = case()
    evaluation.annotations["few"] = [(0, 0, 1, "x"), (1, 0, 1, "y")]
    evaluation.tasks = ("few", "tag")
    found, arrays = compare(tmp_path, evaluation, [(states, states, states)] * 2, layers=[2, 0], matrix=False)
    assert {m.layer for m in found[0]} == {0, 2}
    assert one(found[0], "refit_accuracy", layer=2, task="few").reason
    assert one(found[0], "refit_accuracy", layer=2, task="tag").value > 0.9
    assert not arrays
    analyzer = ProbeTransferAnalyzer()
    one_way, other = (
        analyzer.extract_params(parse_params(analyzer.Params, "probe_transfer", p))
        for p in ({"penalties": [0.1], "references": ["10"]}, {})
    )
    assert one_way == other
    assert set(other) == {"tasks", "alignment", "max_words", "layers"}


def test_refusals(tmp_path: Path) -> None:
    evaluation, states = case(40)
    with pytest.raises(UsageError, match=r"no checkpoint of this series has step 7; its steps: 0, 10\."):
        compare(tmp_path, evaluation, [(states,)] * 2, references=["7"])
    with pytest.raises(UsageError, match=r"probe_transfer\.references\.0"):
        compare(tmp_path, evaluation, [(states,)], references=["end"])
    with pytest.raises(UsageError, match="expected 0 to 0 for this network, found 4"):
        compare(tmp_path, evaluation, [(states,)], layers=[4])
    with pytest.raises(NotApplicable, match="no annotated task"):
        compare(tmp_path, FakeEvaluation(torch.zeros(4, 3).long()), [(states,)])

"""Probes that were kept can be loaded again: the example of the docs, run on a real store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SmallSeries
from transformers import AutoModelForCausalLM

import trace_offline
from trace_offline.analyzers._probe_data import choose_words
from trace_offline.estimators.splits import Part

PAGE = Path(__file__).parents[1] / "docs" / "analyzers" / "probe.md"


@pytest.fixture(scope="module")
def store(small_series: SmallSeries, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probes") / "s.duckdb"
    params = {"probe": {"weights": True, "control": False, "penalties": [0.1]}}
    summary = trace_offline.analyze(
        small_series.run, small_series.evaluation, path, analyzers=("probe",), params=params, jobs=1, steps="0-1"
    )
    assert summary.exit_code == 0, summary.problems
    return path


def states(series: SmallSeries, step: int, layer: int) -> tuple[torch.Tensor, list[str]]:
    """Hidden states of one layer at the test words, from the network itself, and their labels."""
    evaluation = trace_offline.EvaluationSet.load(series.evaluation)
    _, (words,) = choose_words(evaluation, ("parity",), 20_000, seed=0)
    (found,) = (checkpoint for checkpoint in trace_offline.discover(series.run) if checkpoint.step == step)
    model = AutoModelForCausalLM.from_pretrained(found.location, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    block = model.gpt_neox.layers[layer - 1]
    block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=evaluation.tokens(0, evaluation.n_examples).input_ids)
    test = words.part == Part.TEST
    row, _, end = words.span[test].T
    return seen[0][row, end - 1], [words.classes[code] for code in words.label[test]]


def test_the_example_of_the_docs_finds_the_accuracy_of_the_store(store: Path, small_series: SmallSeries) -> None:
    example = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    example = example.replace('"pos", 3', '"parity", 1').replace('"pos"', '"parity"')
    hidden, truth = states(small_series, 1, 1)
    found = {"store": store, "hidden": hidden}
    exec(compile(example, str(PAGE), "exec"), found)
    right = np.mean([a == b for a, b in zip(found["names"], truth, strict=True)])
    stored = trace_offline.Store.open(store).scalar(
        "select value from history where metric = 'accuracy' and layer = 1 and step = 1"
    )
    assert right == pytest.approx(stored)
    assert found["kept"].num_rows == 2
    assert found["weight"].shape == (2, hidden.shape[1])
    log_p = found["log_p"]
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(len(log_p)))
    assert found["probes"].classes["parity"] == ("even", "odd")


def test_load_probe_is_public_and_lazy() -> None:
    from trace_offline.analyzers.probe_weights import load_probe

    assert trace_offline.load_probe is load_probe
    code = "import trace_offline, sys; assert 'load_probe' in dir(trace_offline); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

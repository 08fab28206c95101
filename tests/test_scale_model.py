"""The cost model of docs/scale.md: its counts against independent ones; and the benchmark that waits for a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dimension_clouds import benchmark

model = benchmark("scale_model")

PUBLISHED = {
    "70m": 70_426_624, "160m": 162_322_944, "410m": 405_334_016, "1b": 1_011_781_632, "1.4b": 1_414_647_808,
    "2.8b": 2_775_208_960, "6.9b": 6_857_302_016, "12b": 11_846_072_320,
}  # fmt: skip
"""Parameters as the Pythia repository lists them."""

ROOT = Path(__file__).parents[1]

TINY = model.Network("tiny", 3, 32, 200)


def gpt_neox(network: object) -> torch.nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=network.vocabulary, hidden_size=network.width, num_hidden_layers=network.layers,
        num_attention_heads=4, intermediate_size=4 * network.width, max_position_embeddings=64,
        attn_implementation="eager",
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


@pytest.mark.parametrize("network", model.PYTHIA, ids=lambda each: each.name)
def test_parameters_are_those_published(network: object) -> None:
    assert network.parameters == PUBLISHED[network.name]


def test_parameters_are_those_of_the_network() -> None:
    assert sum(each.numel() for each in gpt_neox(TINY).parameters()) == TINY.parameters


@pytest.mark.parametrize(("rows", "positions"), [(1, 8), (5, 32)])
def test_operations_of_a_pass_and_a_gradient_are_those_that_pytorch_counts(rows: int, positions: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    module = gpt_neox(TINY)
    ids = torch.zeros(rows, positions, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        logits = module(input_ids=ids).logits
    tokens = rows * positions
    # the angles of the rotary positions are a product, too: 2 · positions · dimensions / 2 of a head
    expected = model.pass_flops(TINY, tokens, positions, head=True)
    assert forward.get_total_flops() == pytest.approx(expected, rel=2e-3)
    assert expected - model.pass_flops(TINY, tokens, positions, head=False) == 2 * tokens * 200 * 32
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert total == pytest.approx(model.gradient_flops(TINY, tokens, positions), rel=2e-3)


def test_products_of_a_default_curvature_analysis() -> None:
    from trace_offline.analyzers.registry import registry

    plan, params = model.Plan(), registry().get("hessian").Params()
    assert (plan.slq_probes, plan.slq_steps, plan.trace_probes) == (
        params.slq_probes, params.slq_steps, params.trace_probes,
    )  # fmt: skip
    assert (plan.hessian_rows, plan.hessian_tokens) == (params.max_sequences, params.max_tokens)
    assert plan.products == 1 + plan.eigen_products + 8 * 10 + 16
    dimension, probe = registry().get("intrinsic_dimension").Params(), registry().get("probe").Params()
    assert (plan.points, plan.subsamples, plan.words) == (dimension.max_samples, dimension.subsamples, probe.max_words)
    assert plan.curvature_tokens == 16 * 128
    assert model.Plan(positions=2048).curvature_tokens == 2048
    assert model.Plan(positions=4096).curvature_tokens == 4096  # one row always enters


def test_steps_of_pythia() -> None:
    assert len(model.PYTHIA_STEPS) == 154
    assert model.PYTHIA_STEPS[:12] == (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
    assert model.PYTHIA_STEPS[-1] == 143000


def test_seconds_are_work_over_rates() -> None:
    machine = model.Machine("m", 10.0, 5.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125)
    work = model.Work(flops=20, elements=5, moved=8, read=1, hashed=3, calls=2, analyses=4, numbers=8)
    assert machine.seconds(work) == 2 + 1 + 2 + 0.5 + 3 + 1 + 1 + 1
    assert machine.seconds(work.times(2) + work) == 3 * machine.seconds(work)


def test_twice_the_tokens_cost_twice_the_pass_and_no_more_curvature() -> None:
    once, twice = (model.checkpoint_work(TINY, model.Plan(rows=rows)) for rows in (1024, 2048))
    assert twice["pass"].flops == 2 * once["pass"].flops
    assert twice["loss"].elements == 2 * once["loss"].elements
    for name in ("intrinsic_dimension", "probe", "hessian", "load", "hash"):
        assert twice[name] == once[name], name


def test_the_writer_is_busy_when_as_many_workers_bring_as_much_as_it_can_take() -> None:
    machine = model.h100(1e-2, 1e-6)
    found = model.predict(model.PYTHIA[0], model.Plan(), machine, {"loss": (5, 0), "probe": (10, 100)}, 1000.0)
    assert found.numbers == 15 + 700
    assert found.write_seconds == pytest.approx(2e-2 + 715e-6)
    assert found.workers_to_saturate == pytest.approx(found.seconds / found.write_seconds)
    assert found.hessian_vectors == 1000 * 2**30 // (4 * PUBLISHED["70m"])
    assert found.seconds == pytest.approx(sum(found.components[name] for name in model.CHEAP))
    assert found.seconds_with_hessian - found.seconds == pytest.approx(found.components["hessian"])


def test_the_tables_of_the_page_are_made_from_the_results() -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    bench = benchmark("scale_tables")
    assert bench.table() in page, "python benchmarks/bench_scale.py --table"
    assert bench.prediction_tables() in page, "python benchmarks/bench_scale.py --table"
    assert bench.saturation_table() in page, "python benchmarks/bench_scale.py --table"


def test_predictions_are_marked_as_theory_and_follow_from_the_measurements() -> None:
    bench = benchmark("bench_scale")
    kept = bench.load("scale_prediction")
    assert all(row["theory"] is True and row["unit"] == "s (theory)" for row in kept)
    again = json.loads(json.dumps(bench.predict()))
    for old, new in zip(kept, again, strict=True):
        assert {**old, "date": "", "versions": ""} == {**new, "date": "", "versions": ""}


def test_gpu_benchmark_runs_without_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = benchmark("bench_gpu")
    monkeypatch.setattr(benchmark("common"), "RESULTS", tmp_path / "results")
    assert bench.main(["--device", "cpu", "--shape", "tiny"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["case"].split(":")[0] for row in rows] == ["tiny"] * 4
    fields = {"case", "ours", "peer", "peer_name", "floor", "ratio", "unit", "device", "versions", "date"}
    assert all(fields <= set(row) and row["ours"] > 0 for row in rows)
    run, loaded, passed, product = rows
    assert run["unit"] == "checkpoints/min"
    assert 0 <= run["idle_share"] < 1
    assert loaded["bytes"] == 4 * loaded["parameters"]
    assert passed["flops"] == model.pass_flops(bench.TINY, 64, 16, head=True)
    # the quotient of two timings as they came, not a bound on it: a busy machine could break that
    assert product["over_gradient"] == pytest.approx(2 * product["ours"] / product["floor"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 0
    assert "no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()

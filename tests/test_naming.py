from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_offline.checkpoints.naming import ParsedName, StepSource, natural_key, parse_name

STEPS = [
    ("step0", 0),
    ("step143000", 143_000),
    ("checkpoint-500", 500),
    ("checkpoint_500", 500),
    ("ckpt_500.pt", 500),
    ("step_500", 500),
    ("step500", 500),
    ("step-0100K", 100_000),
    ("step_1.5k", 1500),
    ("step1M", 1_000_000),
    ("epoch=0-step=500.ckpt", 500),
    ("epoch=1-step=20-v1.ckpt", 20),
    ("iter_0000500", 500),
    ("global_step500", 500),
    ("200.pth", 200),
    ("00500.safetensors", 500),
    ("model.iter_126360.pt", 126_360),
    ("run-long_step114000.json", 114_000),
    ("step1000-unsharded", 1000),
    ("multiberts-seed_0-step_0k", 0),
    ("multiberts-seed_4-step_2000k", 2_000_000),
    ("ep0-ba1000-rank0.pt", 1000),
    ("10k_steps", 10_000),
    ("1000-steps", 1000),
    ("train_step=7", 7),
    ("stage1-step-40000", 40_000),
    ("pythia-70m-deduped-step3000", 3000),
    ("model_500.pt", 500),
    ("500_model.pt", 500),
    ("step300.pt.tmp", 300),
]
NO_STEP = [
    "last.ckpt",
    "final",
    "main",
    "ckpt.pt",
    "pythia-70m",
    "pythia-160m-data-seed1",
    "stories260K_hf",
    "gpt2",
    "version_0",
    "model-00001-of-00004.safetensors",
    "bert-base-uncased",
    "2024-01-15",
    "hf_bf16",
    "stage2",
    "v1.0",
    "release-1.2.3",
    "tokens_100M",
    "epoch_0.5",
    "empty_0_tensors.safetensors",
    "0123456789abcdef0123456789abcdef01234567",
    "step" + "9" * 30,
    "",
]


@pytest.mark.parametrize(("name", "step"), STEPS)
def test_step(name: str, step: int) -> None:
    assert parse_name(name).step == step


@pytest.mark.parametrize("name", NO_STEP)
def test_no_step(name: str) -> None:
    assert parse_name(name).step is None


def test_tokens_and_stages() -> None:
    assert parse_name("step1000-tokens4B").tokens_seen == 4_000_000_000
    assert parse_name("stage1-step928646-tokens3896B") == ParsedName(
        step=928_646, tokens_seen=3_896_000_000_000, stage="stage1", source=StepSource.STEP
    )
    second = parse_name("stage2-ingredient3-step23852-tokens51B")
    assert (second.step, second.tokens_seen, second.stage) == (23_852, 51_000_000_000, "stage2-ingredient3")
    assert parse_name("step5-2.5B-tokens").tokens_seen == 2_500_000_000


def test_seed_is_no_step() -> None:
    assert parse_name("multiberts-seed_3-step_20k").seed == 3
    assert parse_name("pythia-14m-seed9").seed == 9


def test_epochs_and_indices_say_so() -> None:
    epoch = parse_name("epoch_3.pt")
    assert (epoch.step, epoch.epoch, epoch.source) == (3, 3.0, StepSource.EPOCH)
    assert "epoch (3)" in str(epoch.note)
    index = parse_name("ckpt_012")
    assert (index.step, index.source) == (12, StepSource.INDEX)
    assert "index (012)" in str(index.note)
    assert parse_name("ckpt_358").step == 358
    assert parse_name("epoch=3-val_loss=0.25.ckpt").step == 3
    assert parse_name("checkpoint-500").note is None


def test_bare_numbers_do_not_count_in_ancestors() -> None:
    assert parse_name("llama-2", bare_numbers=False).step is None
    assert parse_name("500", bare_numbers=False).step is None
    assert parse_name("step500", bare_numbers=False).step == 500


@given(
    st.integers(0, 10**15), st.integers(0, 12), st.sampled_from(["step{}", "checkpoint-{}", "global_step{}", "iter_{}"])
)
def test_any_padding_gives_the_number(step: int, width: int, pattern: str) -> None:
    assert parse_name(pattern.format(str(step).zfill(width))).step == step
    assert parse_name(f"epoch=2-step={step}.ckpt").step == step
    assert parse_name(f"stage1-step{step}-tokens7B").step == step


@given(st.integers(0, 10**6), st.sampled_from([("k", 10**3), ("K", 10**3), ("m", 10**6), ("M", 10**6), ("B", 10**9)]))
def test_units_scale(number: int, unit: tuple[str, int]) -> None:
    assert parse_name(f"step_{number}{unit[0]}").step == number * unit[1]


@given(st.text(max_size=60))
def test_never_fails_and_fits_the_store(name: str) -> None:
    parsed = parse_name(name)
    assert parsed.step is None or 0 <= parsed.step < 2**63
    assert parsed.tokens_seen is None or 0 <= parsed.tokens_seen < 2**63
    natural_key(name)


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=20), st.integers(0, 3))
def test_natural_key_orders_as_numbers(numbers: list[int], zeros: int) -> None:
    names = [f"step{'0' * (index % (zeros + 1))}{number}" for index, number in enumerate(numbers)]
    assert [parse_name(name).step for name in sorted(names, key=natural_key)] == sorted(numbers)

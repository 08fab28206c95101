"""The shared pass: batches, collectors that fail, networks it cannot listen to, and the tables of hidden states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from test_architectures import FakeSet, Keep, view
from torch import Tensor, nn

from trace_offline.activations.batch import ForwardBatch
from trace_offline.activations.blocks import find_blocks
from trace_offline.activations.forward import Anatomy, run_pass
from trace_offline.activations.hidden_table import HiddenStateTable, SentenceMeans
from trace_offline.activations.losses import mean_loss, summed_loss
from trace_offline.activations.model import ModelView
from trace_offline.core.errors import CheckpointError, EvaluationSetError, NotApplicable

LENGTHS = (9, 5, 12, 12, 3, 7, 1)


def unknown(module: nn.Module, blocks: str | None = "layers.*") -> ModelView:
    return ModelView(module, None if blocks is None else find_blocks(module, blocks), "cpu", "float32")


class Failing(Keep):
    """Raises at the n-th batch."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def update(self, batch: ForwardBatch) -> None:
        if self.left == 0:
            raise ZeroDivisionError("on purpose")
        self.left -= 1
        super().update(batch)


def test_a_failing_collector_leaves_the_others_untouched() -> None:
    model, rows = view("gpt2"), FakeSet()
    alone, beside, failing, heard = Keep(), Keep(), Failing(1), []
    run_pass(model, rows, {"a": alone}, batch_tokens=24)
    dropped = run_pass(
        model,
        rows,
        {"f": failing, "a": beside},
        batch_tokens=24,
        on_error=lambda name, error: heard.append((name, error)),
    )
    assert list(dropped) == ["f"]
    assert isinstance(dropped["f"], ZeroDivisionError)
    assert heard == [("f", dropped["f"])]
    assert len(failing.hidden) == 1
    for one, other in zip(alone.layers(), beside.layers(), strict=True):
        assert torch.equal(one, other)


def test_no_hook_stays_behind() -> None:
    model, rows = view("llama_gqa"), FakeSet()
    run_pass(model, rows, {"a": Keep(), "f": Failing(0)})
    assert model.blocks is not None
    assert all(not block._forward_hooks and not block._forward_pre_hooks for block in model.blocks)


def test_progress_counts_rows() -> None:
    heard: list[tuple[int, int]] = []
    run_pass(view("gpt2"), FakeSet(), {"a": Keep()}, batch_tokens=24, on_batch=lambda *n: heard.append(n))
    assert heard == [(2, 7), (4, 7), (6, 7), (7, 7)]


def test_batches_follow_from_the_network_and_the_set() -> None:
    anatomy = Anatomy(classes=1000, width=64, obstacle=None)
    assert anatomy.rows_per_batch(100, 4, batch_tokens=8192, memory_floats=10**9) == 81
    assert anatomy.rows_per_batch(100, 4, batch_tokens=8192, memory_floats=1000 * 250) == 2  # logits are the larger
    assert anatomy.rows_per_batch(100, 49, batch_tokens=8192, memory_floats=50 * 64 * 250) == 2  # hidden states are
    assert anatomy.rows_per_batch(100, 4, batch_tokens=10, memory_floats=10) == 1


def test_the_head_runs_only_when_someone_needs_logits() -> None:
    model, rows, calls = view("gpt2"), FakeSet(), []
    model.module.lm_head.register_forward_hook(lambda *_: calls.append(1))
    run_pass(model, rows, {"a": Keep()}, batch_tokens=24)
    assert len(calls) == 1  # the look at the first row
    run_pass(model, rows, {"a": Keep(logits=True)}, batch_tokens=24)
    assert len(calls) == 1 + 1 + 4


def test_a_pass_nobody_needs_does_not_run_the_network() -> None:
    class Explodes(nn.Module):
        def forward(self, **_: Any) -> Tensor:
            raise AssertionError

    keep = Keep(hidden=False)
    assert run_pass(unknown(Explodes(), None), FakeSet(), {}) == {}
    assert run_pass(unknown(Explodes(), None), FakeSet(), {"a": keep}, batch_tokens=24) == {}
    assert len(keep.shapes) == 4


def test_without_blocks_hidden_states_do_not_apply_and_logits_do() -> None:
    keep = Keep(hidden=False, logits=True)
    dropped = run_pass(unknown(tiny_models.unknown_net(), None), FakeSet(), {"h": Keep(), "l": keep})
    assert list(dropped) == ["h"]
    assert isinstance(dropped["h"], NotApplicable)
    assert "blocks of UnknownNet are not known; name them with --blocks" in str(dropped["h"])
    assert keep.logits[0].shape[-1] == tiny_models.VOCABULARY


def test_without_a_head_logits_do_not_apply_and_hidden_states_do() -> None:
    module = tiny_models.gpt2().transformer
    model, keep = ModelView(module, find_blocks(module), "cpu", "float32"), Keep()
    dropped = run_pass(model, FakeSet(), {"h": keep, "l": Keep(hidden=False, logits=True)})
    assert list(dropped) == ["l"]
    assert "has no output head" in str(dropped["l"])
    assert len(keep.layers()) == 4
    with pytest.raises(NotApplicable, match="GPT2Model returns no logits"):
        mean_loss(model, FakeSet().tokens(0, 2))


class Looped(tiny_models.UnknownNet):
    """Runs its blocks twice, as networks with shared layers do."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.embed(input_ids)
        for layer in [*self.layers, *self.layers]:
            hidden, _ = layer(hidden, attention_mask[:, None, :])
        return self.unembed(hidden)


def test_blocks_that_run_twice_have_no_layers() -> None:
    keep = Keep(hidden=False, logits=True)
    dropped = run_pass(unknown(Looped()), FakeSet(), {"h": Keep(), "l": keep})
    assert "do not run once each and in order (order seen: [0, 1, 0, 1])" in str(dropped["h"])
    assert list(dropped) == ["h"]


class InPlace(tiny_models.UnknownNet):
    """Adds to its residual stream in place."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            new, _ = layer(hidden, attention_mask[:, None, :])
            hidden = new
            hidden += 0.0
        hidden *= 100.0
        return self.unembed(hidden)


def test_states_are_copied_before_a_network_overwrites_them() -> None:
    torch.manual_seed(0)
    module, keep = InPlace().eval(), Keep(logits=True)
    run_pass(unknown(module), FakeSet(), {"k": keep})
    with torch.no_grad():
        torch.testing.assert_close(module.unembed(100.0 * keep.layers()[-1]), keep.logits[0])


def test_values_that_are_not_finite_are_handed_on() -> None:
    module = tiny_models.gpt2()
    with torch.no_grad():
        module.transformer.ln_f.bias[0] = torch.inf
    keep = Keep(logits=True)
    run_pass(ModelView(module, find_blocks(module), "cpu", "float32"), FakeSet(), {"k": keep})
    assert not torch.isfinite(keep.logits[0]).all()


def test_tokens_the_network_cannot_take_are_explained() -> None:
    rows = FakeSet()
    rows.ids[0, 0] = 99
    with pytest.raises(
        EvaluationSetError, match=r"GPT2LMHeadModel has no embedding for .*token ids up to 99 and 9 posit"
    ):
        run_pass(view("gpt2"), rows, {"a": Keep()})


def test_a_network_called_otherwise_is_explained() -> None:
    class Positional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(
        CheckpointError, match=r"Positional cannot be called as model\(input_ids=…, attention_mask=…\): .*inp"
    ):
        run_pass(unknown(Positional(), None), FakeSet(), {"a": Keep(hidden=False, logits=True)})


def test_networks_can_be_differentiated_after_a_pass() -> None:
    model, rows = view("llama_gqa"), FakeSet()
    run_pass(model, rows, {"a": Keep()})
    mean_loss(model, rows.tokens(0, 3)).backward()


def test_losses_count_their_targets() -> None:
    model, rows = view("gpt2"), FakeSet()
    with torch.no_grad():
        total, count = summed_loss(model, rows.tokens(0, 7))
        parts = [summed_loss(model, rows.tokens(i, i + 1)) for i in range(7)]
    assert count == sum(LENGTHS) - len(LENGTHS)
    assert sum(n for _, n in parts) == count
    assert float(sum(part for part, _ in parts)) == pytest.approx(float(total), rel=1e-5)
    with pytest.raises(NotApplicable, match="none of these positions has a target"):
        mean_loss(model, rows.tokens(6, 7))


# --- blocks --------------------------------------------------------------------------------------------------------


def test_lists_inside_blocks_are_not_blocks() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(8))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
            self.h = nn.ModuleList(Mixture() for _ in range(3))

    net = Net()
    assert find_blocks(net) == tuple(net.h)
    assert find_blocks(nn.Linear(2, 2)) is None
    assert find_blocks(nn.Sequential(*(Mixture() for _ in range(2)))) is not None
    net.other = nn.ModuleList(Mixture() for _ in range(3))
    assert find_blocks(net) is None  # two stacks of one length: a guess could be wrong


def test_patterns_sort_by_number() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for index in reversed(range(12)):
                self.add_module(f"block{index}", nn.Linear(1, 1))

    net = Net()
    assert find_blocks(net, "block*") == tuple(getattr(net, f"block{i}") for i in range(12))


def test_encoder_decoder_networks_have_no_single_stack() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    assert find_blocks(T5ForConditionalGeneration(config)) is None


# --- tables --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> tuple[ModelView, FakeSet, Tensor]:
    """All hidden states of one padded batch, ``[L+1, N, T, D]``."""
    model, rows = view("gpt_neox"), FakeSet(LENGTHS)

    class Everything(Keep):
        def update(self, batch: ForwardBatch) -> None:
            assert batch.hidden is not None
            self.all = torch.stack(batch.hidden)

    everything = Everything()
    run_pass(model, rows, {"all": everything})
    return model, rows, everything.all


@pytest.mark.parametrize("pooling", ["last", "first", "mean"])
def test_spans_come_back_in_the_order_asked_for(reference: Any, pooling: Any) -> None:
    model, rows, states = reference
    generator = np.random.default_rng(0)
    row = generator.integers(0, len(LENGTHS), 40)
    start = np.array([generator.integers(0, LENGTHS[r]) for r in row])
    end = np.array([generator.integers(s + 1, LENGTHS[r] + 1) for r, s in zip(row, start, strict=True)])
    table = HiddenStateTable(row, start, end, pooling)
    assert run_pass(model, rows, {"t": table}, batch_tokens=24) == {}
    found = table.finish()
    assert found.dtype == torch.float32
    assert found.shape == (4, 40, tiny_models.WIDTH)
    for index, (r, s, e) in enumerate(zip(row, start, end, strict=True)):
        span = states[:, r, s:e]
        expected = {"last": span[:, -1], "first": span[:, 0], "mean": span.double().mean(1).float()}[pooling]
        torch.testing.assert_close(found[:, index], expected, rtol=1e-5, atol=1e-5)


def test_sentence_means(reference: Any) -> None:
    model, rows, states = reference
    wanted = [3, 0, 3, 5]
    excluded = {int(rows.ids[3, 2]), int(rows.ids[0, 0])}
    means = SentenceMeans(wanted, excluded)
    assert run_pass(model, rows, {"m": means}, batch_tokens=24) == {}
    found = means.finish()
    assert found.shape == (4, 4, tiny_models.WIDTH)
    for index, r in enumerate(wanted):
        keep = [t for t in range(LENGTHS[r]) if int(rows.ids[r, t]) not in excluded]
        assert len(keep) < LENGTHS[r] or r == 5
        torch.testing.assert_close(found[:, index], states[:, r, keep].mean(1), rtol=1e-5, atol=1e-5)


def test_tables_refuse_what_is_not_there(reference: Any) -> None:
    model, rows, _ = reference
    with pytest.raises(EvaluationSetError, match="1 of 2 spans hold no token; the first: row 1, positions 3 to 3"):
        HiddenStateTable([0, 1], [0, 3], [1, 3])
    with pytest.raises(ValueError, match="one length"):
        HiddenStateTable([0, 1], [0], [1])
    with pytest.raises(ValueError, match='pooling: expected "last", "first" or "mean", found "max"'):
        HiddenStateTable([0], [0], [1], "max")  # type: ignore[arg-type]
    beyond, absent = HiddenStateTable([6], [0], [30]), HiddenStateTable([7], [0], [1])
    dropped = run_pass(model, rows, {"beyond": beyond, "absent": absent})
    assert "row 6 position 29" in str(dropped["beyond"])
    with pytest.raises(EvaluationSetError, match=r"1 of 1 tokens asked for lie in rows .*highest row asked for: 7"):
        absent.finish()
    nothing = SentenceMeans([6, 1], [int(rows.ids[6, 0])])
    run_pass(model, rows, {"n": nothing})
    with pytest.raises(EvaluationSetError, match=r"1 of 2 rows hold no token to average.*row 6"):
        nothing.finish()
    empty = HiddenStateTable([], [], [])
    run_pass(model, rows, {"e": empty})
    assert empty.finish().shape[1] == 0


def test_gathered_tables_can_be_fitted_with_gradients(reference: Any) -> None:
    model, rows, _ = reference
    table = HiddenStateTable([0, 1], [0, 0], [1, 1])
    run_pass(model, rows, {"t": table})
    probe = nn.Linear(tiny_models.WIDTH, 2)
    probe(table.finish()).sum().backward()


def test_blocks_are_found_without_what_transformers_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    declared = {name: find_blocks(build()) for name, build in tiny_models.ARCHITECTURES.items()}
    monkeypatch.setattr(PreTrainedModel, "_can_record_outputs", None, raising=False)
    for name, build in tiny_models.ARCHITECTURES.items():
        module = build()
        monkeypatch.setattr(type(module), "_can_record_outputs", None, raising=False)
        monkeypatch.setattr(type(module.base_model), "_can_record_outputs", None, raising=False)
        assert getattr(module, "_can_record_outputs", None) is None
        found, before = find_blocks(module), declared[name]
        assert found is not None
        assert before is not None
        assert [type(block) for block in found] == [type(block) for block in before], name

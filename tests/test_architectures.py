"""One pass on every architecture family: hidden states against transformers' own, losses, second derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from trace_offline.activations.batch import ForwardBatch
from trace_offline.activations.blocks import find_blocks
from trace_offline.activations.forward import run_pass
from trace_offline.activations.losses import double_backward_attention, mean_loss
from trace_offline.activations.model import ModelView

NAMES = list(tiny_models.ARCHITECTURES)


@dataclass
class Rows:
    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor


class FakeSet:
    """Right-padded random rows behind the interface of an evaluation set."""

    def __init__(self, lengths: tuple[int, ...] = (9, 5, 12, 12, 3, 7, 1), seed: int = 0, causal: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.max_length = max(lengths)
        self.n_examples = len(lengths)
        self.ids = torch.randint(3, tiny_models.VOCABULARY, (len(lengths), self.max_length), generator=generator)
        self.mask = torch.arange(self.max_length)[None] < torch.tensor(lengths)[:, None]
        self.ids[~self.mask] = 0
        self.targets = torch.full_like(self.ids, -100)
        if causal:
            self.targets[:, :-1] = torch.where(self.mask[:, 1:], self.ids[:, 1:], -100)
        else:
            self.targets[:, ::3] = torch.where(self.mask[:, ::3], self.ids[:, ::3], -100)

    def tokens(self, start: int, stop: int) -> Rows:
        return Rows(self.ids[start:stop], self.mask[start:stop], self.targets[start:stop])


class Keep:
    """Keeps hidden states and logits of attended tokens, batch by batch."""

    def __init__(self, hidden: bool = True, logits: bool = False) -> None:
        self.needs_hidden, self.needs_logits = hidden, logits
        self.hidden: list[list[Tensor]] = []
        self.logits: list[Tensor] = []
        self.shapes: list[tuple[int, ...]] = []

    def update(self, batch: ForwardBatch) -> None:
        self.shapes.append(tuple(batch.input_ids.shape))
        if self.needs_hidden:
            assert batch.hidden is not None
            self.hidden.append([layer[batch.attention_mask] for layer in batch.hidden])
        if self.needs_logits:
            assert batch.logits is not None
            self.logits.append(batch.logits[batch.attention_mask])

    def finish(self) -> Any:
        return None

    def layers(self) -> list[Tensor]:
        return [torch.cat(parts) for parts in zip(*self.hidden, strict=True)]


def view(name: str, dtype: torch.dtype = torch.float32) -> ModelView:
    module = tiny_models.ARCHITECTURES[name]().to(dtype)
    return ModelView(module, find_blocks(module), "cpu", str(dtype).removeprefix("torch."))


def final_norm(name: str, module: Any, hidden: Tensor) -> Tensor:
    """What each architecture does between its last block and its output head."""
    if name == "opt":
        decoder = module.model.decoder
        return decoder.project_out(decoder.final_layer_norm(hidden))
    norms = {
        "gpt2": lambda: module.transformer.ln_f,
        "gpt_neox": lambda: module.gpt_neox.final_layer_norm,
        "llama_gqa": lambda: module.model.norm,
        "bert": nn.Identity,
    }
    return norms[name]()(hidden)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_found(name: str) -> None:
    model = view(name)
    assert model.n_layers == tiny_models.LAYERS


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_equal_those_of_transformers(name: str) -> None:
    model, rows, keep = view(name), FakeSet(), Keep()
    assert run_pass(model, rows, {"keep": keep}, batch_tokens=24) == {}
    assert keep.shapes == [(2, 9), (2, 12), (2, 7), (1, 1)]  # in order, each cut to its longest row
    with torch.no_grad():
        output = model.module(input_ids=rows.ids, attention_mask=rows.mask, output_hidden_states=True)
        expected = [layer[rows.mask] for layer in output.hidden_states]
        found = keep.layers()
        assert len(found) == tiny_models.LAYERS + 1
        for index in range(tiny_models.LAYERS):
            torch.testing.assert_close(found[index], expected[index], rtol=1e-5, atol=2e-5)
        last = final_norm(name, model.module, found[-1])
        torch.testing.assert_close(last, expected[-1], rtol=1e-5, atol=2e-5)
    if name != "bert":  # the raw output of the last block, not what transformers calls its last hidden state
        assert found[-1].shape != expected[-1].shape or not torch.allclose(found[-1], expected[-1], atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_who_else_listens(name: str) -> None:
    model, rows = view(name), FakeSet()
    alone, beside_logits, logits_alone = Keep(), Keep(hidden=True, logits=True), Keep(hidden=False, logits=True)
    run_pass(model, rows, {"a": alone}, batch_tokens=24)
    run_pass(model, rows, {"a": Keep(), "b": beside_logits}, batch_tokens=24)
    run_pass(model, rows, {"b": logits_alone}, batch_tokens=24)
    assert alone.shapes == beside_logits.shapes == logits_alone.shapes
    for one, other in zip(alone.layers(), beside_logits.layers(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(torch.cat(logits_alone.logits), torch.cat(beside_logits.logits))


@pytest.mark.parametrize("name", NAMES)
def test_loss_equals_that_of_transformers(name: str) -> None:
    model, rows = view(name), FakeSet(causal=name != "bert")
    labels = rows.targets if name == "bert" else rows.ids.masked_fill(~rows.mask, -100)
    with torch.no_grad():
        expected = model.module(input_ids=rows.ids, attention_mask=rows.mask, labels=labels).loss
        torch.testing.assert_close(mean_loss(model, rows.tokens(0, 7)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_loss_can_be_differentiated_twice(name: str) -> None:
    model, rows = view(name, torch.float64), FakeSet(lengths=(6, 4), causal=name != "bert")
    parameters = [p for p in model.parameters_by_name().values() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    length = torch.cat([d.ravel() for d in direction]).norm()
    direction = [d / length for d in direction]
    # small enough that no ReLU of OPT switches; wider for Llama, whose RMS norm computes in float32 whatever its type
    step, tolerance = (2e-3, 2e-3) if name == "llama_gqa" else (1e-6, 1e-5)

    def gradient() -> list[Tensor]:
        found = torch.autograd.grad(mean_loss(model, rows.tokens(0, 2)), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    with double_backward_attention():
        loss = mean_loss(model, rows.tokens(0, 2))
        first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        inner = sum((g * d).sum() for g, d in zip(first, direction, strict=True) if g is not None)
        product = torch.autograd.grad(inner, parameters, allow_unused=True)
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * step)
            moved.append(gradient())
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(d, alpha=sign * step)
    flat = torch.cat(
        [torch.zeros_like(p).ravel() if h is None else h.ravel() for h, p in zip(product, parameters, strict=True)]
    )
    numeric = torch.cat([(a - b).ravel() / (2 * step) for a, b in zip(*moved, strict=True)])
    assert float(numeric.norm()) > 1e-2
    assert float((flat - numeric).norm() / numeric.norm()) < tolerance


def test_a_network_transformers_does_not_know() -> None:
    module = tiny_models.unknown_net()
    model, rows, keep = ModelView(module, find_blocks(module), "cpu", "float32"), FakeSet(), Keep(logits=True)
    assert model.n_layers == 2
    assert run_pass(model, rows, {"keep": keep}) == {}
    with torch.no_grad():
        states = [module.embed(rows.ids) + module.position(torch.arange(rows.max_length))]
        allowed = torch.ones(12, 12, dtype=torch.bool).tril() & rows.mask[:, None, :]
        for layer in module.layers:
            states.append(layer(states[-1], allowed)[0])
        for found, expected in zip(keep.layers(), states, strict=True):
            torch.testing.assert_close(found, expected[rows.mask])
        torch.testing.assert_close(keep.logits[0], module.unembed(states[-1])[rows.mask])

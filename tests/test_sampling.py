"""Sampling: against a chain whose law is known, a plain loop, transformers' own generation, and without its cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from scipy import stats
from torch import Tensor, nn

from trace_offline.activations.model import ModelView
from trace_offline.activations.sampling import Sample, context_length_of, invert, sample
from trace_offline.core.errors import NotApplicable, UsageError


class Chain(nn.Module):
    """A network that is a Markov chain: the next token follows row x_t of a table of probabilities."""

    def __init__(self, table: np.ndarray, longest: int | None = None) -> None:
        super().__init__()
        self.table = torch.from_numpy(table).log()
        self.seen: list[tuple[int, ...]] = []
        if longest is not None:  # as the modules of transformers say it
            self.config = SimpleNamespace(max_position_embeddings=longest)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        assert attention_mask.all()
        self.seen.append(tuple(input_ids.shape))
        return self.table[input_ids]


def view(module: nn.Module) -> ModelView:
    return ModelView(module, None, "cpu", "float32")


def table(seed: int = 0, size: int = 6) -> np.ndarray:
    found = np.random.default_rng(seed).dirichlet(np.ones(size), size)
    found[:, 2] = 0.0  # token 2 is never possible
    return found / found.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_transitions_of_a_chain_have_its_probabilities(temperature: float) -> None:
    law = table() ** (1 / temperature)
    law /= law.sum(1, keepdims=True)
    found = sample(view(Chain(table())), 0, n=400, max_new_tokens=50, seed=1, temperature=temperature)
    counts = np.zeros((6, 6))
    for item in found:
        path = [0, *item.tokens]
        np.add.at(counts, (path[:-1], path[1:]), 1)
    assert counts.sum() == 400 * 50
    assert (counts[:, 2] == 0).all()
    for row in (0, 1, 3, 4, 5):
        possible = [0, 1, 3, 4, 5]
        expected = law[row, possible] * counts[row].sum()
        assert stats.chisquare(counts[row, possible], expected * counts[row].sum() / expected.sum()).pvalue > 1e-3


def test_the_chi_square_above_sees_the_wrong_temperature() -> None:
    law = table()[0, [0, 1, 3, 4, 5]]
    found = sample(view(Chain(table())), 0, n=2000, max_new_tokens=1, seed=1, temperature=0.5)
    counts = np.bincount([item.tokens[0] for item in found], minlength=6)[[0, 1, 3, 4, 5]]
    assert stats.chisquare(counts, law * 2000).pvalue < 1e-6


def test_lengths_until_a_stop_token_are_geometric() -> None:
    law = np.full((4, 4), 0.25)
    found = sample(view(Chain(law)), 1, n=2000, max_new_tokens=200, seed=3, stop_token_ids=[3])
    lengths = np.asarray([len(item.tokens) for item in found])
    assert all(item.finished and 3 not in item.tokens for item in found)
    assert abs(lengths.mean() - 3.0) < 4 * np.sqrt(12 / 2000)  # geometric with p = 1/4: mean 3, variance 12
    cut = sample(view(Chain(law)), 1, n=2000, max_new_tokens=2, seed=3, stop_token_ids=[3])
    assert abs(np.mean([item.finished for item in cut]) - (1 - 0.75**2)) < 4 * np.sqrt(0.25 / 2000)
    # a text that ran to its full length is not finished, and is the beginning of the longer one
    for short, long in zip(cut, found, strict=True):
        assert short.tokens == long.tokens[:2]
        assert short.finished == (len(long.tokens) < 2)


def plain_loop(model: nn.Module, prompt: list[int], row: int, steps: int, seed: int, temperature: float) -> list[int]:
    noise = np.random.default_rng([seed, row]).random(steps)
    ids = list(prompt)
    for u in noise:
        given = torch.tensor([ids])
        logits = model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0, -1].double().detach().numpy()
        weights = np.exp((logits - logits.max()) / temperature)
        token, running = 0, weights[0] / weights.sum()
        while running <= u:
            token += 1
            running += weights[token] / weights.sum()
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama_gqa", "opt"])
def test_equals_a_plain_loop_with_and_without_the_cache(name: str) -> None:
    model = getattr(tiny_models, name)()
    prompts = [[5, 6, 7], [8], [9, 10, 11], [12, 13]]
    with_cache = sample(view(model), prompts, n=2, max_new_tokens=8, seed=4, temperature=0.7, stop_token_ids=[20, 30])
    without = sample(
        view(model), prompts, n=2, max_new_tokens=8, seed=4, temperature=0.7, stop_token_ids=[20, 30], use_cache=False
    )
    assert with_cache == without
    for row, item in enumerate(with_cache):
        expected = plain_loop(model, prompts[row // 2], row, 8, 4, 0.7)
        stop = next((place for place, token in enumerate(expected) if token in (20, 30)), None)
        assert item == Sample(row // 2, tuple(expected[:stop]), stop is not None)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_greedy_equals_generation_of_transformers(name: str) -> None:
    model = getattr(tiny_models, name)(seed=3)
    found = sample(view(model), [[5, 6, 7], [8, 9, 10]], max_new_tokens=12, seed=0, temperature=0)
    given = torch.tensor([[5, 6, 7], [8, 9, 10]])
    made = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=12, eos_token_id=None
    )
    assert [list(item.tokens) for item in found] == made[:, 3:].tolist()


def test_rows_that_end_early_leave_the_others_as_they_are() -> None:
    model = tiny_models.gpt_neox()
    free = sample(view(model), 5, n=30, max_new_tokens=10, seed=2, temperature=1.5)
    stop = free[0].tokens[3]
    stopped = sample(view(model), 5, n=30, max_new_tokens=10, seed=2, temperature=1.5, stop_token_ids=[stop])
    assert {item.finished for item in stopped} == {True, False}
    for one, other in zip(free, stopped, strict=True):
        end = one.tokens.index(stop) if stop in one.tokens else None
        assert other.tokens == one.tokens[:end]


def test_seed_number_and_batches() -> None:
    model = view(Chain(table()))
    first = sample(model, [[1], [3, 4]], n=3, max_new_tokens=9, seed=5)
    assert first == sample(model, [[1], [3, 4]], n=3, max_new_tokens=9, seed=5, batch_tokens=10)
    assert first == sample(model, [[1], [3, 4]], n=3, max_new_tokens=9, seed=5, memory_floats=6)
    assert first != sample(model, [[1], [3, 4]], n=3, max_new_tokens=9, seed=6)
    assert [item.prompt for item in first] == [0, 0, 0, 1, 1, 1]
    few, many = (sample(model, 0, n=n, max_new_tokens=9, seed=5) for n in (4, 9))
    assert many[:4] == few
    assert len({item.tokens for item in many}) > 1
    assert sample(model, torch.tensor([[3, 4]]), max_new_tokens=3, seed=0) == sample(model, [3, 4], 1, 3, seed=0)
    assert sample(model, torch.tensor([3, 4]), max_new_tokens=3, seed=0) == sample(model, [3, 4], 1, 3, seed=0)


def test_batches_stay_within_what_was_asked_for() -> None:
    module = Chain(table())
    sample(view(module), [[1, 1]] * 10, max_new_tokens=3, seed=0, batch_tokens=20)
    assert max(rows * length for rows, length in module.seen) <= 20
    assert max(rows for rows, _ in module.seen) == 4


def test_the_context_of_the_network_is_never_passed() -> None:
    module = Chain(table(), longest=6)
    found = sample(view(module), [[1], [1, 3, 4]], max_new_tokens=20, seed=0)
    assert [len(item.tokens) for item in found] == [5, 3]
    assert not any(item.finished for item in found)
    assert max(length for _, length in module.seen) <= 6
    assert [len(s.tokens) for s in sample(view(module), [1], 1, 20, seed=0, context_length=4)] == [3]
    real = tiny_models.gpt2()
    assert context_length_of(view(real)) == tiny_models.POSITIONS
    assert len(sample(view(real), 5, 1, 500, seed=0)[0].tokens) == tiny_models.POSITIONS - 1
    assert context_length_of(view(Chain(table()))) is None


def test_inverting_a_distribution() -> None:
    p = torch.tensor([[0.0, 0.2, 0.0, 0.8, 0.0]], dtype=torch.float64)

    def at(u: float) -> int:
        return int(invert(p, torch.tensor([u], dtype=torch.float64)))

    assert [at(u) for u in (0.0, 0.19, 0.2, 0.5, 1 - 2**-53)] == [1, 1, 3, 3, 3]
    rng = np.random.default_rng(0)
    for _ in range(50):
        weights = rng.random((7, 30)) * (rng.random((7, 30)) < 0.4)
        weights[:, 3] += 1e-3
        u = rng.random(7)
        found = invert(torch.from_numpy(weights), torch.from_numpy(u)).tolist()
        for row in range(7):
            share = weights[row] / weights[row].sum()
            assert share[found[row]] > 0
            assert share[: found[row]].sum() <= u[row] + 1e-12
            assert share[: found[row] + 1].sum() >= u[row] - 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[1], []]}, "every prompt needs at least one token"),
        ({"prompts": []}, "every prompt needs at least one token"),
        ({"n": 0}, "n and max_new_tokens must be at least 1"),
        ({"temperature": float("nan")}, "temperature at least 0; found 1, 5 and nan"),
        ({"prompts": [1] * 6}, "a prompt has 6 tokens, but the network takes only 6"),
    ],
)
def test_arguments_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"prompts": [1], "n": 1, "max_new_tokens": 5, "seed": 0} | changes
    with pytest.raises(UsageError, match=message):
        sample(view(Chain(table(), longest=6)), **given)


def test_logits_that_are_not_numbers() -> None:
    law = table()
    law[1] = np.nan
    with pytest.raises(NotApplicable, match="the logits of 1 of 1 predictions are not numbers"):
        sample(view(Chain(law)), 1, seed=0)


def test_a_network_without_a_head() -> None:
    class Bare(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=input_ids)

    with pytest.raises(NotApplicable, match="returns no logits"):
        sample(view(Bare()), 1, seed=0)


def test_a_model_with_a_cache_reads_each_token_once() -> None:
    model = tiny_models.gpt_neox()
    seen: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *args: seen.append(args[1][0].shape[1]))
    sample(view(model), [5, 6, 7], n=2, max_new_tokens=5, seed=0)
    handle.remove()
    assert seen == [3, 3, 1, 1, 1, 1]  # a look at the output head, the prompts, then one token at a time

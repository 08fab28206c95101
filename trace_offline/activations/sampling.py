"""Text drawn from a causal language model, token by token: p(x_1 … x_n) = Π_t p(x_t | prompt, x_<t).

Every row has its own stream of uniform numbers, fixed by the seed and the row's place, and turns them into tokens by
inverting the cumulative distribution. Two checkpoints sampled with one seed therefore use the same random numbers (what
differs between their texts is the models), and the first rows of many are those of few.

Rows of one batch have prompts of one length, so nothing is padded and every position counts from the start of its
text. A model of transformers that offers a cache of keys and values is asked for one; any other is run over the whole
text again for each token.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trace_offline.activations.forward import BATCH_TOKENS, MEMORY_FLOATS
from trace_offline.activations.memory import at_once
from trace_offline.activations.model import ModelView, logits_of
from trace_offline.core.errors import NotApplicable, UsageError

_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "block_size")


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation. ``prompt``: its number. ``tokens``: the new tokens, without the stop token that ended them.

    ``finished``: a stop token came; False when the text was cut at ``max_new_tokens`` or the end of the context.
    """

    prompt: int
    tokens: tuple[int, ...]
    finished: bool


def sample(
    model: ModelView,
    prompts: int | Tensor | Sequence[int] | Sequence[Sequence[int]],
    n: int = 1,
    max_new_tokens: int = 64,
    *,
    seed: int,
    temperature: float = 1.0,
    stop_token_ids: Sequence[int] = (),
    context_length: int | None = None,
    use_cache: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    memory_floats: int = MEMORY_FLOATS,
) -> list[Sample]:
    """``n`` continuations of every prompt: prompt 0 n times, then prompt 1, …

    ``prompts``: one token id (a beginning-of-sequence token), one list of ids, several lists (of any lengths), or an
    int tensor ``[T]`` or ``[P, T]`` without padding. ``temperature``: the logits are divided by it; 0 takes the most
    likely token (of equal ones the first). ``context_length``: longest text, prompt included, that the network takes;
    None: what its configuration says, if anything. ``use_cache=False``: never ask for keys and values.

    The same arguments give the same tokens; how rows are cut into batches follows from the network and the prompts.
    Raises UsageError for arguments that make no sense, NotApplicable when the network has no output head or its logits
    are not numbers.
    """
    rows = [row for row in _prompts(prompts) for _ in range(n)]
    if n < 1 or max_new_tokens < 1 or not temperature >= 0.0:
        raise UsageError(
            "sampling: n and max_new_tokens must be at least 1 and temperature at least 0; found "
            f"{n}, {max_new_tokens} and {temperature}."
        )
    limit = context_length if context_length is not None else context_length_of(model)
    longest = max(len(row) for row in rows)
    if limit is not None and longest >= limit:
        raise UsageError(
            f"sampling: a prompt has {longest} tokens, but the network takes only {limit}, so that nothing can follow. "
            "Give shorter prompts."
        )
    found: dict[int, Sample] = {}
    lengths = np.asarray([len(row) for row in rows])
    with torch.no_grad():
        head = model.logits(*_whole(torch.tensor([rows[0]], dtype=torch.int64, device=model.device)))
        for length in np.unique(lengths):
            steps = max_new_tokens if limit is None else min(max_new_tokens, limit - int(length))
            per_batch = _rows_per_batch(int(length) + steps, head.shape[-1], batch_tokens, memory_floats)
            places = np.flatnonzero(lengths == length)
            for start in range(0, len(places), per_batch):
                part = places[start : start + per_batch]
                noise = np.stack([_uniforms(seed, int(row), steps) for row in part])
                ids = torch.tensor([rows[row] for row in part], dtype=torch.int64, device=model.device)
                drawn = _continue(model, ids, noise, temperature, frozenset(stop_token_ids), use_cache)
                for row, (tokens, finished) in zip(part.tolist(), drawn, strict=True):
                    found[row] = Sample(row // n, tokens, finished)
    return [found[row] for row in range(len(rows))]


def context_length_of(model: ModelView) -> int | None:
    """Longest text that the configuration of the network (``module.config``) allows; None when it does not say."""
    config: Any = getattr(model.module, "config", None)
    for section in (config, getattr(config, "text_config", None)):
        for key in _LENGTH_KEYS:
            value = getattr(section, key, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The outcome of each distribution at which its cumulative sum first exceeds ``uniforms``: ``[B, V], [B] → [B]``.

    ``uniforms`` in [0, 1); float64. Outcomes of probability 0 are never chosen; rows need not sum to exactly 1.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # rounding can carry u · total to total itself, beyond the last outcome that is possible
    wanted = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]


def _prompts(given: int | Tensor | Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    if isinstance(given, Tensor):
        given = given.tolist()
    values: Any = [[given]] if isinstance(given, int) else given
    if len(values) and isinstance(values[0], int):
        values = [values]
    rows = [[int(token) for token in row] for row in values]
    if not rows or not all(rows):
        raise UsageError(
            "sampling: every prompt needs at least one token (a beginning-of-sequence token, say); found an empty one."
        )
    return rows


def _uniforms(seed: int, row: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng([seed, row]).random(count)


def _rows_per_batch(length: int, classes: int, batch_tokens: int, memory_floats: int) -> int:
    tokens = min(batch_tokens, memory_floats // max(1, classes))
    return at_once(max(1, tokens // length))


def _whole(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, torch.ones_like(ids, dtype=torch.bool)


def _continue(
    model: ModelView,
    ids: Tensor,
    noise: np.ndarray[Any, np.dtype[np.float64]],
    temperature: float,
    stops: frozenset[int],
    use_cache: bool,
) -> list[tuple[tuple[int, ...], bool]]:
    """The new tokens of each row of ``ids [B, T]``, and whether a stop token ended them; ``noise [B, steps]``."""
    tokens: list[list[int]] = [[] for _ in range(len(ids))]
    finished = [False] * len(ids)
    uniforms = torch.from_numpy(noise).to(ids.device)
    text = _Text(model, ids, use_cache)
    running = list(range(len(ids)))
    for step in range(noise.shape[1]):
        chosen = _choose(text.next_logits(), uniforms[running, step], temperature)
        kept = []
        for place, (row, token) in enumerate(zip(running, chosen.tolist(), strict=True)):
            if token in stops:
                finished[row] = True
            else:
                tokens[row].append(token)
                kept.append(place)
        running = [running[place] for place in kept]
        if not running:
            break
        text.extend(chosen, kept)
    return [(tuple(row), done) for row, done in zip(tokens, finished, strict=True)]


def _choose(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """One token for each row of ``logits [B, V]`` (float64)."""
    top = logits.max(-1).values
    broken = int((~torch.isfinite(top)).sum())
    if broken:
        raise NotApplicable(
            f"not applicable because the logits of {broken} of {len(logits)} predictions are not numbers: nothing can "
            "be sampled from them"
        )
    if temperature == 0.0:
        return logits.argmax(-1)
    return invert(((logits - top[:, None]) / temperature).exp(), uniforms)


class _Text:
    """Rows of equal length that grow by a token at a time, with the network's keys and values where it keeps them."""

    def __init__(self, model: ModelView, ids: Tensor, use_cache: bool) -> None:
        self._model = model
        self._ids = ids
        self._cache: Any = None
        self._cached = use_cache and _is_transformers_model(model.module)

    def next_logits(self) -> Tensor:
        """``float64 [B, V]``: the prediction after the last token."""
        ids, mask = _whole(self._ids)
        if not self._cached:
            return self._model.logits(ids, mask)[:, -1].double()
        if self._cache is not None:
            ids = ids[:, -1:]
        output = self._model.module(input_ids=ids, attention_mask=mask, past_key_values=self._cache, use_cache=True)
        self._cache = getattr(output, "past_key_values", None)
        # state-space models and others keep their past under other names: run over the whole text instead
        self._cached = hasattr(self._cache, "batch_select_indices")
        logits = logits_of(output)
        assert logits is not None
        return logits[:, -1].double()

    def extend(self, chosen: Tensor, kept: list[int]) -> None:
        """Keep these rows of the batch and append to each what was chosen for it."""
        if len(kept) < len(chosen):
            places = torch.tensor(kept, device=chosen.device)
            self._ids, chosen = self._ids[places], chosen[places]
            if self._cached:
                self._cache.batch_select_indices(places)
        self._ids = torch.cat([self._ids, chosen[:, None]], dim=1)


def _is_transformers_model(module: object) -> bool:
    """A causal model of transformers that takes ``past_key_values``."""
    from inspect import signature

    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return False
    parameters = signature(module.forward).parameters
    return {"past_key_values", "use_cache"} <= set(parameters)

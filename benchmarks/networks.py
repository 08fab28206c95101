"""Small networks and texts that several benchmarks share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trace_offline.corpus import CorpusParams, LexiconParams, generate

Labelled = tuple[list[int], list[tuple[str, int, int, str]]]


def packed_rows(vocabulary: int, length: int, count: int, seed: int = 0) -> Iterator[Labelled]:
    """Rows of ``length`` words without padding, as token ids, with the part of speech and the role of each word."""
    codes: dict[str, int] = {}
    params = CorpusParams(lexicon=LexiconParams.for_vocabulary(vocabulary))
    sentences = generate(seed, params)
    words = (word for s in sentences for word in zip(s.words, s.pos, s.roles, strict=True))
    for _ in range(count):
        row = list(itertools.islice(words, length))
        labels = [("pos", at, at + 1, pos) for at, (_, pos, _) in enumerate(row)]
        labels += [("role", at, at + 1, role) for at, (_, _, role) in enumerate(row) if role is not None]
        yield [codes.setdefault(word, len(codes)) % vocabulary for word, _, _ in row], labels


def gpt_neox(vocabulary: int, width: int, layers: int, heads: int, length: int, seed: int = 0) -> Any:
    """A GPT-NeoX with random weights and plain (eager) attention, which can be differentiated twice."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=length, attn_implementation="eager",
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


def loss_of(network: Any, ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy as a training script writes it."""
    logits = network(input_ids=ids).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


class Training:
    """A training loop, one step at a time."""

    def __init__(self, network: Any, ids: Tensor, batch: int) -> None:
        self.network, self.batches, self.step = network, ids.split(batch), 0
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)

    def __call__(self) -> None:
        """Forward, backward and AdamW on the next batch."""
        batch = self.batches[self.step % len(self.batches)]
        self.step += 1
        self.optimizer.zero_grad()
        loss_of(self.network, batch).backward()
        self.optimizer.step()

"""Small networks with a fixed seed, one for each architecture family the package promises to work on.

Each function returns a fresh model in eval mode; the same seed gives the same weights. Initial weights are drawn wide
enough (0.2 rather than 0.02) that attention and nonlinearities matter, so that a test cannot pass by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 80
POSITIONS = 48
LAYERS = 3
WIDTH = 32


def _build(class_name: str, config: Any, seed: int) -> Any:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, class_name)(config)
        for name, parameter in model.named_parameters():
            # biases and norms start at constants, which would hide mistakes such as a skipped or swapped tensor
            if parameter.dim() == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith("weight"):
                parameter.data.mul_(4.0)
    model.config.architectures = [class_name]
    return model.eval()


def gpt2(seed: int = 0) -> Any:
    """Learned positions, pre-norm blocks, tied embeddings."""
    from transformers import GPT2Config

    return _build(
        "GPT2LMHeadModel",
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=POSITIONS,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        seed,
    )


def gpt_neox(seed: int = 0) -> Any:
    """Parallel attention and MLP, rotary positions, an output head that files call ``embed_out``."""
    from transformers import GPTNeoXConfig

    return _build(
        "GPTNeoXForCausalLM",
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=POSITIONS,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=64,
            rotary_pct=0.5,
            use_parallel_residual=True,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        seed,
    )


def llama_gqa(seed: int = 0) -> Any:
    """Grouped key-value heads (4 query, 2 key-value), RMS norm, gated MLP."""
    from transformers import LlamaConfig

    return _build(
        "LlamaForCausalLM",
        LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=POSITIONS,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        seed,
    )


def opt(seed: int = 0) -> Any:
    """Learned positions with an offset, and embeddings of another width than the blocks (projections in and out)."""
    from transformers import OPTConfig

    return _build(
        "OPTForCausalLM",
        OPTConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=POSITIONS,
            hidden_size=WIDTH,
            word_embed_proj_dim=16,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            ffn_dim=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        seed,
    )


def bert(seed: int = 0) -> Any:
    """Bidirectional, post-norm blocks, masked-LM head."""
    from transformers import BertConfig

    return _build(
        "BertForMaskedLM",
        BertConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=POSITIONS,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=64,
            pad_token_id=0,
        ),
        seed,
    )


ARCHITECTURES: dict[str, Callable[..., Any]] = {
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama_gqa": llama_gqa,
    "opt": opt,
    "bert": bert,
}


class UnknownBlock(nn.Module):
    """A residual block with causal single-head attention, written out, returning ``(hidden, extra)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))

    def forward(self, hidden: Tensor, allowed: Tensor) -> tuple[Tensor, None]:
        query, key, value = self.query_key_value(hidden).chunk(3, dim=-1)
        scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(~allowed, -1e9)
        hidden = hidden + self.out(scores.softmax(-1) @ value)
        return hidden + self.mlp(hidden), None


class UnknownNet(nn.Module):
    """A plain torch language model that transformers knows nothing about; returns an object with ``.logits``."""

    def __init__(
        self, vocabulary: int = VOCABULARY, width: int = 24, layers: int = 2, positions: int = POSITIONS
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width)
        self.layers = nn.ModuleList(UnknownBlock(width) for _ in range(layers))
        self.unembed = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        allowed = causal & attention_mask.bool()[:, None, :]
        hidden = self.embed(input_ids) + self.position(torch.arange(length, device=input_ids.device))
        for layer in self.layers:
            hidden, _ = layer(hidden, allowed)
        return SimpleNamespace(logits=self.unembed(hidden))


def unknown_net(seed: int = 0) -> UnknownNet:
    """``UnknownNet`` with a fixed seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UnknownNet().eval()

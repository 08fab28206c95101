"""nanoGPT's ``ckpt.pt`` as a transformers GPT-2: the same network under other names.

nanoGPT (A. Karpathy, https://github.com/karpathy/nanoGPT) keeps ``model_args`` beside the weights. Its linear layers
store ``[out, in]`` where GPT-2 stores ``[in, out]``; without biases all of them are zero; the activation is the exact
GELU; the output head shares the token embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_BIASED = ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
NOTE = (
    "built as GPT-2 with the exact GELU, as nanoGPT does since June 2023; a network trained with its older tanh GELU "
    "needs --model-factory"
)


def is_nanogpt(extras: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Are these nanoGPT's ``model_args`` and names?"""
    arguments = extras.get("model_args")
    return (
        isinstance(arguments, dict)
        and all(isinstance(arguments.get(name), int) for name in _ARGUMENTS)
        and "transformer.wte.weight" in tensors
        and "transformer.h.0.attn.c_attn.weight" in tensors
    )


def as_gpt2(extras: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """``(GPT2Config, state dict for GPT2LMHeadModel)`` with the same logits as nanoGPT's own forward pass."""
    from transformers import GPT2Config

    arguments = extras["model_args"]
    head, embedding = tensors.get("lm_head.weight"), tensors["transformer.wte.weight"]
    tied = head is None or torch.equal(head, embedding)
    config = GPT2Config(
        vocab_size=arguments["vocab_size"],
        n_positions=arguments["block_size"],
        n_embd=arguments["n_embd"],
        n_layer=arguments["n_layer"],
        n_head=arguments["n_head"],
        activation_function="gelu",
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=tied,
        architectures=["GPT2LMHeadModel"],
    )
    # the causal mask that old versions keep among the weights is a constant
    state = {name: tensor for name, tensor in tensors.items() if not name.endswith(".attn.bias")}
    for name in list(state):
        if name.endswith(_TRANSPOSED):
            state[name] = state[name].T.contiguous()
    if not arguments.get("bias", True):
        for layer in range(arguments["n_layer"]):
            for part in _BIASED:
                weight = state[f"transformer.h.{layer}.{part}.weight"]
                state[f"transformer.h.{layer}.{part}.bias"] = weight.new_zeros(weight.shape[-1])
        state["transformer.ln_f.bias"] = torch.zeros_like(state["transformer.ln_f.weight"])
    return config, state

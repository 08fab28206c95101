"""Which layer and component a parameter belongs to, on every family of networks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_models import ARCHITECTURES, LAYERS, unknown_net
from torch import nn

from trace_offline.activations.components import Component, Place, inside_block, parameter_groups, parameter_places
from trace_offline.activations.model import ModelView
from trace_offline.checkpoints.blocks import find_blocks

EXPECTED = {
    "gpt2": {
        "transformer.wte.weight": (0, "embedding"),
        "transformer.wpe.weight": (0, "embedding"),
        "transformer.h.1.ln_1.weight": (2, "norm"),
        "transformer.h.0.attn.c_attn.bias": (1, "attention"),
        "transformer.h.0.attn.c_proj.weight": (1, "attention"),
        "transformer.h.2.mlp.c_proj.weight": (3, "mlp"),
        "transformer.h.2.mlp.c_fc.weight": (3, "mlp"),
        "transformer.ln_f.bias": (None, "final_norm"),
    },
    "gpt_neox": {
        "gpt_neox.embed_in.weight": (0, "embedding"),
        "gpt_neox.layers.0.post_attention_layernorm.weight": (1, "norm"),
        "gpt_neox.layers.2.attention.query_key_value.weight": (3, "attention"),
        "gpt_neox.layers.2.attention.dense.bias": (3, "attention"),
        "gpt_neox.layers.1.mlp.dense_4h_to_h.weight": (2, "mlp"),
        "gpt_neox.final_layer_norm.weight": (None, "final_norm"),
        "lm_head.weight": (None, "head"),
    },
    "llama_gqa": {
        "model.embed_tokens.weight": (0, "embedding"),
        "model.layers.0.self_attn.o_proj.weight": (1, "attention"),
        "model.layers.0.mlp.gate_proj.weight": (1, "mlp"),
        "model.layers.0.post_attention_layernorm.weight": (1, "norm"),
        "model.norm.weight": (None, "final_norm"),
        "lm_head.weight": (None, "head"),
    },
    "opt": {
        "model.decoder.embed_tokens.weight": (0, "embedding"),
        "model.decoder.embed_positions.weight": (0, "embedding"),
        "model.decoder.project_in.weight": (0, "embedding"),
        "model.decoder.project_out.weight": (None, "head"),
        "model.decoder.final_layer_norm.bias": (None, "final_norm"),
        "model.decoder.layers.0.final_layer_norm.bias": (1, "norm"),
        "model.decoder.layers.0.self_attn_layer_norm.weight": (1, "norm"),
        "model.decoder.layers.0.self_attn.out_proj.weight": (1, "attention"),
        "model.decoder.layers.2.fc2.weight": (3, "mlp"),
    },
    "bert": {
        "bert.embeddings.word_embeddings.weight": (0, "embedding"),
        "bert.embeddings.token_type_embeddings.weight": (0, "embedding"),
        "bert.embeddings.LayerNorm.weight": (0, "norm"),
        "bert.encoder.layer.0.attention.self.query.weight": (1, "attention"),
        "bert.encoder.layer.0.attention.output.dense.weight": (1, "attention"),
        "bert.encoder.layer.0.attention.output.LayerNorm.weight": (1, "norm"),
        "bert.encoder.layer.0.intermediate.dense.weight": (1, "mlp"),
        "bert.encoder.layer.0.output.dense.weight": (1, "mlp"),
        "bert.encoder.layer.0.output.LayerNorm.bias": (1, "norm"),
        "cls.predictions.bias": (None, "head"),
        "cls.predictions.transform.dense.weight": (None, "head"),
        "cls.predictions.transform.LayerNorm.weight": (None, "final_norm"),
    },
}


def view(module: nn.Module, *, known: bool = True) -> ModelView:
    return ModelView(module, find_blocks(module) if known else None, "cpu", "float32")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_families_of_transformers(kind: str) -> None:
    model = view(ARCHITECTURES[kind]())
    places = parameter_places(model)
    for name, place in EXPECTED[kind].items():
        assert places[name] == place, name
    assert list(places) == list(model.parameters_by_name())
    assert Component.OTHER not in {place.component for place in places.values()}
    for layer in range(1, LAYERS + 1):
        assert {p.component for p in places.values() if p.layer == layer} == {"attention", "mlp", "norm"}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_groups_divide_the_parameters(kind: str) -> None:
    model = view(ARCHITECTURES[kind]())
    groups = parameter_groups(model)
    listed = [name for names in groups.values() for name in names]
    assert Counter(listed) == Counter(list(model.parameters_by_name()))
    layers = [-1 if place.layer is None else place.layer for place in groups]
    known = [layer for layer in layers if layer >= 0]
    assert known == sorted(known)
    assert layers[len(known) :] == [-1] * (len(layers) - len(known))


def test_what_names_do_not_tell_is_other() -> None:
    places = parameter_places(view(unknown_net()))
    assert places["layers.0.query_key_value.weight"] == Place(1, "attention")
    assert places["layers.1.mlp.2.weight"] == Place(2, "mlp")
    assert places["layers.1.out.weight"] == Place(2, "other")
    assert places["embed.weight"] == places["position.weight"] == Place(0, "embedding")
    assert places["unembed.bias"] == Place(None, "head")


def test_without_known_blocks_there_are_components_but_no_layers() -> None:
    places = parameter_places(view(ARCHITECTURES["llama_gqa"](), known=False))
    assert places["model.layers.0.self_attn.o_proj.weight"] == Place(None, "attention")
    assert places["model.layers.0.mlp.gate_proj.weight"] == Place(None, "mlp")
    assert places["model.layers.0.input_layernorm.weight"] == Place(None, "norm")
    assert places["model.embed_tokens.weight"] == Place(0, "embedding")


def test_integer_and_empty_parameters_are_left_out_and_shared_blocks_count_once() -> None:
    block = nn.Sequential(nn.Linear(2, 2))
    module = nn.ModuleList([block, block])
    module.register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False))
    module.register_parameter("nothing", nn.Parameter(torch.zeros(0)))
    places = parameter_places(ModelView(module, (block, block), "cpu", "float32"))
    assert places == {"0.0.weight": Place(1, "other"), "0.0.bias": Place(1, "other")}


@pytest.mark.parametrize(
    ("local", "component"),
    [
        ("self_attention.dense.weight", "attention"),
        ("self_attn.q_norm.weight", "norm"),
        ("layer.0.SelfAttention.q.weight", "attention"),
        ("layer.1.DenseReluDense.wi.weight", "mlp"),
        ("block_sparse_moe.experts.3.w2.weight", "mlp"),
        ("mlp.experts.gate_up_proj", "mlp"),
        ("mlp.gate.weight", "mlp"),
        ("norm1.weight", "norm"),
        ("ln2.weight", "norm"),
        ("linear1.weight", "mlp"),
        ("mixer.in_proj.weight", "other"),
        ("normalizer_free.weight", "other"),
    ],
)
def test_names_of_other_families(local: str, component: str) -> None:
    assert inside_block(local) == component

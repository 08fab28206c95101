"""Loading: nothing missing, nothing random, nothing executed, number type explicit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from conftest import shared_data
from torch import Tensor, nn

from trace_offline.activations.losses import summed_loss
from trace_offline.checkpoints.loading import ModelCache, load_model
from trace_offline.checkpoints.tokenizer import load_tokenizer
from trace_offline.core.errors import CheckpointError, UsageError
from trace_offline.core.types import Checkpoint, CheckpointState

NAMES = list(tiny_models.ARCHITECTURES)
IDS = torch.tensor([[5, 9, 30, 41, 7, 7, 12], [60, 3, 8, 0, 0, 0, 0]])
MASK = torch.tensor([[1] * 7, [1] * 3 + [0] * 4]).bool()


def checkpoint(
    *files: Path, config: Path | None = None, location: Path | None = None, layout: str = "raw"
) -> Checkpoint:
    return Checkpoint(
        location=str(location or files[0]),
        layout=layout,
        state=CheckpointState.COMPLETE,
        weight_files=tuple(sorted(map(str, files))),
        config=None if config is None else str(config),
    )


def folder(path: Path) -> Checkpoint:
    files = sorted([*path.glob("model*.safetensors"), *path.glob("pytorch_model*.bin")])
    return checkpoint(*files, location=path, layout="hf_folder")


def saved(path: Path, name: str, seed: int = 0) -> Any:
    model = tiny_models.ARCHITECTURES[name](seed)
    model.save_pretrained(path)
    return model


def logits(module: Any) -> Tensor:
    with torch.no_grad():
        return module(input_ids=IDS, attention_mask=MASK).logits[MASK]


def factory_file(path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with ``build(weights, path)`` in the current directory; returns its spec."""
    name = f"factory_{abs(hash((str(path), body)))}"
    path.mkdir(exist_ok=True, parents=True)
    (path / f"{name}.py").write_text(body)
    monkeypatch.chdir(path)
    return f"{name}:build"


UNKNOWN = "\n".join(
    [
        "import sys",
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})",
        "from tiny_models import UnknownNet",
        "def build(weights, path):",
        "    net = UnknownNet()",
        "    net.load_state_dict(weights)",
        "    return net",
    ]
)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_folder_gives_the_same_network(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "m", name)
    view = load_model(folder(tmp_path / "m"))
    assert type(view.module) is type(model)
    assert not view.module.training
    assert view.n_layers == tiny_models.LAYERS
    assert torch.equal(logits(view.module), logits(model))
    assert view.notes == ()


@pytest.mark.parametrize("marked", [True, False])
def test_a_folder_that_another_tool_wrote(marked: bool, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = tiny_models.gpt_neox()
    model.config.save_pretrained(tmp_path)  # no generation_config.json, perhaps no mark of the framework
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"} if marked else None)
    assert torch.equal(logits(load_model(folder(tmp_path)).module), logits(model))


@pytest.mark.parametrize("name", NAMES)
def test_the_kept_network_equals_from_pretrained_bit_for_bit(name: str, tmp_path: Path) -> None:
    cache = ModelCache()
    for seed in range(3):
        saved(tmp_path / str(seed), name, seed)
        view = load_model(folder(tmp_path / str(seed)), cache=cache)
        fresh = type(view.module).from_pretrained(tmp_path / str(seed), dtype=torch.float32)
        assert torch.equal(logits(view.module), logits(fresh))
        for (key, one), (_, other) in zip(view.module.state_dict().items(), fresh.state_dict().items(), strict=True):
            assert torch.equal(one, other), key
        view.module(input_ids=IDS, attention_mask=MASK).logits.sum().backward()
        next(view.module.parameters()).requires_grad_(False)
        view.module.train()
        del view
    assert cache.hits == 2  # GPT-NeoX, too, whose file calls the head embed_out


def _resaved(path: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_constants_of_older_files_are_left_out_of_the_kept_network_too(tmp_path: Path) -> None:
    cache = ModelCache()
    for seed in range(2):
        saved(tmp_path / str(seed), "gpt_neox", seed)
        _resaved(
            tmp_path / str(seed),
            lambda weights: weights.update({"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}),
        )
        view = load_model(folder(tmp_path / str(seed)), cache=cache)
        assert torch.equal(logits(view.module), logits(tiny_models.ARCHITECTURES["gpt_neox"](seed)))
        del view
    assert cache.hits == 1


def test_a_name_that_could_be_either_of_two_tensors_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tensors that the file names otherwise, with the same numbers in the first checkpoint."""
    from trace_offline.checkpoints import model_cache

    saved(tmp_path / "0", "llama_gqa", 0)
    twins = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
    _resaved(tmp_path / "0", lambda weights: weights.update({twins[0]: weights[twins[1]].clone()}))
    view = load_model(folder(tmp_path / "0"))
    plain = model_cache._places

    def renamed(module: Any) -> dict[str, Tensor]:
        return {(f"other.{name}" if name in twins else name): tensor for name, tensor in plain(module).items()}

    files = [tmp_path / "0/model.safetensors"]
    assert ModelCache().keep("same", files, view)
    monkeypatch.setattr(model_cache, "_places", renamed)
    assert not ModelCache().keep("same", files, view)


def test_the_kept_network_is_clean_and_never_taken_from_a_user(tmp_path: Path) -> None:
    for seed in range(3):
        saved(tmp_path / str(seed), "llama_gqa", seed)
    cache = ModelCache()
    first = load_model(folder(tmp_path / "0"), cache=cache)
    before = logits(first.module)
    second = load_model(folder(tmp_path / "1"), cache=cache)
    assert cache.hits == 0
    assert second.module is not first.module
    assert torch.equal(logits(first.module), before)
    with torch.no_grad():
        for parameter in second.module.parameters():
            parameter.mul_(3.0)
        second.module.model.rotary_emb.inv_freq.mul_(2.0)
    module = second.module
    del second
    third = load_model(folder(tmp_path / "2"), cache=cache)
    assert cache.hits == 1
    assert third.module is module
    assert torch.equal(logits(third.module), logits(tiny_models.llama_gqa(2)))
    # the file was not written to by changing a network mapped from it
    assert torch.equal(logits(load_model(folder(tmp_path / "1")).module), logits(tiny_models.llama_gqa(1)))


def test_another_configuration_is_built_anew(tmp_path: Path) -> None:
    saved(tmp_path / "0", "llama_gqa", 0)
    saved(tmp_path / "1", "llama_gqa", 1)
    config = json.loads((tmp_path / "1/config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (tmp_path / "1/config.json").write_text(json.dumps(config))
    cache = ModelCache()
    load_model(folder(tmp_path / "0"), cache=cache)
    view = load_model(folder(tmp_path / "1"), cache=cache)
    assert cache.hits == 0
    assert view.module.model.norm.variance_epsilon == 0.5


def test_the_number_type_is_the_one_asked_for(tmp_path: Path) -> None:
    model = tiny_models.llama_gqa().half()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    for dtype in ("float32", "float64", "bfloat16"):
        view = load_model(folder(tmp_path), dtype=dtype)
        assert {p.dtype for p in view.module.parameters()} == {getattr(torch, dtype)}
        assert view.dtype == dtype
    with pytest.raises(
        UsageError, match=r'--dtype: expected one of float32, .* found "float23". Did you mean "float32"'
    ):
        load_model(folder(tmp_path), dtype="float23")


@pytest.mark.parametrize("name", NAMES)
def test_pickled_weights_equal_safetensors(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, name)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(logits(load_model(folder(tmp_path)).module), logits(model))


def test_a_missing_tensor_is_an_error_and_never_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path, "llama_gqa")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 tensors that LlamaForCausalLM needs are missing: model.layers.1.mlp.up_"
    ):
        load_model(folder(tmp_path))


def test_a_head_is_tied_only_when_the_configuration_says_so(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path, "llama_gqa")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: lm_head.weight\..* tied without the configuration saying so"):
        load_model(folder(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    module = load_model(folder(tmp_path)).module
    assert module.lm_head.weight is module.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, "have no place in LlamaForCausalLM as configured: model.layers.2"),
        ({"num_hidden_layers": 4}, "needs are missing: model.layers.3"),
        ({"intermediate_size": 40}, r"do not have the shape .* expected \(\d+, \d+\), found \(\d+, \d+\)"),
        ({"architectures": ["NoSuchForCausalLM"]}, "asks for the class NoSuchForCausalLM, which transformers"),
        ({"model_type": "no_such_type"}, "no configuration that transformers understands"),
    ],
)
def test_a_configuration_of_another_network_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, "llama_gqa")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder(tmp_path))


def test_a_bias_without_a_place_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path, "llama_gqa")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors of the file have no place .*q_proj.bias"):
        load_model(folder(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "someone/code:attention"},
        {"attn_implementation": {"": "sdpa", "vision": "someone/code"}},
        {"text_config": {"experts_implementation": "someone/code"}},
    ],
)
def test_compiled_code_from_the_hub_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, "gpt_neox")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"compiled code from the Hugging Face hub.*--trust-remote-code"):
        load_model(folder(tmp_path))


def test_harmless_extras_are_noted(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = saved(tmp_path, "gpt2")
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    weights["value_head.weight"] = torch.ones(2, 2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    view = load_model(folder(tmp_path))
    assert torch.equal(logits(view.module), logits(model))
    assert view.notes == ("1 tensors of the file are not part of GPT2LMHeadModel and were left: value_head.weight",)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "module.module.", "_fsdp_wrapped_module.", "net."]
)
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama_gqa"])
def test_prefixes_are_stripped_and_reported(prefix: str, name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, name)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"state_dict": {prefix + k: v for k, v in model.state_dict().items()}}, tmp_path / "step_5.pt")
    view = load_model(checkpoint(tmp_path / "step_5.pt"))
    assert torch.equal(logits(view.module), logits(model))
    assert any(prefix.split(".")[0] in note and "stripped" in note for note in view.notes)


def test_bad_values_say_how_many_and_where(tmp_path: Path) -> None:
    model = tiny_models.gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, :5] = torch.nan
        model.transformer.h[2].mlp.c_fc.bias[0] = -torch.inf
    model.save_pretrained(tmp_path)
    total = f"{sum(p.numel() for p in model.parameters()):,}"
    with pytest.raises(
        CheckpointError, match=rf"6 of {total} weights are NaN or infinite, in transformer.h.1.mlp.c_fc.weight \(5\), "
    ):
        load_model(folder(tmp_path))


def test_large_finite_weights_are_no_error(tmp_path: Path) -> None:
    model = tiny_models.gpt2()
    with torch.no_grad():
        model.transformer.wpe.weight.fill_(3e38)  # its sum overflows, its values do not
    model.save_pretrained(tmp_path)
    assert load_model(folder(tmp_path)).n_layers == 3


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trace_offline.checkpoints.loading as loading

    saved(tmp_path, "gpt2")
    real = loading.from_pretrained

    def slow(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        os.utime(tmp_path / "model.safetensors", ns=(1, 1))
        return result

    monkeypatch.setattr(loading, "from_pretrained", slow)
    with pytest.raises(CheckpointError, match="changed while it was being loaded"):
        load_model(folder(tmp_path))


def test_what_is_not_complete_is_not_opened(tmp_path: Path) -> None:
    find = Checkpoint(str(tmp_path), "hf_folder", CheckpointState.PARTIAL, reason="shard 2 of 3 is missing")
    with pytest.raises(CheckpointError, match="cannot be loaded, it is partial: shard 2 of 3 is missing"):
        load_model(find)
    with pytest.raises(CheckpointError, match="not on this disk yet"):
        load_model(Checkpoint("hf://a/b@step1", "hub", CheckpointState.COMPLETE))
    with pytest.raises(CheckpointError, match=r"expected weights .* found none of them"):
        load_model(Checkpoint(str(tmp_path), "hf_folder", CheckpointState.COMPLETE))


def test_a_raw_file_asks_for_a_factory_or_a_configuration(tmp_path: Path) -> None:
    torch.save(tiny_models.unknown_net().state_dict(), tmp_path / "step_3.pt")
    with pytest.raises(
        CheckpointError, match=r"embed.weight \(80, 24\).*config.json .* or --model-factory package.module:"
    ):
        load_model(checkpoint(tmp_path / "step_3.pt"))


@pytest.mark.parametrize("wrap", [None, "model", "state_dict", "model_state_dict", "module", "anything"])
def test_a_factory_serves_a_raw_state_dict(wrap: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny_models.unknown_net()
    state: Any = {f"module.{k}": v for k, v in net.state_dict().items()}
    torch.save(state if wrap is None else {wrap: state, "step": 3, "rng": [1, 2]}, tmp_path / "step_3.pth")
    view = load_model(
        checkpoint(tmp_path / "step_3.pth"),
        model_factory=factory_file(tmp_path, UNKNOWN, monkeypatch),
        blocks="layers.*",
    )
    assert torch.equal(logits(view.module), logits(net))
    assert view.n_layers == 2
    assert view.notes == ("prefixes stripped from the names of tensors: module.",)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "def build(weights, path):\n    raise ValueError('no luck')",
            r"failed: ValueError: no luck\. It was given \d+ tensors",
        ),
        ("def build(weights, path):\n    return weights", "returned a dict; expected a torch.nn.Module"),
        (
            UNKNOWN.replace("    net.load_state_dict(weights)\n", ""),
            "none of whose .* Does the function call load_state",
        ),
    ],
)
def test_what_a_factory_can_do_wrong(body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(tiny_models.unknown_net().state_dict(), tmp_path / "step_3.pt")
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint(tmp_path / "step_3.pt"), model_factory=factory_file(tmp_path, body, monkeypatch))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", 'expected package.module:function, .*found "nothing"'),
        (
            "no_such_module_here:build",
            'no module named "no_such_module_here". It is looked for in the current directory',
        ),
        ("json:lodas", '"json" has no function "lodas". Did you mean "loads"?'),
        ("math:pi", 'expected package.module:function, .*"math:pi" is a float'),
    ],
)
def test_a_wrong_factory_is_a_usage_error(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(checkpoint(tmp_path / "x.pt"), model_factory=spec)


def test_a_wrong_blocks_pattern_names_what_there_is(tmp_path: Path) -> None:
    saved(tmp_path, "gpt_neox")
    assert load_model(folder(tmp_path), blocks="gpt_neox.layers.*").n_layers == 3
    with pytest.raises(UsageError, match=r'no module of GPTNeoXForCausalLM is named "layers.\*".*: gpt_neox.layers.\*'):
        load_model(folder(tmp_path), blocks="layers.*")
    with pytest.raises(UsageError, match=r'exactly one "\*"'):
        load_model(folder(tmp_path), blocks="gpt_neox.layers")


def test_zero3_placeholders_are_named(tmp_path: Path) -> None:
    model = saved(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").unlink()
    torch.save({k: torch.empty(0) for k in model.state_dict()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"tensors have size 0 .*ZeRO-3.*zero_to_fp32.py"):
        load_model(folder(tmp_path))


def test_no_output_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, "gpt2")
    capfd.readouterr()
    load_model(folder(tmp_path))
    assert capfd.readouterr() == ("", "")


# --- nanoGPT -------------------------------------------------------------------------------------------------------


class NanoBlock(nn.Module):
    """Written from the description of nanoGPT: pre-norm, one joint projection, exact GELU."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, 3 * width, bias=bias), "c_proj": nn.Linear(width, width, bias=bias)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width, bias=bias), "c_proj": nn.Linear(4 * width, width, bias=bias)}
        )

    def forward(self, hidden: Tensor) -> Tensor:
        b, t, d = hidden.shape
        parts = self.attn["c_attn"](self.ln_1(hidden)).split(d, dim=2)
        query, key, value = (part.reshape(b, t, self.heads, d // self.heads).transpose(1, 2) for part in parts)
        scores = query @ key.transpose(-1, -2) / (d // self.heads) ** 0.5
        scores = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        hidden = hidden + self.attn["c_proj"]((scores @ value).transpose(1, 2).reshape(b, t, d))
        return hidden + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(hidden))))


class NanoGPT(nn.Module):
    def __init__(self, *, n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int, bias: bool) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(NanoBlock(n_embd, n_head, bias) for _ in range(n_layer)),
                "ln_f": nn.LayerNorm(n_embd, bias=bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            hidden = block(hidden)
        return self.lm_head(self.transformer["ln_f"](hidden))


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoints_equal_their_own_forward_pass(bias: bool, tmp_path: Path) -> None:
    arguments = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 20, "vocab_size": 80, "bias": bias}
    torch.manual_seed(0)
    net = NanoGPT(**arguments).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    state = {f"_orig_mod.{k}": v for k, v in net.state_dict().items()}
    content = {"model": state, "optimizer": {"state": {}}, "model_args": arguments | {"dropout": 0.0}, "iter_num": 7}
    torch.save(content | {"best_val_loss": torch.tensor(1.0), "config": {"out_dir": "out"}}, tmp_path / "ckpt.pt")
    view = load_model(checkpoint(tmp_path / "ckpt.pt", layout="nanogpt"))
    with torch.no_grad():
        expected = net(IDS)
        found = view.logits(IDS, torch.ones_like(IDS).bool())
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert any("exact GELU" in note for note in view.notes)
    assert any("_orig_mod." in note for note in view.notes)


# --- real files ------------------------------------------------------------------------------------------------------


def stories_loss(module_view: Any, tokenizer: Any) -> float:
    text = shared_data("text", "tinystories_sample.txt").read_text()
    total, count = 0.0, 0
    for story in [part.strip() for part in text.split("<|endoftext|>") if part.strip()]:
        ids = [1, *tokenizer.encode(story, add_special_tokens=False)][:512]
        row = torch.tensor([ids])
        targets = torch.full_like(row, -100)
        targets[0, :-1] = row[0, 1:]

        class Row:
            input_ids, attention_mask = row, torch.ones_like(row).bool()

        Row.targets = targets
        with torch.no_grad():
            part, n = summed_loss(module_view, Row)
        total, count = total + float(part), count + n
    return total / count


def test_the_english_model_has_its_published_loss(stories_model: Path) -> None:
    view = load_model(folder(stories_model))
    assert stories_loss(view, load_tokenizer(stories_model)) == pytest.approx(1.2664, abs=0.0005)


@pytest.mark.parametrize("layout", ["hf_sharded", "hf_bf16", "hf_trainer/checkpoint-12", "accelerate/step_100"])
def test_layouts_that_real_libraries_wrote(layout: str, stories_model: Path) -> None:
    path = shared_data("layouts_generated", *layout.split("/"))
    config = None if (path / "config.json").exists() else stories_model / "config.json"
    files = sorted(path.glob("model*.safetensors"))
    view = load_model(checkpoint(*files, location=path, config=config))
    assert {p.dtype for p in view.module.parameters()} == {torch.float32}
    loss = stories_loss(view, load_tokenizer(stories_model))
    # the Trainer's were trained a little on these very stories
    expected = {"hf_bf16": 1.1802, "accelerate/step_100": 1.2664}.get(layout, 1.1825)
    assert loss == pytest.approx(expected, abs=0.0005)


def test_accelerate_pickle(stories_model: Path) -> None:
    path = shared_data("layouts_generated", "accelerate", "epoch_1", "pytorch_model.bin")
    view = load_model(checkpoint(path, config=stories_model / "config.json"))
    assert any("configuration taken from" in note for note in view.notes)
    assert stories_loss(view, load_tokenizer(stories_model)) == pytest.approx(1.2664, abs=0.0005)


def test_lightning_by_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(shared_data("layouts_generated", "lightning").rglob("epoch=0-step=10.ckpt"))
    lines = ("net = torch.nn.Linear(4, 2)", "net.load_state_dict(weights)", "return net")
    body = "import torch\ndef build(weights, path):\n" + "".join(f"    {line}\n" for line in lines)
    view = load_model(checkpoint(path), model_factory=factory_file(tmp_path, body, monkeypatch))
    content = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(view.module.weight, content["net.weight"])
    assert view.notes == ("prefix net. stripped from the names of tensors (the attribute of the Lightning module)",)
    assert view.blocks is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("html_page_named_model.safetensors", "web page"),
        ("git_lfs_pointer_epoch_0.pt", "Git LFS pointer.*git lfs pull"),
        ("empty_0_tensors.safetensors", "holds no tensors"),
        ("truncated.safetensors", r"the header promises \d+ bytes, the file has 500000"),
        ("nan_weights.safetensors", "59,725 of 59,981 weights are NaN"),
    ],
)
def test_bad_files_are_explained(name: str, message: str, tmp_path: Path, stories_model: Path) -> None:
    bad = shared_data("bad_files", name)
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint(bad))
    if name != "nan_weights.safetensors":
        shutil.copy(bad, tmp_path / "model.safetensors")
        shutil.copy(stories_model / "config.json", tmp_path)
        with pytest.raises(CheckpointError, match=message):
            load_model(folder(tmp_path))


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, trace_offline, trace_offline.core.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Layouts that hold weights in pieces: recognised by name, set aside with the command that converts them."""

from __future__ import annotations

import re
from shlex import quote

from trace_offline.checkpoints.layouts.base import Find, Search, identify, set_aside
from trace_offline.checkpoints.listing import Listing
from trace_offline.core.types import CheckpointState

_DEEPSPEED_FILE = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_(?:model|optim)_states\.pt|mp_rank_\d+_model_states\.pt"
    r"|layer_\d+_expert_\d+_mp_rank_\d+_(?:model|optim)_states\.pt"
)
_NEOX_FILE = re.compile(r"layer_\d+-model_\d+-model_states\.pt")
_MEGATRON_FOLDER = re.compile(r"mp_rank_\d{2}(?:_\d{3}){0,2}")
_DCP_FILE = re.compile(r"__\d+_\d+\.distcp")
_STANDARD_WEIGHTS = re.compile(r"(?:model|pytorch_model)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)(?:\.index\.json)?")


def _has_standard_weights(listing: Listing) -> bool:
    return any(_STANDARD_WEIGHTS.fullmatch(name) for name in listing.files)


def peft(listing: Listing) -> str | None:
    """Adapters without their base model."""
    if "adapter_config.json" not in listing.files and not any(
        name in listing.files for name in ("adapter_model.safetensors", "adapter_model.bin")
    ):
        return None
    if _has_standard_weights(listing):
        return None  # a full model that carries an adapter beside it
    folder = str(listing.path)
    return (
        "It is a PEFT adapter, not a whole model. Merge it into its base model: "
        f'`python -c "from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({folder!r})'
        f'.merge_and_unload().save_pretrained({folder + "-merged"!r})"`.'
    )


def megatron(listing: Listing) -> str | None:
    """Megatron-LM: ``mp_rank_XX/model_optim_rng.pt`` or a distributed checkpoint with its ``metadata.json``."""
    parts = [name for name in listing.folders if _MEGATRON_FOLDER.fullmatch(name)]
    distributed = "metadata.json" in listing.files and any(_DCP_FILE.fullmatch(name) for name in listing.files)
    whole_parts = any((listing.path / name / "model_optim_rng.pt").exists() for name in parts)
    if not whole_parts and not distributed:
        return None
    folder = quote(str(listing.path))
    return (
        "It is a Megatron checkpoint, split over ranks. Convert it with Megatron-Bridge: "
        f"`python examples/conversion/convert_checkpoints.py export --hf-model ORG/NAME --megatron-path {folder} "
        f"--hf-path {folder}-hf` (ORG/NAME: a Hugging Face model of the same architecture)."
    )


def dcp(listing: Listing) -> str | None:
    """torch.distributed.checkpoint: ``.metadata`` and ``__0_0.distcp``."""
    if not any(_DCP_FILE.fullmatch(name) for name in listing.files):
        return None
    folder = quote(str(listing.path))
    if ".metadata" not in listing.files:
        return (
            "It is a torch.distributed checkpoint without its .metadata file, which is written last: the save was "
            "interrupted, or only some ranks' files were copied."
        )
    return (
        "It is a torch.distributed checkpoint (DCP). Convert it: "
        f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} {folder}.pt`."
    )


def fsdp(listing: Listing) -> str | None:
    """FSDP saved by accelerate: a sharded folder, or one file per rank."""
    if _has_standard_weights(listing) or "pytorch_model_fsdp.bin" in listing.files:
        return None
    sharded = [name for name in listing.folders if re.fullmatch(r"pytorch_model_fsdp_\d+", name)]
    if sharded:
        folder = quote(str(listing.path / sharded[0]))
        return f"It is an FSDP checkpoint in shards. Merge them: `accelerate merge-weights {folder} {folder}-merged`."
    if any(re.fullmatch(r"pytorch_model_fsdp_rank\d+(?:_\d+)?\.bin", name) for name in listing.files):
        return (
            "It is an FSDP checkpoint of local shards (one file per rank), which only the same number of processes can "
            "load: resume the training script on it and save with `fsdp_state_dict_type: FULL_STATE_DICT`."
        )
    return None


def deepspeed(listing: Listing) -> str | None:
    """DeepSpeed ZeRO and GPT-NeoX pipeline folders, alone or inside a folder of the HF Trainer."""
    if any(_NEOX_FILE.fullmatch(name) for name in listing.files):
        folder = quote(str(listing.path))
        return (
            "It is a GPT-NeoX pipeline checkpoint, one file per layer. Convert it with gpt-neox: "
            f"`python tools/ckpts/convert_neox_to_hf.py --input_dir {folder} --config_file CONFIG.yml "
            f"--output_dir {folder}-hf`."
        )
    if any(_DEEPSPEED_FILE.fullmatch(name) for name in listing.files):
        return _zero(str(listing.path.parent), listing.path.name)
    if not _has_standard_weights(listing):
        tags = [name for name in listing.folders if re.fullmatch(r"global_step\d+", name)]
        # Inside the HF Trainer's folder the tag belongs to it; on its own, each tag is a checkpoint of its own.
        if tags and ("trainer_state.json" in listing.files or "config.json" in listing.files):
            return _zero(str(listing.path), tags[-1])
    return None


def _zero(parent: str, tag: str) -> str:
    out = quote(f"{parent}/{tag}-merged")
    return (
        "It is a DeepSpeed checkpoint, split over ranks. Gather the weights with the script that DeepSpeed leaves "
        f"beside it: `python {quote(parent + '/zero_to_fp32.py')} {quote(parent)} {out} --tag {quote(tag)}`."
    )


def other_frameworks(listing: Listing) -> str | None:
    """Hugging Face folders whose only weights are TensorFlow's or Flax's; Orbax folders."""
    if _has_standard_weights(listing):
        return None
    for name, flag in (("flax_model.msgpack", "from_flax"), ("tf_model.h5", "from_tf")):
        if name in listing.files and "config.json" in listing.files:
            folder = str(listing.path)
            return (
                f"Its only weights are {name}. Convert them with transformers 4: "
                f'`python -c "from transformers import AutoModelForCausalLM as M; '
                f'M.from_pretrained({folder!r}, {flag}=True).save_pretrained({folder + "-torch"!r})"`.'
            )
    if "_CHECKPOINT_METADATA" in listing.files:
        return "It is an Orbax (JAX) checkpoint: save the parameters as safetensors with `safetensors.flax.save_file`."
    consolidated = [name for name in listing.files if re.fullmatch(r"consolidated\.\d{2}\.pth", name)]
    if consolidated:
        folder = quote(str(listing.path))
        return (
            "It is in Meta's own format (consolidated.NN.pth). Convert it: `python -m transformers.models.llama."
            f"convert_llama_weights_to_hf --input_dir {folder} --output_dir {folder}-hf`."
        )
    return None


_RECOGNISERS = (
    ("peft", peft),
    ("megatron", megatron),
    ("dcp", dcp),
    ("fsdp", fsdp),
    ("deepspeed", deepspeed),
    ("other", other_frameworks),
)


def recognise(listing: Listing, search: Search, has_nested: bool) -> Find | None:
    """A folder in a layout we cannot read, with the reason and the way out."""
    for layout, recogniser in _RECOGNISERS:
        if reason := recogniser(listing):
            identity = identify(listing.path, search, own_name=not has_nested)
            size = sum(entry.size for entry in listing.files.values())
            find = set_aside(listing.path, layout, CheckpointState.UNSUPPORTED, reason, identity, size_bytes=size)
            return Find(find, run=str(listing.path.parent))
    return None


def unsupported_file(name: str, location: str) -> tuple[str, str] | None:
    """``(layout, reason)`` for single files of formats we cannot read."""
    if name.lower().endswith(".gguf"):
        return "gguf", (
            'It is a GGUF file (usually quantised). Convert it: `python -c "from transformers import '
            "AutoModelForCausalLM as M; M.from_pretrained('FOLDER', gguf_file='"
            f"{name}').save_pretrained('OUT')\"`; quantised weights give other numbers than the originals."
        )
    if name.lower().endswith((".zanj", ".npz", ".msgpack", ".h5", ".onnx")):
        return "other", f"{location} is no torch or safetensors file: save a state dict with `torch.save` instead."
    return None

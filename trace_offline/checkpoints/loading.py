"""A checkpoint becomes a network: nothing missing, nothing random, nothing executed, number type explicit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trace_offline.checkpoints import nanogpt_model
from trace_offline.checkpoints.blocks import find_blocks
from trace_offline.checkpoints.factory import build as build_with_factory
from trace_offline.checkpoints.factory import load_factory
from trace_offline.checkpoints.hf_models import from_pretrained, model_class, read_config
from trace_offline.checkpoints.model_cache import ModelCache
from trace_offline.checkpoints.model_view import ModelView
from trace_offline.checkpoints.prefixes import strip_attribute, strip_to_fit, strip_wrappers
from trace_offline.checkpoints.rotary import refuse_changed_rotary
from trace_offline.checkpoints.weights import (
    RawWeights,
    check_file,
    read_weights,
    refuse_changed,
    refuse_not_finite,
    stamp,
)
from trace_offline.core.errors import CheckpointError, UsageError, nearest
from trace_offline.core.hashing import file_digest

if TYPE_CHECKING:
    from trace_offline.core.types import Checkpoint

__all__ = ["DTYPES", "ModelCache", "load_model"]

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,  # how the shared pass multiplies; the tensors are the same
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_LEVELS_UP = 2


def load_model(
    checkpoint: Checkpoint,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    model_factory: str | None = None,
    blocks: str | None = None,
    trust_remote_code: bool = False,
    cache: ModelCache | None = None,
) -> ModelView:
    """Load the weights of ``checkpoint`` into a network in eval mode, every floating tensor as ``dtype``.

    In this order: the user's ``model_factory`` (``package.module:function``); a Hugging Face folder by
    ``from_pretrained``; a state dict (raw, Lightning, accelerate) with the ``config.json`` found for it, beside it or
    above it; nanoGPT's own file. ``blocks``: see ``find_blocks``. ``cache`` keeps the last network so that the next
    checkpoint of the same run only exchanges weights; the view it was lent to must be gone by then.

    Raises CheckpointError when a weight is missing, has another shape, is NaN or infinite, or has no place in the
    network; when the file is damaged or changes meanwhile; when no network can be made of it. UsageError for wrong
    options.
    """
    if dtype not in DTYPES:
        raise UsageError(f'--dtype: expected one of {", ".join(DTYPES)}, found "{dtype}".{nearest(dtype, DTYPES)}')
    factory = None if model_factory is None else load_factory(model_factory)
    if not checkpoint.state.analyzable:
        raise CheckpointError(
            f"{checkpoint.location}: cannot be loaded, it is {checkpoint.state.value}"
            f"{': ' + checkpoint.reason if checkpoint.reason else ''}."
        )
    files = _weight_files(checkpoint)
    before = stamp(files)
    config_path = None if factory is not None else _find_config(checkpoint, files)
    identity = None
    lent = False
    if factory is not None and model_factory is not None:
        weights = _lightning_names(read_weights(files))
        module, notes = build_with_factory(factory, model_factory, weights.tensors, files[0])
        module, notes = module.to(DTYPES[dtype]), weights.notes + notes
    elif config_path is not None:
        kinds = {check_file(path) for path in files}
        safe = kinds == {"safetensors"}
        identity = (file_digest(config_path), dtype, device, trust_remote_code, blocks) if safe and cache else None
        reused = cache.reuse(identity, files) if identity is not None and cache is not None else None
        if reused is not None:
            (module, notes), lent = reused, True
        else:
            module, notes = _with_config(files, config_path, safe, DTYPES[dtype], trust_remote_code)
            refuse_changed_rotary(module, config_path)
    else:
        module, notes = _without_config(read_weights(files), files[0], DTYPES[dtype])
    if not lent:
        module = module.to(device).eval()
        _own(module)
    if hasattr(module, "config") and hasattr(module.config, "use_cache"):
        module.config.use_cache = False
    refuse_not_finite(module.named_parameters(), checkpoint.location)
    refuse_changed(before, files)
    view = ModelView(module, find_blocks(module, blocks), device, dtype, notes)
    if cache is not None and lent:
        cache.lend(view)
    elif cache is not None and identity is not None:
        cache.keep(identity, files, view)
    return view


def _own(module: nn.Module) -> None:
    """Give every tensor on the host memory of its own.

    Loaders hand out views of the mapped file. A training that writes its checkpoint again in place would change the
    weights while they are measured, and one that cuts the file short would end the process (SIGBUS).
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    if checkpoint.weight_files:
        return [Path(name) for name in checkpoint.weight_files]
    if checkpoint.location.startswith("hf://"):
        raise CheckpointError(f"{checkpoint.location}: is not on this disk yet; download the revision first.")
    location = Path(checkpoint.location)
    if location.is_file():
        return [location]
    for pattern in ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin"):
        if found := sorted(location.glob(pattern)):
            return found
    raise CheckpointError(
        f"{location}: expected weights (model.safetensors, its shards, or pytorch_model.bin), found "
        f"{'none of them' if location.is_dir() else 'no such file or folder'}."
    )


def _find_config(checkpoint: Checkpoint, files: Sequence[Path]) -> Path | None:
    """The transformers configuration that discovery found, else one beside the weights or up to two levels above."""
    if checkpoint.config is not None:
        path = Path(checkpoint.config)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise CheckpointError(f"{path}: expected the configuration of {checkpoint.location} there, found nothing.")
        return path
    folder = files[0].parent
    for candidate in (folder, *list(folder.parents)[:_LEVELS_UP]):
        path = candidate / "config.json"
        # other tools write a config.json too; transformers' names its model type
        if path.is_file() and b'"model_type"' in path.read_bytes():
            return path
    return None


def _reads_in_place(files: Sequence[Path], config_path: Path) -> bool:
    """Can ``from_pretrained`` be given the folder itself, and would it read exactly these safetensors files there?"""
    folder, names = files[0].parent, {path.name for path in files}
    if config_path.parent != folder or any(path.parent != folder for path in files):
        return False
    single, index = "model.safetensors", folder / "model.safetensors.index.json"
    read = {single} if (folder / single).exists() else _shards_of(index) if index.is_file() else set()
    return read == names and all(_is_plain(path) for path in files)


def _shards_of(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: expected a map of tensors to files, found something else ({error}).") from None


def _is_plain(path: Path) -> bool:
    """Names without wrapper prefixes, in a file that carries the mark transformers insists on (some tools omit it)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as stream:
        names = dict.fromkeys(stream.keys())
        return (stream.metadata() or {}).get("format") == "pt" and not strip_wrappers(names)[1]


def _with_config(
    files: Sequence[Path], config_path: Path, safe: bool, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    config = read_config(config_path, trust_remote_code)
    notes: tuple[str, ...] = ()
    if config_path.parent != files[0].parent:
        notes = (f"configuration taken from {config_path}",)
    if safe and _reads_in_place(files, config_path):
        module, more = from_pretrained(config, dtype, trust_remote_code, folder=files[0].parent)
        return module, notes + more
    weights = read_weights(files)
    tensors, prefix = strip_to_fit(weights.tensors, _expected_names(config, trust_remote_code))
    if prefix is not None:
        notes += (f"prefix {prefix} stripped from the names of tensors",)
    module, more = from_pretrained(config, dtype, trust_remote_code, tensors=tensors, where=files[0])
    return module, notes + weights.notes + more


def _expected_names(config: Any, trust_remote_code: bool) -> set[str]:
    """Names of the network's tensors, from a skeleton that holds no numbers."""
    with torch.device("meta"):
        return set(model_class(config, trust_remote_code)(config).state_dict())


def _lightning_names(weights: RawWeights) -> RawWeights:
    """Lightning stores ``self.net = network`` as ``net.…``; a factory expects the network's own names."""
    if not weights.lightning:
        return weights
    tensors, part = strip_attribute(weights.tensors)
    if part is None:
        return weights
    note = f"prefix {part} stripped from the names of tensors (the attribute of the Lightning module)"
    return RawWeights(tensors, weights.extras, True, (*weights.notes, note))


def _without_config(weights: RawWeights, path: Path, dtype: torch.dtype) -> tuple[nn.Module, tuple[str, ...]]:
    if nanogpt_model.is_nanogpt(weights.extras, weights.tensors):
        config, tensors = nanogpt_model.as_gpt2(weights.extras, weights.tensors)
        module, notes = from_pretrained(config, dtype, False, tensors=tensors, where=path)
        return module, (*weights.notes, nanogpt_model.NOTE, *notes)
    raise CheckpointError(
        f"{path}: holds {len(weights.tensors)} tensors ({_some(weights.tensors)}), but nothing says what network they "
        "belong to. Expected a config.json of transformers beside it or above it, or --model-factory "
        "package.module:function, where function(weights, path) returns the torch module with the weights loaded."
    )


def _some(tensors: Mapping[str, Tensor]) -> str:
    listed = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:3])
    return listed + (", …" if len(tensors) > 3 else "")

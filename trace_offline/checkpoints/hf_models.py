"""transformers behind one door: configuration, class and weights, with everything it only logs made an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trace_offline.core.errors import CheckpointError

# buffers that older versions of a library wrote among the weights; networks of today compute them
_CONSTANTS = re.compile(
    r"(^|\.)((attn|attention|self_attn|self_attention|self)\.(bias|masked_bias)|inv_freq|original_inv_freq"
    r"|position_ids|token_type_ids|num_batches_tracked)$"
)
# published checkpoints that name the class they were pre-trained with, of which we want the language-model head
_LANGUAGE_HEAD = {"ForPreTraining": "ForMaskedLM"}


def is_constant(name: str) -> bool:
    """Whether a tensor of this name is a constant that networks of today compute themselves."""
    return _CONSTANTS.search(name) is not None


def read_config(path: Path, trust_remote_code: bool) -> Any:
    """The transformers configuration at ``path``. Raises CheckpointError when transformers cannot make sense of it."""
    from transformers import AutoConfig

    where = path.parent if path.name == "config.json" else path
    if not trust_remote_code and (kernel := _foreign_kernel(_content(where / "config.json"))):
        raise CheckpointError(
            f'{path}: asks for "{kernel}", compiled code from the Hugging Face hub. If you trust it, allow that with '
            "--trust-remote-code; else remove that entry (attention is then computed by PyTorch)."
        )
    try:
        return AutoConfig.from_pretrained(str(where), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = _first_line(error)
        hint = (
            " It wants to run code of its own; if you trust it, allow that with --trust-remote-code."
            if "trust_remote_code" in str(error)
            else " Is it a config.json that transformers wrote? For other networks use --model-factory."
        )
        raise CheckpointError(f"{path}: no configuration that transformers understands ({reason}).{hint}") from None


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # transformers says what is wrong with it


def _foreign_kernel(value: Any, key: str = "") -> str | None:
    """The first implementation that is the name of a repository, anywhere in a configuration."""
    if isinstance(value, str):
        return value if key.endswith("_implementation") and "/" in value else None
    if isinstance(value, (dict, list)):
        parts = value.items() if isinstance(value, dict) else ((key, item) for item in value)
        for name, item in parts:
            # Implementations of parts are given as {"part": "name"}.
            inner = key if key.endswith("_implementation") else str(name)
            if found := _foreign_kernel(item, inner):
                return found
    return None


def model_class(config: Any, trust_remote_code: bool) -> Any:
    """The class with the head that ``config.architectures`` names; without a name, the language model of its type."""
    import transformers
    from transformers.models.auto import modeling_auto

    named = (getattr(config, "architectures", None) or [None])[0]
    for ending, language_head in _LANGUAGE_HEAD.items():
        if named and named.endswith(ending) and hasattr(transformers, named.removesuffix(ending) + language_head):
            named = named.removesuffix(ending) + language_head
    if named and hasattr(transformers, named):
        return getattr(transformers, named)
    auto_map = getattr(config, "auto_map", None) or {}
    if auto_map and trust_remote_code:
        kind = next((name for name in auto_map if name.startswith("AutoModelFor")), "AutoModel")
        return getattr(transformers, kind)
    kind = config.model_type
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if named is None and kind in masked and (kind not in causal or not getattr(config, "is_decoder", False)):
        return getattr(transformers, _only(masked[kind]))
    if named is None and kind in causal:
        return getattr(transformers, _only(causal[kind]))
    raise CheckpointError(
        f"the configuration (model_type {kind}) asks for the class {named or 'of a language model'}, which "
        f"transformers {transformers.__version__} does not have. Use --model-factory"
        f"{', or --trust-remote-code if you trust the code beside it' if auto_map else ''}."
    )


def _only(names: Any) -> str:
    return names if isinstance(names, str) else names[0]


def from_pretrained(
    config: Any,
    dtype: torch.dtype,
    trust_remote_code: bool,
    *,
    folder: Path | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    where: Path | None = None,
) -> tuple[nn.Module, tuple[str, ...]]:
    """The network of ``config`` with the weights of ``folder`` (safetensors) or ``tensors``, and notes.

    Raises CheckpointError when a tensor is missing, has another shape, or is one that the network would leave out
    although it changes what is computed (more layers than configured, a bias without a place).
    """
    kind = model_class(config, trust_remote_code)
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported by us, with the names, instead of as a RuntimeError
        "weights_only": True,
    }
    if trust_remote_code:
        options["trust_remote_code"] = True
    if tensors is None:
        options["use_safetensors"] = True
    else:
        options["state_dict"] = dict(tensors)
    origin = where if tensors is not None else folder
    try:
        with _quiet():
            module, report = kind.from_pretrained(None if tensors is not None else str(folder), **options)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{origin}: transformers cannot load it as {kind.__name__} ({type(error).__name__}: {_first_line(error)})."
        ) from None
    _refuse_incomplete(report, kind.__name__, origin)
    return module, _unused(module, report, origin)


def _refuse_incomplete(report: Mapping[str, Any], kind: str, origin: Path | None) -> None:
    missing = sorted(report["missing_keys"])
    mismatched = sorted(report["mismatched_keys"])
    unexpected = sorted(report["unexpected_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        if 0 in tuple(found):
            raise CheckpointError(
                f"{origin}: {len(mismatched)} tensors have another shape than {kind} expects, {name} even size 0: "
                "placeholders of weights that DeepSpeed ZeRO-3 keeps elsewhere. Convert the checkpoint first: "
                "python zero_to_fp32.py . output/"
            )
        raise CheckpointError(
            f"{origin}: {len(mismatched)} tensors do not have the shape that {kind} with this configuration expects; "
            f"the first: {name}, expected {tuple(expected)}, found {tuple(found)}. Does the config.json belong to "
            "these weights?"
        )
    if missing:
        listed = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        instead = f" The file has names such as {', '.join(unexpected[:3])} instead." if unexpected else ""
        cause = (
            "a prefix in the names that is not known, or the weights of another architecture"
            if unexpected
            else "weights saved in parts, or an output head that is tied without the configuration saying so"
        )
        raise CheckpointError(
            f"{origin}: {len(missing)} tensors that {kind} needs are missing: {listed}.{instead} They would be filled "
            f"with random numbers, so nothing is measured. Likely cause: {cause}."
        )
    problems = [*report.get("error_msgs", ())]
    if problems:
        raise CheckpointError(f"{origin}: transformers reports an error while loading it: {problems[0]}")


def _unused(module: nn.Module, report: Mapping[str, Any], origin: Path | None) -> tuple[str, ...]:
    """Tensors of the file without a place: refused where they belong to a part the network has, else noted."""
    unexpected = sorted(name for name in report["unexpected_keys"] if not is_constant(name))
    if not unexpected:
        return ()
    parts = {name for name, _ in module.named_modules()}
    patterns = {re.sub(r"\.\d+(?=\.)", ".*", name) for name in module.state_dict()}
    inside = [
        name
        for name in unexpected
        if (name.rpartition(".")[0] in parts and "." in name) or re.sub(r"\.\d+(?=\.)", ".*", name) in patterns
    ]
    if inside:
        listed = ", ".join(inside[:4]) + (f" and {len(inside) - 4} more" if len(inside) > 4 else "")
        raise CheckpointError(
            f"{origin}: {len(inside)} tensors of the file have no place in {type(module).__name__} as configured: "
            f"{listed}. Leaving them out would change what is computed. Does the config.json belong to these weights "
            "(number of layers, biases)?"
        )
    listed = ", ".join(unexpected[:4]) + (f" and {len(unexpected) - 4} more" if len(unexpected) > 4 else "")
    return (f"{len(unexpected)} tensors of the file are not part of {type(module).__name__} and were left: {listed}",)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and loading report: what the report says is raised or noted here."""
    from transformers.utils import logging

    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(". ")

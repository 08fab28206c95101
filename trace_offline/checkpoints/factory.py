"""The user's own function that builds a network transformers does not know (``--model-factory``)."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trace_offline.core.errors import CheckpointError, UsageError, nearest

Factory = Callable[[dict[str, Tensor], Path], nn.Module]

_SHAPE = "expected package.module:function, where function(weights, path) returns a torch.nn.Module"


def load_factory(spec: str) -> Factory:
    """Import the function that ``spec`` names; modules in the current directory can be named too.

    Raises UsageError when the text, the module or the function is not what was expected.
    """
    module_name, separator, function_name = spec.partition(":")
    if not separator or not module_name or not function_name:
        raise UsageError(f'--model-factory: {_SHAPE}; found "{spec}".')
    with _current_directory():
        importlib.invalidate_caches()
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            missing = error.name or module_name
            hint = (
                f"It is looked for in the current directory ({os.getcwd()}) and among installed packages."
                if module_name == missing or module_name.startswith(f"{missing}.")
                else f'"{module_name}" itself was found, but it imports "{missing}"; install that.'
            )
            raise UsageError(f'--model-factory: no module named "{missing}". {hint}') from error
        except Exception as error:
            raise UsageError(
                f'--model-factory: importing "{module_name}" failed: {type(error).__name__}: {error}'
            ) from error
    found: Any = getattr(module, function_name, None)
    if found is None:
        raise UsageError(
            f'--model-factory: "{module_name}" has no function "{function_name}".'
            f"{nearest(function_name, [name for name in vars(module) if not name.startswith('_')])}"
        )
    if not callable(found):
        raise UsageError(f'--model-factory: {_SHAPE}; "{spec}" is a {type(found).__name__}.')
    factory: Factory = found
    return factory


def build(factory: Factory, spec: str, weights: Mapping[str, Tensor], path: Path) -> tuple[nn.Module, tuple[str, ...]]:
    """Call the factory and look at what it returned; the notes say how much of the network came from the file.

    Raises CheckpointError when the function raises, returns no module, or returns one without a single of the weights.
    """
    given = dict(weights)
    try:
        with _current_directory():
            module = factory(dict(given), path)
    except Exception as error:
        some = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(given.items())[:4])
        raise CheckpointError(
            f"{path}: the model factory {spec} failed: {type(error).__name__}: {error}. It was given {len(given)} "
            f"tensors, the first: {some}."
        ) from error
    if not isinstance(module, nn.Module):
        raise CheckpointError(
            f"{path}: the model factory {spec} returned a {type(module).__name__}; expected a torch.nn.Module with its "
            "weights loaded."
        )
    return module, _provenance(module, given, spec, path)


def _provenance(module: nn.Module, given: Mapping[str, Tensor], spec: str, path: Path) -> tuple[str, ...]:
    """A factory that forgets ``load_state_dict`` would have a random network measured: look for the file's numbers."""
    parameters = list(module.named_parameters())
    foreign = [name for name, parameter in parameters if not _in_file(name, parameter.detach(), given)]
    if parameters and len(foreign) == len(parameters):
        raise CheckpointError(
            f"{path}: the model factory {spec} returned a network none of whose {len(parameters)} parameters equals a "
            "tensor of the file; expected its weights loaded. Does the function call load_state_dict(weights)?"
        )
    if foreign:
        some = ", ".join(foreign[:3])
        return (f"{len(foreign)} of {len(parameters)} parameters equal no tensor of the file: {some}",)
    return ()


def _in_file(name: str, parameter: Tensor, given: Mapping[str, Tensor]) -> bool:
    candidates = [given[name]] if name in given else []
    candidates += [tensor for tensor in given.values() if tensor.numel() == parameter.numel()]
    own = parameter.cpu()
    for tensor in candidates:
        for shape in (tensor, tensor.mT) if tensor.dim() >= 2 else (tensor,):
            if shape.shape == own.shape and bool((shape.to(own.dtype) == own).all()):
                return True
    return False


@contextmanager
def _current_directory() -> Iterator[None]:
    """The current directory in front of the import path, as with ``python -m``."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)

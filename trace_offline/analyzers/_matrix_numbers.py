"""Sparsity and singular values of the tensors of one part of a network: of its weights, or of their gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trace_offline.analyzers._measurements import missing
from trace_offline.core.types import Measurement

if TYPE_CHECKING:
    from torch import Tensor, nn

SPARSITY = ("gini", "hoyer")
SPECTRAL = ("spectral_norm", "stable_rank", "effective_rank", "proportional_effective_rank", "condition_number")


@dataclass(frozen=True)
class Spectrum:
    """Singular values, descending, on the CPU; None with the ``reason``. ``n``: entries of the matrices."""

    values: Tensor | None
    full_rank: bool
    n: int
    reason: str | None = None


def sparsity_numbers(values: Tensor, where: Mapping[str, Any], prefix: str = "") -> Iterator[Measurement]:
    """Gini index and Hoyer's measure of all entries."""
    from trace_offline.estimators.sparsity import gini, hoyer

    n = values.numel()
    for metric, function in zip(SPARSITY, (gini, hoyer), strict=True):
        try:
            yield Measurement(prefix + metric, float(function(values.reshape(-1))), n=n, **where)
        except ValueError as error:
            yield missing(prefix + metric, str(error), n, **where)


def spectra_of(tensors: Mapping[str, Tensor], convolutions: frozenset[str]) -> dict[str, Spectrum]:
    """Singular values of every tensor that holds matrices, by its name; vectors are passed over."""
    import torch

    from trace_offline.estimators.singular_values import numerical_rank, singular_values

    found: dict[str, Spectrum] = {}
    for name, tensor in tensors.items():
        matrices = matrices_of(tensor, name in convolutions)
        if not matrices:
            continue
        try:
            values = [singular_values(matrix) for matrix in matrices]
        except ValueError as error:
            found[name] = Spectrum(None, False, tensor.numel(), str(error))
            continue
        precision = torch.finfo(torch.float64 if tensor.dtype == torch.float64 else torch.float32).eps
        full = all(
            numerical_rank(own, (matrix.shape[0], matrix.shape[1]), precision) == len(own)
            for own, matrix in zip(values, matrices, strict=True)
        )
        found[name] = Spectrum(torch.cat(values).sort(descending=True).values.cpu(), full, tensor.numel())
    return found


def union(spectra: Mapping[str, Spectrum]) -> Spectrum | None:
    """Spectrum of the block-diagonal matrix of all of them; None when there are none."""
    import torch

    if not spectra:
        return None
    n = sum(spectrum.n for spectrum in spectra.values())
    every = [spectrum.values for spectrum in spectra.values() if spectrum.values is not None]
    for name, spectrum in spectra.items():
        if spectrum.values is None:
            return Spectrum(None, False, n, f"{name}: {spectrum.reason}")
    full = all(spectrum.full_rank for spectrum in spectra.values())
    return Spectrum(torch.cat(every).sort(descending=True).values, full, n)


def spectral_numbers(spectrum: Spectrum, where: Mapping[str, Any], prefix: str = "") -> Iterator[Measurement]:
    """The numbers of ``SPECTRAL``; those that do not exist are None with the reason."""
    from trace_offline.estimators.singular_values import effective_rank, stable_rank

    values = spectrum.values
    if values is None or float(values[0]) == 0:
        for metric in SPECTRAL:
            yield missing(prefix + metric, spectrum.reason or "all entries are 0", spectrum.n, **where)
        return
    rank = effective_rank(values)
    numbers = (float(values[0]), stable_rank(values), rank, rank / len(values))
    for metric, value in zip(SPECTRAL[:-1], numbers, strict=True):
        yield Measurement(prefix + metric, value, n=spectrum.n, **where)
    condition = prefix + SPECTRAL[-1]
    if spectrum.full_rank:
        yield Measurement(condition, float(values[0] / values[-1]), n=spectrum.n, **where)
    else:
        reason = "not of full rank within rounding: the smallest singular value cannot be told from 0"
        yield missing(condition, reason, spectrum.n, **where)


def convolution_weights(module: nn.Module) -> frozenset[str]:
    """Names of the kernels of convolutions, which are one matrix [outputs, rest] each."""
    from torch.nn.modules.conv import _ConvNd

    return frozenset(
        f"{name}.weight" if name else "weight" for name, item in module.named_modules() if isinstance(item, _ConvNd)
    )


def matrices_of(tensor: Tensor, convolution: bool) -> list[Tensor]:
    """The matrices a tensor holds: itself, a kernel as [outputs, rest], or one for every leading index (experts)."""
    if tensor.ndim < 2:
        return []
    if convolution or tensor.ndim == 2:
        return [tensor.flatten(1)]
    return list(tensor.flatten(0, -3))

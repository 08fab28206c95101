"""float32 means float32: TensorFloat-32, which keeps 10 bits of 23, is used only where it was asked for by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

TF32 = "tf32"
"""The number type ``--dtype tf32``: weights and hidden states in float32, products of the shared pass in TF32."""


def true_float32() -> None:
    """GPUs multiply float32 as float32, whatever PyTorch's defaults are (convolutions: TF32) or a program had set."""
    _set(False)


@contextmanager
def products(dtype: str) -> Iterator[None]:
    """Inside, float32 is multiplied in TF32 when ``dtype`` says so; afterwards in float32 again."""
    if dtype != TF32:
        yield
        return
    _set(True)
    try:
        yield
    finally:
        _set(False)


def _set(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed

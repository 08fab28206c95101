"""Histories whose events are known, and noise without any."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LOG_SPACED: Floats = np.concatenate([[0.0], 2.0 ** np.arange(13)])
PYTHIA: Floats = np.concatenate([[0.0], 2.0 ** np.arange(10), [1000.0, 3000.0], np.arange(13, 144, 10) * 1000.0])
EVEN: Floats = np.arange(30) * 100.0
GRIDS = {"log spaced": LOG_SPACED, "pythia": PYTHIA, "even": EVEN}


def noise(n: int, rng: np.random.Generator, correlation: float = 0.0) -> Floats:
    """First-order autoregressive noise of unit variance, written out step by step."""
    values = np.zeros(n)
    values[0] = rng.standard_normal()
    for i in range(1, n):
        values[i] = correlation * values[i - 1] + np.sqrt(1 - correlation**2) * rng.standard_normal()
    return values


def sigmoid(steps: Floats, centre: float, width: float) -> Floats:
    """0 → 1 around ``centre``, in ``log(step + 1)``."""
    return np.asarray(1 / (1 + np.exp(-(np.log1p(steps) - np.log1p(centre)) / width)))

"""Random streams: one independent PCG64 stream per name, drawn in blocks, the same whatever the block size."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
BLOCK = 8192


def _generator(seed: int, name: str) -> np.random.Generator:
    # The name enters the seed, so a new stream never shifts the draws of the others.
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=(zlib.crc32(name.encode()),))
    return np.random.Generator(np.random.PCG64(sequence))


def uniform_stream(seed: int, name: str) -> Iterator[float]:
    """Endless uniform numbers in [0, 1) for (seed, name)."""
    rng = _generator(seed, name)
    while True:
        yield from rng.random(BLOCK).tolist()


def index_stream(seed: int, name: str, probabilities: Sequence[float] | np.ndarray) -> Iterator[int]:
    """Endless indices, index i with probability ``probabilities[i]`` (normalised here), by inverse distribution."""
    weights = np.asarray(probabilities, dtype=np.float64)
    edges = np.cumsum(weights)
    edges = edges[:-1] / edges[-1]  # the last edge is 1 by definition and must not be met by rounding
    rng = _generator(seed, name)
    while True:
        yield from np.searchsorted(edges, rng.random(BLOCK), side="right").tolist()


def drawer(seed: int, name: str, probabilities: Sequence[float] | np.ndarray, items: Sequence[T]) -> Iterator[T]:
    """Endless items, item i with probability ``probabilities[i]``."""
    return map(items.__getitem__, index_stream(seed, name, probabilities))


def permutation(seed: int, name: str, n: int) -> np.ndarray:
    """The numbers from 0 to n - 1 in an order fixed by (seed, name); int64 [n]."""
    # Sorted uniform numbers, which stay the same in every release of NumPy; its own permutations need not.
    return np.argsort(_generator(seed, name).random(n), kind="stable")


def zipf_probabilities(n: int, alpha: float) -> np.ndarray:
    """P(rank r) = r^-alpha / sum_k k^-alpha for r = 1…n; float64 [n]."""
    weights = np.arange(1, n + 1, dtype=np.float64) ** -alpha
    return weights / weights.sum()

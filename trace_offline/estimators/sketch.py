"""A short random projection of a long vector that keeps lengths and distances: the count sketch.

Every coordinate is added, with a random sign, to one of k buckets: ``s = S x`` with one ±1 per column of S. For any
two vectors ``E ⟨Sx, Sy⟩ = ⟨x, y⟩`` and ``Var ‖Sx‖² ≤ 2 ‖x‖⁴ / k``, so that a distance estimated from two sketches has a
relative standard error of at most ``1/√(2k)``. The projection is linear: the difference of two sketches is the sketch
of the difference. M. Charikar, K. Chen, M. Farach-Colton, "Finding frequent items in data streams", ICALP 2002;
K. Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009, arXiv:0902.2206 (unbiasedness and
variance); W. Johnson, J. Lindenstrauss, 1984.

Bucket and sign come from a hash of the place of the coordinate, not from a library's random numbers: sketches made by
another version on another machine are comparable.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_CHUNK = 1 << 20
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class CountSketch:
    """Sketch of a vector given piece by piece, in a fixed order.

    ``size``: number of buckets k, a power of 2. Equal ``size`` and ``seed`` give the same projection. Raises ValueError
    when the size is no power of 2.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1 or size & (size - 1):
            raise ValueError(f"expected a power of 2 as size of a sketch, found {size}")
        self._shift = np.uint64(64 - (size.bit_length() - 1))
        self._seed = int(_mix(np.array([(seed * _GOLDEN + 1) & _MASK], dtype=np.uint64))[0])
        self._size = size
        self._place = 0
        self.values: NDArray[np.float64] = np.zeros(size)

    def add(self, piece: Tensor) -> None:
        """Add the next coordinates of the vector: all entries of ``piece``, row by row."""
        for part in piece.detach().reshape(-1).split(_CHUNK):
            numbers = part.double().cpu().numpy()
            place = np.arange(self._place, self._place + len(numbers), dtype=np.uint64)
            hashed = _mix(place * np.uint64(_GOLDEN) + np.uint64(self._seed))
            # The highest bits choose the bucket, the lowest the sign.
            bucket = (hashed >> self._shift).astype(np.int64) if self._size > 1 else np.zeros(len(numbers), np.int64)
            signed = np.where(hashed & np.uint64(1), numbers, -numbers)
            self.values += np.bincount(bucket, weights=signed, minlength=self._size)
            self._place += len(numbers)


def seed_for(seed: int, name: str) -> int:
    """A seed of its own for each of several named vectors, always the same."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def squared_distance_variance(squared: float, size: int) -> float:
    """Upper bound of the variance of a squared distance that was estimated as ``squared`` from sketches of ``size``."""
    return 2.0 * squared * squared / size


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit numbers in which every input bit moves every output bit (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

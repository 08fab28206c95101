"""One part of a network as a vector, kept of every checkpoint and compared: all entries, or a random projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from trace_offline.analyzers._matrix_similarity import Matrix, matrices_at
from trace_offline.analyzers.base import Extract
from trace_offline.estimators.sketch import squared_distance_variance

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.activations.components import Place

EXACT, SKETCH, SIZE, LEFT_OUT = "exact/", "sketch/", "size/", "left_out/"


@dataclass(frozen=True)
class Kept:
    """One part at one checkpoint: all its entries, or a sketch of them. ``size``: entries, squared norm.

    ``left_out [G, k]``: (projections of) the vector without each of G independent parts of the data it comes from.
    """

    values: Tensor
    exact: bool
    size: tuple[int, float]
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    left_out: np.ndarray | None = None


@dataclass(frozen=True)
class Pair:
    """Sums over entries a of one checkpoint and b of the one it is compared with.

    ``variance``: of ``distance``, which is squared. ``left_out [3, G]``: ``square_a``, ``square_b``, ``product``
    without each part of the data.
    """

    n: int = 0
    square_a: float = 0.0
    square_b: float = 0.0
    product: float = 0.0
    distance: float = 0.0
    variance: float = 0.0
    reason: str | None = None
    left_out: np.ndarray | None = None

    def __add__(self, other: Pair) -> Pair:
        both = self.left_out is not None and other.left_out is not None
        return Pair(
            self.n + other.n,
            self.square_a + other.square_a,
            self.square_b + other.square_b,
            self.product + other.product,
            self.distance + other.distance,
            self.variance + other.variance,
            self.reason or other.reason,
            self.left_out + other.left_out if both else None,  # type: ignore[operator]
        )

    @property
    def exact(self) -> bool:
        """Whether nothing was projected."""
        return self.variance == 0 and (self.distance > 0 or self.square_a == self.square_b)

    def cosine(self) -> float | None:
        """Between −1 and 1; None when one of the two is 0."""
        norms = math.sqrt(self.square_a * self.square_b)
        # Cauchy-Schwarz: only rounding and the error of the projection can leave [−1, 1]
        return None if norms == 0 else min(1.0, max(-1.0, self.product / norms))


def part_key(place: Place) -> str:
    """Name of a part in an extract."""
    return f"{'none' if place.layer is None else place.layer}.{place.component}"


def part_place(key: str) -> tuple[int | None, str]:
    """Layer and component of a part by its name in an extract."""
    layer, component = key.split(".", 1)
    return (None if layer == "none" else int(layer)), component


def parts_of(extracts: Sequence[Extract]) -> list[str]:
    """Names of all parts."""
    names = {name for extract in extracts for name in extract.names()}
    return sorted(name.split("/", 1)[1] for name in names if name.startswith((EXACT, SKETCH)))


def load_part(extract: Extract, part: str, *, matrices: bool) -> Kept | None:
    """None where a checkpoint has no such part."""
    names = extract.names()
    left_out = extract.load(LEFT_OUT + part).double().numpy() if LEFT_OUT + part in names else None
    if EXACT + part in names:
        values = extract.load(EXACT + part).double()
        tables = matrices_at(extract, part, values) if matrices else {}
        return Kept(values, True, (len(values), float(values.square().sum())), tables, left_out)
    if SKETCH + part not in names:
        return None
    count, square = extract.load(SIZE + part).tolist()
    tables = matrices_at(extract, part, None) if matrices else {}
    return Kept(extract.load(SKETCH + part).double(), False, (int(count), square), tables, left_out)


def pairs_of(
    extracts: Sequence[Extract], load: Callable[[Extract], Kept | None]
) -> Iterator[tuple[int, str, Kept | None, Kept | None]]:
    """Index of a checkpoint, label, what was kept there and of the one it is compared with; four are held at a time."""
    last = len(extracts) - 1
    final = load(extracts[last])
    first = final if last == 0 else load(extracts[0])
    previous: Kept | None = None
    for index, extract in enumerate(extracts):
        kept = {0: first, last: final}
        current = kept[index] if index in kept else load(extract)
        for label, other in (("previous", previous), ("first", first), ("final", final)):
            if label == "previous" and index == 0:
                continue
            yield index, label, current, other
        previous = current


def compare_vectors(a: Kept | None, b: Kept | None, part: str, what: str) -> Pair:
    """Both come from extracts of one set of parameters: they were kept in the same way, or differ in size.

    ``what``: of what the entries are, in the plural, for reasons.
    """
    layer, component = part_place(part)
    if a is None or b is None:
        there = f"layer {layer} {component}" if layer is not None else component
        return Pair(a.size[0] if a else 0, reason=f"one of the two checkpoints has no {there}")
    n = a.size[0]
    if n != b.size[0] or a.exact != b.exact or len(a.values) != len(b.values):
        return Pair(n, reason=f"{n} parameters here and {b.size[0]} there: the network changed its shape")
    square_a, square_b = a.size[1], b.size[1]
    if not (math.isfinite(square_a) and math.isfinite(square_b)):
        return Pair(n, reason=f"some {what} are not finite numbers")
    distance = float((a.values - b.values).square().sum())
    left_out = _left_out(a, b, equal=distance == 0)
    if a.exact:
        # Equal vectors have the product of one with itself, so that their cosine is exactly 1.
        product = square_a if distance == 0 else float(a.values @ b.values)
        return Pair(n, square_a, square_b, product, distance, left_out=left_out)
    # Norms are exact, so the law of cosines is far better than the product of two sketches where vectors are alike.
    variance = squared_distance_variance(distance, len(a.values))
    product = (square_a + square_b - distance) / 2
    return Pair(n, square_a, square_b, product, distance, variance, left_out=left_out)


def _left_out(a: Kept, b: Kept, *, equal: bool) -> np.ndarray | None:
    one, other = a.left_out, b.left_out
    if one is None or other is None or one.shape != other.shape:
        return None
    squares = np.stack([(one * one).sum(1), (other * other).sum(1), (one * other).sum(1)])
    if equal:
        squares[1:] = squares[0]
    return squares

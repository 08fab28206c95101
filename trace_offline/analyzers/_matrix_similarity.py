"""CKA and PWCCA of the matrices of a part of the network at two checkpoints: of its weights, or of their gradient.

A matrix is a table of samples × features with the longer side as samples: the hidden units of an MLP (rows of the
matrix into it, columns of the one out of it), the tokens of an embedding, the outputs of queries, keys and values
together; the rows as stored of a square matrix. Both checkpoints have the same units in the same order, so that the
tables are paired. With the shorter side as samples there would be no more samples than features, of which PWCCA is 1
and CKA high whatever the entries. Rows are all there are, so that nothing is estimated; of a network too large to keep,
a random part of the rows is kept, the same at every checkpoint, and only debiased CKA is an estimate from those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from trace_offline.analyzers._matrix_numbers import matrices_of
from trace_offline.analyzers._measurements import missing
from trace_offline.analyzers.base import Extract
from trace_offline.core.types import Measurement

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.estimators.table_cka import CentredTable

SIMILARITY = ("cka", "cka_debiased", "pwcca", "pwcca_chance")
_PLACE, _ROWS = "matrix/", "rows/"


@dataclass(frozen=True)
class Matrix:
    """``points [kept, features]`` of one matrix, float64; ``of``: samples it has in all."""

    points: Tensor
    of: int

    @property
    def complete(self) -> bool:
        """Whether all samples were kept."""
        return len(self.points) == self.of

    @cached_property
    def centred(self) -> CentredTable:
        from trace_offline.estimators.table_cka import centred_table

        return centred_table(self.points)


@dataclass(frozen=True)
class _Number:
    """``by_shape``: there is none for matrices of this shape, whatever their entries."""

    value: float | None
    stderr: float | None = None
    reason: str | None = None
    by_shape: bool = False


def keep_matrices(
    part: str, tensors: Mapping[str, Tensor], convolutions: frozenset[str], *, whole: bool, most_rows: int, seed: int
) -> dict[str, Tensor]:
    """Arrays from which ``matrices_at`` restores the matrices of a part.

    ``whole``: all entries of the part are kept elsewhere, one tensor after the other, and only places are noted; else
    ``most_rows`` random samples of each matrix are kept (0: nothing).
    """
    import torch

    from trace_offline.estimators.sketch import seed_for

    found: dict[str, Tensor] = {}
    start = 0
    for name, tensor in tensors.items():
        matrices = matrices_of(tensor, name in convolutions)
        if matrices and (whole or most_rows):
            rows, columns = matrices[0].shape
            found[f"{_PLACE}{part}/{name}"] = torch.tensor([start, len(matrices), rows, columns], dtype=torch.int64)
            if not whole:
                tables = [_samples_first(matrix.detach()) for matrix in matrices]
                kept = torch.arange(len(tables[0]))
                if len(kept) > most_rows:
                    generator = np.random.default_rng(seed_for(seed, f"{part}/{name}"))
                    kept = torch.from_numpy(np.sort(generator.permutation(len(kept))[:most_rows]))
                wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
                chosen = torch.stack([table[kept.to(table.device)] for table in tables])
                found[f"{_ROWS}{part}/{name}"] = chosen.to(wide).cpu().contiguous()
        start += tensor.numel()
    return found


def matrices_at(extract: Extract, part: str, values: Tensor | None) -> dict[str, Matrix]:
    """The matrices of a part by name (``name[i]`` for one of several in a tensor), from what an extract keeps.

    ``values``: all entries of the part, float64, where they were kept.
    """
    prefix = f"{_PLACE}{part}/"
    found: dict[str, Matrix] = {}
    for key in extract.names():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        start, count, rows, columns = extract.load(key).tolist()
        if values is None:
            tables = list(extract.load(f"{_ROWS}{part}/{name}").double())
        else:
            flat = values[start : start + count * rows * columns]
            tables = [_samples_first(matrix) for matrix in flat.reshape(count, rows, columns)]
        for index, table in enumerate(tables):
            found[name if count == 1 else f"{name}[{index}]"] = Matrix(table, max(rows, columns))
    return found


def similarity_numbers(
    first: Mapping[str, Matrix],
    second: Mapping[str, Matrix],
    where: Mapping[str, Any],
    label: str,
    prefix: str,
    seed: int,
    *,
    per_matrix: bool,
) -> Iterator[Measurement]:
    """Every number of ``SIMILARITY`` of a part (the mean of its matrices by entries), and of every matrix.

    A matrix has the label ``label|name``. Weights of PWCCA come from ``first``. Yields nothing for a part of vectors.
    """
    names = sorted({*first, *second})
    if not names:
        return
    each: dict[str, dict[str, _Number]] = {}
    for name in names:
        each[name] = _compare(first.get(name), second.get(name), seed)
        if per_matrix:
            n = _samples(first.get(name) or second.get(name))
            for metric, number in each[name].items():
                yield _measurement(prefix + metric, number, n, where, f"{label}|{name}")
    sizes = {name: float((first.get(name) or second[name]).points.numel()) for name in names}
    for metric in SIMILARITY:
        mine = {name: each[name][metric] for name in names if not each[name][metric].by_shape}
        n = sum(_samples(first.get(name) or second.get(name)) for name in mine or names)
        yield _measurement(prefix + metric, _mean(mine, sizes) or each[names[0]][metric], n, where, label)


def _mean(numbers: Mapping[str, _Number], sizes: Mapping[str, float]) -> _Number | None:
    """None when there are none; without a value when one of them has none."""
    if not numbers:
        return None
    for name, number in numbers.items():
        if number.value is None:
            return _Number(None, reason=f"{name}: {number.reason}")
    total = sum(sizes[name] for name in numbers)
    if all(number.value == 1 for number in numbers.values()):
        value = 1.0  # shares do not sum to exactly 1
    else:
        value = sum(sizes[name] * float(number.value or 0) for name, number in numbers.items()) / total
    errors = [(sizes[name] / total, number.stderr) for name, number in numbers.items()]
    if all(stderr is None for _, stderr in errors):
        return _Number(value)
    return _Number(value, math.hypot(*(share * (stderr or 0.0) for share, stderr in errors)))


def _compare(first: Matrix | None, second: Matrix | None, seed: int) -> dict[str, _Number]:
    from trace_offline.estimators.table_cka import table_cka, table_cka_debiased

    if first is None or second is None:
        reason = "one of the two checkpoints has no such matrix"
        return dict.fromkeys(SIMILARITY, _Number(None, reason=reason))
    if first.of != second.of or first.points.shape != second.points.shape:
        shapes = " and ".join(f"{matrix.of} × {matrix.points.shape[1]}" for matrix in (first, second))
        reason = f"the matrix changed its shape: {shapes} (samples × features)"
        return dict.fromkeys(SIMILARITY, _Number(None, reason=reason))
    if not first.complete:
        kept = f"only {len(first.points)} of {first.of} rows were kept"
        reason = f"{kept}, and this number depends on how many there are; read the debiased CKA, or raise matrix_rows"
        found = dict.fromkeys(SIMILARITY, _Number(None, reason=reason))
        found["cka_debiased"] = _sampled(first, second)
        return found
    found = {}
    for metric, function in (("cka", table_cka), ("cka_debiased", table_cka_debiased)):
        try:
            found[metric] = _Number(function(first.centred, second.centred))
        except ValueError as error:
            found[metric] = _Number(None, reason=str(error), by_shape=len(first.points) < (4 if "_" in metric else 2))
    return found | _canonical(first.points, second.points, seed)


def _canonical(first: Tensor, second: Tensor, seed: int) -> dict[str, _Number]:
    import torch

    from trace_offline.estimators.pwcca import pwcca

    try:
        value = pwcca(first, second).value
        shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(len(second)))
        chance = pwcca(first, second[shuffled]).value
    except ValueError as error:
        number = _Number(None, reason=str(error), by_shape=len(first) - 1 <= 2 * first.shape[1])
        return {"pwcca": number, "pwcca_chance": number}
    return {"pwcca": _Number(value), "pwcca_chance": _Number(chance)}


def _sampled(first: Matrix, second: Matrix) -> _Number:
    """Debiased CKA of a random part of the rows, with its standard error."""
    from trace_offline.estimators.cka import cka, u_centred_kernel

    try:
        found = cka(u_centred_kernel(first.points), u_centred_kernel(second.points))
    except ValueError as error:
        return _Number(None, reason=str(error), by_shape=len(first.points) < 4)
    return _Number(found.value, found.stderr)


def _measurement(metric: str, number: _Number, n: int, where: Mapping[str, Any], label: str) -> Measurement:
    if number.value is None:
        return missing(metric, str(number.reason), n, **where, label=label)
    return Measurement(metric, number.value, stderr=number.stderr, n=n, **where, label=label)


def _samples(matrix: Matrix | None) -> int:
    return 0 if matrix is None else len(matrix.points)


def _samples_first(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T

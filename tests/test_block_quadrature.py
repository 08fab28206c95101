"""Quadratures of several blocks side by side: the same numbers as one by one, from fewer graphs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from curvature_cases import generator, matrix_with, tied_case

from trace_offline.estimators.block_quadrature import block_quadratures
from trace_offline.estimators.hvp import HessianOperator
from trace_offline.estimators.lanczos import extreme_eigenpairs
from trace_offline.estimators.operators import HostVectors, MatrixOperator
from trace_offline.estimators.slq import spectral_quadrature

SPECTRA = [[5.0, 1.0, -2.0, *np.linspace(-1, 1, 20)], [3.0], np.linspace(0.1, 4, 12).tolist(), [2.0] * 7]


@pytest.mark.parametrize("room", [0, 150, 10_000])
@pytest.mark.parametrize("deflate", [False, True])
def test_the_same_as_one_by_one(deflate: bool, room: int) -> None:
    matrices = [matrix_with(spectrum, seed) for seed, spectrum in enumerate(SPECTRA)]
    operators = [MatrixOperator(matrix) for matrix in matrices]
    rounds: list[tuple[int, ...]] = []

    def products(places: Sequence[int], vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        rounds.append(tuple(places))
        return [operators[i].product(v) for i, v in zip(places, vectors, strict=True)]

    exact = [(np.zeros(0), torch.zeros(0, operator.n, dtype=torch.float64)) for operator in operators]
    if deflate:
        pairs = [extreme_eigenpairs(op, largest=1, tolerance=1e-10, generator=generator(9)).pairs for op in operators]
        exact = [(found.values, found.vectors) for found in pairs]
        operators = [MatrixOperator(matrix) for matrix in matrices]
    found = block_quadratures(
        operators, products, probes=3, steps=[6, 6, 5, 6], generators=[generator(s) for s in range(4)], exact=exact,
        room=room,
    )  # fmt: skip
    for place, (quadrature, matrix, steps) in enumerate(zip(found, matrices, [6, 6, 5, 6], strict=True)):
        alone = spectral_quadrature(
            MatrixOperator(matrix), probes=3, steps=steps, generator=generator(place), exact_values=exact[place][0],
            exact_vectors=exact[place][1],
        )  # fmt: skip
        assert quadrature.closed == alone.closed
        assert quadrature.products == alone.products
        for ours, theirs in zip(quadrature.measures(), alone.measures(), strict=True):
            np.testing.assert_array_equal(ours[0], theirs[0])
            np.testing.assert_array_equal(ours[1], theirs[1])
    together = max(len(places) for places in rounds)
    active = 3 if deflate else 4
    assert together == (1 if room == 0 else active if room == 10_000 else together)
    if room == 150:
        assert 1 <= together < active


@pytest.mark.parametrize("keep", [True, False])
def test_blocks_share_the_rebuilt_graphs(keep: bool) -> None:
    case = tied_case()
    built = []

    def loss() -> torch.Tensor:
        built.append(1)
        return case.loss()

    dense = case.dense()
    with HessianOperator([loss], case.parameters, keep_graphs=keep) as hessian:
        blocks = [hessian.block([place]) for place in range(3)]
        built.clear()
        vectors = [torch.randn(block.n, dtype=torch.float64, generator=generator(block.n)) for block in blocks]
        images = hessian.block_products(blocks, vectors)
        assert len(built) == (0 if keep else 1)
        assert [block.products for block in blocks] == [1, 1, 1]
        assert hessian.products == 0
        for block, vector, image in zip(blocks, vectors, images, strict=True):
            start, stop = block.ranges[0]
            torch.testing.assert_close(image, dense[start:stop, start:stop] @ vector)
            torch.testing.assert_close(block.product(vector), image)
        with pytest.raises(ValueError, match="expected a vector"):
            hessian.block_products(blocks, vectors[::-1])


def test_vectors_on_the_host_give_the_same_products() -> None:
    matrix = matrix_with(SPECTRA[0])
    inner = MatrixOperator(matrix)
    outer = HostVectors(inner)
    vector = torch.randn(inner.n, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(outer.product(vector), matrix @ vector)
    assert (outer.n, outer.dtype, outer.device.type, outer.products) == (inner.n, inner.dtype, "cpu", 1)


def test_bad_input_is_explained() -> None:
    with pytest.raises(ValueError, match="expected probes and steps >= 1, found 0 and \\[3\\]"):
        block_quadratures([], lambda *_: [], probes=0, steps=[3], generators=[], exact=[], room=0)

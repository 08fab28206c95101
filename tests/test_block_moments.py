"""Traces and norms of all diagonal blocks from shared products, and products through one block alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from curvature_cases import generator, matrix_with, tied_case
from scipy import stats

from trace_offline.estimators.block_moments import block_moments
from trace_offline.estimators.hvp import HessianOperator, NonFiniteError
from trace_offline.estimators.operators import MatrixOperator
from trace_offline.estimators.slq import Estimate

SPECTRUM = [9.0, 6.0, -4.0, *np.linspace(-1, 2, 37).tolist()]
REPEATS = 200
BLOCKS = [[(0, 5), (20, 30)], [(5, 6)], [(6, 20)], [(30, 40)]]


def dense_block(matrix: torch.Tensor, ranges: list[tuple[int, int]]) -> torch.Tensor:
    index = torch.cat([torch.arange(start, stop) for start, stop in ranges])
    return matrix[index][:, index]


@pytest.mark.parametrize("together", [None, 7])
@pytest.mark.parametrize("deflate", [False, True])
def test_unbiased_with_intervals_that_cover(deflate: bool, together: int | None) -> None:
    matrix = matrix_with(SPECTRUM)
    dense = [dense_block(matrix, ranges) for ranges in BLOCKS]
    bases, left = None, dense
    if deflate:
        vectors = [torch.linalg.eigh(block)[1][:, -2:].T.contiguous() if len(block) > 2 else None for block in dense]
        bases = vectors
        left = [
            block if v is None else (torch.eye(len(block)) - v.T @ v) @ block @ (torch.eye(len(block)) - v.T @ v)
            for block, v in zip(dense, vectors, strict=True)
        ]
    traces = [[] for _ in BLOCKS]
    squares = [[] for _ in BLOCKS]
    for seed in range(REPEATS):
        found = block_moments(
            MatrixOperator(matrix), BLOCKS, probes=24, generator=generator(seed), bases=bases, together=together
        )
        for b in range(len(BLOCKS)):
            traces[b].append(found.trace(b))
            squares[b].append(found.square(b))
    for b, block in enumerate(left):
        exact = float(block.trace())
        z = np.array([(e.value - exact) / e.stderr for e in traces[b]])
        assert 0.90 <= np.mean(np.abs(z) < stats.t.ppf(0.975, 23)) <= 0.98
        assert abs(z.mean()) < 4 / np.sqrt(REPEATS)
        values = np.array([e.value for e in squares[b]])
        norm = float(block.square().sum())
        assert abs(values.mean() - norm) < 4 * values.std() / np.sqrt(REPEATS)
        if together is None:
            errors = np.array([e.stderr for e in squares[b]])
            assert 0.6 < errors.mean() / values.std() < 1.6
            assert np.mean(np.abs(values - norm) < 2.1 * errors) > 0.8


def test_one_number_and_whole_spaces_are_exact() -> None:
    matrix = torch.diag(torch.tensor([3.0, -2.0, 5.0], dtype=torch.float64))
    operator = MatrixOperator(matrix)
    found = block_moments(operator, [[(0, 1)], [(1, 2)], [(2, 3)]], probes=4, generator=generator())
    assert operator.products == 4
    for block, value in enumerate((3.0, -2.0, 5.0)):
        assert found.trace(block).value == pytest.approx(value, rel=1e-12)
        assert found.trace(block).stderr == pytest.approx(0, abs=1e-12)
        assert found.square(block).value == pytest.approx(value**2, rel=1e-12)
    known = block_moments(
        operator, [[(0, 2)], [(2, 3)]], probes=4, generator=generator(),
        bases=[torch.eye(2, dtype=torch.float64), None],
    )  # fmt: skip
    assert known.trace(0, 1.0) == Estimate(1.0, 0.0, 0)
    assert known.square(0) == Estimate(0.0, 0.0, 0)
    assert known.trace(1).value == pytest.approx(5)


def test_no_probe_stands_alone() -> None:
    found = block_moments(MatrixOperator(matrix_with(SPECTRUM)), BLOCKS, probes=9, generator=generator(), together=4)
    for form in found.forms:
        assert np.isfinite(form).sum(1).min() >= 2
        assert np.isfinite(found.traces(0)).all()
    two = block_moments(MatrixOperator(matrix_with(SPECTRUM)), BLOCKS, probes=2, generator=generator())
    assert two.square(0).stderr is None
    with pytest.raises(ValueError, match="at least 2 probes, held together, found 1 and 1"):
        block_moments(MatrixOperator(torch.eye(40)), BLOCKS, probes=1, generator=generator())
    broken = torch.eye(40)
    operator = MatrixOperator(broken)
    broken[1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        block_moments(operator, BLOCKS, probes=2, generator=generator())


@pytest.mark.parametrize("keep", [True, False])
def test_products_through_a_block_rebuild_it(keep: bool) -> None:
    case = tied_case()
    dense = case.dense()
    with HessianOperator([case.loss], case.parameters, keep_graphs=keep) as hessian:
        for places in ([0], [1, 3], [4, 2], list(range(len(case.parameters)))):
            block = hessian.block(places)
            exact = dense_block(dense, list(block.ranges))
            rows = torch.stack([block.product(unit) for unit in torch.eye(block.n, dtype=torch.float64)])
            torch.testing.assert_close(rows, exact, rtol=1e-10, atol=1e-13)
            assert block.products == block.n == len(exact)
            torch.testing.assert_close(block.gradient, block.part(hessian.gradient))
        assert hessian.products == 0
        with pytest.raises(ValueError, match=r"distinct places between 0 and 5, found \[0, 0\]"):
            hessian.block([0, 0])
        with pytest.raises(ValueError, match=r"expected a vector \[3\], found shape \(4,\)"):
            hessian.block([0]).product(torch.ones(4))
    with pytest.raises(RuntimeError, match="was closed"):
        hessian.block([0]).product(torch.ones(28))

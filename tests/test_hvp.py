"""Hessian-vector products against the dense Hessian, finite differences and forward-over-reverse products."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from curvature_cases import generator, tied_case
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from trace_offline.core.errors import TraceOfflineError
from trace_offline.estimators.hvp import HessianOperator, NonFiniteError, graph_bytes, require_gradients
from trace_offline.estimators.operators import MatrixOperator, SymmetricOperator, orthogonalize


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("keep", [True, False])
def test_products_rebuild_the_dense_hessian(dtype: torch.dtype, tolerance: float, keep: bool) -> None:
    case = tied_case(dtype)
    dense = tied_case(torch.float64).dense()
    with HessianOperator([case.loss], case.parameters, keep_graphs=keep) as hessian:
        assert isinstance(hessian, SymmetricOperator)
        rows = torch.stack([hessian.product(unit) for unit in torch.eye(hessian.n, dtype=dtype)])
        assert hessian.products == hessian.n
        assert rows.dtype == dtype
    assert rows.shape == dense.shape
    assert float((rows.double() - dense).abs().max()) <= tolerance * float(dense.abs().max())


def test_tied_weights_count_once_and_unused_ones_are_flat() -> None:
    case = tied_case()
    twice = [*case.parameters, case.parameters[0]]
    with HessianOperator([case.loss], twice) as hessian:
        assert hessian.n == 7 * 4 + 4 * 4 + 4 + 4 + 4 + 3
        offset = 0
        for name, parameter in zip(case.names, case.parameters, strict=True):
            if name == "unused":
                break
            offset += parameter.numel()
        image = hessian.product(torch.randn(hessian.n, dtype=torch.float64, generator=generator()))
        unused = slice(offset, offset + 3)
        assert image[unused].abs().max() == 0
        assert hessian.gradient[unused].abs().max() == 0
        assert image.abs().max() > 0


def test_frozen_parameters_are_left_out_by_not_naming_them() -> None:
    case = tied_case()
    dense = case.dense()
    index = case.names.index("mix.weight")
    start = sum(p.numel() for p in case.parameters[:index])
    block = dense[start : start + 16, start : start + 16]
    with HessianOperator([case.loss], [case.parameters[index]]) as hessian:
        rows = torch.stack([hessian.product(unit) for unit in torch.eye(16, dtype=torch.float64)])
    torch.testing.assert_close(rows, block, rtol=1e-10, atol=1e-13)


def test_the_hessian_is_symmetric_and_linear() -> None:
    case = tied_case()
    with HessianOperator([case.loss], case.parameters) as hessian:
        v, w = torch.randn(2, hessian.n, dtype=torch.float64, generator=generator(3))
        torch.testing.assert_close(v @ hessian.product(w), w @ hessian.product(v), rtol=1e-11, atol=0)
        both = hessian.product(2 * v - 3 * w)
        torch.testing.assert_close(both, 2 * hessian.product(v) - 3 * hessian.product(w), rtol=1e-10, atol=1e-13)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own forward mode warns
def test_product_agrees_with_finite_differences_and_forward_over_reverse() -> None:
    case = tied_case()
    direction = torch.randn(sum(p.numel() for p in case.parameters), dtype=torch.float64, generator=generator(4))
    parts = direction.split([p.numel() for p in case.parameters])
    with HessianOperator([case.loss], case.parameters) as hessian:
        product = hessian.product(direction)
        gradient = hessian.gradient

    def gradient_at(step: float) -> torch.Tensor:
        with torch.no_grad():
            for parameter, part in zip(case.parameters, parts, strict=True):
                parameter.add_(step * part.view_as(parameter))
        found = torch.autograd.grad(case.loss(), case.parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            for parameter, part in zip(case.parameters, parts, strict=True):
                parameter.sub_(step * part.view_as(parameter))
        return torch.cat([g.reshape(-1) for g in found])

    torch.testing.assert_close(gradient, gradient_at(0.0))
    difference = (gradient_at(1e-5) - gradient_at(-1e-5)) / 2e-5
    torch.testing.assert_close(product, difference, rtol=1e-6, atol=1e-8)

    given = {name: p.detach() for name, p in zip(case.names, case.parameters, strict=True)}
    tangent = {name: v.reshape(p.shape) for name, v, p in zip(case.names, parts, case.parameters, strict=True)}
    _, forward = torch.func.jvp(torch.func.grad(case.functional), (given,), (tangent,))
    torch.testing.assert_close(product, torch.cat([forward[name].reshape(-1) for name in case.names]))


@pytest.mark.parametrize("keep", [True, False])
def test_micro_batches_sum_to_the_whole(keep: bool) -> None:
    case = tied_case()
    with HessianOperator([case.loss], case.parameters) as whole:
        vector = torch.randn(whole.n, dtype=torch.float64, generator=generator())
        expected, loss, gradient = whole.product(vector), whole.loss, whole.gradient
    weights = [0.25, 0.5, 0.25]
    parts = [lambda w=w: w * case.loss() for w in weights]
    with HessianOperator(parts, case.parameters, keep_graphs=keep) as pieces:
        torch.testing.assert_close(pieces.product(vector), expected)
        torch.testing.assert_close(pieces.product(vector), expected)
        torch.testing.assert_close(pieces.gradient, gradient)
        assert pieces.loss == pytest.approx(loss, rel=1e-12)
        assert pieces.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-12)


def test_a_linear_parameter_adds_nothing() -> None:
    slope = torch.ones(3, dtype=torch.float64, requires_grad=True)
    bend = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with HessianOperator([lambda: slope.sum() + (bend**2).sum()], [slope, bend]) as hessian:
        torch.testing.assert_close(
            hessian.product(torch.ones(5, dtype=torch.float64)), torch.tensor([0.0, 0, 0, 2, 2], dtype=torch.float64)
        )
    with HessianOperator([lambda: slope.sum()], [slope]) as flat:
        assert flat.product(torch.ones(3)).abs().max() == 0
        assert flat.gradient_norm == pytest.approx(3**0.5)


def test_works_under_no_grad_and_leaves_grad_fields_alone() -> None:
    case = tied_case()
    with torch.no_grad(), HessianOperator([case.loss], case.parameters) as hessian:
        image = hessian.product(torch.ones(hessian.n))
    assert image.abs().max() > 0
    assert not image.requires_grad
    assert all(parameter.grad is None for parameter in case.parameters)


def test_close_frees_the_graph() -> None:
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    seen: list[weakref.ref[torch.Tensor]] = []

    def loss() -> torch.Tensor:
        inner = torch.exp(weight)
        seen.append(weakref.ref(inner))
        return (inner**2).sum()

    hessian = HessianOperator([loss], [weight])
    hessian.product(torch.ones(4, dtype=torch.float64))
    hessian.close()
    hessian.close()
    gc.collect()
    assert seen[0]() is None
    with pytest.raises(RuntimeError, match="was closed"):
        hessian.product(torch.ones(4))


def test_require_gradients_puts_every_flag_back() -> None:
    frozen, free = torch.ones(2), torch.ones(2, requires_grad=True)

    def fail_inside() -> None:
        with require_gradients([frozen, free]):
            assert frozen.requires_grad
            assert free.requires_grad
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert not frozen.requires_grad
    assert free.requires_grad


def test_bad_input_is_explained() -> None:
    weight = torch.ones(2, requires_grad=True)
    other = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="at least one parameter, found none"):
        HessianOperator([weight.sum], [])
    with pytest.raises(ValueError, match="at least one loss, found none"):
        HessianOperator([], [weight])
    with pytest.raises(ValueError, match=r"found torch.float32 on cpu, torch.float64 on cpu"):
        HessianOperator([weight.sum], [weight, other])
    with pytest.raises(ValueError, match="1 of 1 parameters do not require gradients"):
        HessianOperator([weight.sum], [torch.ones(2)])
    with pytest.raises(ValueError, match=r"expected a scalar loss, found shape \(2,\)"):
        HessianOperator([lambda: weight * 2], [weight])
    with pytest.raises(ValueError, match="does not depend on any of the parameters"):
        HessianOperator([lambda: torch.ones(())], [weight])
    with pytest.raises(NonFiniteError, match=r"the loss is not finite \(nan\)"):
        HessianOperator([lambda: weight.sum() * float("nan")], [weight])
    zero = torch.zeros(1, requires_grad=True)
    with pytest.raises(NonFiniteError, match=r"the gradient is not finite \(norm inf, loss 0\)"):
        HessianOperator([lambda: zero.sqrt().sum()], [zero])
    with (
        HessianOperator([lambda: (weight**3).sum()], [weight]) as hessian,
        pytest.raises(ValueError, match=r"expected a vector \[2\], found shape \(3,\)"),
    ):
        hessian.product(torch.ones(3))


def test_a_random_loss_is_noticed_when_graphs_are_rebuilt() -> None:
    weight = torch.ones(4, requires_grad=True)
    draw = generator()
    with (
        HessianOperator(
            [lambda: ((weight * torch.rand(4, generator=draw)) ** 2).sum()], [weight], keep_graphs=False
        ) as hessian,
        pytest.raises(TraceOfflineError, match="curvature needs a loss without randomness"),
    ):
        hessian.product(torch.ones(4))


def _attention_loss(query: torch.Tensor, backend: str) -> torch.Tensor:
    q = query.view(1, 2, 5, 4)
    if backend == "eager":
        scores = (q @ q.transpose(-1, -2) / 2).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
        return (scores.softmax(-1) @ q).pow(3).sum()
    return functional.scaled_dot_product_attention(q, q, q, is_causal=True).pow(3).sum()


def test_math_attention_equals_eager_and_the_fused_kernel_is_named() -> None:
    query = torch.randn(40, dtype=torch.float64, generator=generator(), requires_grad=True)
    vector = torch.randn(40, dtype=torch.float64, generator=generator(1))
    with HessianOperator([lambda: _attention_loss(query, "eager")], [query]) as hessian:
        expected = hessian.product(vector)
    with sdpa_kernel(SDPBackend.MATH), HessianOperator([lambda: _attention_loss(query, "sdpa")], [query]) as hessian:
        torch.testing.assert_close(hessian.product(vector), expected)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(TraceOfflineError, match="differentiated twice"):
        HessianOperator([lambda: _attention_loss(query, "sdpa")], [query]).product(vector)


def test_graph_bytes_grow_with_the_batch_and_do_not_count_the_weights() -> None:
    weight = torch.ones(50, 50, requires_grad=True)

    def loss(rows: int) -> torch.Tensor:
        return torch.tanh(torch.ones(rows, 50) @ weight).pow(2).mean()

    small, middle, large = (graph_bytes(lambda r=r: loss(r), [weight]) for r in (100, 200, 400))
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.05)
    assert 100 * 50 * 4 <= small <= 20 * 100 * 50 * 4


def test_matrix_operator_refuses_what_is_not_symmetric() -> None:
    with pytest.raises(ValueError, match="expected a symmetric matrix"):
        MatrixOperator(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"square floating matrix \[n, n\], found shape \(2, 3\)"):
        MatrixOperator(torch.ones(2, 3))


def test_orthogonalize_leaves_nothing_behind() -> None:
    basis, _ = torch.linalg.qr(torch.randn(60, 8, generator=generator()))
    inside = basis @ torch.ones(8) * 1e4
    outside = torch.randn(60, generator=generator(2))
    left = orthogonalize(inside + outside, basis.T[:5], None, basis.T[5:])
    assert float((basis.T @ left).abs().max()) < 1e-5 * float(left.norm())

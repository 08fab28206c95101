"""Cross-entropy with its own second derivative, beside PyTorch's rules and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trace_offline.estimators import cross_entropy
from trace_offline.estimators.cross_entropy import summed_cross_entropy


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum")


def derivatives(loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, targets: Tensor) -> list[Tensor]:
    """Loss, gradient and two products of the Hessian, of logits that are a function of what is differentiated by."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(*targets.shape, 6, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(6, 11, generator=generator).to(dtype).requires_grad_()
    value = loss(hidden @ weight, targets) / 13
    first = torch.autograd.grad(value, [hidden, weight], create_graph=True)
    found = [value.detach(), *(part.detach() for part in first)]
    for _ in range(2):
        vectors = [torch.randn(part.shape, generator=generator).to(dtype) for part in first]
        found += torch.autograd.grad(first, [hidden, weight], vectors, retain_graph=True)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ignored", ["none", "some", "all but one"])
@pytest.mark.parametrize("cache", [1, 200, 1 << 20])
def test_equals_the_rules_of_torch(
    dtype: torch.dtype, ignored: str, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_CACHE_BYTES", cache)
    targets = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(0))
    if ignored != "none":
        targets[:, -1] = -100
    if ignored == "all but one":
        targets[1:] = targets[0, 1:] = -100
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    for ours, theirs in zip(
        derivatives(summed_cross_entropy, dtype, targets), derivatives(plain, dtype, targets), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_finite_differences() -> None:
    """Also where the loss is not linear in what follows: the weight of its gradient has a derivative, too."""
    logits = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.tensor([[0, 1, -100, 4], [2, -100, -100, 3], [1, 1, 0, 2]])
    for function in (lambda z: summed_cross_entropy(z, targets), lambda z: summed_cross_entropy(z, targets) ** 2):
        assert torch.autograd.gradcheck(function, (logits,))
        assert torch.autograd.gradgradcheck(function, (logits,))


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    loss = summed_cross_entropy(logits, torch.tensor([1, 1]))
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient, logits, torch.ones_like(logits))
    assert float(loss.detach()) == pytest.approx(2e4 + torch.log(torch.tensor(2.0)).item())
    torch.testing.assert_close(gradient.detach(), torch.tensor([[1.0, -1.0, 0.0], [0.0, -0.5, 0.5]]))
    torch.testing.assert_close(second, torch.zeros(2, 3))


def test_nothing_counts() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.full((2,), -100))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == 0
    assert not bool(gradient.any())


def test_third_derivatives_are_refused() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(summed_cross_entropy(logits, torch.tensor([0, 2])), logits, create_graph=True)
    (second,) = torch.autograd.grad((gradient**2).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|third derivative"):
        torch.autograd.grad(second.sum(), logits)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), r"found \[2, 3\] and \[3\]"),
        (torch.zeros(2, 3).bfloat16(), torch.zeros(2, dtype=torch.int64), "float32 or float64, found torch.bfloat16"),
    ],
)
def test_errors(logits: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summed_cross_entropy(logits, targets)

"""Linear CKA, plain and debiased, against its definitions written out, known values and its own sampling spread."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from trace_offline.estimators.cka import centred_kernel, cka, u_centred_kernel, unit_points
from trace_offline.estimators.influence import influence_stderr
from trace_offline.estimators.subsampling import jackknife_stderr


def tables(
    seed: int, n: int = 60, width: int = 8, other: int = 5, mix: float = 0.7
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, width)) * np.geomspace(3, 0.3, width) + 10
    y = mix * x @ rng.standard_normal((width, other)) / 3 + (1 - mix) * rng.standard_normal((n, other)) - 4
    return torch.from_numpy(x), torch.from_numpy(y)


def dense_cka(x: np.ndarray, y: np.ndarray) -> float:
    """The feature-space formula of Kornblith et al. (their equation 5)."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def unbiased_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 5 of Song et al. 2012, with the kernels whose diagonals are removed."""
    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    one = np.ones(n)
    first = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return float((first - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3)))


def value(x: torch.Tensor, y: torch.Tensor, *, debiased: bool = False) -> float:
    kernel = u_centred_kernel if debiased else centred_kernel
    found = cka(kernel(x), kernel(y)).value
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "width"), [(60, 8), (10, 30), (2, 3), (200, 1)])
def test_value_is_the_definition(seed: int, n: int, width: int) -> None:
    x, y = tables(seed, n, width)
    assert value(x, y) == pytest.approx(dense_cka(x.numpy(), y.numpy()), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "width"), [(60, 8), (10, 30), (5, 2)])
def test_debiased_value_is_a_ratio_of_unbiased_estimates(seed: int, n: int, width: int) -> None:
    x, y = tables(seed, n, width)
    a, b = x.numpy(), y.numpy()
    expected = unbiased_hsic(a, b) / np.sqrt(unbiased_hsic(a, a) * unbiased_hsic(b, b))
    assert value(x, y, debiased=True) == pytest.approx(expected, rel=1e-9)


def test_known_values() -> None:
    """Orthogonal indicator features: the first half of the features against all of them gives √(1/2)."""
    x = torch.linalg.qr(torch.from_numpy(np.random.default_rng(0).standard_normal((40, 9))))[0]
    x = torch.linalg.qr(x - x.mean(0))[0][:, :8]
    assert value(x, x[:, :4]) == pytest.approx(np.sqrt(0.5), abs=1e-12)
    assert value(x[:, 4:], x[:, :4]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_rotation_scale_and_shift_change_nothing_and_itself_is_exactly_one(seed: int, debiased: bool) -> None:
    x, y = tables(seed)
    rotation = torch.from_numpy(ortho_group.rvs(8, random_state=seed))
    assert value(1e-6 * x @ rotation + 5, y, debiased=debiased) == pytest.approx(
        value(x, y, debiased=debiased), abs=1e-8
    )
    assert value(x @ rotation, x, debiased=debiased) == pytest.approx(1.0, abs=1e-12)
    assert value(y, x, debiased=debiased) == pytest.approx(value(x, y, debiased=debiased), abs=1e-14)
    kernel = u_centred_kernel if debiased else centred_kernel
    for points in (x, x.float(), x[:4]):
        found = cka(kernel(points), kernel(points.clone()))
        assert (found.value, found.stderr) == (1.0, 0.0)


def test_debiasing_removes_what_chance_adds() -> None:
    rng = np.random.default_rng(0)
    plain, debiased = [], []
    for _ in range(60):
        x, y = (torch.from_numpy(rng.standard_normal((30, 40))) for _ in range(2))
        plain.append(value(x, y))
        debiased.append(value(x, y, debiased=True))
    assert np.mean(plain) > 0.4
    assert abs(np.mean(debiased)) < 4 * np.std(debiased) / np.sqrt(60)


@pytest.mark.parametrize("debiased", [False, True])
def test_stderr_is_that_of_leaving_out_clusters_and_of_new_samples(debiased: bool) -> None:
    kernel = u_centred_kernel if debiased else centred_kernel
    rng = np.random.default_rng(1)
    mix = rng.standard_normal((6, 6))
    values, errors = [], []
    for repeat in range(120):
        shared = np.repeat(rng.standard_normal((120, 6)), 3, axis=0)  # three points of each cluster nearly agree
        x = torch.from_numpy(shared + 0.2 * rng.standard_normal((360, 6)))
        y = torch.from_numpy(np.tanh(x.numpy() @ mix) + 0.5 * np.repeat(rng.standard_normal((120, 6)), 3, axis=0))
        clusters = np.repeat(np.arange(120), 3)
        found = cka(kernel(x), kernel(y), clusters)
        values.append(found.value)
        errors.append(found.stderr)
        if repeat < 3:
            left = np.array([value(x[clusters != g], y[clusters != g], debiased=debiased) for g in range(120)])
            assert found.stderr == pytest.approx(float(jackknife_stderr(left)), rel=0.1)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.2)  # type: ignore[arg-type]


def test_influence_stderr_of_a_mean_is_the_textbook_one() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    influence = (values - values.mean()) / 50
    assert influence_stderr(influence) == pytest.approx(float(values.std() / 50**0.5), rel=1e-12)
    assert influence_stderr(influence, np.zeros(50, np.int64)) is None
    assert influence_stderr(influence[:1]) is None


def test_what_cannot_be_compared_is_an_error() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="all points coincide"):
        centred_kernel(torch.full((5, 2), 0.1))
    with pytest.raises(ValueError, match="at least 2 points"):
        centred_kernel(x[:1])
    with pytest.raises(ValueError, match="at least 4 points, found 3"):
        u_centred_kernel(x[:3])
    with pytest.raises(ValueError, match="found NaN"):
        unit_points(torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="same points, found 6 and 5"):
        cka(centred_kernel(x), centred_kernel(x[:5]))

"""CKA without Gram matrices: the same numbers as with them, and as the definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_cka import dense_cka, tables, unbiased_hsic

from trace_offline.estimators.cka import centred_kernel, cka, u_centred_kernel
from trace_offline.estimators.table_cka import centred_table, table_cka, table_cka_debiased


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "width"), [(200, 8), (60, 3), (10, 30), (5, 2)])
def test_numbers_are_the_definitions(seed: int, n: int, width: int) -> None:
    x, y = tables(seed, n, width)
    a, b = centred_table(x), centred_table(y)
    assert table_cka(a, b) == pytest.approx(dense_cka(x.numpy(), y.numpy()), abs=1e-12)
    assert table_cka(a, b) == pytest.approx(cka(centred_kernel(x), centred_kernel(y)).value, abs=1e-12)
    hsic = [unbiased_hsic(one.numpy(), other.numpy()) for one, other in ((x, y), (x, x), (y, y))]
    assert table_cka_debiased(a, b) == pytest.approx(hsic[0] / np.sqrt(hsic[1] * hsic[2]), abs=1e-9)
    assert table_cka_debiased(a, b) == pytest.approx(cka(u_centred_kernel(x), u_centred_kernel(y)).value, abs=1e-9)


def test_equal_tables_are_exactly_one_and_scale_shift_rotation_change_nothing() -> None:
    x, y = tables(0, 50, 8)
    same = centred_table(x), centred_table(x.clone())
    assert table_cka(*same) == table_cka_debiased(*same) == 1.0
    turned = 3 * x @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] - 7
    for function in (table_cka, table_cka_debiased):
        assert function(centred_table(turned), centred_table(y)) == pytest.approx(
            function(centred_table(x), centred_table(y)), abs=1e-9
        )
        assert function(centred_table(x), centred_table(turned)) == pytest.approx(1, abs=1e-9)


def test_unrelated_tables_are_zero_only_when_debiased() -> None:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(100):
        pair = [centred_table(torch.randn(60, 20, generator=generator)) for _ in range(2)]
        found.append((table_cka(*pair), table_cka_debiased(*pair)))
    plain, debiased = np.array(found).T
    assert abs(debiased.mean()) < 4 * debiased.std(ddof=1) / 10
    assert plain.mean() > 0.2  # about D/(D + n)


def test_what_is_refused() -> None:
    x, _ = tables(0, 50, 8)
    with pytest.raises(ValueError, match="same points, found 50 and 40"):
        table_cka(centred_table(x), centred_table(x[:40]))
    with pytest.raises(ValueError, match="at least 4 points, found 3"):
        table_cka_debiased(centred_table(x[:3]), centred_table(x[3:6]))
    with pytest.raises(ValueError, match="all points coincide"):
        centred_table(torch.ones(9, 3))
    # every row its own direction: nothing off the diagonal but what centring puts there
    corners = centred_table(torch.eye(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="no off-diagonal structure"):
        table_cka_debiased(corners, corners)

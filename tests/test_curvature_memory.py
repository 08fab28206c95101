"""Where curvature keeps its vectors: on the device, else on the host; and what is said when neither has room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from analyzer_fakes import one
from test_analyzer_hessian import analyze as hessian
from test_analyzer_hessian import evaluation, numbers, tied_net
from test_analyzer_hessian_blocks import analyze as hessian_blocks
from test_analyzer_hessian_blocks import layered
from test_ggn import analyze as output_curvature
from test_train_heldout_curvature import analyze as train_heldout
from test_train_heldout_curvature import halves

from trace_offline.activations import memory
from trace_offline.activations.memory import Memory, free_memory, host_memory
from trace_offline.analyzers import _curvature_plan as module
from trace_offline.analyzers._curvature_plan import Placement, place_for, plan_basis
from trace_offline.core.errors import NotApplicable
from trace_offline.estimators.operators import HostVectors

CPU = torch.device("cpu")
HUGE = 1 << 50


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the vectors that went from the host to the device for a product."""
    seen: list[int] = []
    product = HostVectors.product

    def counted(self: HostVectors, vector: torch.Tensor) -> torch.Tensor:
        seen.append(len(vector))
        return product(self, vector)

    monkeypatch.setattr(HostVectors, "product", counted)
    return seen


def device_with(monkeypatch: pytest.MonkeyPatch, device: int | None, host: int | None = HUGE) -> None:
    monkeypatch.setattr(module, "free_memory", lambda _: Memory(device, host))


def test_the_device_is_preferred_then_the_host_then_the_larger_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_memory(CPU) == Memory(None)
    assert place_for(HUGE, CPU, 0) == Placement(host=False)
    for device, host, expected in (
        (1000, 5000, Placement(host=False)),
        (999, 5000, Placement(host=True)),
        (999, None, Placement(host=True)),
        (999, 750, Placement(host=True)),
        (300, 740, Placement(host=True, free=740)),
        (999, 740, Placement(host=False, free=749)),
        (100, 0, Placement(host=False, free=0)),
    ):
        device_with(monkeypatch, device, host)
        assert place_for(750, CPU, 250) == expected, (device, host)


def test_free_memory_of_a_device_counts_what_the_allocator_could_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    monkeypatch.setattr(memory, "host_memory", lambda: 77)
    assert free_memory(torch.device("cuda:1")) == Memory(1200, 77)


def test_host_memory_is_that_of_the_machine_or_the_container(tmp_path: Path) -> None:
    assert host_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 90 kB\nMemFree: 5 kB\nMemAvailable: 20 kB\n")
    assert host_memory(tmp_path) == 20 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("3000\n")
    assert host_memory(tmp_path) == 20 * 1024
    (group / "memory.max").write_text("8000\n")
    assert host_memory(tmp_path) == 5000


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("hessian", lambda: hessian(tied_net(), evaluation(), k=3)),
        ("hessian_blocks", lambda: hessian_blocks(layered(), evaluation(rows=6))),
        ("gauss_newton", lambda: output_curvature("ggn", tied_net(), evaluation())),
        ("empirical_fisher", lambda: output_curvature("fisher", tied_net(), evaluation())),
        ("train_heldout_curvature", lambda: train_heldout(tied_net(), halves(8))),
    ],
)
def test_a_short_device_changes_the_place_and_no_number(
    name: str, measure: Any, monkeypatch: pytest.MonkeyPatch, visits: list[int]
) -> None:
    def found() -> tuple[list[Any], float]:
        results = list(measure())
        (host,) = [item for item in results if getattr(item, "metric", "") == "basis_on_host"]
        return [item for item in results if item is not host], host.value

    expected = found()
    assert expected[1] == 0
    device_with(monkeypatch, HUGE)
    assert found() == expected
    assert not visits
    device_with(monkeypatch, 10)
    assert found() == (expected[0], 1), name
    assert visits


def test_when_neither_has_room_the_plan_shrinks_and_then_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = 59 * 4
    # the graphs of this small case are larger than its vectors; the host decides
    device_with(monkeypatch, 0, 18 * vector)
    found = numbers(hessian(tied_net(), evaluation(), k=5))
    assert one(found, "basis_vectors").value == 9
    assert one(found, "basis_on_host").value == 1
    assert one(found, "eigenvalue", label="3").reason == ("free memory has room for the vectors of 2 eigenvalues only")
    device_with(monkeypatch, 0, 3 * vector)
    with pytest.raises(
        NotApplicable,
        match=r"at least 16 vectors, .* only .* GiB are free: lower max_graph_gb, or take a device with more memory; "
        "or take hessian_blocks",
    ):
        hessian(tied_net(), evaluation())
    blocks = [item for item in hessian_blocks(layered(), evaluation()) if getattr(item, "metric", "") == "eigenvalue"]
    assert any(item.value is None and "are free" in item.reason for item in blocks)
    assert any(item.value is not None for item in blocks)


def test_the_users_bound_is_named_where_it_is_the_smaller() -> None:
    plan = plan_basis(1000, 4, k=5, smallest=1, max_steps=50, slq_steps=5, max_basis_gb=20 * 4000 / 2**30, free=HUGE)
    assert (plan.k, plan.limit, plan.fewer) == (
        3, "max_basis_gb", "max_basis_gb has room for the vectors of 3 eigenvalues only; raise it",
    )  # fmt: skip
    assert plan.bytes == plan.vectors * 4000 <= 20 * 4000
    with pytest.raises(NotApplicable, match=r"max_basis_gb is 1e-06: raise max_basis_gb$"):
        plan_basis(1000, 4, k=5, smallest=1, max_steps=50, slq_steps=5, max_basis_gb=1e-6, free=HUGE)

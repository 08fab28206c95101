"""Overlap of subspaces in closed form, and the series analyzer on checkpoints held in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SmallSeries
from curvature_cases import generator
from safetensors.torch import save_file
from scipy.linalg import subspace_angles
from test_analyzer_hessian import Broken, dense_reference, evaluation, tied_net
from torch import nn

import trace_offline
from trace_offline import Store
from trace_offline.activations.model import ModelView
from trace_offline.analyzers.base import Context, Extract, SeriesContext
from trace_offline.analyzers.curvature_overlap import CurvatureOverlapAnalyzer
from trace_offline.core.errors import NotApplicable
from trace_offline.core.params import parse_params
from trace_offline.core.types import Array, Measurement
from trace_offline.estimators.subspace_overlap import subspace_overlap


def basis(k: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    rows, _ = torch.linalg.qr(torch.randn(n, k, generator=generator(seed), dtype=torch.float64))
    return rows.T.contiguous().to(dtype)


def test_planted_angles_come_back() -> None:
    angles = np.array([0.0, 1e-5, 0.3, 1.0, np.pi / 2])
    frame = basis(10, 40, 0)
    first = frame[:5]
    second = torch.as_tensor(np.cos(angles))[:, None] * frame[:5] + torch.as_tensor(np.sin(angles))[:, None] * frame[5:]
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator(1)))
    found = subspace_overlap(first, turn @ second)
    np.testing.assert_allclose(found.angles, angles, atol=1e-9)
    assert found.value == pytest.approx(np.mean(np.cos(angles) ** 2))
    assert found.chance == 5 / 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_scipy_and_symmetric(dtype: torch.dtype) -> None:
    for seed in range(4):
        a, b = basis(4, 9, seed, dtype), basis(4, 9, seed + 50, dtype)
        found = subspace_overlap(a, b)
        np.testing.assert_allclose(found.angles[::-1], subspace_angles(a.double().T, b.double().T), atol=2e-6)
        assert found.value == pytest.approx(subspace_overlap(b, a).value, rel=1e-6)


def test_itself_is_exactly_one_and_chance_is_the_mean_of_random_subspaces() -> None:
    for seed in range(5):
        same = basis(3, 50, seed, torch.float32)
        assert subspace_overlap(same, same.clone()).value == 1.0
        assert not subspace_overlap(same, same).angles.any()
    values = [subspace_overlap(basis(3, 30, s), basis(3, 30, s + 1000)).value for s in range(400)]
    assert abs(np.mean(values) - 0.1) < 4 * np.std(values) / 20
    frame = basis(6, 20, 1)
    assert subspace_overlap(frame[:3], frame[3:]).value == pytest.approx(0, abs=1e-20)
    assert subspace_overlap(torch.ones(1, 1), -torch.ones(1, 1)).value == 1.0


def test_bad_input_is_explained() -> None:
    good = basis(2, 5, 0)
    with pytest.raises(ValueError, match=r"two bases of one shape .* found \(2, 5\) and \(1, 5\)"):
        subspace_overlap(good, good[:1])
    for bad in (good * 1.1, good * float("nan")):
        with pytest.raises(ValueError, match="expected orthonormal rows"):
            subspace_overlap(good, bad)


def extract(module: nn.Module, data: Any, **params: Any) -> dict[str, torch.Tensor]:
    chosen = parse_params(CurvatureOverlapAnalyzer.Params, "curvature_overlap", params)
    context = Context(ModelView(module, None, "cpu", "float32"), data, chosen, 0)
    assert CurvatureOverlapAnalyzer().collectors(context) == {}
    return dict(CurvatureOverlapAnalyzer().extract(context))


def compare(folder: Path, extracts: list[dict[str, torch.Tensor]]) -> list[dict[tuple[str, str | None], Any]]:
    paths = []
    for position, arrays in enumerate(extracts):
        save_file(arrays, folder / f"{position}.safetensors")
        paths.append(Extract(position, 10 * position, str(folder / f"{position}.safetensors")))
    found: list[dict[tuple[str, str | None], Any]] = [{} for _ in extracts]
    context = SeriesContext(tuple(paths), None, CurvatureOverlapAnalyzer.Params(), 0)  # type: ignore[arg-type]
    for position, item in CurvatureOverlapAnalyzer().compare(context):
        if isinstance(item, Measurement):
            assert item.metric in {spec.name for spec in CurvatureOverlapAnalyzer.metrics}
            assert (item.value is None) == (item.reason is not None)
            found[position][item.metric, item.label] = item
        else:
            assert isinstance(item, Array)
            found[position][item.name, item.label] = item
    return found


def moved(scale: float, seed: int = 5) -> nn.Module:
    net = tied_net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator(seed)))
    return net


def test_a_series_against_dense_hessians(tmp_path: Path) -> None:
    data = evaluation()
    nets = [tied_net, tied_net, lambda: moved(0.05), lambda: moved(0.8)]
    options = {"k": 3, "max_sequences": 100, "tolerance": 1e-6, "dtype": "float64"}
    found = compare(tmp_path, [extract(make(), data, **options) for make in nets])
    spaces = [np.linalg.eigh(dense_reference(make(), data)[0])[1][:, ::-1][:, :3] for make in nets]

    def exact(a: int, b: int) -> float:
        return float(np.linalg.norm(spaces[a].T @ spaces[b]) ** 2 / 3)

    assert found[0]["overlap_previous", None].reason == "the first checkpoint of a series has no previous one"
    for position in range(4):
        assert found[position]["overlap_first", None].value == pytest.approx(exact(position, 0), rel=1e-4)
        assert found[position]["overlap_final", None].value == pytest.approx(exact(position, 3), rel=1e-4)
        if position:
            assert found[position]["overlap_previous", None].value == pytest.approx(
                exact(position, position - 1), rel=1e-4
            )
        assert found[position]["overlap_chance", None].value == 3 / 59
        assert found[position]["subspace_error", None].value < 0.05
    # The same weights twice: exactly neutral, not nearly.
    assert found[1]["overlap_previous", None].value == 1.0
    assert found[0]["overlap_first", None].value == found[3]["overlap_final", None].value == 1.0
    assert found[1]["principal_angles", "previous"].values == (0.0, 0.0, 0.0)
    assert found[3]["overlap_first", None].value < found[2]["overlap_first", None].value < 1


@pytest.mark.slow
def test_equal_weights_overlap_exactly_from_folder_to_history(small_series: SmallSeries, tmp_path: Path) -> None:
    summary = trace_offline.analyze(
        small_series.run, small_series.evaluation, tmp_path / "s.duckdb", analyzers=("curvature_overlap",), jobs=1,
        params={"curvature_overlap": {"k": 1, "max_sequences": 1, "tolerance": 0.1}},
    )  # fmt: skip
    assert summary.exit_code == 0, summary.problems
    rows = Store.open(tmp_path / "s.duckdb").sql("select step, metric, value from history where metric like 'overlap%'")
    found = {(row["step"], row["metric"]): row["value"] for row in rows.to_pylist()}
    # steps 2 and 4 hold equal weights
    for place in ((0, "overlap_first"), (2, "overlap_final"), (4, "overlap_final"), (4, "overlap_previous")):
        assert found[place] == 1.0, place
    assert 0 < found[2, "overlap_previous"] < 1


def test_one_checkpoint_is_its_own_start_and_end(tmp_path: Path) -> None:
    found = compare(tmp_path, [extract(tied_net(), evaluation(), k=2)])
    assert found[0]["overlap_first", None].value == found[0]["overlap_final", None].value == 1.0


def test_what_cannot_be_compared_has_a_reason(tmp_path: Path) -> None:
    data = evaluation()
    good, short = extract(tied_net(), data, k=3), extract(tied_net(), data, k=4, max_steps=5)
    found = compare(tmp_path, [good, short, extract(Broken("bias"), data, k=3)])
    assert "at step 10 did not converge; raise max_steps" in found[1]["overlap_previous", None].reason
    assert "not converged" in found[1]["eigenvalue", "4"].reason
    assert "raise max_steps" in found[1]["subspace_error", None].reason
    assert found[2]["overlap_first", None].reason.startswith("the checkpoints have 7 and 59 parameters")
    assert found[2]["relative_gap", None].value == pytest.approx(0, abs=1e-5)
    whole = compare(tmp_path, [extract(Broken("bias"), data, k=9)])[0]
    assert whole["vectors", None].value == 7
    assert whole["subspace_error", None].value == 0


def test_fewer_vectors_when_the_disk_is_short() -> None:
    data, vector = evaluation(), 59 * 4 / 2**30
    kept = extract(tied_net(), data, k=5, max_extract_gb=2.5 * vector)
    assert kept["vectors"].shape == (2, 59)
    assert kept["vectors"].dtype == torch.float32
    assert len(kept["values"]) == 3
    with pytest.raises(NotApplicable, match=r"one vector of 59 parameters takes .* raise max_extract_gb"):
        extract(tied_net(), data, max_extract_gb=0.5 * vector)
    with pytest.raises(NotApplicable, match="the loss is not finite"):
        extract(Broken("nan"), data)

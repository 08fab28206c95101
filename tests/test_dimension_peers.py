"""The same clouds through scikit-dimension and DADApy."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from analyzer_fakes import FakeEvaluation, one, run
from dimension_clouds import manifold
from scipy.optimize import brentq

from trace_offline.analyzers.intrinsic_dimension import IntrinsicDimensionAnalyzer
from trace_offline.estimators.gride import gride, gride_scales
from trace_offline.estimators.local_pca import local_pca_dimensions
from trace_offline.estimators.mle_dimension import mle_dimension
from trace_offline.estimators.neighbors import nearest_neighbors
from trace_offline.estimators.pca_dimension import covariance_spectrum, participation_ratio
from trace_offline.estimators.twonn import neighbor_log_ratios, twonn_fit, twonn_maximum_likelihood

# DADApy's compiled modules (clustering, densities) and jax play no part in its dimensions, and the former do not build
# against current NumPy; stand-ins let the rest be imported.
_UNUSED = (
    "jax",
    "dadapy.diff_imbalance",
    *(
        f"dadapy._cython.cython_{name}"
        for name in (
            "clustering",
            "clustering_v2",
            "density",
            "differentiable_imbalance",
            "distances",
            "grads",
            "maximum_likelihood_opt",
            "maximum_likelihood_opt_full",
            "overlap",
        )
    ),
)

pytestmark = pytest.mark.slow
CLOUDS = [("gauss", 3, 10), ("cube", 8, 40), ("curved", 12, 64)]


def dadapy(points: np.ndarray, **more: Any) -> Any:
    if importlib.util.find_spec("dadapy") is None:
        pytest.skip("needs DADApy: pip install --no-deps dadapy")
    absent = [name for name in _UNUSED if name not in sys.modules]
    sys.modules.update({name: MagicMock() for name in absent})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module("dadapy.id_estimation")
    finally:
        # Only the stand-ins leave: what else was loaded on the way cannot be loaded twice.
        for name in absent:
            del sys.modules[name]
    return module.IdEstimation(coordinates=points, verbose=False, n_jobs=1, **more)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "dimension", "width"), CLOUDS)
def test_dadapy(kind: str, dimension: int, width: int) -> None:
    points = manifold(kind, 900, dimension, 1, width=width).astype(np.float64)
    peer = dadapy(points, maxk=70)
    squared = nearest_neighbors(torch.from_numpy(points), 64).squared_distances.numpy()
    ratios = neighbor_log_ratios(squared)
    assert twonn_fit(ratios) == pytest.approx(peer.compute_id_2NN(algorithm="base")[0], rel=1e-6)
    assert twonn_maximum_likelihood(ratios) == pytest.approx(peer.compute_id_2NN(algorithm="ml")[0], rel=1e-6)
    theirs, errors, _ = peer.return_id_scaling_gride(range_max=64, eps=1e-10)
    assert len(errors) == len(theirs) == 6
    for value, (first, second) in zip(theirs, gride_scales(64), strict=True):
        # They put n − 1 for n in the derivative, as the unbiased TwoNN does; the same derivative has the same root.
        v = 0.5 * np.log(squared[:, second - 1] / squared[:, first - 1])

        def derivative(d: float, v: np.ndarray = v, between: int = second - first - 1, last: int = second - 1) -> float:
            return float((len(v) - 1) / d + between * (v / -np.expm1(-d * v)).sum() - last * v.sum())

        assert brentq(derivative, 0.5, 100) == pytest.approx(value, rel=1e-5)
        assert gride(squared, first, second) == pytest.approx(value, rel=1.2 / len(points))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "dimension", "width"), CLOUDS)
def test_scikit_dimension(kind: str, dimension: int, width: int) -> None:
    points = manifold(kind, 500, dimension, 2, width=width).astype(np.float64)
    table = torch.from_numpy(points)
    found = nearest_neighbors(table, 40)
    squared = found.squared_distances.numpy()
    skdim = pytest.importorskip("skdim", reason="needs scikit-dimension")
    assert twonn_fit(neighbor_log_ratios(squared)) == pytest.approx(
        skdim.id.TwoNN(discard_fraction=0.1).fit(points).dimension_, rel=1e-9
    )
    mle = skdim.id.MLE().fit(points, n_neighbors=20, comb="mle").dimension_
    assert mle_dimension(squared[:, :20]) == pytest.approx(mle, rel=1e-9)
    local = skdim.id.lPCA(ver="FO", alphaFO=0.05).fit_pw(points, n_neighbors=40, n_jobs=1).dimension_pw_
    np.testing.assert_array_equal(local_pca_dimensions(table, found.indices), local)
    ratio = skdim.id.lPCA(ver="participation_ratio").fit(points).dimension_
    assert participation_ratio(covariance_spectrum(points)) == pytest.approx(ratio, rel=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_flattened_rows_are_what_trace_hands_to_scikit_dimension() -> None:
    """TRACE calls ``skdim.id.TwoNN()`` on the flattened rows, padding included."""
    skdim = pytest.importorskip("skdim", reason="needs scikit-dimension")
    ids = torch.randint(2, 60, (128, 12), generator=torch.Generator().manual_seed(0))
    fake = FakeEvaluation(ids)
    fake.special_token_ids = ()  # type: ignore[attr-defined]
    hidden = torch.randn(128, 12, 4, generator=torch.Generator().manual_seed(1)) @ torch.randn(4, 24)
    results, _ = run(IntrinsicDimensionAnalyzer(), fake, hidden=(hidden,), trace_flattened=True)
    theirs = skdim.id.TwoNN().fit(hidden.reshape(128, -1).double().numpy()).dimension_
    assert one(results, "trace_flattened_twonn", layer=0).value == pytest.approx(theirs, rel=1e-6)

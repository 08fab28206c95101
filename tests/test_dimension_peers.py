"""The same clouds through scikit-dimension and DADApy."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from dimension_clouds import manifold

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
    with patch.dict(sys.modules, {name: MagicMock() for name in _UNUSED}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("dadapy.id_estimation")
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
    theirs, errors, _ = peer.return_id_scaling_gride(range_max=64, eps=1e-9)
    ours = [gride(squared, first, second) for first, second in gride_scales(64)]
    np.testing.assert_allclose(ours, theirs, atol=0.0051)  # they round to two digits
    assert len(errors) == len(ours) == 6


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

"""Intrinsic dimension beside scikit-dimension, DADApy and scikit-learn, over the matrix product it needs.

    python benchmarks/bench_dimension.py            n = 10,000 and 50,000
    python benchmarks/bench_dimension.py small      n = 10,000 only
    python benchmarks/bench_dimension.py large      n = 50,000 only

A smooth 20-dimensional manifold in d = 512, float32. The floor is the product X Xᵀ, in blocks of rows whose results are
dropped: every exact search by a matrix product takes it once. *TwoNN*: neighbours exact to float64, ratios, line fit.
*Set*: TwoNN, maximum likelihood over 20 neighbours, GRIDE to the 64th, and the spectrum of the covariance, from one
search; the peers' set is scikit-dimension's TwoNN and MLE, DADApy's GRIDE and scikit-learn's PCA, each of which
searches for itself. At 50,000 points, 25 times the product, one peer is measured once.

DADApy's compiled modules (clustering, densities) and jax play no part in its dimensions, and the former do not build
against current NumPy; stand-ins let the rest be imported. One thread and the processor's seconds for everything.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from bench_dimension_bias import manifold
from common import alternating, load, result, save, versions
from threadpoolctl import threadpool_info, threadpool_limits

from trace_offline.estimators.gride import gride, gride_scales
from trace_offline.estimators.mle_dimension import mle_dimension
from trace_offline.estimators.neighbors import nearest_neighbors
from trace_offline.estimators.pca_dimension import components_for_variance, covariance_spectrum, participation_ratio
from trace_offline.estimators.twonn import neighbor_log_ratios, twonn_fit

THREADS = 1
WIDTH, TRUE, K, FARTHEST = 512, 20, 20, 64
GOAL_TWONN, GOAL_SET = 1.4, 4.0
BLOCK = 1024
LIBRARIES = ("torch", "numpy", "scikit-learn", "scikit-dimension", "dadapy")
_COMPILED = (
    "clustering", "clustering_v2", "density", "differentiable_imbalance", "distances", "grads",
    "maximum_likelihood_opt", "maximum_likelihood_opt_full", "overlap",
)  # fmt: skip


def dadapy(points: np.ndarray, **more: Any) -> Any:
    """DADApy's estimator of dimensions."""
    names = ("jax", "dadapy.diff_imbalance", *(f"dadapy._cython.cython_{name}" for name in _COMPILED))
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update({name: MagicMock() for name in absent})
    try:
        module = importlib.import_module("dadapy.id_estimation")
    finally:
        for name in absent:
            del sys.modules[name]
    return module.IdEstimation(coordinates=points, verbose=False, n_jobs=THREADS, **more)


def floor(points: torch.Tensor) -> None:
    """The product, block by block into the same memory."""
    table = points.new_empty(BLOCK, len(points))
    for block in points.split(BLOCK):
        torch.mm(block, points.T, out=table[: len(block)])


def twonn(points: torch.Tensor) -> float:
    return twonn_fit(neighbor_log_ratios(nearest_neighbors(points, 2).squared_distances.numpy()))


def our_set(points: torch.Tensor) -> dict[str, float]:
    """All four from one search."""
    squared = nearest_neighbors(points, FARTHEST).squared_distances.numpy()
    spectrum = covariance_spectrum(points.numpy())
    found = {"twonn": twonn_fit(neighbor_log_ratios(squared)), "mle": mle_dimension(squared[:, :K])}
    found |= {f"gride {second}": gride(squared, first, second) for first, second in gride_scales(FARTHEST)}
    return found | {
        "participation_ratio": participation_ratio(spectrum),
        "components_90": components_for_variance(spectrum, 0.9),
    }


def skdim_twonn(points: np.ndarray) -> float:
    import skdim

    return float(skdim.id.TwoNN(discard_fraction=0.1).fit(points).dimension_)


def dadapy_twonn(points: np.ndarray) -> float:
    return float(dadapy(points, maxk=3).compute_id_2NN(algorithm="base")[0])


def peer_set(points: np.ndarray) -> dict[str, float]:
    """The peers' four, each with a search of its own."""
    import skdim
    from sklearn.decomposition import PCA

    found = {"twonn": skdim_twonn(points)}
    found["mle"] = float(skdim.id.MLE().fit(points, n_neighbors=K, comb="mle").dimension_)
    scales = dadapy(points, maxk=FARTHEST).return_id_scaling_gride(range_max=FARTHEST)[0]
    found |= {f"gride {second}": float(d) for (_, second), d in zip(gride_scales(FARTHEST), scales, strict=True)}
    ratios = PCA().fit(points).explained_variance_ratio_
    found["participation_ratio"] = float(ratios.sum() ** 2 / (ratios @ ratios))
    found["components_90"] = float(np.searchsorted(np.cumsum(ratios), 0.9) + 1)
    return found


def measure(
    n: int, rounds: int, peers: dict[str, Callable[[np.ndarray], Any]]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds and the last value of each body."""
    points = manifold("curved", n, TRUE, 0, width=WIDTH)
    table = torch.from_numpy(points)
    values: dict[str, Any] = {}
    bodies: dict[str, Callable[[], Any]] = {
        "floor": lambda: floor(table),
        "twonn": lambda: twonn(table),
        "set": lambda: our_set(table),
        **{name: lambda peer=peer: peer(points) for name, peer in peers.items()},
    }

    def keep(name: str) -> Callable[[], None]:
        return lambda: values.update({name: bodies[name]()})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = alternating({name: keep(name) for name in bodies}, rounds, warmup=0, clock=time.process_time)
    print(n, times, values, flush=True)
    return {name: statistics.median(seconds) for name, seconds in times.items()}, values


def small(row: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours, the peers and the floor at 10,000 points."""
    peers = {"scikit-dimension": skdim_twonn, "DADApy": dadapy_twonn, "set of peers": peer_set}
    seconds, values = measure(10_000, 3, peers)
    product = seconds["floor"]
    rows = [
        row(
            f"TwoNN, n = 10,000: beside {name}", seconds["twonn"], product, peer=seconds[name], peer_name=name,
            limit=GOAL_TWONN * product, value=values["twonn"], peer_value=values[name],
        )
        for name in ("DADApy", "scikit-dimension")
    ]  # fmt: skip
    more = {"peer": seconds["set of peers"], "peer_name": "scikit-dimension, DADApy and scikit-learn"}
    more |= {"ratio_goal": GOAL_SET, "values": values["set"], "peer_values": values["set of peers"]}
    return [*rows, row("TwoNN, MLE, GRIDE and PCA, n = 10,000", seconds["set"], product, **more)]


def large(row: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours, one peer and the floor at 50,000 points; the set of peers would take a quarter of an hour."""
    seconds, values = measure(50_000, 1, {"DADApy": dadapy_twonn})
    product = seconds["floor"]
    return [
        row(
            "TwoNN, n = 50,000: beside DADApy", seconds["twonn"], product, peer=seconds["DADApy"], peer_name="DADApy",
            limit=GOAL_TWONN * product, value=values["twonn"], peer_value=values["DADApy"],
        ),
        row("TwoNN, MLE, GRIDE and PCA, n = 50,000", seconds["set"], product, values=values["set"]),
    ]  # fmt: skip


def main() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny = manifold("curved", 300, TRUE, 1, width=WIDTH)
        # what is imported and compiled on first use
        peer_set(tiny), dadapy_twonn(tiny), our_set(torch.from_numpy(tiny))
    # After that: a limit holds for libraries that are loaded.
    torch.set_num_threads(THREADS)
    threadpool_limits(THREADS)
    assert all(library["num_threads"] == THREADS for library in threadpool_info())
    where = {"threads": THREADS, "d": WIDTH, "versions": versions(*LIBRARIES)}

    def row(case: str, ours: float, product: float, **more: Any) -> dict[str, Any]:
        ratio = more["peer"] / ours if "peer" in more else None
        return result(
            case, ours, "CPU s", floor=product, ratio=ratio, over_floor=ours / product, **more, **where
        )  # fmt: skip

    asked, before = sys.argv[1:], load("dimension")
    rows = small(row) if asked != ["large"] else [old for old in before if "10,000" in old["case"]]
    rows += large(row) if asked != ["small"] else [old for old in before if "50,000" in old["case"]]
    save("dimension", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

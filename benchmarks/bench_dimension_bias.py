"""Which estimator of intrinsic dimension falls short where: manifolds of known dimension in 256 dimensions.

    python benchmarks/bench_dimension_bias.py            every case, about five minutes on one core
    python benchmarks/bench_dimension_bias.py --table    the committed result as the table of the documentation

The manifolds: ``gauss`` (a normal cloud, linear), ``cube`` (uniform, linear, with edges), ``sphere`` (uniform on the
sphere of that dimension), ``curved`` (a normal cloud z through sin(Az + b): smooth, no fold comes near another),
``rolls`` (as many Swiss rolls as dimensions, whose windings come as close as the nearest neighbours).
"""

from __future__ import annotations

import json
import sys
import time

import common
import numpy as np
import torch

from trace_offline.estimators.extrapolation import curve_levels, extrapolated_dimension, sample_size_curve
from trace_offline.estimators.gride import gride
from trace_offline.estimators.local_pca import local_pca_dimension
from trace_offline.estimators.mle_dimension import mle_dimension
from trace_offline.estimators.neighbors import nearest_neighbors
from trace_offline.estimators.pca_dimension import covariance_spectrum, participation_ratio
from trace_offline.estimators.twonn import neighbor_log_ratios, twonn_fit, twonn_maximum_likelihood

KINDS = ("gauss", "cube", "sphere", "curved", "rolls")
DIMENSIONS = (5, 10, 20, 40)
SIZES = {2000: 5, 10_000: 3}
WIDTH = 256
K = 20
K_LOCAL = 100
COLUMNS = ("twonn", "twonn_ml", "mle", "gride", "local_pca", "pca_participation_ratio", "twonn_extrapolated")


def manifold(kind: str, n: int, dimension: int, seed: int, width: int = WIDTH) -> np.ndarray:
    """``[n, width]`` float32 of the given intrinsic dimension."""
    generator = np.random.default_rng([seed, n, dimension])
    if kind == "gauss":
        inner = generator.standard_normal((n, dimension))
    elif kind == "cube":
        inner = generator.random((n, dimension))
    elif kind == "sphere":
        inner = generator.standard_normal((n, dimension + 1))
        inner /= np.linalg.norm(inner, axis=1, keepdims=True)
    elif kind == "curved":
        weights = generator.standard_normal((dimension, width)) * 0.7 / np.sqrt(dimension)
        phase = generator.random(width) * 2 * np.pi
        return np.sin(generator.standard_normal((n, dimension)) @ weights + phase).astype(np.float32)
    elif kind == "rolls":
        angle = generator.random((n, dimension)) * 1.5 * np.pi
        inner = np.concatenate([angle * np.cos(angle), angle * np.sin(angle)], 1)
    else:
        raise ValueError(f"no manifold {kind!r}; there are {', '.join(KINDS)}")
    axes = np.linalg.qr(generator.standard_normal((width, inner.shape[1])))[0]
    return np.asarray(inner @ axes.T, dtype=np.float32)


def estimates(points: np.ndarray, seed: int) -> dict[str, float]:
    table = torch.from_numpy(points)
    found = nearest_neighbors(table, K_LOCAL)
    squared = found.squared_distances.numpy()
    ratios = neighbor_log_ratios(squared)
    generator = np.random.default_rng(seed)
    curve = sample_size_curve(table, curve_levels(len(points)), k=K, generator=generator, full=squared)
    return {
        "twonn": twonn_fit(ratios),
        "twonn_ml": twonn_maximum_likelihood(ratios),
        "mle": mle_dimension(squared[:, :K]),
        "gride": gride(squared, 8, 16),
        "local_pca": local_pca_dimension(table, found.indices[:200]),
        "pca_participation_ratio": participation_ratio(covariance_spectrum(points)),
        "twonn_extrapolated": extrapolated_dimension(curve.twonn_ml, curve.squared_distance),
    }


def measure() -> None:
    torch.set_num_threads(1)
    rows = []
    for kind in KINDS:
        for dimension in DIMENSIONS:
            for n, seeds in SIZES.items():
                started = time.process_time()
                found = [estimates(manifold(kind, n, dimension, seed), seed) for seed in range(seeds)]
                seconds = (time.process_time() - started) / seeds
                for name in COLUMNS:
                    values = np.array([item[name] for item in found])
                    rows.append(
                        common.result(
                            f"{kind} {dimension}, n = {n:,}, {name}",
                            float(values.mean()),
                            "dimensions",
                            manifold=kind,
                            true=dimension,
                            n=n,
                            estimator=name,
                            sd=float(values.std(ddof=1)),
                            seeds=seeds,
                            seconds_all=round(seconds, 2),
                            versions=common.versions("torch", "numpy"),
                        )
                    )
                print(kind, dimension, n, f"{seconds:.1f} s", file=sys.stderr, flush=True)
    common.save("dimension_bias", rows)


def table() -> str:
    """The committed result as Markdown; bold is the nearest to the truth, a cross a miss by more than 10 %."""
    rows = json.loads((common.RESULTS / "dimension_bias.json").read_text())
    lines = ["| cloud | n | " + " | ".join(f"`{name}`" for name in COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for kind in KINDS:
        for dimension in DIMENSIONS:
            for n in SIZES:
                mine = {
                    row["estimator"]: (row["ours"], row["sd"])
                    for row in rows
                    if (row["manifold"], row["true"], row["n"]) == (kind, dimension, n)
                }
                nearest = min(mine, key=lambda name: abs(mine[name][0] - dimension))
                cells = []
                for name in COLUMNS:
                    value, sd = mine[name]
                    text = f"{value:.1f} ({sd:.1f})" + (" ✗" if abs(value - dimension) > 0.1 * dimension else "")
                    cells.append(f"**{text}**" if name == nearest else text)
                lines.append(f"| {kind} {dimension} | {n:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--table" in sys.argv[1:]:
        print(table())
    else:
        measure()

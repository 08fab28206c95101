"""Curvature beside curvlinops and PyHessian: the price of a product, how many of them, and a whole analysis.

    python benchmarks/bench_curvature.py            everything, about eight minutes
    python benchmarks/bench_curvature.py product    one product over one gradient
    python benchmarks/bench_curvature.py task       eigenvalues, trace and density of a trained network
    python benchmarks/bench_curvature.py prepare    only the network and the reference of the latter, kept for it

*Product.* GPT-NeoX shape with random weights, 6 layers, d = 512, vocabulary 8,192, 8 rows of 128 tokens, eager
attention; unit: one gradient of PyTorch's own cross-entropy. In theory a product costs two of its own kind; ours has a
cross-entropy that needs fewer sweeps over the logits than PyTorch's.

*Task.* A network of a million parameters (4 layers, d = 128, vocabulary 1,024), trained for 300 steps; the Hessian of
16 rows of 16 tokens (``curvature_task.py``). To the same accuracy, with for each the cheapest settings found that reach
it (``SETTINGS``): ten largest eigenvalues to a relative error of 1e-3, the trace with a standard error of about 5 %,
the spectral density to 1e-3. Ours is all that the ``hessian`` analyzer does (it also has the smallest eigenvalue,
gradient curvature, effective rank and negative mass). PyHessian's tolerance is that between steps of its power
iteration; at its default of 1e-3 an eigenvalue is off by 1e-2, which the case of eigenvalues alone shows. curvlinops
has no eigenvalue search: its operator goes through SciPy's ``eigsh``, as its documentation shows, with the trace by its
Hutch++, which knows no error of its own (its distance from the reference, 5 % either way, is in the rows), and the
density by its Lanczos quadrature. The reference is in float64: SciPy's ``eigsh`` to 1e-6 on products with a rebuilt
gradient for eigenvalues; many more probes and steps for trace and density. ``error`` fields say how far each is from
it: eigenvalues by the largest relative error of the ten, the trace relative to the reference, the density by ``∫|φ −
φ_ref|`` with every spectrum spread by the same Gaussian, 1 % of the reference's range.

PyHessian 0.1 calls ``torch.eig``, which PyTorch no longer has; while its density runs, a stand-in from
``torch.linalg.eigh`` (the matrix is symmetric) takes that name. Nothing else of the peers is touched; the network is
wrapped so that it takes token ids and returns logits, one row for each target. One thread and the processor's seconds.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternating, load, result, save, versions
from curvature_peers import our_hessian, peer_hessian, peer_operator
from curvature_task import CACHE, TOLERANCE, K, Task
from networks import gpt_neox, loss_of
from threadpoolctl import threadpool_limits
from torch import Tensor

THREADS = 1
REPEATS = 2
LIBRARIES = ("torch", "transformers", "scipy", "curvlinops-for-pytorch", "pyhessian")


def product() -> list[dict[str, Any]]:
    """One product over one gradient, in turn with the peers'."""
    network = gpt_neox(8192, 512, 6, 8, 128)
    ids = torch.randint(0, 8192, (8, 128), generator=torch.Generator().manual_seed(1))
    parameters = list(network.parameters())
    sizes = [p.numel() for p in parameters]
    vector = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(2))
    parts = [v.view_as(p) for v, p in zip(vector.split(sizes), parameters, strict=True)]
    found: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as temporary, our_hessian(network, Path(temporary), ids) as operator:
        from pyhessian.utils import hessian_vector_product

        linear = peer_operator(network, ids)
        batch = peer_hessian(network, ids)
        loader = peer_hessian(network, ids, loader=True)
        bodies: dict[str, Callable[[], Any]] = {
            "gradient": lambda: torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss_of(network, ids), parameters)]
            ),
            "ours": lambda: operator.product(vector),
            "curvlinops": lambda: linear @ vector,
            "PyHessian, one batch": lambda: hessian_vector_product(batch.gradsH, batch.params, parts),
            "PyHessian, data loader": lambda: loader.dataloader_hv_product(parts)[1],
        }

        def keep(name: str) -> Callable[[], None]:
            def body() -> None:
                made = bodies[name]()
                found[name] = made if isinstance(made, Tensor) else torch.cat([part.flatten() for part in made])

            return body

        times = alternating({name: keep(name) for name in bodies}, repeats=REPEATS, clock=time.process_time)
    gradient = statistics.median(times.pop("gradient"))
    cost = {name: statistics.median(seconds) / gradient for name, seconds in times.items()}
    print(cost)
    where = {"gradient_seconds": gradient, "threads": THREADS, "repeats": REPEATS, "versions": versions(*LIBRARIES)}
    rows = []
    for name in bodies:
        if name in ("gradient", "ours"):
            continue
        difference = float((found[name] - found["ours"]).norm() / found["ours"].norm())
        goal = {"ratio_goal": 1.5} if name == "curvlinops" else {}
        rows.append(
            result(
                f"one product: beside {name}", cost["ours"], "gradients", limit=2.2, floor=2.0, peer=cost[name],
                peer_name=name, ratio=cost[name] / cost["ours"], relative_difference=difference, **goal, **where,
            )
        )  # fmt: skip
    return rows


def task(rounds: int = 1) -> list[dict[str, Any]]:
    """Ten eigenvalues, trace and density: products, errors and time of each, in turn."""
    task = Task()
    if not hasattr(torch, "eig"):
        torch.eig = None
    found: dict[str, list[dict[str, float]]] = {"ours": [], "PyHessian": [], "curvlinops": []}
    searches = []
    from trace_offline.estimators.lanczos import extreme_eigenpairs

    for seed in range(rounds):
        for name, body in (("ours", task.ours), ("PyHessian", task.pyhessian), ("curvlinops", task.curvlinops)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name].append(body(seed))
            print(name, found[name][-1], flush=True)
        with our_hessian(task.network, CACHE, task.ids) as operator:
            pairs = extreme_eigenpairs(
                operator, largest=K, tolerance=TOLERANCE, generator=torch.Generator().manual_seed(seed)
            )
        error = float(np.abs(pairs.pairs.values / task.known["values"] - 1).max())
        searches.append({"search_products": float(pairs.products), "eigenvalue_error": error})
        print("ten eigenvalues", searches[-1], flush=True)

    def median(name: str, key: str) -> float:
        return statistics.median(abs(one[key]) for one in found[name])

    where = {"threads": THREADS, "rounds": rounds, "parameters": task.parameters, "versions": versions(*LIBRARIES)}
    rows = []
    ours = statistics.median(one["search_products"] for one in searches)
    for name, peer_name in (("curvlinops", "SciPy eigsh (ARPACK)"), ("PyHessian", "PyHessian power iteration")):
        rows.append(
            result(
                f"ten largest eigenvalues, relative error 1e-3: beside {peer_name}", ours, "products", limit=50,
                peer=median(name, "search_products"), peer_name=peer_name, ratio=median(name, "search_products") / ours,
                error=max(one["eigenvalue_error"] for one in searches),
                peer_error=max(one["search_error"] for one in found[name]), **where,
            )
        )  # fmt: skip
    for name, goal in (("PyHessian", 3.0), ("curvlinops", 1.5)):
        seconds = median("ours", "seconds")
        more = {
            f"{prefix}{key}": median(which, key)
            for which, prefix in (("ours", ""), (name, "peer_"))
            for key in ("products", "eigenvalue_error", "trace_error", "trace_stderr", "density_error")
            if key in found[which][0]
        }
        rows.append(
            result(
                f"eigenvalues, trace and density: beside {name}", seconds, "CPU s", ratio_goal=goal,
                peer=median(name, "seconds"), peer_name=name, ratio=median(name, "seconds") / seconds, **more, **where,
            )
        )  # fmt: skip
    return rows


def main() -> int:
    torch.set_num_threads(THREADS)
    threadpool_limits(THREADS)
    asked = sys.argv[1:]
    if asked == ["prepare"]:
        print(Task().known)
        return 0
    before = load("curvature")
    rows = product() if asked != ["task"] else [row for row in before if row["case"].startswith("one product")]
    rows += task() if asked != ["product"] else [row for row in before if not row["case"].startswith("one product")]
    save("curvature", rows)
    shutil.rmtree(CACHE, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

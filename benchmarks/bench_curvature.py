"""Curvature beside curvlinops and PyHessian: the price of a product, how many of them, and a whole analysis.

    python benchmarks/bench_curvature.py            everything, about eight minutes
    python benchmarks/bench_curvature.py product    one product over one gradient
    python benchmarks/bench_curvature.py task       eigenvalues, trace and density of a trained network
    python benchmarks/bench_curvature.py prepare    only the network and the reference of the latter, kept for it

*Product.* GPT-NeoX shape with random weights, 6 layers, d = 512, vocabulary 8,192, 8 rows of 128 tokens, eager
attention; unit: one gradient of PyTorch's own cross-entropy. In theory a product costs two of its own kind; ours has a
cross-entropy that needs fewer sweeps over the logits than PyTorch's.

*Task.* A network of a million parameters (4 layers, d = 128, vocabulary 1,024), trained for 300 steps; the Hessian of
16 rows of 16 tokens. To the same accuracy, with for each the cheapest settings found that reach it (``SETTINGS``): ten
largest eigenvalues to a relative error of 1e-3, the trace with a standard error of about 5 %, the spectral density to
1e-3. Ours is all that the ``hessian`` analyzer does (it also has the smallest eigenvalue, gradient curvature, effective
rank and negative mass). PyHessian's tolerance is that between steps of its power iteration; at its default of 1e-3 an
eigenvalue is off by 1e-2, which the case of eigenvalues alone shows. curvlinops has no eigenvalue search: its operator
goes through SciPy's ``eigsh``, as its documentation shows, with the trace by its Hutch++, which knows no error of its
own (its distance from the reference, 5 % either way, is in the rows), and the density by its Lanczos quadrature. The
reference is in float64: SciPy's ``eigsh`` to 1e-6 on products with a rebuilt gradient for eigenvalues; many more probes
and steps for trace and density. ``error`` fields say how far each is from it: eigenvalues by the largest relative error
of the ten, the trace relative to the reference, the density by ``∫|φ − φ_ref|`` with every spectrum spread by the same
Gaussian, 1 % of the reference's range.

PyHessian 0.1 calls ``torch.eig``, which PyTorch no longer has; while its density runs, a stand-in from
``torch.linalg.eigh`` (the matrix is symmetric) takes that name. Nothing else of the peers is touched; the network is
wrapped so that it takes token ids and returns logits, one row for each target. One thread and the processor's seconds.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternating, load, result, save, versions
from networks import Training, gpt_neox, loss_of, packed_rows
from scipy.sparse.linalg import LinearOperator, eigsh
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional

from trace_offline.activations.losses import double_backward_attention
from trace_offline.activations.model import ModelView
from trace_offline.analyzers._curvature import measure_curvature
from trace_offline.analyzers._curvature_batch import choose_rows, losses_of, weights_of
from trace_offline.analyzers.hessian import HessianAnalyzer
from trace_offline.core.types import Array, Measurement
from trace_offline.estimators.hutchpp import complement_moments, mean_of
from trace_offline.estimators.hvp import HessianOperator
from trace_offline.estimators.slq import spectral_quadrature
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.recording import save_evaluation_set

THREADS = 1
REPEATS = 2
K, TOLERANCE = 10, 1e-3
SHAPE = {"vocabulary": 1024, "width": 128, "layers": 4, "heads": 4, "length": 16}
ROWS, TRAINED = 16, 300
SETTINGS: dict[str, Any] = {
    "ours": {"slq_probes": 2, "slq_steps": 15, "trace_probes": 24},
    "PyHessian": {"tol": 3e-5, "maxIter": 2000, "trace": 50, "density": 20},
    "curvlinops": {"tol": TOLERANCE, "trace": 60, "density": 40},
}
CACHE = Path(tempfile.gettempdir()) / "trace-offline-bench-curvature"
LIBRARIES = ("torch", "transformers", "scipy", "curvlinops-for-pytorch", "pyhessian")
Floats = np.ndarray


class Wrapped(nn.Module):
    """Token ids → logits ``[targets, classes]``, as peers want their models."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T] → [B (T − 1), V]``."""
        logits: Tensor = self.network(input_ids=ids).logits
        return logits[:, :-1].flatten(0, 1)


def peer_hessian(network: Any, ids: Tensor, *, loader: bool = False) -> Any:
    """PyHessian of one batch, or of a data loader with that one batch."""
    import pyhessian

    data = (ids, ids[:, 1:].flatten())
    more = {"dataloader": [data]} if loader else {"data": data}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pyhessian.hessian(Wrapped(network), functional.cross_entropy, cuda=False, **more)


def peer_operator(network: Any, ids: Tensor) -> Any:
    """The Hessian of curvlinops."""
    import curvlinops

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return curvlinops.HessianLinearOperator(
            Wrapped(network), nn.CrossEntropyLoss(), list(network.parameters()), [(ids, ids[:, 1:].flatten())],
            check_deterministic=False, batch_size_fn=lambda ids: ids[:, 1:].numel(),
        )  # fmt: skip


@contextlib.contextmanager
def our_hessian(network: Any, folder: Path, ids: Tensor) -> Iterator[HessianOperator]:
    """The operator as the analyzer makes it."""
    evaluation, model = evaluation_of(folder, ids), ModelView(network, None, "cpu", "float32")
    rows = choose_rows(evaluation, len(ids), ids.numel(), 0)
    with double_backward_attention():
        operator = HessianOperator(losses_of(model, rows, (list(range(len(ids))),)), weights_of(model))
        with operator:
            yield operator


def evaluation_of(folder: Path, ids: Tensor) -> EvaluationSet:
    if not (folder / "set").exists():
        save_evaluation_set(folder / "set", ids)
    return EvaluationSet.load(folder / "set")


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


class Task:
    """The trained network, its batch, and the reference."""

    def __init__(self) -> None:
        text = torch.tensor([ids for ids, _ in packed_rows(SHAPE["vocabulary"], SHAPE["length"], 64 * 64 + ROWS)])
        self.ids, training = text[:ROWS], text[ROWS:]
        self.network = gpt_neox(**SHAPE)
        CACHE.mkdir(exist_ok=True)
        saved, known = CACHE / "network.pt", CACHE / "reference.npz"
        if not saved.exists():
            train = Training(self.network, training, 64)
            for _ in range(TRAINED):
                train()
            torch.save(self.network.state_dict(), saved)
        self.network.load_state_dict(torch.load(saved, weights_only=True))
        self.network.zero_grad(set_to_none=True)
        self.parameters = sum(p.numel() for p in self.network.parameters())
        if not known.exists():
            np.savez(known, **self.reference())
        self.known = dict(np.load(known))

    def reference(self) -> dict[str, Floats]:
        """Eigenvalues, trace with its standard error, and density, in float64."""
        network = gpt_neox(**SHAPE).double()
        network.load_state_dict(self.network.state_dict())
        parameters = list(network.parameters())
        sizes = [p.numel() for p in parameters]

        def rebuilt(vector: Floats) -> Floats:
            parts = torch.from_numpy(np.asarray(vector).reshape(-1)).split(sizes)
            gradient = torch.autograd.grad(loss_of(network, self.ids), parameters, create_graph=True)
            directions = [v.view_as(p) for v, p in zip(parts, parameters, strict=True)]
            made = torch.autograd.grad(gradient, parameters, grad_outputs=directions)
            return torch.cat([part.flatten() for part in made]).numpy()

        n = sum(sizes)
        start = np.random.default_rng(7).standard_normal(n)
        values, vectors = eigsh(LinearOperator((n, n), rebuilt, dtype=np.float64), k=K, which="LA", tol=1e-6, v0=start)
        order = np.argsort(-values)
        values, basis = values[order], torch.from_numpy(np.ascontiguousarray(vectors.T[order]))
        operator = HessianOperator([lambda: loss_of(network, self.ids)], parameters)
        generator = torch.Generator().manual_seed(11)
        more = spectral_quadrature(
            operator, probes=6, steps=60, generator=generator, exact_values=values, exact_vectors=basis
        )
        extra = complement_moments(operator, 40, generator, basis)
        trace = mean_of(np.concatenate((more.samples(lambda x: x), extra.first + values.sum())))
        nodes, weights = (np.concatenate(part) for part in zip(*more.measures(), strict=True))
        return {
            "values": values, "trace": np.array([trace.value, trace.stderr or 0.0]), "nodes": nodes,
            "weights": weights / more.probes,
        }  # fmt: skip

    def errors(self, values: Floats, trace: float, density: Floats) -> dict[str, float]:
        """How far these numbers are from the reference."""
        wanted = self.known["values"]
        found = np.sort(np.asarray(values))[::-1][:K]
        grid = self.grid()
        reference = self.spread(self.known["nodes"], self.known["weights"])
        return {
            "eigenvalue_error": float(np.abs(found / wanted - 1).max()),
            "trace_error": float(trace / self.known["trace"][0] - 1),
            "density_error": float(np.abs(density - reference).sum() * (grid[1] - grid[0])),
        }

    @property
    def sigma(self) -> float:
        """Width of the common kernel."""
        return 0.01 * float(np.ptp(self.known["nodes"]))

    def grid(self) -> Floats:
        """The common grid of densities."""
        nodes = self.known["nodes"]
        return np.linspace(nodes.min() - 10 * self.sigma, nodes.max() + 10 * self.sigma, 2048)

    def spread(self, nodes: Floats, weights: Floats, sigma: float | None = None) -> Floats:
        """The density of weighted points, each spread by a Gaussian, on the common grid."""
        sigma = sigma or self.sigma
        offsets = (self.grid()[:, None] - np.asarray(nodes)[None, :]) / sigma
        return np.exp(-0.5 * offsets**2) @ np.asarray(weights) / (sigma * np.sqrt(2 * np.pi))

    def ours(self, seed: int) -> dict[str, float]:
        """The analyzer's whole measurement."""
        evaluation, model = evaluation_of(CACHE, self.ids), ModelView(self.network, None, "cpu", "float32")
        started = time.process_time()
        found = list(measure_curvature(model, evaluation, HessianAnalyzer.Params(**SETTINGS["ours"]), seed))
        seconds = time.process_time() - started
        numbers = {(m.metric, m.label): m for m in found if isinstance(m, Measurement)}
        arrays = [a for a in found if isinstance(a, Array)]
        nodes = np.concatenate([a.values for a in arrays if a.name == "slq_nodes"])
        weights = np.concatenate([a.values for a in arrays if a.name == "slq_weights"])
        density = self.spread(nodes, weights / sum(a.name == "slq_nodes" for a in arrays))
        trace = numbers["trace", None]
        return {
            "seconds": seconds, "products": float(numbers["products", None].value or 0),
            "trace_stderr": (trace.stderr or 0.0) / self.known["trace"][0],
            **self.errors(
                np.array([numbers["eigenvalue", str(k + 1)].value for k in range(K)]), trace.value or 0.0, density
            ),
        }  # fmt: skip

    def pyhessian(self, seed: int) -> dict[str, float]:
        """Its power iteration, Hutchinson trace and density; the search with its default tolerance beside the clock."""
        import pyhessian

        # the package gives the name of this module to the class
        module: Any = sys.modules[pyhessian.hessian.__module__]
        torch.manual_seed(seed)
        counted, plain = [0], module.hessian_vector_product

        def counting(*given: Any) -> Any:
            counted[0] += 1
            return plain(*given)

        def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
            values, vectors = torch.linalg.eigh(matrix)
            return torch.stack((values, torch.zeros_like(values)), 1), vectors

        removed = torch.eig
        module.hessian_vector_product, torch.eig = counting, eig
        try:
            started = time.process_time()
            peer = peer_hessian(self.network, self.ids)
            settings = SETTINGS["PyHessian"]
            values, _ = peer.eigenvalues(top_n=K, tol=settings["tol"], maxIter=settings["maxIter"])
            samples = peer.trace(maxIter=settings["trace"], tol=0)
            nodes, weights = peer.density(iter=settings["density"], n_v=1)
            seconds = time.process_time() - started
            counted_all, counted[0] = counted[0], 0
            default, _ = peer.eigenvalues(top_n=K)
            searched = counted[0]
        finally:
            module.hessian_vector_product, torch.eig = plain, removed
            self.network.zero_grad(set_to_none=True)
        density = self.spread(np.array(nodes[0]), np.array(weights[0]))
        return {
            "seconds": seconds, "products": float(counted_all), "search_products": float(searched),
            "search_error": float(np.abs(np.sort(np.array(default))[::-1] / self.known["values"] - 1).max()),
            "trace_stderr": float(np.std(samples, ddof=1) / np.sqrt(len(samples))) / self.known["trace"][0],
            **self.errors(np.array(values), float(np.mean(samples)), density),
        }  # fmt: skip

    def curvlinops(self, seed: int) -> dict[str, float]:
        """ARPACK on its operator, its Hutch++ and its density."""
        import curvlinops

        torch.manual_seed(seed)
        settings = SETTINGS["curvlinops"]
        counted = [0]
        start = np.random.default_rng(seed).standard_normal(self.parameters).astype(np.float32)
        started = time.process_time()
        operator = peer_operator(self.network, self.ids)
        plain = operator._matmat_batch

        def counting(ids: Tensor, labels: Tensor, columns: list[Tensor]) -> list[Tensor]:
            counted[0] += columns[0].shape[-1]
            made: list[Tensor] = plain(ids, labels, columns)
            return made

        operator._matmat_batch = counting
        values = eigsh(operator.to_scipy(), k=K, which="LA", tol=settings["tol"], v0=start, return_eigenvectors=False)
        searched = counted[0]
        trace = float(curvlinops.hutchpp_trace(operator, num_matvecs=settings["trace"]))
        vectors, kappa, margin = settings["density"], 3.0, 0.05
        # the upper end is known by now; the lower one it finds itself
        points, density = curvlinops.lanczos_approximate_spectrum(
            operator, vectors, num_repeats=1, kappa=kappa, margin=margin, boundaries=(None, float(values.max()))
        )
        seconds = time.process_time() - started
        points, density = points.numpy().astype(np.float64), density.numpy().astype(np.float64)
        # its own kernel is narrower than the common one: spread its density by what is missing
        half = (points[-1] - points[0]) / 2
        own = 2 / (vectors - 1) / np.sqrt(8 * np.log(kappa)) * half
        if own >= self.sigma:
            raise RuntimeError(f"its kernel of {own:.3g} is wider than the common one, {self.sigma:.3g}")
        step = points[1] - points[0]
        density = self.spread(points, density / density.sum() / step * step, np.sqrt(self.sigma**2 - own**2))
        errors = self.errors(values, trace, density)
        return {
            "seconds": seconds, "products": float(counted[0]), "search_products": float(searched),
            "search_error": errors["eigenvalue_error"], **errors,
        }  # fmt: skip


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

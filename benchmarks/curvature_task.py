"""The whole task of bench_curvature.py: its network, the reference in float64, and the way of each of the three."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curvature_peers import evaluation_of, peer_hessian, peer_operator
from networks import Training, gpt_neox, loss_of, packed_rows
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from trace_offline.activations.model import ModelView
from trace_offline.analyzers._curvature import measure_curvature
from trace_offline.analyzers.hessian import HessianAnalyzer
from trace_offline.core.types import Array, Measurement
from trace_offline.estimators.hutchpp import complement_moments, mean_of
from trace_offline.estimators.hvp import HessianOperator
from trace_offline.estimators.slq import spectral_quadrature

K, TOLERANCE = 10, 1e-3
SHAPE = {"vocabulary": 1024, "width": 128, "layers": 4, "heads": 4, "length": 16}
ROWS, TRAINED = 16, 300
SETTINGS: dict[str, Any] = {
    "ours": {"slq_probes": 2, "slq_steps": 15, "trace_probes": 24},
    "PyHessian": {"tol": 3e-5, "maxIter": 2000, "trace": 50, "density": 20},
    "curvlinops": {"tol": TOLERANCE, "trace": 60, "density": 40},
}
CACHE = Path(tempfile.gettempdir()) / "trace-offline-bench-curvature"
Floats = np.ndarray


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

"""Trace of a symmetric operator by XTrace: every random vector serves as sketch and as probe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trace_offline.estimators.hutchpp import range_of
from trace_offline.estimators.krylov import Floats
from trace_offline.estimators.operators import SymmetricOperator, standard_normal
from trace_offline.estimators.slq import Estimate


def xtrace(operator: SymmetricOperator, *, probes: int, generator: torch.Generator) -> Estimate:
    """``Tr A`` by XTrace (Epperly, Tropp & Webber, SIAM J. Matrix Anal. Appl. 45, 2024, arXiv 2301.07825).

    For each i the other probes' images ``Aω_j`` span a subspace Q_i that is independent of ω_i, so that

        ``t_i = Tr(Q_iᵀ A Q_i) + (n − m + 1) xᵀAx / xᵀx``,  ``x = (I − Q_i Q_iᵀ) ω_i``

    is unbiased for each i (x is uniform in direction on a complement of dimension n − m + 1). The estimate is the mean
    of the t_i. All Q_i come from one basis Q of ``Y = AΩ = QR``: ``Q_i Q_iᵀ = Q (I − s_i s_iᵀ) Qᵀ`` with s_i the
    normalised columns of ``R^{-T}``.

    The t_i share most of their subspaces, so the paper's error ``sd(t_i)/√m`` is too small where the spectrum decays
    fast. The standard error here is the delete-one jackknife of the whole estimator, which is not too small on average
    (Efron & Stein, Ann. Statist. 9, 1981) and costs no product: leaving two out works like leaving one out.

    Args:
        operator: n, dtype, device, product.
        probes: m random vectors, at least 3; the cost is 2 m products, and some ``4 m`` vectors are held.
        generator: source of the random vectors.

    Returns:
        An Estimate. Exact, with standard error 0, when the probes are as many as the order, or more than the rank.

    Raises:
        ValueError: fewer than 3 probes.

    """
    if probes < 3:
        raise ValueError(f"expected at least 3 probes (each is measured against the others), found {probes}")
    if probes >= operator.n:
        unit = torch.eye(operator.n, dtype=operator.dtype, device=operator.device)
        return Estimate(sum(float(operator.product(row)[i]) for i, row in enumerate(unit)), 0.0, 0)
    omega = torch.stack([standard_normal(operator, generator) for _ in range(probes)])
    sketch = torch.stack([operator.product(row) for row in omega])
    if not bool(sketch.any()):
        return Estimate(0.0, 0.0, 0)
    basis = range_of(sketch)
    images = torch.stack([operator.product(row) for row in basis])
    inner = (basis @ images.T).double().cpu().numpy()
    inner = (inner + inner.T) / 2
    if len(basis) < probes:
        # The rank is below the number of probes: the range is known, nothing is left outside it.
        return Estimate(float(np.trace(inner)), 0.0, 0)
    inside = basis @ omega.T
    outside = omega - inside.T @ basis
    left_out = np.linalg.inv((basis @ sketch.T).double().cpu().numpy()).T
    small = _Small(
        n=operator.n,
        inner=inner,
        sketch=(basis @ sketch.T).double().cpu().numpy(),
        inside=inside.double().cpu().numpy(),
        cross=(images @ outside.T).double().cpu().numpy(),
        square=outside.double().square().sum(1).cpu().numpy(),
        left_out=left_out / np.linalg.norm(left_out, axis=0),
    )
    value = float(np.mean([small.sample(i, [i]) for i in range(probes)]))
    others = [[small.sample(j, [i, j]) for j in range(probes) if j != i] for i in range(probes)]
    means = np.array([np.mean(samples) for samples in others])
    variance = (probes - 1) / probes * float(((means - means.mean()) ** 2).sum())
    return Estimate(value, float(np.sqrt(variance)), probes)


@dataclass(frozen=True)
class _Small:
    """All that the samples need, in coordinates of the basis Q: matrices of order m.

    ``inner = QᵀAQ``, ``sketch = QᵀY``, ``inside = QᵀΩ``, ``cross = (AQ)ᵀX`` and ``square = ‖X_j‖²`` with
    ``X = (I − QQᵀ)Ω``; columns of ``left_out`` are the s_i.
    """

    n: int
    inner: Floats
    sketch: Floats
    inside: Floats
    cross: Floats
    square: Floats
    left_out: Floats

    def sample(self, probe: int, without: list[int]) -> float:
        """The estimate of one probe against the subspace of all probes but ``without`` (which contains it)."""
        removed, _ = np.linalg.qr(self.left_out[:, without])
        part = removed @ (removed.T @ self.inside[:, probe])
        kept = self.inside[:, probe] - part
        # x = X + Q part, and Ax = y − (AQ) kept, where y has no part along X
        form = part @ (self.sketch[:, probe] - self.inner @ kept) - self.cross[:, probe] @ kept
        subspace = np.trace(self.inner) - np.trace(removed.T @ self.inner @ removed)
        outer = self.n - len(self.inner) + len(without)
        return float(subspace + outer * form / (self.square[probe] + part @ part))

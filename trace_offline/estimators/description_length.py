"""Minimum description length of labels given representations, by the online (prequential) code.

The rows are sent in blocks that end at t_1 < t_2 < … < t_B = n. The labels of the first block are sent with the uniform
code; those of block i+1 with the probabilities of a probe fitted to the first t_i rows:

    L = t_1 log2 K  −  Σ_i Σ_{t_i < j ≤ t_{i+1}} log2 p_i(y_j | x_j)          compression = n log2 K / L

A probe cannot foresee a class that it has never seen, so every p_i is mixed with the uniform distribution at weight
1/(t_i + 1); the code stays a valid one. The penalty of each fit is that of the full data, scaled as a prior is:
λ_i = λ n / t_i.

Reference: E. Voita and I. Titov (2020), Information-Theoretic Probing with Minimum Description Length, EMNLP,
arXiv:2003.12298.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trace_offline.estimators.clustered import Codes
from trace_offline.estimators.logistic import LogisticProblems


def block_ends(groups: Codes, fractions: Sequence[float]) -> list[int]:
    """Row numbers at which blocks end, each moved on to the end of its group; rows of a group must be together."""
    n = len(groups)
    last = np.flatnonzero(np.append(groups[1:] != groups[:-1], True)) + 1
    wanted = [max(1, round(min(1.0, f) * n)) for f in fractions]
    ends = {int(last[np.searchsorted(last, end)]) for end in wanted} | {n}
    return sorted(ends)


def online_code(
    features: Tensor,
    labels: Tensor,
    n_classes: int,
    penalty: Tensor,
    ends: Sequence[int],
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 500,
) -> NDArray[np.float64]:
    """Bits of every label, ``[L, S, n]``, for ``features [L, n, D]`` and ``labels [S, n]`` in the order of sending.

    ``penalty [L, S]``: λ of the fit to all rows. ``ends``: see ``block_ends``.
    """
    n_layers, n, _ = features.shape
    bits = np.empty((n_layers, labels.shape[0], n))
    bits[:, :, : ends[0]] = np.log2(n_classes)
    for begin, end in pairwise(ends):
        problems = LogisticProblems(features[:, :begin], labels[:, :begin], n_classes)
        fit = problems.solve(penalty * (n / begin), tolerance=tolerance, max_iterations=max_iterations)
        share = 1.0 / (begin + 1.0)
        for layer in range(n_layers):
            p = fit.log_probabilities(features[layer, begin:end], layer).double().exp()
            right = p.gather(2, labels[:, begin:end, None])[..., 0]
            mixed = (1.0 - share) * right + share / n_classes
            bits[layer, :, begin:end] = -torch.log2(mixed).cpu().numpy()
    return bits

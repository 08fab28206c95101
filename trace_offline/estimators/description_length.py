"""Minimum description length of labels given representations, by the online (prequential) code.

The rows are sent in blocks that end at t_1 < t_2 < … < t_B = n. The labels of the first block are sent with the uniform
code; those of block i+1 with the probabilities of a probe fitted to the first t_i rows:

    L = t_1 log2 K  −  Σ_i Σ_{t_i < j ≤ t_{i+1}} log2 p_i(y_j | x_j)          compression = n log2 K / L

A probe cannot foresee a class that it has never seen, so every p_i is mixed with the uniform distribution at weight
1/(t_i + 1); the code stays a valid one. The penalty of each fit of a linear probe is that of the full data, scaled as a
prior is: λ_i = λ n / t_i.

Reference: E. Voita and I. Titov (2020), Information-Theoretic Probing with Minimum Description Length, EMNLP,
arXiv:2003.12298.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trace_offline.estimators.clustered import Codes
from trace_offline.estimators.logistic import LogisticProblems, Problem


class Predictor(Protocol):
    """Probes that were fitted to a list of problems."""

    def log_probabilities(self, features: Tensor, problem: int) -> Tensor:
        """``features [m, D]`` → ``log p [m, K]`` of one problem."""


Fit = Callable[[Sequence[Tensor], Sequence[Problem], Sequence[int]], Predictor]
"""Fits first parts of problems, all at once: their features, the problems, and of which problem each is a part."""


def block_ends(groups: Codes, fractions: Sequence[float]) -> list[int]:
    """Row numbers at which blocks end, each moved on to the end of its group; rows of a group must be together."""
    n = len(groups)
    last = np.flatnonzero(np.append(groups[1:] != groups[:-1], True)) + 1
    wanted = [max(1, round(min(1.0, f) * n)) for f in fractions]
    ends = {int(last[np.searchsorted(last, end)]) for end in wanted} | {n}
    return sorted(ends)


def online_code(
    features: Sequence[Tensor], problems: Sequence[Problem], ends: Sequence[Sequence[int]], fit: Fit
) -> list[NDArray[np.float64]]:
    """Bits of every label of every problem, ``[n]`` each, in the order of sending.

    ``features``: matrices ``[n, D]`` in that order, ``problems`` likewise. ``ends``: see ``block_ends``, for each
    feature matrix. ``fit`` is called once, with the first parts of all problems.
    """
    starts: dict[tuple[int, int], int] = {}
    parts: list[Tensor] = []
    first: list[Problem] = []
    owners: list[int] = []
    cut: dict[tuple[int, int], Tensor] = {}
    for owner, problem in enumerate(problems):
        for begin in ends[problem.design][:-1]:
            if (problem.design, begin) not in starts:
                starts[problem.design, begin] = len(parts)
                parts.append(features[problem.design][:begin])
            labels = cut.setdefault((id(problem.labels), begin), problem.labels[:begin])
            first.append(Problem(starts[problem.design, begin], labels, problem.n_classes))
            owners.append(owner)
    fitted = fit(parts, first, owners) if first else None
    bits, number = [], 0
    for problem in problems:
        here = ends[problem.design]
        out = np.empty(len(problem.labels))
        out[: here[0]] = np.log2(problem.n_classes)
        for begin, end in pairwise(here):
            assert fitted is not None
            p = fitted.log_probabilities(features[problem.design][begin:end], number).double().exp()
            number += 1
            share = 1.0 / (begin + 1.0)
            right = p.gather(1, problem.labels[begin:end, None])[:, 0]
            out[begin:end] = -torch.log2((1.0 - share) * right + share / problem.n_classes).cpu().numpy()
        bits.append(out)
    return bits


def linear_fit(penalty: Tensor, sizes: Sequence[int], tolerance: float = 1e-3, max_iterations: int = 500) -> Fit:
    """Logistic regressions for ``online_code``. ``penalty [P]``: λ of the fits to all rows, ``sizes``: how many."""

    def fit(features: Sequence[Tensor], problems: Sequence[Problem], owners: Sequence[int]) -> Predictor:
        shares = [sizes[owner] / len(problem.labels) for owner, problem in zip(owners, problems, strict=True)]
        scaled = penalty[list(owners)] * torch.tensor(shares, dtype=torch.float64, device=penalty.device)
        return LogisticProblems(features, problems).solve(scaled, tolerance=tolerance, max_iterations=max_iterations)

    return fit

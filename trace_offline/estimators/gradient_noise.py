"""Size, signal-to-noise ratio and alignment of gradients, from inner products of the gradients of parts of the data.

The data are cut into G independent parts; ``g_i`` is the gradient of the *summed* loss of part i, ``c_i`` its number of
targets. The gradient of the mean loss is the ratio ``ĝ = Σ g_i / Σ c_i``. Its length is too long on average, because
noise adds to it: ``E ‖ĝ‖² = ‖g‖² + V`` with ``V = tr Cov(ĝ)``, estimated by ``G/(G−1) Σ ‖g_i − c_i ĝ‖² / (Σ c)²``.
Everything here follows from inner products, so that gradients need not be kept: standard errors are the delete-one
jackknife over the parts, in closed form.

S. McCandlish, J. Kaplan, D. Amodei, "An Empirical Model of Large-Batch Training", arXiv:1812.06162, 2018 (the simple
noise scale is 1 / signal_to_noise, in sequences).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trace_offline.estimators.clustered import Estimate
from trace_offline.estimators.subsampling import jackknife_stderr

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Parts:
    """Inner products of part gradients, each ``[G]``: ``targets`` c, ``sequences``, ``own`` ‖g_i‖², ``with_sum``
    ⟨g_i, Σ g⟩, ``with_weighted`` ⟨g_i, Σ c g⟩. Those of several blocks of parameters add up.
    """

    targets: Floats
    sequences: Floats
    own: Floats
    with_sum: Floats
    with_weighted: Floats


def gradient_norm(parts: Parts) -> Estimate:
    """``‖ĝ‖`` of the mean loss as measured (noise included), with standard error (None for fewer than 2 parts)."""
    value, left_out = _both(parts, lambda state: np.sqrt(np.maximum(state[3], 0)) / state[0])
    return Estimate(float(value), _stderr(left_out))


def signal_to_noise(parts: Parts) -> Estimate:
    """``‖g‖² / tr Cov(gradient of one sequence)``, noise taken off the numerator: does not depend on how much data.

    About 0 (and possibly below) where the gradient is all noise. Raises ValueError for fewer than 2 parts and when the
    parts agree completely (no noise to divide by). The standard error needs 3 parts.
    """
    count = len(parts.targets)
    if count < 2:
        raise ValueError(f"noise needs at least 2 independent parts of the data, found {count}")

    def ratio(state: tuple[Floats, ...]) -> Floats:
        targets, sequences, squares, sum_square, own, weighted, groups = state
        residual = own - 2 * weighted / targets + squares * sum_square / targets**2
        # Residuals are sums of squares: what rounding leaves of them below 1e-12 of the terms is no noise.
        residual = np.where(residual > 1e-12 * np.maximum(own, 1e-300), residual, np.nan)
        variance = groups / (groups - 1) * residual / targets**2
        return np.asarray((sum_square / targets**2 - variance) / (variance * sequences))

    value, left_out = _both(parts, ratio)
    if not np.isfinite(value):
        raise ValueError("the gradients of all parts of the data agree: there is no noise to compare with")
    return Estimate(float(value), _stderr(left_out) if count > 2 else None)


def gradient_cosine(a_with_a: Floats, b_with_b: Floats, a_with_b: Floats, b_with_a: Floats, own: Floats) -> Estimate:
    """Cosine of the gradients ``A = Σ a_i`` and ``B = Σ b_i`` of two losses on the same G parts, with standard error.

    ``a_with_a``: ⟨a_i, A⟩; ``b_with_b``: ⟨b_i, B⟩; ``a_with_b``: ⟨a_i, B⟩; ``b_with_a``: ⟨b_i, A⟩; ``own [3, G]``:
    ⟨a_i, a_i⟩, ⟨b_i, b_i⟩, ⟨a_i, b_i⟩. Noise makes gradients longer, so that the cosine of two noisy estimates is
    nearer to 0 than that of the gradients (or nearer to 1, when both hold the same noise).

    Raises ValueError when one of the two is 0.
    """
    squares = float(a_with_a.sum()), float(b_with_b.sum())
    if min(squares) <= 0:
        raise ValueError("one of the two gradients is 0: there is no angle")

    def cosine(product: Floats, first: Floats, second: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            # Cauchy-Schwarz: only rounding can leave [−1, 1]
            return np.clip(product / np.sqrt(np.maximum(first, 0) * np.maximum(second, 0)), -1.0, 1.0)

    value = cosine(np.asarray(a_with_b.sum()), np.asarray(squares[0]), np.asarray(squares[1]))
    left_out = cosine(
        a_with_b.sum() - a_with_b - b_with_a + own[2],
        squares[0] - 2 * a_with_a + own[0],
        squares[1] - 2 * b_with_b + own[1],
    )
    return Estimate(float(value), _stderr(left_out))


def _both(parts: Parts, statistic: object) -> tuple[Floats, Floats]:
    """The statistic of all parts, and with each left out ``[G]``."""
    assert callable(statistic)
    c, n, d, e = parts.targets, parts.own, parts.with_sum, parts.with_weighted
    whole = (
        np.asarray(c.sum()),
        np.asarray(parts.sequences.sum()),
        np.asarray((c**2).sum()),
        np.asarray(d.sum()),
        np.asarray(n.sum()),
        np.asarray((c * d).sum()),
        np.asarray(float(len(c))),
    )
    # Without part i: S − g_i, and for the weighted sum Σ c g − c_i g_i.
    less = (
        whole[0] - c,
        whole[1] - parts.sequences,
        whole[2] - c**2,
        whole[3] - 2 * d + n,
        whole[4] - n,
        whole[5] - e - c * d + c * n,
        np.full(len(c), len(c) - 1.0),
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(statistic(whole)), np.asarray(statistic(less))


def _stderr(left_out: Floats) -> float | None:
    if len(left_out) < 2 or not np.isfinite(left_out).all():
        return None
    return float(jackknife_stderr(left_out))

"""Linear dimensions of a cloud from the spectrum of its covariance.

With eigenvalues λ₁ ≥ λ₂ ≥ … of the covariance: the *participation ratio* ``(Σλ)² / Σλ²`` (D equal eigenvalues give D,
one dominating gives 1; e.g. P. Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement",
bioRxiv 214262, 2017) and the number of leading components that hold a given share of the variance.

Their standard errors: the delete-group jackknife over ``leave_out_spectra`` (``subsampling.jackknife_stderr``); both
are smooth functions of second moments, for which the jackknife holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A share of the variance that is reached up to rounding is reached.
_ROUNDING = 1e-12


def covariance_spectrum(points: np.ndarray) -> np.ndarray:
    """Eigenvalues of the covariance (divisor n) of ``points [n, D]``, descending, ``[min(n, D)]`` float64.

    In squared units of the points; from the covariance or the Gram matrix, whichever is smaller. Raises ValueError
    for fewer than 2 points, values that are not finite, or points that all coincide.
    """
    scores = _scores(points)
    return _descending(np.linalg.eigvalsh(scores.T @ scores / len(scores)))


def leave_out_spectra(points: np.ndarray, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The spectrum of all points without each of the ``parts`` (arrays of row numbers), one after the other.

    The scatter matrix is summed once and each part's share subtracted: G spectra cost one scatter matrix and G sets of
    eigenvalues of size min(n, D).
    """
    scores = _scores(points)
    scatter = scores.T @ scores
    spectra = []
    for part in parts:
        left_out, n_rest = scores[part], len(scores) - len(part)
        if n_rest < 2:
            raise ValueError(f"leaving {len(part)} of {len(scores)} points out leaves too few for a covariance")
        mean = -left_out.sum(0) / n_rest
        rest = (scatter - left_out.T @ left_out) / n_rest - np.outer(mean, mean)
        spectra.append(_descending(np.linalg.eigvalsh(rest)))
    return spectra


def participation_ratio(eigenvalues: np.ndarray) -> float:
    """``(Σλ)² / Σλ²``: between 1 and the number of eigenvalues (no unit). Raises ValueError if all are 0."""
    _check(eigenvalues)
    scaled = eigenvalues / eigenvalues.max()
    return float(scaled.sum() ** 2 / (scaled @ scaled))


def components_for_variance(eigenvalues: np.ndarray, share: float) -> int:
    """Smallest number of leading components that hold at least ``share`` (between 0 and 1) of the variance."""
    return _crossing(eigenvalues, share)[0]


def fractional_components_for_variance(eigenvalues: np.ndarray, share: float) -> float:
    """The same with a fractional last component: where the interpolated cumulative spectrum reaches ``share``.

    Never more than ``components_for_variance`` and less than one below it. A count that jumps by whole components has
    no useful jackknife; this has one.
    """
    count, fraction = _crossing(eigenvalues, share)
    return count - 1 + fraction


def _crossing(eigenvalues: np.ndarray, share: float) -> tuple[int, float]:
    """The number of the component in which ``share`` is reached, from 1, and the part of it that is needed."""
    _check(eigenvalues)
    if not 0 < share < 1:
        raise ValueError(f"expected a share of the variance between 0 and 1, found {share}")
    cumulative = np.cumsum(eigenvalues / eigenvalues.sum())
    count = int(np.argmax(cumulative >= share - _ROUNDING)) + 1
    below = cumulative[count - 2] if count > 1 else 0.0
    return count, float(min(1.0, (share - below) / (cumulative[count - 1] - below)))


def _check(eigenvalues: np.ndarray) -> None:
    if eigenvalues.ndim != 1 or not len(eigenvalues) or not np.isfinite(eigenvalues).all() or eigenvalues.min() < 0:
        raise ValueError(f"expected finite, non-negative eigenvalues, found {eigenvalues}")
    if eigenvalues.max() == 0:
        raise ValueError("all eigenvalues are 0: there is no variance to divide among components")


def _scores(points: np.ndarray) -> np.ndarray:
    """Centred float64 coordinates ``[n, min(n, D)]`` with the distances of ``points``: rotated when D > n."""
    if points.ndim != 2 or len(points) < 2:
        raise ValueError(f"expected at least 2 points [points, features], found shape {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("expected finite points, found NaN or infinity")
    if bool((points == points[0]).all()):
        raise ValueError("all points coincide: there is no variance to divide among components")
    centred = points.astype(np.float64)
    centred -= centred.mean(0)
    if centred.shape[1] <= len(centred):
        return centred
    values, vectors = np.linalg.eigh(centred @ centred.T)
    return vectors * np.sqrt(np.maximum(values, 0))


def _descending(values: np.ndarray) -> np.ndarray:
    """Ascending eigenvalues of a positive semi-definite matrix → descending, rounding below 0 removed."""
    return np.maximum(values[::-1], 0)

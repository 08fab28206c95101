"""Expected calibration error from streaming sums.

Predictions are sorted into M equal-width bins of their confidence (the probability of the most likely class), bin m
covering ((m−1)/M, m/M], and

    ECE = Σ_m (n_m / n) · |accuracy of bin m − mean confidence of bin m|

The estimate is biased upwards: within every bin the noise of the observed accuracy counts as miscalibration, of the
order √(M/n) at worst. Compare values of equal n only.

References: C. Guo et al. (2017), On Calibration of Modern Neural Networks, ICML, arXiv:1706.04599; M. P. Naeini et al.
(2015), Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI; on the bias R. Roelofs et al. (2022),
Mitigating Bias in Calibration Error Estimation, AISTATS, arXiv:2012.08668.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trace_offline.estimators.clustered import Codes, Estimate, Floats, jackknife

BINS = 15


def calibration_error(sums: Floats) -> Floats:
    """ECE of sums per bin, ``[…, M, 3] → […]`` (count, confidence, correct); NaN without predictions."""
    total = sums[..., 0].sum(-1)
    gaps = np.abs(sums[..., 2] - sums[..., 1]).sum(-1)
    return np.where(total > 0, gaps / np.maximum(total, 1.0), np.nan)


class CalibrationBins:
    """Sums per group and bin ``[G, M, 3]``; add predictions in any order and any number of times."""

    def __init__(self, n_groups: int, n_bins: int = BINS) -> None:
        self.n_bins = n_bins
        self.sums: Floats = np.zeros((n_groups, n_bins, 3))

    def add(self, confidence: NDArray[np.floating], correct: NDArray[np.bool_], groups: Codes) -> None:
        """``confidence [n]`` in (0, 1], ``correct [n]``, ``groups [n]`` in 0…G−1."""
        confidence = np.asarray(confidence, dtype=np.float64)
        bins = np.clip(np.ceil(confidence * self.n_bins).astype(np.int64) - 1, 0, self.n_bins - 1)
        cells = groups * self.n_bins + bins
        for slot, weights in enumerate((np.ones_like(confidence), confidence, correct.astype(np.float64))):
            flat = np.bincount(cells, weights=weights, minlength=self.sums.shape[0] * self.n_bins)
            self.sums[:, :, slot] += flat.reshape(-1, self.n_bins)

    def error(self) -> Estimate:
        """ECE with its standard error by leaving out one group at a time."""
        return jackknife(self.sums, calibration_error)

"""Where in depth a score arises: one number for a whole curve over layers, with a standard error.

For scores s_0 … s_L of the layers and a chance level c, two questions with two answers:

    centre of gravity   Σ ℓ g_ℓ / Σ g_ℓ            g_ℓ = max(0, s_ℓ − c)                 where is it readable?
    expected layer      Σ ℓ Δ_ℓ / Σ Δ_ℓ, ℓ ≥ 1     Δ_ℓ = max_{j≤ℓ} s_j − max_{j<ℓ} s_j   where does it become readable?

The second is the expected layer of Tenney et al. with the best layer so far in the place of a classifier that sees all
layers so far. Standard errors leave out one group of sentences at a time, the same for all layers, so what layers
share cancels. A ratio whose denominator is noise means nothing: both are refused unless the total gain exceeds two of
its standard errors.

Reference: I. Tenney, D. Das and E. Pavlick (2019), BERT Rediscovers the Classical NLP Pipeline, ACL, arXiv:1905.05950.
"""

from __future__ import annotations

import numpy as np

from trace_offline.estimators.clustered import Estimate, Floats, jackknife

_ERRORS = 2.0


def _scores(sums: Floats) -> Floats:
    """``[…, 2 + L+1]`` (rows, chance hits, hits of each layer) → shares ``[…, 1 + L+1]``."""
    return sums[..., 1:] / np.maximum(sums[..., :1], 1.0)


def _gains(sums: Floats) -> Floats:
    shares = _scores(sums)
    return np.maximum(shares[..., 1:] - shares[..., :1], 0.0)


def _steps(sums: Floats) -> Floats:
    return np.diff(np.maximum.accumulate(_scores(sums)[..., 1:], axis=-1), axis=-1)


def _ratio(weights: Floats, layers: Floats) -> Floats:
    total = weights.sum(-1)
    return np.where(total > 0, (weights @ layers) / np.where(total > 0, total, 1.0), np.nan)


def centre_of_gravity(sums: Floats, layers: Floats) -> Estimate:
    """Centre of the gains over chance. ``sums [G, 2 + F]``: per group of sentences the words, how many of them the
    chance level gets right, how many each of the F layers gets right; ``layers [F]`` their depths.

    ``Estimate(None, None)`` when no layer gains more than two standard errors.
    """
    total = jackknife(sums, lambda s: _gains(s).max(-1))
    if not _clear(total):
        return Estimate(None, None)
    return jackknife(sums, lambda s: _ratio(_gains(s), layers))


def expected_layer(sums: Floats, layers: Floats) -> Estimate:
    """Expected layer of the gains over the first layer; arguments and refusal as for ``centre_of_gravity``."""
    total = jackknife(sums, lambda s: _steps(s).sum(-1))
    if not _clear(total):
        return Estimate(None, None)
    return jackknife(sums, lambda s: _ratio(_steps(s), layers[1:]))


def _clear(total: Estimate) -> bool:
    return total.value is not None and total.stderr is not None and total.value > _ERRORS * total.stderr

"""Differences within pairs: is the second member larger than the first, and by how much?

The pairs are the observations. Where several pairs share a member (one sentence changed in several ways) they form a
cluster, and standard errors take clusters as independent. The two tests are two-sided and take pairs as independent:

- Wilcoxon's signed ranks: the differences are symmetric about 0. Differences of 0 are left out (Wilcoxon 1945); the
  p-value is exact for at most 50 pairs without ties, else from the normal approximation with tie correction.
- the sign test: positive and negative differences are equally likely. Differences of 0 are left out; exact binomial.

F. Wilcoxon (1945), Individual comparisons by ranking methods, Biometrics Bulletin 1; W. J. Conover (1999), Practical
Nonparametric Statistics, 3rd ed., 3.4 and 5.7.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_offline.estimators.clustered import Codes, Estimate, Floats, cluster_sums, ratio

_EXACT = 50


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Two-sided p-values; None with fewer than one difference that is not 0."""

    wilcoxon: float | None
    sign: float | None


def mean_within_clusters(values: Floats, clusters: Codes) -> Estimate:
    """Mean of ``values [n]``; standard error over ``clusters [n]`` (0…G−1), the plain s/√n when each has a cluster.

    Value None for n = 0, standard error None for fewer than two clusters.
    """
    if not len(values):
        return Estimate(None, None)
    groups = int(clusters.max()) + 1
    return ratio(cluster_sums(values, clusters, groups), cluster_sums(np.ones(len(values)), clusters, groups))


def share_positive(differences: Floats, clusters: Codes) -> Estimate:
    """Share of ``differences [n]`` above 0, those equal to 0 counting half, with the standard error of the mean."""
    return mean_within_clusters((np.sign(differences) + 1.0) / 2.0, clusters)


def paired_test(differences: Floats) -> PairedTest:
    """Wilcoxon's signed-rank test and the sign test of ``differences [n]``, all finite."""
    from scipy import stats

    moved = differences[differences != 0.0]
    if not len(moved):
        return PairedTest(None, None)
    sizes = np.abs(moved)
    exact = len(moved) <= _EXACT and len(np.unique(sizes)) == len(sizes)
    signed = stats.wilcoxon(moved, zero_method="wilcox", correction=False, method="exact" if exact else "approx")
    sign = stats.binomtest(int((moved > 0).sum()), len(moved), 0.5)
    return PairedTest(float(signed.pvalue), float(sign.pvalue))

"""Whether one forecaster is better than another, at any time that one cares to look.

Choe, Ramdas, "Comparing sequential forecasters", Operations Research 2023, theorem 2: with d_t the difference of two
bounded scores on label t, the mean of E[d_t | the past] lies in

    mean(d) +- u(V) / t        V = sum of (d_i - mean of the d before)^2

for all t at once with probability `level`, whatever the labels' dependence: one may stop as soon as zero is outside,
and look again after each label. u is the stitched boundary of Howard, Ramdas, McAuliffe, Sekhon, "Time-uniform,
nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49, 2021, theorem 1, for a sub-gamma process of
scale c, the length of the interval that holds all d: here 2, since half the Brier score lies in [0, 1].

    u(v) = sqrt(k1^2 v l + k2^2 c^2 l^2) + k2 c l     l = s log log_2(2 v) + log zeta(s) + log(2 / (1 - level))
    k1 = (2^(1/4) + 2^(-1/4)) / sqrt 2                k2 = (sqrt 2 + 1) / 2              v at least 1, s = 1.4
"""

from __future__ import annotations

from math import log, log2, sqrt
from typing import NamedTuple, Self

import numpy as np

from calibrators.numerics import Array

POWER, ZETA_OF_POWER = 1.4, 3.1055472779775810
K1, K2 = (2**0.25 + 2**-0.25) / sqrt(2), (sqrt(2) + 1) / 2
SCALE = 2.0


class Difference(NamedTuple):
    """What is kept of the differences so far: how many, their sum, and V.

    Examples
    --------
    Sixty labels are too few to tell a gain of .3 from none, two hundred are not.

    >>> Difference().after(np.full(60, 0.3) + np.tile([0.1, -0.1], 30)).interval()[0] > 0
    False
    >>> Difference().after(np.full(200, 0.3) + np.tile([0.1, -0.1], 100)).interval()[0] > 0
    True
    """

    n_labels: int = 0
    total: float = 0.0
    variation: float = 0.0

    def after(self, differences: Array) -> Self:
        """With further differences, (n_labels,), in their order."""
        count, total, variation = self
        for difference in differences.tolist():
            variation += (difference - (total / count if count else 0.0)) ** 2
            count, total = count + 1, total + difference
        return type(self)(count, total, variation)

    @property
    def mean(self) -> float:
        """0 before the first label."""
        return self.total / max(1, self.n_labels)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Bounds of the mean difference that hold for all times at once; nothing is known before the first label."""
        if not self.n_labels:
            return -1.0, 1.0
        v = max(self.variation, 1.0)
        loss = POWER * log(log2(2 * v)) + log(ZETA_OF_POWER) + log(2 / (1 - level))
        half = (sqrt(K1**2 * v * loss + (K2 * SCALE * loss) ** 2) + K2 * SCALE * loss) / self.n_labels
        mean = self.total / self.n_labels
        return max(-1.0, mean - half), min(1.0, mean + half)


def half_brier(probabilities: Array, y: Array) -> Array:
    """Half the Brier score of each row, in [0, 1]; of two classes the square of what class 1 is off by.

    >>> half_brier(np.array([[0.2, 0.8], [1.0, 0.0]]), np.array([1, 1])).round(2).tolist()
    [0.04, 1.0]
    """
    error = probabilities.astype(np.float64)
    error[np.arange(len(y)), y] -= 1.0
    scores: Array = np.einsum("nk,nk->n", error, error) / 2
    return scores

"""masked_temperature: one temperature, fitted while the largest logit of each row is partly hidden.

In the spirit of Zhu, Lei, Zhang and others, "Rethinking Data Distillation: Do Not Overlook Calibration", ICCV 2023,
arXiv 2307.12463: a network trained on distilled data gives maximal logits that are all alike, which leaves a
temperature little to go by, so the temperature is fitted on masked logits. No code was published. The authors' are the
idea of masking and p = softmax(z / T); the mask, its share, the loss and the solver are this file's, so none of their
numbers are to be expected here.

The mask hides the largest logit of a row (of several that are equal the first), whatever the label is. Where that is
the label's own, nothing remains to be explained; everywhere else the label is one of the K - 1 others. With s the
`masked_share`, v the weights summing to one and a_i the argmax of row i, T = 1/beta minimises

    L(beta) = (1 - s) sum_i v_i CE(beta z_i, y_i)  +  s sum_{i: y_i != a_i} v_i CE(beta z_i without a_i, y_i)

    CE(z, y) = log sum_k exp(z_k) - z_y

The second sum is the log likelihood of the labels given that the largest logit is wrong. It is one of the two terms of

    CE(z, y) = - log P(is the label a?) - [y != a] log P(y | y != a)

so masking lowers the weight of the first question, "is the largest logit right?", to 1 - s, and leaves that of the
second at one. Where the labels follow softmax(z / T) for some T, both terms have their minimum there and each s finds
that T; elsewhere s says which question T answers best. s = 0 is `temperature`; so is every s at K = 2, where one class
remains.

L is convex in beta. Its slope never decreases, so the root is found by Brent's method in log beta, to 1e-12. Where
there is no finite optimum T ends where that of `temperature` would.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq

from calibrators.kinds.temperature import (
    HIGHEST,
    LOG_RANGE,
    LOWEST,
    RELATIVE_PRECISION,
    TemperatureScaling,
    _derivatives,
)
from calibrators.numerics import Array


class MaskedTemperatureScaling(TemperatureScaling):
    """p = softmax(z / T), T fitted with the largest logits partly hidden. Keeps the argmax, so the accuracy.

    Parameters
    ----------
    masked_share : 0 <= s < 1, the weight of the loss without each row's largest logit

    Attributes
    ----------
    temperature_ : () float64, T > 0
    converged_ : whether T is an interior optimum (not stored in the artifact)

    Examples
    --------
    The largest logit is right half the time. Where it is wrong, the second is right three times in four: a gap of
    log 3 where the logits show 4, so the more is masked, the nearer T comes to 4 / log 3 = 3.64.

    >>> logits, y = [[8.0, 4.0, 0.0]] * 8, [0, 0, 0, 0, 1, 1, 1, 2]
    >>> for share in (0.0, 0.5, 0.999):
    ...     print(f"{MaskedTemperatureScaling(share).fit(logits, y).temperature_:.2f}")
    6.72
    5.93
    3.65
    """

    def __init__(self, masked_share: float = 0.25) -> None:
        self.masked_share = masked_share

    def check_params(self) -> None:
        share = self.masked_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise ValueError(f"masked_share must be a number in 0 <= s < 1, got {share!r}")

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        centred = logits - logits[np.arange(len(y)), y][:, None]
        scale = float(np.abs(centred).max()) or 1.0
        centred /= scale
        weight = weight / weight.sum()
        masked = _without_largest(centred, logits.argmax(axis=1), y, weight)
        log_beta, self.converged_ = _root((centred, weight), masked, self.masked_share)
        self.temperature_ = np.asarray(np.clip(scale * np.exp(-log_beta), LOWEST, HIGHEST))


def _without_largest(centred: Array, largest: Array, y: Array, weight: Array) -> tuple[Array, Array]:
    """The rows whose label is not hidden, (n_rows, n_classes - 1), and their weights."""
    n_classes = centred.shape[1]
    remains = largest != y
    others = np.arange(n_classes) != largest[remains, None]
    return centred[remains][others].reshape(-1, n_classes - 1), weight[remains]


def _root(whole: tuple[Array, Array], masked: tuple[Array, Array], share: float) -> tuple[float, bool]:
    """The log beta at which L' is zero, for logits scaled to ±1 and centred on the label; whether it is interior."""

    def slope(log_beta: float) -> float:
        return (1 - share) * _derivatives(*whole, log_beta)[0] + share * _derivatives(*masked, log_beta)[0]

    if slope(-LOG_RANGE) >= 0:
        return -LOG_RANGE, False
    if slope(LOG_RANGE) <= 0:
        return LOG_RANGE, False
    return float(brentq(slope, -LOG_RANGE, LOG_RANGE, xtol=RELATIVE_PRECISION)), True

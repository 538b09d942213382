"""Proper scores in parts: how much of a loss calibration could take away, and how much only a better model.

Sources. Murphy, "A New Vector Partition of the Probability Score", Journal of Applied Meteorology 12 (1973); with
isotonic regression in place of bins: Dimitriadis, Gneiting, Jordan, "Stable Reliability Diagrams for Probabilistic
Classifiers", PNAS 118 (2021). The log loss: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section
4.2, for the temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression

from calibrators.kinds.temperature import TemperatureScaling
from calibrators.metrics.checks import check_labelled
from calibrators.metrics.proper import brier_scores, log_losses
from calibrators.numerics import Array


@dataclass(frozen=True)
class BrierDecomposition:
    """brier_score = calibration - resolution + uncertainty = calibration + refinement; no part is negative.

    Attributes
    ----------
    calibration : what the best increasing map of each class's probability would take off; 0 is perfect
    resolution : how much the mapped probabilities tell beyond the base rates; larger is better
    uncertainty : the Brier score of the base rates themselves: a property of the labels alone

    Examples
    --------
    >>> parts = BrierDecomposition(calibration=0.02, resolution=0.30, uncertainty=0.50)
    >>> print(f"{parts.refinement:.2f} {parts.brier_score:.2f}")
    0.20 0.22
    """

    calibration: float
    resolution: float
    uncertainty: float

    @property
    def refinement(self) -> float:
        """The Brier score after the best map, uncertainty - resolution: left for a better model."""
        return self.uncertainty - self.resolution

    @property
    def brier_score(self) -> float:
        return self.calibration + self.refinement


def brier_decomposition(probabilities: ArrayLike, y: ArrayLike) -> BrierDecomposition:
    """Calibration, resolution and uncertainty, the sums over classes of their one-against-rest parts.

    For class k let q be the isotonic regression of [y = k] on p_k, the increasing map with the least squared error,
    and r its base rate. With S the mean of (forecast - [y = k])^2, the parts are S(p_k) - S(q), S(r) - S(q) and S(r).
    No bins have to be chosen, and the sum is the Brier score to the last digit, where bins leave a remainder. The map
    is fitted to the rows it is judged on, so calibration and resolution both come out a little large with few rows.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1

    Examples
    --------
    Right 6 times in 10 at 0.9, and 4 in 10 of the other class at 0.1: the map says 0.6 and 0.4.

    >>> parts = brier_decomposition([[0.9, 0.1]] * 10 + [[0.1, 0.9]] * 10, [0] * 6 + [1] * 4 + [1] * 6 + [0] * 4)
    >>> print(f"{parts.calibration:.2f} - {parts.resolution:.2f} + {parts.uncertainty:.2f} = {parts.brier_score:.2f}")
    0.18 - 0.02 + 0.50 = 0.66
    """
    p, labels = check_labelled(probabilities, y)
    shares = np.bincount(labels, minlength=p.shape[1]) / len(labels)
    uncertainty = float(shares @ (1 - shares))
    refinement = sum(_refinement(p[:, k], labels == k) for k in np.flatnonzero(shares))
    calibration = float(brier_scores(p, labels).mean()) - refinement
    # Both are sums of squares; rounding may leave one at -1e-17.
    return BrierDecomposition(max(calibration, 0.0), max(uncertainty - refinement, 0.0), uncertainty)


def nll_gap(probabilities: ArrayLike, y: ArrayLike) -> float:
    """Log loss less the log loss after the best temperature for these very rows, in nats; 0 or more.

    The part of the log loss that one number would take away: what a temperature cannot mend counts as the model's. A
    probability of 0 where the label came true is an infinite loss, and an infinite gap.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1

    Examples
    --------
    Right three times in four at 0.9; the best temperature says 0.75:
    -(3 log 0.9 + log 0.1) / 4 + (3 log 0.75 + log 0.25) / 4.

    >>> print(f"{nll_gap([[0.9, 0.1]] * 4, [0, 0, 0, 1]):.6f}")
    0.092332
    """
    p, labels = check_labelled(probabilities, y)
    loss = float(log_losses(p, labels).mean())
    if np.isinf(loss):
        return loss
    logits = np.maximum(p, np.finfo(p.dtype).tiny, dtype=np.float64)
    np.log(logits, out=logits)  # in place, and in the type of the fit: half the memory of a fit on copies
    best = TemperatureScaling().fit(logits, labels).predict_proba(logits)
    return max(loss - float(log_losses(best, labels).mean()), 0.0)


def _refinement(p: Array, came_true: Array) -> float:
    """Mean squared error of the isotonic regression of came_true on p: the mean of q (1 - q), q its value at a row."""
    order = np.argsort(p)
    starts = np.flatnonzero(np.diff(p[order], prepend=-1))  # one entry for rows of one probability
    rows = np.diff(starts, append=len(p))
    q = isotonic_regression(np.add.reduceat(came_true[order].astype(np.float64), starts) / rows, weights=rows).x
    return float(rows @ (q * (1 - q)) / len(p))

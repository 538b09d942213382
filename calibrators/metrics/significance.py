"""Tests of calibration: whether chance alone explains the distance between probabilities and labels.

Sources. Spiegelhalter, "Probabilistic Prediction in Patient Management and Clinical Trials", Statistics in Medicine 5
(1986). Hosmer and Lemeshow, "Goodness of Fit Tests for the Multiple Logistic Regression Model", Communications in
Statistics 9 (1980).

The hypothesis is that each label was drawn from its row of probabilities. The p-value is the probability, if it holds,
of a statistic at least as far out as this one. The rows must be ones the calibrator was not fitted on. With enough rows
every model is rejected: a test says that an error is there, not that it matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import chi2, norm

from calibrators.metrics.binned import equal_count_edges
from calibrators.metrics.calibration import binned_curve, top_label
from calibrators.metrics.checks import check_labelled
from calibrators.metrics.proper import of_label


@dataclass(frozen=True)
class CalibrationTest:
    """A test's statistic, and the probability of one at least as far out under calibration.

    Examples
    --------
    >>> print(CalibrationTest(2.5, 0.0124))
    2.5 (p = 0.0124)
    """

    statistic: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.statistic:.4g} (p = {self.p_value:.3g})"


def spiegelhalter_z(probabilities: ArrayLike, y: ArrayLike) -> CalibrationTest:
    """How many standard deviations the Brier score lies above its expectation under calibration; two-sided.

    For label k drawn from p_i the Brier score of row i has expectation 1 - sum_k p_ik^2 and differs from it by
    2 (sum_k p_ik^2 - p_iy), so with e_i = sum_k p_ik^2

        z = sum_i (e_i - p_iy) / sqrt(sum_i [sum_k p_ik^3 - e_i^2])

    which is Spiegelhalter's z for two classes. Standard normal under calibration; above 0 the model is overconfident,
    below 0 underconfident. It needs no bins and is the more powerful for it, but errors of opposite direction cancel,
    and a row of equal probabilities says nothing.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1

    Returns
    -------
    z and its p-value; z is 0 where no row could have surprised and none did, infinite where one of those did

    Examples
    --------
    A hundred rows at 0.8, 70 right: (0.68 * 100 - 0.8 * 70 - 0.2 * 30) / sqrt(100 (0.52 - 0.68^2)) = 6 / 2.4.

    >>> print(spiegelhalter_z([[0.8, 0.2]] * 100, [0] * 70 + [1] * 30))
    2.5 (p = 0.0124)
    """
    p, labels = check_labelled(probabilities, y)
    squares = np.einsum("ik,ik->i", p, p, dtype=np.float64)
    cubes = np.einsum("ik,ik,ik->i", p, p, p, dtype=np.float64)
    z = standardised(float((squares - of_label(p, labels)).sum()), float((cubes - squares**2).clip(min=0).sum()))
    return CalibrationTest(z, float(2 * norm.sf(abs(z))))


def hosmer_lemeshow(probabilities: ArrayLike, y: ArrayLike, n_bins: int = 10) -> CalibrationTest:
    """Chi-square distance between how many top labels were right and how many should have been, over equal-mass bins.

    With count n_b, mean confidence c_b and accuracy a_b of each bin that holds a row

        sum_b n_b (a_b - c_b)^2 / (c_b (1 - c_b))

    is nearly chi-square under calibration, with as many degrees of freedom as there are bins (two fewer are taken where
    a logistic regression was fitted on these very rows). It wants n_b c_b (1 - c_b) of 5 or more in each bin. Where
    confidences differ within a bin the statistic comes out a little small, so the test errs towards not rejecting.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1
    n_bins : number of bins of equal mass; rows of equal confidence share one, which can leave fewer

    Examples
    --------
    A hundred rows at 0.8, 70 right: 100 * 0.1^2 / 0.16, one bin.

    >>> print(hosmer_lemeshow([[0.8, 0.2]] * 100, [0] * 70 + [1] * 30))
    6.25 (p = 0.0124)
    """
    confidence, correct = top_label(*check_labelled(probabilities, y))
    curve = binned_curve(confidence, correct, equal_count_edges(confidence, n_bins))
    filled = curve.counts > 0
    said = curve.confidence[filled].clip(max=1)
    deviations = [
        standardised(gap, variance)
        for gap, variance in zip(curve.accuracy[filled] - said, said * (1 - said) / curve.counts[filled], strict=True)
    ]
    statistic = float(np.square(deviations).sum())
    return CalibrationTest(statistic, float(chi2.sf(statistic, len(deviations))))


def standardised(deviation: float, variance: float) -> float:
    """deviation / sqrt(variance); 0 where nothing could vary and nothing did, infinite where something did."""
    if variance > 0:
        return float(deviation / np.sqrt(variance))
    return float(np.sign(deviation) * np.inf) if abs(deviation) > 1e-9 else 0.0

"""Selective prediction: how often the model errs on the rows it is surest of.

Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017 (the risk-coverage curve);
Geifman, Uziel, El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019 (its area).

Only the order of the confidences matters here. Temperature scaling keeps the order of two classes, but not that of the
confidences of more, so a calibrator can change the curve and leave every prediction as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.metrics.calibration import top_label
from calibrators.metrics.checks import check_labelled


@dataclass(frozen=True)
class RiskCoverageCurve:
    """What is left over when the surest rows alone are answered, one entry per number of answered rows.

    Attributes
    ----------
    coverage : (n_samples,) share of the rows that is answered: 1/n, 2/n, .., 1
    risk : (n_samples,) share of those answers that is wrong
    confidence : (n_samples,) the lowest confidence among them: answer from here on to reach that coverage
    """

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    confidence: NDArray[np.float64]


def risk_coverage_curve(probabilities: ArrayLike, y: ArrayLike) -> RiskCoverageCurve:
    """Share of wrong answers against share of rows answered, surest first.

    Rows of one confidence err alike: each counts the mean error of them all, which is what a random order among them
    gives on average. So the order of the rows has no say.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1

    Examples
    --------
    >>> curve = risk_coverage_curve([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.4, 0.6]], [0, 1, 0, 0])
    >>> print(curve.coverage, curve.risk)  # 0.6 twice, one of the two wrong
    [0.25 0.5  0.75 1.  ] [0.  0.5 0.5 0.5]
    """
    confidence, correct = top_label(*check_labelled(probabilities, y))
    order = np.argsort(-confidence)
    descending = confidence[order]
    starts = np.flatnonzero(np.diff(descending, prepend=np.inf))
    rows = np.diff(starts, append=len(order))
    wrong = np.repeat(np.add.reduceat(1 - correct[order], starts) / rows, rows)
    answered = np.arange(1, len(order) + 1)
    return RiskCoverageCurve(answered / len(order), np.cumsum(wrong) / answered, descending.astype(np.float64))


def aurc(probabilities: ArrayLike, y: ArrayLike) -> float:
    """Area under the risk-coverage curve: the mean of its risks over all numbers of answered rows; 0 to 1, 0 is best.

    A model whose confidence says nothing scores its error rate; one that is right on every row scores 0.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1

    Examples
    --------
    >>> aurc([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.4, 0.6]], [0, 1, 0, 0])
    0.375
    """
    return float(risk_coverage_curve(probabilities, y).risk.mean())

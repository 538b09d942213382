"""Proper scores: the log loss, the Brier score, and the accuracy beside them.

Gneiting and Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", JASA 102 (2007), sections 3.1 and
4.1. A score is proper when no other forecast than the true distribution has a smaller expectation, so calibrators are
fitted and chosen by these; a calibration error is not proper (the base rate for every row has none) and describes.

Each score is a mean over rows of a value per row, which `log_losses`, `brier_scores` and `hits` give.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.metrics.checks import check_labelled
from calibrators.numerics import Array


def log_loss(probabilities: ArrayLike, y: ArrayLike) -> float:
    """Mean of -log p_y, the negative log-likelihood, in nats. 0 is perfect; log K is what a uniform guess gets.

    Nothing is clipped: a probability of 0 on the class that came true is an infinite loss, and the mean is infinite.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1

    Examples
    --------
    >>> print(f"{log_loss([[0.5, 0.5], [0.25, 0.75]], [0, 1]):.6f}")  # (log 2 + log 4/3) / 2
    0.490415
    """
    return float(log_losses(*check_labelled(probabilities, y)).mean())


def brier_score(probabilities: ArrayLike, y: ArrayLike) -> float:
    """Mean of sum_k (p_k - [y = k])^2: 0 is perfect, 2 is the worst.

    Brier, "Verification of Forecasts Expressed in Terms of Probability", Monthly Weather Review 78 (1950): the sum over
    all classes. For two classes it is twice the squared error of one class that some libraries report.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1

    Examples
    --------
    >>> brier_score([[0.5, 0.5], [0.25, 0.75]], [0, 1])  # (1/4 + 1/4 + 1/16 + 1/16) / 2
    0.3125
    """
    return float(brier_scores(*check_labelled(probabilities, y)).mean())


def accuracy(probabilities: ArrayLike, y: ArrayLike) -> float:
    """Share of rows whose most probable class came true; the first of equally probable classes counts.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1

    Examples
    --------
    >>> accuracy([[0.5, 0.5], [0.25, 0.75]], [1, 1])
    0.5
    """
    return float(hits(*check_labelled(probabilities, y)).mean())


def log_losses(p: Array, y: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log p_y of each row of checked inputs, (n_samples,)."""
    with np.errstate(divide="ignore"):  # -log 0 is the infinity that was asked for
        return np.asarray(-np.log(of_label(p, y)))


def brier_scores(p: Array, y: NDArray[np.int64]) -> NDArray[np.float64]:
    """sum_k (p_k - [y = k])^2 of each row of checked inputs, (n_samples,)."""
    own = of_label(p, y)
    # All classes as if none came true, then the label's own term put right: no one-hot matrix.
    return np.asarray(np.einsum("ik,ik->i", p, p, dtype=np.float64) + (1 - 2 * own))


def hits(p: Array, y: NDArray[np.int64]) -> NDArray[np.float64]:
    """1.0 where the most probable class came true, else 0.0, (n_samples,)."""
    return np.asarray(p.argmax(axis=1) == y, dtype=np.float64)


def of_label(p: Array, y: NDArray[np.int64]) -> NDArray[np.float64]:
    """p_y, the probability of the class that came true, of each row of checked inputs, (n_samples,)."""
    return np.asarray(p[np.arange(len(y)), y], dtype=np.float64)

"""Binned calibration errors for questions that one figure at one number of bins leaves open.

Sources. Without the bias of noise: Kumar, Liang, Ma, "Verified Uncertainty Calibration", NeurIPS 2019.
Each predicted class on its own: Gupta and Ramdas, "Top-label Calibration and Multiclass-to-binary Reductions", ICLR
2022. Many numbers of bins at once: Tao et al., "A Benchmark Study on Calibration", ICLR 2024, whose list
`BIN_COUNTS` is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.metrics.calibration import (
    ReliabilityCurve,
    bin_index,
    binned_curve,
    equal_mass_edges,
    equal_width_edges,
    top_label,
    weighted_gaps,
)
from calibrators.metrics.checks import check_labelled, check_n_bins
from calibrators.numerics import Array

BIN_COUNTS = (5, 10, 15, 20, 25, 50, 100, 200, 500)


def debiased_squared_error(probabilities: ArrayLike, y: ArrayLike, n_bins: int = 15) -> float:
    """The squared calibration error of the top label, with the share that noise alone adds taken off.

    With share of rows P_b, count n_b, mean confidence c_b and accuracy a_b of bins of equal mass:

        sum_b P_b [(c_b - a_b)^2 - a_b (1 - a_b) / (n_b - 1)]

    The expectation is the squared error between the bins' means, so a calibrated model scores about 0, and below 0 as
    often as above; its root, where positive, compares with the ECE. A bin of one row counts as 0: its variance is
    unknown. Rows of equal confidence share a bin.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1
    n_bins : number of bins of equal mass; ties can leave some of them empty

    Examples
    --------
    Ten rows at confidence 0.9, six right: 0.3^2 less 0.6 * 0.4 / 9.

    >>> print(f"{debiased_squared_error([[0.9, 0.1]] * 10, [0] * 6 + [1] * 4):.6f}")
    0.063333
    """
    confidence, correct = top_label(*check_labelled(probabilities, y))
    return debiased_squared_gap(binned_curve(confidence, correct, equal_count_edges(confidence, n_bins)))


def debiased_squared_gap(curve: ReliabilityCurve) -> float:
    """`debiased_squared_error` of rows that are in bins already, whatever the bins."""
    several = curve.counts > 1
    counts, said, right = curve.counts[several], curve.confidence[several], curve.accuracy[several]
    return float(counts @ ((said - right) ** 2 - right * (1 - right) / (counts - 1)) / curve.counts.sum())


def top_label_calibration_error(probabilities: ArrayLike, y: ArrayLike, n_bins: int = 15) -> float:
    """The ECE of the rows predicted as each class, weighted by their number: bins of equal width; 0 to 1.

    A model that says 0.7 and is right nine times in ten where it predicts one class, five in ten where another, has an
    ECE of 0 and a top-label error of 0.2. Never below the ECE at the same number of bins. Its bias is that of up to
    n_classes times as many bins.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1
    n_bins : number of bins over [0, 1] for each predicted class

    Examples
    --------
    >>> p, y = [[0.7, 0.3]] * 10 + [[0.3, 0.7]] * 10, [0] * 9 + [1] + [1] * 5 + [0] * 5
    >>> print(f"{top_label_calibration_error(p, y):.6f}")
    0.200000
    """
    p, labels = check_labelled(probabilities, y)
    confidence, correct = top_label(p, labels)
    cell = p.argmax(axis=1) * n_bins + bin_index(confidence, equal_width_edges(n_bins, confidence.dtype))
    return float(np.abs(np.bincount(cell, weights=confidence - correct)).sum() / len(labels))


def calibration_errors_by_bins(
    probabilities: ArrayLike, y: ArrayLike, bin_counts: Sequence[int] = BIN_COUNTS
) -> dict[str, dict[int, float]]:
    """The ECE at several numbers of bins, of equal width and of equal mass: how much of a figure is the choice of bins.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1
    bin_counts : numbers of bins

    Returns
    -------
    `equal_width` and `equal_mass`, each from number of bins to the value of `expected_calibration_error` and of
    `adaptive_calibration_error`

    Examples
    --------
    >>> calibration_errors_by_bins([[0.75, 0.25]] * 4 + [[0.5, 0.5]] * 4, [0] * 8, bin_counts=[1, 2])
    {'equal_width': {1: 0.375, 2: 0.375}, 'equal_mass': {1: 0.375, 2: 0.375}}
    """
    confidence, correct = top_label(*check_labelled(probabilities, y))
    order = np.argsort(confidence)  # once: sorting again what is in order costs next to nothing
    confidence, correct = confidence[order], correct[order]
    return {
        "equal_width": {
            n: _binned_error(confidence, correct, equal_width_edges(n, confidence.dtype)) for n in bin_counts
        },
        "equal_mass": {n: _binned_error(confidence, correct, equal_mass_edges(confidence, n)) for n in bin_counts},
    }


def equal_count_edges(values: Array, n_bins: int) -> Array:
    """Edges that cut the sorted values at ranks n/n_bins, .., n, rounded up, (n_bins + 1,); every row has a bin.

    `equal_mass_edges` interpolates between values and leaves the smallest out, as published figures do.
    """
    check_n_bins(n_bins)
    last = -(-np.arange(1, n_bins + 1) * len(values) // n_bins) - 1
    return np.concatenate([np.zeros(1, values.dtype), np.sort(values)[last]])


def _binned_error(confidence: Array, correct: NDArray[np.float64], edges: Array) -> float:
    return float(weighted_gaps(binned_curve(confidence, correct, edges), len(confidence)).sum())

"""Kernel calibration errors: whether rows with like probabilities err alike.

Sources. MMCE: Kumar, Sarawagi, Jain, "Trainable Calibration Measures for Neural Networks from Kernel Mean Embeddings",
ICML 2018. SKCE: Widmann, Lindsten, Zachariah, "Calibration Tests in Multi-class Classification: A Unifying Framework",
NeurIPS 2019, table 1.

Under calibration the errors of different rows have mean zero and are independent, whatever their probabilities; so has
their product, weighted by a kernel of the probabilities. Errors shared by neighbours make the weighted mean positive.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.spatial.distance import pdist, squareform
from scipy.stats import norm

from calibrators.metrics.calibration import top_label
from calibrators.metrics.checks import check_labelled
from calibrators.metrics.significance import CalibrationTest, standardised
from calibrators.numerics import Array, blocks

MMCE_WIDTH = 0.4
"""Of the Laplacian kernel, in the paper and in its code."""

ESTIMATORS = ("linear", "quadratic")

MOST_QUADRATIC_ROWS = 4000
"""The quadratic estimator holds a kernel matrix of (n_samples, n_samples): 128 MB."""


def mmce(probabilities: ArrayLike, y: ArrayLike) -> float:
    """Maximum mean calibration error of the top label, 0 to 1.

    With c_i the confidence of row i, a_i = 1 where it was right and g_i = a_i - c_i

        MMCE^2 = sum_ij g_i g_j exp(-|c_i - c_j| / 0.4) / n^2

    Exact in O(n log n): over ascending confidences the exponential is the product of exp(-c_i / 0.4) and
    exp(c_j / 0.4), so the inner sum is a running one. The terms i = j bias it upwards, by about 1/n in the square.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1

    Examples
    --------
    All rows at one confidence: the distance between confidence and accuracy.

    >>> print(f"{mmce([[0.9, 0.1]] * 10, [0] * 6 + [1] * 4):.6f}")
    0.300000
    """
    confidence, correct = top_label(*check_labelled(probabilities, y))
    order = np.argsort(confidence)
    ascending = confidence[order].astype(np.float64)
    gaps = correct[order] - ascending
    growth = np.exp(ascending / MMCE_WIDTH)
    below = np.cumsum(gaps * growth) / growth  # includes the row itself
    square = float(2 * gaps @ below - gaps @ gaps)
    return math.sqrt(max(square, 0.0)) / len(gaps)


def skce_test(
    probabilities: ArrayLike,
    y: ArrayLike,
    *,
    estimator: Literal["linear", "quadratic"] = "linear",
    n_resamples: int = 500,
    seed: int = 0,
) -> CalibrationTest:
    """Test of calibration of the whole row, all classes, by the squared kernel calibration error.

    With r_i = onehot(y_i) - p_i and h_ij = exp(-|p_i - p_j| / w) r_i . r_j, Euclidean distance, the statistic is the
    mean of h_ij over pairs of different rows, so 0 in expectation under calibration, and may be negative.

    linear : pairs (1, 2), (3, 4), ..: O(n_samples n_classes). The pairs are independent, so mean over standard error is
        nearly standard normal; one-sided. It wants some hundreds of rows.
    quadratic : all pairs of at most 4000 rows: far more powerful. The p-value is exact at any number of rows: the
        statistic's rank among those of labels drawn from the probabilities themselves. For repeated data sets vary the
        seed, or the same draws decide all of them.

    The width w is the median distance of the rows (1, 2), (2, 3), .., never looking at a label.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1
    estimator : "linear" or "quadratic"
    n_resamples : draws of all labels, for "quadratic"; its p-value is a multiple of 1 / (n_resamples + 1)
    seed : the same seed gives the same p-value, for "quadratic"

    Raises
    ------
    ValueError
        if there are fewer than 4 rows, more than 4000 for "quadratic", `n_resamples` is not positive, or for another
        estimator

    Examples
    --------
    Sixty of a hundred alike rows right: (2 (60 * 0.1 - 40 * 0.9)^2 - 60 * 0.02 - 40 * 1.62) / 9900.

    >>> p, y = [[0.9, 0.1]] * 100, [0, 0, 0, 1, 1] * 20
    >>> print(skce_test(p, y, estimator="quadratic"))
    0.1752 (p = 0.002)
    """
    p, labels = check_labelled(probabilities, y)
    if len(p) < 4:
        raise ValueError(f"the test needs at least 4 rows, got {len(p)}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if estimator == "linear":
        return _linear_test(p, labels)
    if len(p) > MOST_QUADRATIC_ROWS:
        raise ValueError(
            f"the quadratic estimator takes at most {MOST_QUADRATIC_ROWS} rows, got {len(p)}: pass fewer, or 'linear'"
        )
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    return _quadratic_test(p.astype(np.float64), labels, n_resamples, seed)


def _linear_test(p: Array, y: NDArray[np.int64]) -> CalibrationTest:
    n_pairs = len(p) // 2
    first, second = slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2)
    row = np.arange(n_pairs)
    kernel = np.exp(-_distances(p[first], p[second]) / _width(p))
    shared = np.einsum("ik,ik->i", p[first], p[second], dtype=np.float64)
    h = kernel * ((y[first] == y[second]) - p[first][row, y[second]] - p[second][row, y[first]] + shared)
    z = standardised(float(h.mean()), float(h.var(ddof=1) / n_pairs))
    return CalibrationTest(float(h.mean()), float(norm.sf(z)))


def _quadratic_test(p: Array, y: NDArray[np.int64], n_resamples: int, seed: int) -> CalibrationTest:
    n, n_classes = p.shape
    kernel = np.exp(-squareform(pdist(p)) / _width(p))
    np.fill_diagonal(kernel, 0.0)
    # r_i . r_j = [y_i = y_j] - p_i[y_j] - p_j[y_i] + p_i . p_j: the last does not know the labels, two are one lookup.
    smoothed = kernel @ p
    constant = float(np.vdot(p, smoothed))
    draws = np.vstack([y, _labels_drawn_from(p, n_resamples, seed)])
    sums = np.concatenate([_label_sums(kernel, smoothed, draws[part]) for part in blocks(len(draws), n * n_classes)])
    statistics = (sums + constant) / (n * (n - 1))
    # A tie counts against rejection; rounding must not break one.
    reached = np.count_nonzero(statistics[1:] >= statistics[0] - 1e-12)
    return CalibrationTest(float(statistics[0]), (1 + reached) / (1 + n_resamples))


def _label_sums(kernel: Array, smoothed: Array, draws: NDArray[np.int64]) -> Array:
    """sum_ij k_ij ([y_i = y_j] - 2 p_i[y_j]) of each draw of labels (n_draws, n_samples), (n_draws,)."""
    n_draws, n = draws.shape
    n_classes = smoothed.shape[1]
    row = np.arange(n)
    column = draws + n_classes * np.arange(n_draws)[:, None]
    one_hot = sparse.csc_array(
        (np.ones(draws.size), (np.tile(row, n_draws), column.ravel())), shape=(n, n_draws * n_classes)
    )
    alike = (one_hot.T @ kernel)[column, row]  # the kernel is symmetric
    return np.asarray((alike - 2 * smoothed[row, draws]).sum(axis=1))


def _labels_drawn_from(p: Array, n_draws: int, seed: int) -> NDArray[np.int64]:
    """Labels from each row's distribution, (n_draws, n_samples): one sorted list of all rows' cumulative sums."""
    n, n_classes = p.shape
    cumulative = np.cumsum(p, axis=1)
    row = np.arange(n)
    steps = (cumulative / cumulative[:, -1:] + row[:, None]).ravel()
    places = np.random.default_rng(seed).random((n_draws, n)) + row
    labels: NDArray[np.int64] = np.searchsorted(steps, places, side="right") - n_classes * row
    return labels.clip(0, n_classes - 1)


def _width(p: Array) -> float:
    """The median distance between neighbouring rows; 1 where that is 0, most rows being the same."""
    return float(np.median(_distances(p[:-1], p[1:]))) or 1.0


def _distances(first: Array, second: Array) -> NDArray[np.float64]:
    difference = first - second
    return np.asarray(np.sqrt(np.einsum("ik,ik->i", difference, difference, dtype=np.float64)))

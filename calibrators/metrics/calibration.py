"""Calibration errors: how far what the model says lies from how often it is right.

Sources. Binned error ECE and its maximum MCE: Naeini, Cooper, Hauskrecht, "Obtaining Well Calibrated Probabilities
Using Bayesian Binning", AAAI 2015, and Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equations 3
and 5. Bins of equal mass: Nguyen and O'Connor, EMNLP 2015; edges as Mukhoti et al., "Calibrating Deep Neural Networks
using Focal Loss", NeurIPS 2020. Classwise: Kull et al., "Beyond temperature scaling", NeurIPS 2019. Without bins: Gupta
et al., "Calibration of Neural Networks using Splines", ICLR 2021.

With c_i the confidence of row i (its top probability) and a_i = 1 where the top class came true, a binned error is

    sum_b n_b / n * |accuracy_b - confidence_b| = sum_b |sum_{i in b} (c_i - a_i)| / n

Bins are closed above: lo < c <= hi. A confidence of exactly 0 counts in the first bin. Edges of equal width are the
floats nearest to b / n_bins, in the precision of the probabilities, so that a confidence written 0.6 lies on the edge
0.6 and not beside it.

Every binned error is biased upwards: the absolute value of noise is not zero. Fifteen bins, two thousand rows and a
perfect model give about 0.017. `scores` gives intervals that allow for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from calibrators.metrics.checks import check_labelled, check_n_bins
from calibrators.metrics.proper import hits
from calibrators.numerics import Array

_CELLS_AT_A_TIME = 1 << 20
"""Entries of (rows, classes) that the classwise error bins at once: bounds its temporaries at a few tens of MB."""


@dataclass(frozen=True)
class ReliabilityCurve:
    """What a reliability diagram draws, one entry per bin.

    Attributes
    ----------
    edges : (n_bins + 1,) lower edge of the first bin to upper edge of the last
    counts : (n_bins,) rows in each bin
    confidence : (n_bins,) their mean confidence, NaN in an empty bin
    accuracy : (n_bins,) share of them that were right, NaN in an empty bin
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    def consistency_band(self, level: float = 0.95) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where the accuracy of each bin would lie, with probability `level` or more, if the model were calibrated.

        Bröcker and Smith, "Increasing the Reliability of Reliability Diagrams", Weather and Forecasting 22 (2007),
        resample labels from the forecasts. Here the number right in a bin is taken as Binomial(count, mean confidence),
        whose quantiles need no resampling. It is a little wider than the exact law: by the spread of confidences within
        the bin.

        Returns
        -------
        low, high : (n_bins,) each, NaN in an empty bin
        """
        low = _binomial_quantile((1 - level) / 2, self.counts, self.confidence)
        high = _binomial_quantile((1 + level) / 2, self.counts, self.confidence)
        return low, high


def reliability_curve(probabilities: ArrayLike, y: ArrayLike, n_bins: int = 15) -> ReliabilityCurve:
    """Count, mean confidence and accuracy in bins of equal width of the top-label confidence.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1
    n_bins : number of bins over [0, 1]

    Examples
    --------
    >>> curve = reliability_curve([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], [0, 1, 0], n_bins=4)
    >>> print(curve.counts, curve.accuracy)
    [0 0 1 2] [nan nan  0.  1.]
    """
    confidence, correct = top_label(*check_labelled(probabilities, y))
    edges = equal_width_edges(n_bins, confidence.dtype)
    return binned_curve(confidence, correct, edges)


def expected_calibration_error(probabilities: ArrayLike, y: ArrayLike, n_bins: int = 15) -> float:
    """ECE: mean distance between confidence and accuracy, over bins of equal width, weighted by their rows; 0 to 1.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1
    n_bins : number of bins over [0, 1]; figures are comparable only at the same number

    Examples
    --------
    >>> print(f"{expected_calibration_error([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], [0, 1, 0], n_bins=4):.6f}")
    0.333333

    Two rows share the bin (0.75, 1], both right at mean confidence 0.85, gap 0.15; the third is wrong at 0.7, gap 0.7:
    (2 * 0.15 + 0.7) / 3 = 1/3.
    """
    curve = reliability_curve(probabilities, y, n_bins)
    return float(weighted_gaps(curve, int(curve.counts.sum())).sum())


def maximum_calibration_error(probabilities: ArrayLike, y: ArrayLike, n_bins: int = 15) -> float:
    """MCE: the largest distance between confidence and accuracy in any bin that holds a row; 0 to 1.

    One row in a bin of its own decides it, so it wants many rows.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1
    n_bins : number of bins of equal width over [0, 1]

    Examples
    --------
    >>> print(f"{maximum_calibration_error([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], [0, 1, 0], n_bins=4):.6f}")
    0.700000
    """
    curve = reliability_curve(probabilities, y, n_bins)
    return float(np.nanmax(np.abs(curve.accuracy - curve.confidence)))


def adaptive_calibration_error(probabilities: ArrayLike, y: ArrayLike, n_bins: int = 15) -> float:
    """ECE with bins of equal mass: steadier than equal width where most confidences are near 1; 0 to 1.

    Edges interpolate the sorted confidences at ranks 0, n/n_bins, .., n (see `equal_mass_edges` for the lowest).

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1
    n_bins : number of bins; ties can leave some of them empty

    Examples
    --------
    Confidences 0.5, 0.6, 0.7, 0.8, 0.9, the last two right. The edges are 0.5, 0.75, 0.9, so 0.6 and 0.7 share a bin
    with none right, 0.8 and 0.9 one with two right, and 0.5 is the lowest edge: (1.3 + 0.3) / 5.

    >>> p = [[0.5, 0.5], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1]]
    >>> print(f"{adaptive_calibration_error(p, [1, 1, 1, 0, 0], n_bins=2):.6f}")
    0.320000
    """
    confidence, correct = top_label(*check_labelled(probabilities, y))
    curve = binned_curve(confidence, correct, equal_mass_edges(confidence, n_bins))
    return float(weighted_gaps(curve, len(confidence)).sum())


def classwise_calibration_error(probabilities: ArrayLike, y: ArrayLike, n_bins: int = 15) -> float:
    """Mean over classes k of the binned error of "p_k against how often y = k"; equal width, every class alike; 0 to 1.

    It sees what the top label hides, and shrinks as 1/K with many classes: most of the K n probabilities are near 0.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1
    n_bins : number of bins over [0, 1]

    Examples
    --------
    >>> print(f"{classwise_calibration_error([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], [0, 1, 0], n_bins=4):.6f}")
    0.333333
    """
    p, labels = check_labelled(probabilities, y)
    n, n_classes = p.shape
    edges = equal_width_edges(n_bins, p.dtype)
    sums = np.zeros(n_classes * n_bins)
    rows = max(1, _CELLS_AT_A_TIME // n_classes)
    for start in range(0, n, rows):
        sums += _gaps_by_class_and_bin(p[start : start + rows], labels[start : start + rows], edges)
    return float(np.abs(sums).sum() / (n * n_classes))


def ks_error(probabilities: ArrayLike, y: ArrayLike) -> float:
    """Kolmogorov-Smirnov calibration error, without bins: max over t of |sum over c_i <= t of (a_i - c_i)| / n; 0 to 1.

    Gupta et al. 2021, equation 5, for the top label. Rows of one confidence enter together, so the order of the rows
    has no say.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1

    Examples
    --------
    >>> print(f"{ks_error([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], [0, 1, 0]):.6f}")  # -0.7, -0.5, -0.4 over 3
    0.233333
    """
    confidence, correct = top_label(*check_labelled(probabilities, y))
    order = np.argsort(confidence)
    ascending = confidence[order]
    last_of_its_value = np.append(ascending[1:] != ascending[:-1], True)
    return float(np.abs(np.cumsum(correct[order] - ascending)[last_of_its_value]).max() / len(order))


def top_label(p: Array, y: NDArray[np.int64]) -> tuple[Array, NDArray[np.float64]]:
    """Confidence (n_samples,) in the precision of p, and 1.0 where the top class came true, of checked inputs."""
    return p.max(axis=1), hits(p, y)


def equal_width_edges(n_bins: int, dtype: np.dtype[np.floating]) -> Array:
    """b / n_bins for b = 0 .. n_bins, each the nearest number of that precision, (n_bins + 1,)."""
    check_n_bins(n_bins)
    return (np.arange(n_bins + 1) / n_bins).astype(dtype)


def equal_mass_edges(confidence: Array, n_bins: int) -> Array:
    """The sorted confidences, interpolated at ranks 0, n/n_bins, .., n, (n_bins + 1,).

    The lowest edge is the smallest confidence. Bins being open below, published figures leave that one row out, and so
    does `bin_index`. Where several rows share the smallest confidence the lowest edge is 0 and all of them count: to
    leave them out would call a constant classifier perfect.
    """
    check_n_bins(n_bins)
    ascending = np.sort(confidence)
    n = len(ascending)
    edges: Array = np.interp(np.linspace(0, n, n_bins + 1), np.arange(n), ascending)
    if n == 1 or ascending[0] == ascending[1]:
        edges[0] = 0.0
    return edges


def bin_index(values: Array, edges: Array) -> NDArray[np.int64]:
    """The bin b with edges[b] < value <= edges[b + 1], in the shape of `values`.

    A value of 0 counts in the first bin, a rounding error above 1 in the last. -1: no bin, the value being the lowest
    edge and that above 0.
    """
    index = np.searchsorted(edges, values, side="left") - 1
    if edges[0] == 0:
        np.maximum(index, 0, out=index)
    return np.minimum(index, len(edges) - 2, out=index)


def binned_curve(confidence: Array, correct: NDArray[np.float64], edges: Array) -> ReliabilityCurve:
    """Counts and means of forecasts and of the 0 or 1 that came true, (n_samples,) each, over the bins of `edges`."""
    index = bin_index(confidence, edges)
    kept = index >= 0
    if not kept.all():
        index, confidence, correct = index[kept], confidence[kept], correct[kept]
    n_bins = len(edges) - 1
    counts = np.bincount(index, minlength=n_bins)
    divisor = np.where(counts > 0, counts, np.nan)
    return ReliabilityCurve(
        edges=edges.astype(np.float64),
        counts=counts,
        confidence=np.bincount(index, weights=confidence, minlength=n_bins) / divisor,
        accuracy=np.bincount(index, weights=correct, minlength=n_bins) / divisor,
    )


def weighted_gaps(curve: ReliabilityCurve, n_samples: int) -> NDArray[np.float64]:
    """|accuracy - confidence| of each bin times its share of all rows, 0 for an empty bin."""
    return np.asarray(np.nan_to_num(np.abs(curve.accuracy - curve.confidence)) * curve.counts / n_samples)


def _gaps_by_class_and_bin(p: Array, y: NDArray[np.int64], edges: Array) -> NDArray[np.float64]:
    """sum of p_ik - [y_i = k] over the rows of each (class, bin), (n_classes * n_bins,)."""
    n_bins = len(edges) - 1
    cell = bin_index(p, edges) + n_bins * np.arange(p.shape[1])
    n_cells = n_bins * p.shape[1]
    said = np.bincount(cell.ravel(), weights=p.ravel(), minlength=n_cells)
    return np.asarray(said - np.bincount(cell[np.arange(len(y)), y], minlength=n_cells))


def _binomial_quantile(q: float, counts: NDArray[np.int64], probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quantile q of the share of successes in `counts` draws, NaN where there is none."""
    drawn = np.where(counts > 0, counts, 1)
    share = binom.ppf(q, drawn, np.clip(np.nan_to_num(probability), 0, 1)) / drawn
    return np.where(counts > 0, share, np.nan)

"""All scores of a calibrator in one call, and the differences between two."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.metrics.calibration import (
    bin_index,
    classwise_calibration_error,
    equal_mass_edges,
    equal_width_edges,
    top_label,
)
from calibrators.metrics.checks import check_labelled
from calibrators.metrics.intervals import BinnedGap, Estimate, GapDifference, RowMean, Statistic, bootstrap
from calibrators.metrics.proper import brier_scores, hits, log_losses
from calibrators.numerics import Array


def scores(
    probabilities: ArrayLike,
    y: ArrayLike,
    *,
    n_bins: int = 15,
    level: float = 0.95,
    n_resamples: int = 500,
    seed: int = 0,
) -> dict[str, Estimate]:
    """What to say about a calibrator on held-out rows: each metric, with a bootstrap interval.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1
    n_bins : bins of the calibration errors
    level : confidence level of the intervals
    n_resamples : resamples of the rows; time and precision grow with it
    seed : the same seed gives the same intervals

    Returns
    -------
    `accuracy`, `log_loss`, `brier_score`, `expected_calibration_error`, `adaptive_calibration_error` with intervals;
    `classwise_calibration_error` without (it would cost n_classes times as much as the others together)

    Examples
    --------
    >>> p = np.tile([[0.2, 0.8]], (100, 1))
    >>> for name, estimate in scores(p, np.repeat([0, 1], [40, 60])).items():
    ...     print(f"{name:28}{estimate.value:.2f}")
    accuracy                    0.60
    log_loss                    0.78
    brier_score                 0.56
    expected_calibration_error  0.20
    adaptive_calibration_error  0.20
    classwise_calibration_error 0.20
    """
    p, labels = check_labelled(probabilities, y)
    statistics: dict[str, Statistic] = {name: RowMean(values) for name, values in _values_per_row(p, labels).items()}
    statistics |= _gaps(p, labels, n_bins)
    estimates = bootstrap(statistics, level=level, n_resamples=n_resamples, seed=seed)
    return estimates | {"classwise_calibration_error": Estimate(classwise_calibration_error(p, labels, n_bins))}


def score_differences(
    first: ArrayLike,
    second: ArrayLike,
    y: ArrayLike,
    *,
    n_bins: int = 15,
    level: float = 0.95,
    n_resamples: int = 500,
    seed: int = 0,
) -> dict[str, Estimate]:
    """First minus second, metric by metric, for two calibrators on the same rows, with paired intervals.

    Rows that are hard for one are hard for the other, so the interval of the difference is far narrower than the two
    intervals of `scores` suggest. A log loss that is infinite in one of them has an infinite difference, in both of
    them NaN, and then no interval.

    Parameters
    ----------
    first, second : (n_samples, n_classes) each, on the same rows
    y, n_bins, level, n_resamples, seed : as for `scores`

    Returns
    -------
    the names of `scores` that have intervals

    Examples
    --------
    >>> y = np.repeat([0, 1], [40, 60])
    >>> overconfident, honest = np.tile([[0.2, 0.8]], (100, 1)), np.tile([[0.4, 0.6]], (100, 1))
    >>> gain = score_differences(overconfident, honest, y)
    >>> print(f"{gain['log_loss'].value:.3f} {gain['accuracy'].value:.1f}")
    0.105 0.0
    """
    p, labels = check_labelled(first, y)
    q, _ = check_labelled(second, y)
    if p.shape != q.shape:
        raise ValueError(f"both must be of one shape (n_samples, n_classes), got {p.shape} and {q.shape}")
    ours, theirs = _values_per_row(p, labels), _values_per_row(q, labels)
    statistics: dict[str, Statistic] = {name: RowMean(_minus(ours[name], theirs[name])) for name in ours}
    our_gaps, their_gaps = _gaps(p, labels, n_bins), _gaps(q, labels, n_bins)
    statistics |= {name: GapDifference(our_gaps[name], their_gaps[name]) for name in our_gaps}
    return bootstrap(statistics, level=level, n_resamples=n_resamples, seed=seed)


def _values_per_row(p: Array, y: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    return {"accuracy": hits(p, y), "log_loss": log_losses(p, y), "brier_score": brier_scores(p, y)}


def _gaps(p: Array, y: NDArray[np.int64], n_bins: int) -> dict[str, BinnedGap]:
    confidence, correct = top_label(p, y)
    edges = {
        "expected_calibration_error": equal_width_edges(n_bins, confidence.dtype),
        "adaptive_calibration_error": equal_mass_edges(confidence, n_bins),
    }
    gaps = confidence - correct
    return {name: BinnedGap(bin_index(confidence, own), gaps, n_bins) for name, own in edges.items()}


def _minus(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # infinity less infinity is not a number, as documented
        return first - second

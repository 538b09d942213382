"""Bootstrap intervals for metrics, and for the difference of a metric between two calibrators on the same rows.

Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13. Every metric here is a function of means
over rows. A resample of n rows with replacement is therefore a vector of counts, and all metrics of all resamples are
one product of their sparse values per row with a matrix of counts: no row is copied, and every metric sees the same
resamples.

A mean (accuracy, log loss, Brier score) gets the percentile interval. A binned calibration error does not: it is a sum
of absolute values, resampling adds noise to noise, and the percentile interval of a perfectly calibrated model lies
entirely above the truth, 0, in almost every data set. `BinnedGap.interval` says what is done instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from calibrators.numerics import Array

Interval = tuple[float, float]

_COUNTS_AT_A_TIME = 1 << 21
"""Entries of the matrix of counts held at once: under 100 MB with its temporaries, up to two million rows."""


@dataclass(frozen=True)
class Estimate:
    """A metric on the rows at hand, and the ends of its interval; NaN ends where no interval was computed.

    Examples
    --------
    >>> print(Estimate(0.04354, 0.0391, 0.0476), "|", Estimate(0.00908))
    0.0435 [0.0391, 0.0476] | 0.0091
    """

    value: float
    low: float = float("nan")
    high: float = float("nan")

    @property
    def has_interval(self) -> bool:
        return not (math.isnan(self.low) or math.isnan(self.high))

    def __str__(self) -> str:
        return f"{self.value:.4f}" + (f" [{self.low:.4f}, {self.high:.4f}]" if self.has_interval else "")


class Statistic(Protocol):
    """A metric as a function of the means over rows of `per_row`, sparse (n_samples, n_columns) and finite."""

    @property
    def per_row(self) -> sparse.csr_array: ...

    def value(self, means: Array) -> Array:
        """The metric from means (n_columns, ...), along the first axis."""

    def interval(self, means: Array, resampled: Array, level: float) -> Interval:
        """Its interval from the means of the rows at hand (n_columns,) and of resamples (n_columns, n_resamples)."""


@dataclass(frozen=True)
class RowMean:
    """The mean of one value per row: accuracy, a proper score, or the difference of one between two calibrators.

    An infinite value (log loss where a zero probability came true) makes the mean infinite, without an interval.
    """

    values: NDArray[np.float64]

    @property
    def per_row(self) -> sparse.csr_array:
        return sparse.csr_array(np.where(np.isfinite(self.values), self.values, 0.0)[:, None])

    def value(self, means: Array) -> Array:
        # 0 for each finite value; infinities of both signs, or a NaN, make it NaN.
        beyond = self.values[~np.isfinite(self.values)]
        return np.asarray(means[0] + beyond.sum()) if len(beyond) else means[0]

    def interval(self, means: Array, resampled: Array, level: float) -> Interval:
        """The percentile interval, widened to the value itself should that lie outside."""
        if not np.all(np.isfinite(self.values)):
            return float("nan"), float("nan")
        value, (low, high) = float(means[0]), _central(resampled[0], level)
        return min(low, value), max(high, value)


@dataclass(frozen=True)
class BinnedGap:
    """sum_b |sum_{i in b} (c_i - a_i)| / n: a binned calibration error.

    bins : (n_samples,) bin of each row, -1 for a row that no bin holds
    gaps : (n_samples,) c_i - a_i
    """

    bins: NDArray[np.int64]
    gaps: NDArray[np.float64]
    n_bins: int

    @property
    def per_row(self) -> sparse.csr_array:
        rows = np.flatnonzero(self.bins >= 0)
        shape = (len(self.bins), self.n_bins)
        return sparse.csr_array((self.gaps[rows], (rows, self.bins[rows])), shape=shape)

    def value(self, means: Array) -> Array:
        return np.asarray(np.abs(means).sum(axis=0))

    def interval(self, means: Array, resampled: Array, level: float) -> Interval:
        """Interval of the error that unlimited rows would show in these bins; it always holds the value itself.

        The basic interval (2 v - upper quantile, 2 v - lower quantile) takes off the bias to first order. Where perfect
        calibration is not rejected, that is where v is no larger than the `level` quantile of sum_b |resampled mean -
        mean|, the noise alone, the lower end is 0. In simulations with 200 to 10,000 rows and true errors 0 to 0.12 it
        held the truth in 86 to 97 % of data sets at level 0.95, and 0 in 93 to 96 % of those of a calibrated model (the
        percentile interval: in none).
        """
        value, resamples = float(self.value(means)), self.value(resampled)
        low, high = _central(resamples, level)
        noise = self.value(resampled - means[:, None])
        perfect_is_possible = value <= np.quantile(noise, level)
        return 0.0 if perfect_is_possible else max(0.0, min(value, 2 * value - high)), max(value, 2 * value - low)


@dataclass(frozen=True)
class GapDifference:
    """First minus second of two binned calibration errors on the same rows."""

    first: BinnedGap
    second: BinnedGap

    @property
    def per_row(self) -> sparse.csr_array:
        return sparse.hstack([self.first.per_row, self.second.per_row], format="csr")

    def value(self, means: Array) -> Array:
        n_first = self.first.n_bins
        return self.first.value(means[:n_first]) - self.second.value(means[n_first:])

    def interval(self, means: Array, resampled: Array, level: float) -> Interval:
        """The wider, on each side, of the percentile and the basic interval.

        The two errors are biased by different amounts when one calibrator is much better, and neither interval alone
        allows for it. In simulations at level 0.95 it held the truth in 90 to 100 % of data sets of 10,000 rows, in 78
        to 100 % of 1,000 and in 69 to 100 % of 200, least often when one of the two was exactly calibrated: the
        difference then looks too small. To decide between calibrators, compare their log loss.
        """
        value = float(self.value(means))
        low, high = _central(self.value(resampled), level)
        return min(low, 2 * value - high), max(high, 2 * value - low)


def bootstrap(
    statistics: Mapping[str, Statistic], *, level: float = 0.95, n_resamples: int = 500, seed: int = 0
) -> dict[str, Estimate]:
    """Value and interval of each statistic, all from the same resamples of the rows.

    Parameters
    ----------
    statistics : by name, all over the same rows
    level : confidence level of the intervals, strictly between 0 and 1
    n_resamples : 500 place the ends within about a twentieth of the interval's width
    seed : the same seed gives the same intervals

    Raises
    ------
    ValueError
        if `level` or `n_resamples` is out of range, or the statistics differ in their number of rows

    Examples
    --------
    A mean of 400 zeros and ones, half of each, has standard error 0.025:

    >>> estimate = bootstrap({"accuracy": RowMean(np.repeat([0.0, 1.0], 200))})["accuracy"]
    >>> print(estimate.value, round(estimate.low, 2), round(estimate.high, 2))
    0.5 0.45 0.55
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    if n_resamples < 2:
        raise ValueError(f"n_resamples must be at least 2, got {n_resamples}")
    blocks = [statistic.per_row for statistic in statistics.values()]
    n_samples = {block.shape[0] for block in blocks}
    if len(n_samples) != 1:
        raise ValueError(f"statistics must be over the same rows, got numbers of rows {sorted(n_samples)}")
    columns = sparse.csr_array(sparse.hstack(blocks).T)
    ends = np.cumsum([block.shape[1] for block in blocks])[:-1]
    means = np.split(_means(columns, np.ones((columns.shape[1], 1)))[:, 0], ends)
    resampled = np.split(_resampled_means(columns, n_resamples, seed), ends)
    return {
        name: Estimate(float(statistic.value(own)), *statistic.interval(own, draws, level))
        for (name, statistic), own, draws in zip(statistics.items(), means, resampled, strict=True)
    }


def _resampled_means(columns: sparse.csr_array, n_resamples: int, seed: int) -> Array:
    """Means of each column (n_columns, n_samples) over each resample, (n_columns, n_resamples)."""
    return np.concatenate([_means(columns, c) for c in _counts(columns.shape[1], n_resamples, seed)], axis=1)


def _means(columns: sparse.csr_array, counts: Array) -> Array:
    return np.asarray(columns @ counts / columns.shape[1])


def _counts(n_samples: int, n_resamples: int, seed: int) -> Iterator[Array]:
    """How often each row was drawn: (n_samples, at most so many resamples as fit), until n_resamples have come."""
    rng = np.random.default_rng(seed)
    most = max(1, _COUNTS_AT_A_TIME // n_samples)
    for done in range(0, n_resamples, most):
        width = min(most, n_resamples - done)
        cells = rng.integers(n_samples, size=(n_samples, width)) * width + np.arange(width)
        yield np.bincount(cells.ravel(), minlength=n_samples * width).reshape(n_samples, width).astype(np.float64)


def _central(resamples: Array, level: float) -> Interval:
    low, high = np.quantile(resamples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

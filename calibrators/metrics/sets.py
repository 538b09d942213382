"""Prediction sets judged on labelled rows: how often they hold the label, how large they are, and for whom.

A share of n rows gets Clopper and Pearson's interval ("The Use of Confidence or Fiducial Limits Illustrated in the Case
of the Binomial", Biometrika 1934), which holds the true share with the probability stated or more, whatever n.

Sets that cover 90 % of all rows may cover all of the easy ones and half of the hard ones. What a threshold for all
rows cannot promise is looked at by the size of the set (Angelopoulos et al., "Uncertainty Sets for Image Classifiers
using Conformal Prediction", ICLR 2021, section 4.3) and by the class (Ding et al., NeurIPS 2023: CovGap).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from calibrators.metrics.intervals import Estimate
from calibrators.numerics import check_labels, to_numpy

SIZES = (0, 1, 2, 4, 11, 101)
"""Where the groups of sizes begin: none, 1, 2-3, 4-10, 11-100, more (those of the RAPS paper, in part)."""


@dataclass(frozen=True)
class Stratum:
    """Coverage of the rows that have something in common: `name` says what."""

    name: str
    n_rows: int
    coverage: Estimate


@dataclass(frozen=True)
class CoverageCurve:
    """What sets of several confidence levels hold, in ascending order of level.

    Attributes
    ----------
    levels : (n_levels,) asked for
    coverage : of each its share of rows whose set holds the label, with interval
    sizes : (n_levels,) mean number of labels in a set
    """

    levels: NDArray[np.float64]
    coverage: list[Estimate]
    sizes: NDArray[np.float64]


def check_sets(sets: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Sets as bool (n_samples, n_classes) and their labels (else TypeError or ValueError)."""
    array = to_numpy(sets)
    if array.dtype != bool:
        raise TypeError(f"sets must be bool, got dtype {array.dtype}")
    if array.ndim != 2 or not len(array):
        raise ValueError(f"sets must have shape (n_samples, n_classes) with at least 1 row, got shape {array.shape}")
    return array, check_labels(y, n_samples=array.shape[0], n_classes=array.shape[1])


def coverage(sets: ArrayLike, y: ArrayLike, *, level: float = 0.95) -> Estimate:
    """The share of rows whose set holds the label, with its exact binomial interval.

    Parameters
    ----------
    sets : (n_samples, n_classes) bool
    y : (n_samples,) class indices
    level : of the interval, not of the sets

    Examples
    --------
    >>> print(coverage([[True, False], [True, True], [False, True], [True, False]], [0, 1, 1, 1]))
    0.7500 [0.1941, 0.9937]
    """
    return _share(_hits(*check_sets(sets, y)), level)


def mean_set_size(sets: ArrayLike) -> float:
    """Labels in a set, on average."""
    return float(to_numpy(sets).sum(axis=1).mean())


def set_size_counts(sets: ArrayLike) -> NDArray[np.int64]:
    """(n_classes + 1,) how many rows have a set of 0, 1, .. n_classes labels.

    >>> set_size_counts(np.array([[True, False], [True, True], [False, False]])).tolist()
    [1, 1, 1]
    """
    array = to_numpy(sets)
    return np.bincount(array.sum(axis=1), minlength=array.shape[1] + 1)


def size_stratified_coverage(
    sets: ArrayLike, y: ArrayLike, *, sizes: Sequence[int] = SIZES, level: float = 0.95
) -> list[Stratum]:
    """Coverage among the rows whose sets are of like size, without sizes that no row has.

    Parameters
    ----------
    sets, y, level : as for `coverage`
    sizes : where the groups begin, ascending from 0
    """
    array, labels = check_sets(sets, y)
    starts = list(sizes)
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
        raise ValueError(f"sizes must ascend from 0, got {sizes}")
    hits = _hits(array, labels)
    group = np.searchsorted(starts, array.sum(axis=1), side="right") - 1
    ends = [*(start - 1 for start in starts[1:]), array.shape[1]]
    return [
        Stratum(_of_sizes(starts[i], ends[i]), int((group == i).sum()), _share(hits[group == i], level))
        for i in np.unique(group)
    ]


def class_coverage(
    sets: ArrayLike, y: ArrayLike, *, class_names: Sequence[str] | None = None, level: float = 0.95
) -> list[Stratum]:
    """Coverage among the rows of each class that occurs, the least covered class first."""
    array, labels = check_sets(sets, y)
    names = [f"class {k}" for k in range(array.shape[1])] if class_names is None else list(class_names)
    if len(names) != array.shape[1]:
        raise ValueError(f"class_names must hold {array.shape[1]} names, one for each class, got {len(names)}")
    hits = _hits(array, labels)
    found = [Stratum(names[k], int((labels == k).sum()), _share(hits[labels == k], level)) for k in np.unique(labels)]
    return sorted(found, key=lambda stratum: stratum.coverage.value)


def coverage_gap(sets: ArrayLike, y: ArrayLike, confidence_level: float) -> float:
    """CovGap: the mean distance of the classes' coverage from the confidence level, each class counting alike.

    >>> coverage_gap([[True, False], [True, False], [False, True], [True, False]], [0, 0, 1, 1], 0.75)
    0.25
    """
    strata = class_coverage(sets, y)
    return float(np.mean([abs(stratum.coverage.value - confidence_level) for stratum in strata]))


def coverage_curve(by_level: Mapping[float, ArrayLike], y: ArrayLike, *, level: float = 0.95) -> CoverageCurve:
    """Coverage and size against the confidence level asked for.

    Parameters
    ----------
    by_level : confidence level -> sets of the same rows at that level; at least one
    y : (n_samples,) class indices
    level : of the intervals
    """
    if not by_level:
        raise ValueError("by_level must hold the sets of at least one level, got none")
    levels = sorted(by_level)
    found = [coverage(by_level[one], y, level=level) for one in levels]
    return CoverageCurve(np.array(levels), found, np.array([mean_set_size(by_level[one]) for one in levels]))


def local_coverage(hits: ArrayLike, window: int = 500) -> NDArray[np.float64]:
    """(n - window + 1,) the share of hits in each stretch of `window` rows: what a long-run average hides.

    Parameters
    ----------
    hits : (n,) bool, whether each row's set held the label, in order of time
    window : rows of a stretch, at most n
    """
    array = to_numpy(hits)
    if array.ndim != 1 or not 1 <= window <= len(array):
        raise ValueError(f"window must lie in 1..{array.size}, got {window}")
    sums = np.concatenate([[0], np.cumsum(array.astype(np.int64))])
    return np.asarray((sums[window:] - sums[:-window]) / window)


def _hits(sets: NDArray[np.bool_], y: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.asarray(sets[np.arange(len(y)), y])


def _share(hits: NDArray[np.bool_], level: float) -> Estimate:
    n, k, tail = len(hits), int(hits.sum()), (1 - level) / 2
    low = float(beta.ppf(tail, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
    return Estimate(k / n, low, high)


def _of_sizes(first: int, last: int) -> str:
    if first >= last:
        return f"{first} label{'' if first == 1 else 's'}"
    return f"{first} to {last} labels"

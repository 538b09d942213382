"""Checked inputs of the metrics: rows that are distributions, and one label for each."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.numerics import Array, check_labels, to_numpy

SUM_TOLERANCE = 1e-3
"""How far a row may sum from 1: float16 probabilities of a thousand classes pass, logits do not."""

ROUNDING = 1e-6
"""How far a probability may lie above 1: the last digits of float32 arithmetic."""


def check_probabilities(probabilities: ArrayLike) -> Array:
    """Probabilities as a float32 or float64 array (n_samples, n_classes), rows summing to one; values untouched.

    Raises
    ------
    TypeError
        if the values are not real numbers
    ValueError
        if there is no row or fewer than two columns, a value is not finite or lies outside [0, 1], or a row does not
        sum to 1 within 1e-3
    """
    array = to_numpy(probabilities)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"probabilities must be real numbers, got dtype {array.dtype}")
    if array.dtype != np.float32:
        array = array.astype(np.float32 if array.dtype == np.float16 else np.float64, copy=False)
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
        raise ValueError(
            "probabilities must have shape (n_samples, n_classes) with at least 1 row and 2 columns, "
            f"got shape {array.shape}"
        )
    # The extremes show a NaN or an infinity too, without a temporary of the array's size.
    if not (array.min() >= 0 and array.max() <= 1 + ROUNDING):
        row, column = np.argwhere(~((array >= 0) & (array <= 1 + ROUNDING)))[0]
        raise ValueError(
            f"probabilities must lie in [0, 1], got {array[row, column]} at row {row}, column {column} (logits?)"
        )
    sums = array.sum(axis=1, dtype=np.float64)
    if np.abs(sums - 1).max() > SUM_TOLERANCE:
        row = int(np.argmax(np.abs(sums - 1)))
        raise ValueError(
            f"each row of probabilities must sum to 1 within {SUM_TOLERANCE}, row {row} sums to {sums[row]}"
        )
    return array


def check_labelled(probabilities: ArrayLike, y: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    """Probabilities (n_samples, n_classes) and labels (n_samples,), each checked; errors of both checks."""
    p = check_probabilities(probabilities)
    return p, check_labels(y, n_samples=p.shape[0], n_classes=p.shape[1])


def check_n_bins(n_bins: int) -> None:
    """TypeError unless `n_bins` is an integer, ValueError unless it is at least 1."""
    if isinstance(n_bins, bool) or not isinstance(n_bins, int | np.integer):
        raise TypeError(f"n_bins must be an integer, got {n_bins!r}")
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")

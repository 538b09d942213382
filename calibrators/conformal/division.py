"""Rows divided between what is tuned and what thresholds are read from.

A threshold is valid for rows exchangeable with those its scores are of, and scores of rows that the base was fitted on
are not: it has seen their labels. So the base, and a score's parameters, learn from one part and thresholds from the
other.

The order of the rows has no say, and a row of weight two counts as the row twice: rows stand in the order of a hash of
their values, which knows nothing of what they mean, and one unit of weight in so many is dealt to the first part.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibrators.numerics import Array, blocks

_ODD = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def divide(hashes: NDArray[np.uint64], weight: Array, share: float, strata: Array | None = None) -> tuple[Array, Array]:
    """Weights (n_samples,) in the first part, about `share` of the whole (and of each stratum), and in the second.

    Whole weights are dealt unit by unit, as if each were a row. A row of a fraction goes to one part.
    """
    order = np.lexsort((weight, hashes, np.zeros(len(weight)) if strata is None else strata))
    units = np.floor(share * np.cumsum(weight[order]) + 1e-9)
    dealt = np.minimum(np.diff(units, prepend=0.0), weight[order])
    first = np.empty_like(weight)
    first[order] = dealt
    return first, weight - first


def hashes_of(logits: Array, y: Array) -> NDArray[np.uint64]:
    """(n_samples,) a hash of each row's bits and label, by the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    columns = _mix(np.arange(1, logits.shape[1] + 1, dtype=np.uint64) * _ODD) | np.uint64(1)
    found = _mix(y.astype(np.uint64) + _ODD)
    for block in blocks(*logits.shape):
        bits = np.ascontiguousarray(logits[block] + 0.0, dtype=np.float64).view(np.uint64)  # + 0: no negative zero
        found[block] += (_mix(bits + columns) * columns).sum(axis=1, dtype=np.uint64)
    return _mix(found)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, factor in _SHIFTS:
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> np.uint64(31))


def uniforms(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1), one for each hash."""
    return (_mix(hashes + _ODD) >> np.uint64(11)).astype(np.float64) * 2.0**-53

"""Of many classes the most probable ones, and what the logits of the others come to.

All of a row is looked at a few times, in ways that take many numbers at a time; what has to be done number by number is
done for the few classes that may be among the most probable.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Places = NDArray[np.intp]

LEAST_LOGIT = np.finfo(np.float32).min
GROUPS = 4
"""Groups of classes for each class that is wanted: with more of them fewer classes are sorted, and more maxima."""


def most_probable(probabilities: Floats, count: int) -> Places:
    """(n_rows, count) the classes of the largest values of (n_rows, n_classes), the largest first.

    Of equals the first class comes first, and NaN counts as nothing.

    >>> most_probable(np.array([[0.1, 0.3, 0.1, 0.3, 0.2]], np.float32), 4)
    array([[1, 3, 4, 0]])
    """
    n_rows, n_classes = probabilities.shape
    groups = min(GROUPS * count, n_classes)
    maxima = probabilities[:, : n_classes // groups * groups].reshape(n_rows, -1, groups).max(axis=1)
    if np.isnan(maxima).any():
        return most_probable(np.where(np.isnan(probabilities), np.float32(0), probabilities), count)
    maxima.sort(axis=1)
    places = np.flatnonzero(probabilities >= maxima[:, -count, None])  # as many as are wanted, and a few more
    row, classes = np.divmod(places, n_classes)
    first = np.searchsorted(row, np.arange(n_rows))
    among = np.arange(len(places)) - first[row]
    values = np.full((n_rows, int(among.max()) + 1), np.inf, np.float32)
    values[row, among] = -probabilities.ravel()[places]
    order = np.argsort(values, axis=1, kind="stable")[:, :count]
    return np.asarray(classes[first[:, None] + order])


def log_sum_exp_of_others(logits: Floats, classes: Places) -> NDArray[np.float64]:
    """(n_rows,) log of the sum of the exponentials of all logits of (n_rows, n_classes) but those of these classes."""
    others = logits.copy()
    np.put_along_axis(others, classes, -np.inf, 1)
    largest = np.maximum(others.max(axis=1), LEAST_LOGIT)
    others -= largest[:, None]
    np.exp(others, out=others)
    with np.errstate(divide="ignore"):  # of classes that the model rules out nothing is left
        return np.asarray(largest + np.log(others.sum(axis=1, dtype=np.float64)))

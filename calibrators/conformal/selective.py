"""Selective prediction: from which confidence on to answer, so that answers are seldom wrong.

Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017, algorithm 1 (selection with
guaranteed risk). Of the rows with confidence t or more, let n be the number and e that of errors. Their error rate on
new rows is at most

    b = the b with P(Binomial(n, b) <= e) = delta / m           (Clopper and Pearson's upper end)

with probability 1 - delta for all m thresholds tried. Thresholds are tried by bisection over the sorted confidences, so
m = ceil(log2 n): the lowest whose bound is within the target is taken. Rows must be such as are served, and not those
that the calibrator was fitted on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta

from calibrators.metrics.calibration import top_label
from calibrators.metrics.checks import check_labelled


@dataclass(frozen=True)
class Selection:
    """Answer where the confidence is `threshold` or more; infinite where no threshold is good enough.

    Attributes
    ----------
    threshold : the lowest confidence that is answered
    coverage : the share of the rows at hand that is answered
    error : the error rate among these
    bound : what that of new rows stays below with the probability asked for
    """

    threshold: float
    coverage: float
    error: float
    bound: float


def select(probabilities: ArrayLike, y: ArrayLike, *, target: float, delta: float = 0.05) -> Selection:
    """The lowest confidence to answer from so that, with probability 1 - delta, at most `target` of answers are wrong.

    Parameters
    ----------
    probabilities : (n_samples, n_classes)
    y : (n_samples,) class indices
    target : the most errors among answers, between 0 and 1
    delta : the probability that the bound fails

    Examples
    --------
    >>> p = np.tile([[0.99, 0.01], [0.6, 0.4]], (500, 1))
    >>> found = select(p, np.tile([0, 1], 500), target=0.05)
    >>> found.threshold, found.coverage, found.error, round(found.bound, 3)
    (0.99, 0.5, 0.0, 0.007)
    """
    for name, value in (("target", target), ("delta", delta)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}")
    confidence, right = top_label(*check_labelled(probabilities, y))
    levels = np.unique(confidence)
    n_answered = len(confidence) - np.searchsorted(np.sort(confidence), levels)
    order = np.argsort(-confidence, kind="stable")
    wrong = np.cumsum(1 - right[order])
    n_tests = max(1, math.ceil(math.log2(len(levels) + 1)))
    low, high, found = 0, len(levels) - 1, Selection(math.inf, 0.0, 0.0, 0.0)
    while low <= high:
        middle = (low + high) // 2
        n = int(n_answered[middle])
        errors = int(wrong[n - 1])
        bound = upper_bound(errors, n, delta / n_tests)
        if bound <= target:
            found = Selection(float(levels[middle]), n / len(confidence), errors / n, bound)
            high = middle - 1
        else:
            low = middle + 1
    return found


def upper_bound(errors: int, n: int, delta: float) -> float:
    """Clopper and Pearson's upper end for an error rate, exceeded with probability delta or less."""
    return 1.0 if errors >= n else float(beta.ppf(1 - delta, errors + 1, n - errors))

"""The rank of the order statistic that a confidence level asks for, without a rounding error.

Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World" (2005), section 4.2; Lei et al., "Distribution-Free
Predictive Inference for Regression", JASA 2018, theorem 2: of n exchangeable scores and one more, the new one is at
most the k-th smallest of the others with probability k / (n + 1) or more, and exactly that without ties. So a
confidence level c is reached by

    k = ceil((n + 1) c)

and by no finite threshold where k > n. In floating point 1 - 0.9 is a little less than 0.1 and ceil makes a whole rank
of the difference. A level is therefore taken as the decimal fraction that it is written as: 0.9 is 9/10.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


def check_level(confidence_level: float) -> float:
    """A confidence level as a float strictly between 0 and 1.

    Raises
    ------
    TypeError
        if it is no number
    ValueError
        if it lies outside
    """
    if isinstance(confidence_level, bool) or not isinstance(confidence_level, int | float | np.floating):
        raise TypeError(f"confidence_level must be a number, got {confidence_level!r}")
    level = float(confidence_level)
    if not 0 < level < 1:
        raise ValueError(f"confidence_level must lie strictly between 0 and 1, got {confidence_level!r}")
    return level


def as_written(confidence_level: float) -> Fraction:
    """The level as the shortest decimal that reads back as this float.

    >>> as_written(0.9), as_written(1 - 0.1)
    (Fraction(9, 10), Fraction(9, 10))
    """
    return Fraction(repr(check_level(confidence_level)))


def rank(confidence_level: float, n: int) -> int:
    """k = ceil((n + 1) c), from 1; more than n where no finite threshold reaches the level.

    >>> rank(0.9, 9), rank(0.9, 8), rank(0.9, 99)
    (9, 9, 90)
    """
    return math.ceil((n + 1) * as_written(confidence_level))


def needed_weights(confidence_level: float, totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of groups of scores with these total weights, how much weight must lie at or below the threshold.

    A score of weight two counts as two, so of a whole total this is `rank`; else (total + 1) c.
    """
    level = as_written(confidence_level)
    different, places = np.unique(totals, return_inverse=True)
    needed = [(Fraction(float(total)) + 1) * level for total in different]
    whole = [math.ceil(one) if total == int(total) else one for one, total in zip(needed, different, strict=True)]
    return np.array([float(one) for one in whole])[places]


def least_rows(confidence_level: float) -> int:
    """The smallest n for which a finite threshold reaches the level.

    >>> least_rows(0.9), least_rows(0.95), least_rows(0.5)
    (9, 19, 1)
    """
    level = as_written(confidence_level)
    return math.ceil(level / (1 - level))

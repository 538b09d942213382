"""class_conditional_conformal: sets that hold the true label as often as asked for each class by itself.

Vovk, "Conditional Validity of Inductive Conformal Predictors", ACML 2012, section 4 (Mondrian, label-conditional):
label y is in the set where its score is at or below the threshold of the rows of class y alone, so

    P(label in set | label = y) >= c     for each class y

A class with fewer than c / (1 - c) rows, 9 for c = 0.9, has an infinite threshold and is in every set: with many
classes and few rows of each the sets hold most of them, and `clustered_conformal` is the better choice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibrators.conformal.calibrator import ConformalCalibrator
from calibrators.numerics import Array


class ClassConditionalConformal(ConformalCalibrator):
    """{y: s(p, y) <= t_y}, a threshold a class. Parameters: as the base class.

    Examples
    --------
    Class 1 is given a quarter where it is right and class 0 three quarters. One threshold for both would miss class 1.

    >>> logits = np.log([[3.0, 1.0]] * 40)
    >>> calibrator = ClassConditionalConformal(base="identity").fit(logits, [0, 0, 0, 1] * 10)
    >>> calibrator.thresholds(0.8)
    array([-0.75, -0.25], dtype=float32)
    """

    def _groups(self, scores: Array, y: Array, tuning: Array, ranking: Array, n_classes: int) -> NDArray[np.int64]:
        del scores, y, tuning, ranking
        return np.arange(n_classes, dtype=np.int64)

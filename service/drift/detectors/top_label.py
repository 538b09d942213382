"""How sure a forecast was of its most probable class, and whether it was right: what one-signal detectors read."""

from __future__ import annotations

from math import exp

import numpy as np
from numpy.typing import NDArray

from calibrators.numerics import Array
from calibrators.online.compiled import compiled
from service.drift.detectors.base import Batch

HUGE = 1e100
"""Infinite logits are taken as these."""


def confidence_and_correct(batch: Batch) -> tuple[NDArray[np.int64], Array, Array]:
    """Of rows with a label that is a class and without a NaN: which they are, confidence, and 1 where it was right.

    >>> batch = Batch(np.log([[0.25, 0.75], [0.5, 0.5]]), np.array([1, -1]), np.zeros(2, np.int64))
    >>> confidence_and_correct(batch)
    (array([0]), array([0.75]), array([1.]))
    """
    rows, confidence, correct = np.empty(len(batch), np.int64), np.empty(len(batch)), np.empty(len(batch))
    n = _fill(np.ascontiguousarray(batch.logits, np.float64), batch.labels, rows, confidence, correct)
    return rows[:n], confidence[:n], correct[:n]


@compiled
def _fill(
    logits: Array, labels: NDArray[np.int64], rows: NDArray[np.int64], confidence: Array, correct: Array
) -> int:  # fmt: skip
    n, n_classes = 0, logits.shape[1]
    for t in range(len(labels)):
        if labels[t] < 0 or labels[t] >= n_classes:
            continue
        top, is_number = 0, True
        for k in range(n_classes):
            top = k if logits[t, k] > logits[t, top] else top
            is_number = is_number and logits[t, k] == logits[t, k]
        if not is_number:
            continue
        total, largest = 0.0, min(max(logits[t, top], -HUGE), HUGE)
        for k in range(n_classes):
            total += exp(min(max(logits[t, k], -HUGE), HUGE) - largest)
        rows[n], confidence[n], correct[n] = t, 1.0 / total, 1.0 if labels[t] == top else 0.0
        n += 1
    return n

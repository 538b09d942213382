"""ADWIN: a window of rows as long as its older and its newer part agree about the mean.

Bifet, Gavaldà, "Learning from time-changing data with adaptive windowing" (SIAM SDM 2007), on the signal x = (1 +
correct - confidence) / 2, whose mean is 1/2 while the confidence is true. The window is an exponential histogram
(section 4): `MOST` buckets at most of each size 1, 2, 4, ..., the two oldest of a size merged when there is one more.
Between older buckets of n0 rows and newer ones of n1 it cuts where their means differ by more than (section 3)

    sqrt(2 m v d) + 2/3 m d        m = 1/(n0 - s + 1) + 1/(n1 - s + 1)      d = log(2 log(n0 + n1) / delta)

with v the variance of the window and s the least length of a part, as MOA and river have it (river cuts at the same
row, which a test holds). The bound is for one look; it is looked at again and again, so that no rate of false alarms
follows. A model that was always wrong is right to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log, sqrt
from typing import Self

import numpy as np
from numpy.typing import NDArray

from calibrators.numerics import Array
from calibrators.online.compiled import compiled
from service.drift.detectors.base import Batch, Detector, number, whole
from service.drift.detectors.top_label import confidence_and_correct

MOST, SIZES = 5, 48
SHORTEST, FIRST_ROWS = 5, 10
"""Rows of a part, and of the window, that a cut needs more than."""


class Adwin(Detector):
    """Rings when two parts of its window differ in their mean of correct - confidence.

    The statistic is the difference as a multiple of what it may be at most, at the cut where that is largest.

    Parameters
    ----------
    delta : how sure it must be, of one look
    every : it looks once in so many rows

    Examples
    --------
    >>> logits, labels = np.log([[0.9, 0.1]] * 800), np.arange(800) // 400
    >>> detector = Adwin()
    >>> detector.update(Batch(logits, labels, np.zeros(800, np.int64)))
    447
    >>> detector.change_point()
    48
    """

    kind = "adwin"
    labelled = True
    ready = True
    threshold = 1.0

    def __init__(self, delta: float = 0.002, every: float = 32) -> None:
        self.delta = number("delta", delta, above=0, most=1)
        self.every = whole("every", every)
        self.reset()

    def reset(self) -> None:
        self.n_rows = 0
        self._counts = np.zeros(SIZES, np.int64)
        self._buckets = np.zeros((SIZES, MOST + 1, 2))  # total and sum of squares about the mean, oldest first
        self._window = np.zeros(3)  # rows, total, sum of squares about the mean
        self._best = np.zeros(2)  # the largest multiple, and rows behind that cut

    @property
    def statistic(self) -> float:
        return float(self._best[0])

    def update(self, batch: Batch) -> int | None:
        rows, confidence, correct = confidence_and_correct(batch)
        signal = 0.5 * (1.0 + correct - confidence)
        arrays = self._counts, self._buckets, self._window, self._best
        read, rang = _read(*arrays, signal, self.n_rows, self.every, self.delta)
        self.n_rows += read
        return int(rows[read - 1]) if rang else None

    def change_point(self) -> int:
        return max(1, int(self._best[1]))

    def evidence(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, NDArray[np.generic]]:
        return self._packed(
            n_rows=self.n_rows, counts=self._counts, buckets=self._buckets, window=self._window, best=self._best
        )

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> Self:
        arrays = self._unpacked(state, "n_rows", "counts", "buckets", "window", "best")
        self.n_rows, self._counts, self._buckets = int(arrays["n_rows"]), arrays["counts"], arrays["buckets"]
        self._window, self._best = arrays["window"], arrays["best"]
        return self


@compiled
def _read(
    counts: NDArray[np.int64], buckets: Array, window: Array, best: Array, signal: Array, n_rows: int, every: int,
    delta: float,
) -> tuple[int, bool]:  # fmt: skip
    """How many were read, and whether the last of them made it ring."""
    for t in range(len(signal)):
        _add(counts, buckets, window, signal[t])
        if (n_rows + t + 1) % every == 0 and window[0] > FIRST_ROWS:
            _look(counts, buckets, window, best, delta)
            if best[0] >= 1.0:
                _forget(counts, buckets, window, best[1])
                return t + 1, True
    return len(signal), False


@compiled
def _add(counts: NDArray[np.int64], buckets: Array, window: Array, x: float) -> None:
    if window[0] > 0.0:
        gap = x - window[1] / window[0]
        window[2] += window[0] * gap * gap / (window[0] + 1.0)
    window[0] += 1.0
    window[1] += x
    total, squares, n = x, 0.0, 1.0
    for size in range(SIZES):
        row, count = buckets[size], counts[size]
        row[count, 0], row[count, 1] = total, squares
        counts[size] += 1
        if counts[size] <= MOST:
            break
        total = row[0, 0] + row[1, 0]
        gap = (row[0, 0] - row[1, 0]) / n
        squares = row[0, 1] + row[1, 1] + 0.5 * n * gap * gap
        for i in range(2, MOST + 1):
            row[i - 2, 0], row[i - 2, 1] = row[i, 0], row[i, 1]
        counts[size] -= 2
        n *= 2.0


@compiled
def _look(counts: NDArray[np.int64], buckets: Array, window: Array, best: Array, delta: float) -> None:
    """The cut with the largest multiple into `best`."""
    best[:] = 0.0
    certainty = log(2.0 * log(window[0]) / delta)
    older = older_total = 0.0
    for size in range(SIZES - 1, -1, -1):
        for i in range(counts[size]):
            older += 2.0**size
            older_total += buckets[size, i, 0]
            newer = window[0] - older
            if older < SHORTEST or newer < SHORTEST:
                continue
            m = 1.0 / (older - SHORTEST + 1.0) + 1.0 / (newer - SHORTEST + 1.0)
            most = sqrt(2.0 * m * window[2] / window[0] * certainty) + 2.0 / 3.0 * m * certainty
            multiple = abs(older_total / older - (window[1] - older_total) / newer) / most
            if multiple > best[0]:
                best[0], best[1] = multiple, newer


@compiled
def _forget(counts: NDArray[np.int64], buckets: Array, window: Array, kept: float) -> None:
    """What is older than the last `kept` rows."""
    for size in range(SIZES - 1, -1, -1):
        n, row = 2.0**size, buckets[size]
        while counts[size] > 0 and window[0] > kept:
            left = window[0] - n
            gap = row[0, 0] / n - (window[1] - row[0, 0]) / left
            window[2] = max(window[2] - row[0, 1] - n * left * gap * gap / (n + left), 0.0)
            window[0], window[1] = left, window[1] - row[0, 0]
            for i in range(1, MOST + 1):
                row[i - 1, 0], row[i - 1, 1] = row[i, 0], row[i, 1]
            counts[size] -= 1

"""The calibration error of the last rows, held against a fixed limit: what most dashboards do.

Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks" (ICML 2017), section 2: confidence in bins of
equal width, the sum over bins of |correct - confidence| / window. It is never negative, so that noise alone lifts it,
by an amount that depends on how confidences are spread: a harmless change of the inputs may carry it over the limit,
and it promises nothing about false alarms. It is here to be compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
from numpy.typing import NDArray

from calibrators.numerics import Array
from service.drift.detectors.base import Batch, Detector, number, whole
from service.drift.detectors.top_label import confidence_and_correct


class WindowedECE(Detector):
    """Rings when the expected calibration error of the last rows reaches a limit.

    Parameters
    ----------
    limit : of the error
    window : rows
    every : it is looked at once in so many rows, the first time when the window is full
    n_bins : of confidence

    Examples
    --------
    >>> logits, labels = np.log([[0.9, 0.1]] * 1000), np.arange(1000) % 2
    >>> detector = WindowedECE()
    >>> detector.update(Batch(logits, labels, np.zeros(1000, np.int64)))
    999
    >>> round(detector.statistic, 3), detector.evidence()
    (0.4, {'confidence 0.87 to 0.93': 1.0})
    """

    kind = "windowed_ece"
    labelled = True
    ready = True

    def __init__(self, limit: float = 0.06, window: float = 1000, every: float = 100, n_bins: float = 15) -> None:
        self.limit = number("limit", limit, above=0, most=1)
        self.window = whole("window", window, most=1_000_000)
        self.every = whole("every", every)
        self.n_bins = whole("n_bins", n_bins, most=1000)
        self.reset()

    def reset(self) -> None:
        self.n_rows = 0
        self._confidence, self._correct = np.zeros(self.window), np.zeros(self.window)
        self._gaps = np.zeros(self.n_bins)

    @property
    def statistic(self) -> float:
        return float(self._gaps.sum())

    @property
    def threshold(self) -> float:
        return self.limit

    def update(self, batch: Batch) -> int | None:
        rows, confidence, correct = confidence_and_correct(batch)
        done = 0
        while done < len(rows):
            n = min(self._until_looked_at(), len(rows) - done)
            self._keep(confidence[done : done + n], correct[done : done + n])
            done += n
            if self._until_looked_at() == self.every and self.n_rows >= self.window:
                self._gaps = self._look()
                if self.statistic >= self.limit:
                    return int(rows[done - 1])
        return None

    def change_point(self) -> int:
        return max(1, min(self.n_rows, self.window))

    def evidence(self) -> dict[str, float]:
        edges, total = np.linspace(0, 1, self.n_bins + 1), self.statistic
        return {
            f"confidence {edges[b]:.2f} to {edges[b + 1]:.2f}": float(gap / total)
            for b, gap in enumerate(self._gaps)
            if gap > 0
        }

    def state(self) -> dict[str, NDArray[np.generic]]:
        return self._packed(n_rows=self.n_rows, confidence=self._confidence, correct=self._correct, gaps=self._gaps)

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> Self:
        arrays = self._unpacked(state, "n_rows", "confidence", "correct", "gaps")
        self.n_rows = int(arrays["n_rows"])
        self._confidence, self._correct, self._gaps = arrays["confidence"], arrays["correct"], arrays["gaps"]
        return self

    def _until_looked_at(self) -> int:
        """Rows from 1 to `every`: it is looked at when `window` rows came, and `every` rows, and so on."""
        return (self.window - self.n_rows - 1) % self.every + 1

    def _keep(self, confidence: Array, correct: Array) -> None:
        at = (self.n_rows + np.arange(len(confidence))) % self.window
        self._confidence[at], self._correct[at] = confidence, correct
        self.n_rows += len(confidence)

    def _look(self) -> Array:
        """Of each bin, what it adds to the error."""
        bins = np.minimum((self._confidence * self.n_bins).astype(np.int64), self.n_bins - 1)
        return np.abs(np.bincount(bins, self._correct - self._confidence, self.n_bins)) / self.window

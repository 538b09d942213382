"""Whether what was learned may serve: do no harm.

The judges are labelled rows that nothing learned from, the last ones of each producer. A new state serves only if its
log loss there is, for every producer who sent enough of them, no worse by more than a margin than that of the
revision's start and that of the best state so far. The best is replaced only by one that is no worse for anybody, so
that many small steps lead no farther than one. One producer can keep a state from serving; none can make it serve.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from calibrators.graph import parameters_of
from calibrators.numerics import Array
from calibrators.online.learner import OnlineCalibrator
from service.learning.progress import Rows, by_producer

WINDOW_ROWS, WINDOW_VALUES = 1000, 64_000
"""Of one producer so many held-out rows are kept, fewer where they have so many classes that they would be more values
than that."""
LEAST_ROWS = 20
"""Who sent fewer held-out rows has no say."""
MARGIN = 5e-4
"""In nats a row: where probabilities are near one half, a shift by .016."""
EXPIRES_MS = 86_400_000
"""Held-out rows that were predicted so long before the newest one count no more."""
MOST_PRODUCERS = 64
TRUSTED = 1e3
"""No parameter that serves is larger."""
LEAST_PROBABILITY = 1e-12


class Verdict(NamedTuple):
    """`refused`: why the state may not serve, empty if it may; `best`: whether it is the best so far.

    The losses are those of the producer on whose rows the state does worst; NaN while nobody has a say.
    """

    refused: str
    best: bool
    new: float = float("nan")
    best_loss: float = float("nan")
    start: float = float("nan")


class _Compared(NamedTuple):
    """On one producer's rows: the losses of the new state, the best and the start; the new one's excess over both."""

    losses: list[float]
    excess: list[float]


class Gate:
    """The held-out rows of one revision. `start` is its state before any label, `best` the best so far."""

    def __init__(self, start: OnlineCalibrator, best: OnlineCalibrator) -> None:
        self.start, self.best = start, best
        self._windows: dict[int, Rows] = {}

    def add(self, rows: Rows) -> None:
        for producer, new in by_producer(rows):
            before = self._windows.pop(producer, None)
            joined = new if before is None else Rows(*map(np.concatenate, zip(before, new, strict=True)))
            self._windows[producer] = joined.chosen(slice(-window_rows(joined.logits.shape[1]), None))
        while len(self._windows) > MOST_PRODUCERS:
            del self._windows[next(iter(self._windows))]

    def judge(self, state: OnlineCalibrator) -> Verdict:
        if not all(np.abs(values).max(initial=0) <= TRUSTED for values in parameters_of(state).values()):
            return Verdict("a parameter is out of bounds", best=False)
        found = [self._compared(state, rows) for rows in self._judges()]
        if not found:
            return Verdict("", best=True)
        by_best, by_start = (max(one.excess[index] for one in found) for index in (0, 1))
        worst = max(found, key=lambda one: max(one.excess))
        beaten = [
            name for name, excess in (("the best so far", by_best), ("the start", by_start)) if not excess <= MARGIN
        ]
        refused = f"worse than {' and '.join(beaten)} on held-out labels" if beaten else ""
        is_best = not refused and max(one.losses[0] - one.losses[1] for one in found) <= 0
        return Verdict(refused, is_best, *worst.losses)

    def _compared(self, state: OnlineCalibrator, rows: Rows) -> _Compared:
        """While a window is not full, chance is allowed for: by the part of a standard error that is missing of it."""
        new, *others = (log_losses(calibrator, rows) for calibrator in (state, self.best, self.start))
        n, full = len(new), window_rows(rows.logits.shape[1])
        chance = (1 - n / full) / np.sqrt(n)
        excess = [float((new - other).mean() - chance * (new - other).std()) for other in others]
        return _Compared([float(losses.mean()) for losses in (new, *others)], excess)

    def _judges(self) -> list[Rows]:
        newest = max((int(rows.times_ms.max()) for rows in self._windows.values()), default=0)
        recent = (rows.chosen(rows.times_ms >= newest - EXPIRES_MS) for rows in self._windows.values())
        return [rows for rows in recent if len(rows.labels) >= LEAST_ROWS]


def window_rows(n_classes: int) -> int:
    """How many held-out rows are kept of one producer."""
    return min(WINDOW_ROWS, max(100, WINDOW_VALUES // n_classes))


def log_losses(calibrator: OnlineCalibrator, rows: Rows) -> Array:
    """Of each row."""
    probabilities = calibrator.predict_proba(rows.logits)[np.arange(len(rows.labels)), rows.labels]
    losses: Array = -np.log(np.maximum(probabilities, LEAST_PROBABILITY))
    return losses

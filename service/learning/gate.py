"""Whether what was learned may serve: do no harm.

The judges are labelled rows that nothing learned from, the last ones of each producer. A new state serves only if on
the rows of every producer who sent enough of them

- its log loss is no worse, by more than a margin, than that of the revision's start and of the best state so far;
- and it moves probabilities little from those of the best state, or betters its loss by more than a standard error:
  the best of many states that were tried on the same few rows is better by chance, and an attacker tries many.

A state is the best so far when it betters the one before by more than a standard error for everybody, so many small
steps lead no farther than one. One producer can keep a state from serving; none can make it serve.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from calibrators.graph import parameters_of
from calibrators.numerics import Array
from calibrators.online.learner import OnlineCalibrator
from service.learning.progress import Rows, by_producer

WINDOW_ROWS, WINDOW_VALUES = 500, 32_000
"""Of one producer so many held-out rows are kept, fewer where they have so many classes that they would be more values
than that."""
LEAST_ROWS = 20
"""Who sent fewer held-out rows has no say."""
MARGIN = 5e-4
"""In nats a row."""
MOVED = 0.01
"""Mean total variation distance from the best state up to which a state need not be surely better."""
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
    """A new state on one producer's rows: its losses, the best state's and the start's; how far it moves from the best.

    `sure` is whether it betters the best by more than a standard error.
    """

    new: float
    best: float
    start: float
    moved: float
    sure: bool

    @property
    def excess(self) -> float:
        return self.new - min(self.best, self.start)


class Gate:
    """The held-out rows of one revision. `start` is its state before any label, `best` the best so far."""

    def __init__(self, start: OnlineCalibrator, best: OnlineCalibrator) -> None:
        self.start, self.best = start, best
        self._windows: dict[int, Rows] = {}

    def add(self, rows: Rows) -> None:
        for producer, new in by_producer(rows):
            before = self._windows.pop(producer, None)
            joined = new if before is None else Rows(*map(np.concatenate, zip(before, new, strict=True)))
            most = min(WINDOW_ROWS, max(100, WINDOW_VALUES // joined.logits.shape[1]))
            self._windows[producer] = joined.chosen(slice(-most, None))
        while len(self._windows) > MOST_PRODUCERS:
            del self._windows[next(iter(self._windows))]

    def judge(self, state: OnlineCalibrator) -> Verdict:
        if not all(np.abs(values).max(initial=0) <= TRUSTED for values in parameters_of(state).values()):
            return Verdict("a parameter is out of bounds", best=False)
        found = [self._compared(state, rows) for rows in self._judges()]
        if not found:
            return Verdict("", best=True)
        reasons = {
            "worse than the best so far": any(not one.new - one.best <= MARGIN for one in found),
            "worse than the start": any(not one.new - one.start <= MARGIN for one in found),
            "far from the best so far and not surely better": any(one.moved > MOVED and not one.sure for one in found),
        }
        refused = ", ".join(reason for reason, holds in reasons.items() if holds)
        worst = max(found, key=lambda one: one.excess)
        return Verdict(refused, not refused and all(one.sure for one in found), *worst[:3])

    def _compared(self, state: OnlineCalibrator, rows: Rows) -> _Compared:
        new, best, start = (calibrator.predict_proba(rows.logits) for calibrator in (state, self.best, self.start))
        losses = [_log_losses(probabilities, rows.labels) for probabilities in (new, best, start)]
        gains, means = losses[1] - losses[0], [float(of_rows.mean()) for of_rows in losses]
        return _Compared(
            new=means[0],
            best=means[1],
            start=means[2],
            moved=float(np.abs(new - best).sum(axis=1).mean()) / 2,
            sure=bool(gains.mean() > gains.std() / np.sqrt(len(gains))),
        )

    def _judges(self) -> list[Rows]:
        newest = max((int(rows.times_ms.max()) for rows in self._windows.values()), default=0)
        recent = (rows.chosen(rows.times_ms >= newest - EXPIRES_MS) for rows in self._windows.values())
        return [rows for rows in recent if len(rows.labels) >= LEAST_ROWS]


def _log_losses(probabilities: Array, labels: Array) -> Array:
    losses: Array = -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], LEAST_PROBABILITY))
    return losses

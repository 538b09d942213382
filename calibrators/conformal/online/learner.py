"""What the online learners share: a threshold that moves with the labels, and a state that is numbers alone.

Split thresholds hold while rows stay exchangeable with the calibration set. These hold whatever comes: of any sequence
of scores, however chosen, the share at or below the thresholds tends to the confidence level, because each miss raises
the next threshold and each hit lowers it. They say nothing of a given row or stretch; local coverage has to be watched.

A learner sees the score of each label that arrives, in order. Its state is a dict of float64 arrays, each step is plain
arithmetic on them, so the same scores give the same state bit for bit, and a state read back goes on as if nothing had
happened. Nothing is raised on the way: a level that leaves 0..1 means a threshold of plus or minus infinity, the set of
all labels or of none.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.conformal.level import check_level

State = dict[str, NDArray[np.float64]]


class OnlineThreshold(ABC):
    """A threshold on nonconformity scores, learned score by score.

    Attributes
    ----------
    state : the numbers learned so far; assign it to go on from there
    """

    def __init__(self, confidence_level: float = 0.9) -> None:
        self.confidence_level = check_level(confidence_level)
        self.state: State = {}

    @property
    def misses_wanted(self) -> float:
        """1 - c, the share of misses that is aimed at."""
        return 1 - self.confidence_level

    @property
    @abstractmethod
    def threshold(self) -> float:
        """Labels with this score or less are in the next set; may be plus or minus infinity."""

    def update(self, score: float) -> bool:
        """Learn from the score of the label that arrived; whether the set before held it.

        Raises
        ------
        ValueError
            if the score is not a finite number
        """
        seen = float(score)
        if not math.isfinite(seen):
            raise ValueError(f"a score must be a finite number, got {score!r}")
        missed = seen > self.threshold
        self._learn(seen, missed)
        return not missed

    def run(self, scores: ArrayLike) -> NDArray[np.bool_]:
        """(n,) `update` with each score in turn."""
        return np.array([self.update(score) for score in np.asarray(scores, dtype=np.float64)], dtype=bool)

    @abstractmethod
    def _learn(self, score: float, missed: bool) -> None:
        """Move the state by one label."""


class WindowedThreshold(OnlineThreshold):
    """A learner of levels: its threshold is a quantile of the last scores.

    Parameters
    ----------
    scores : (n,) of a calibration set, to start from; the last `window` of them are kept
    window : how many of the last scores are looked at
    """

    def __init__(self, confidence_level: float, scores: ArrayLike, window: int) -> None:
        super().__init__(confidence_level)
        if window < 1:
            raise ValueError(f"window must be 1 or more, got {window}")
        self.window = window
        first = np.asarray(scores, dtype=np.float64)
        if first.ndim != 1 or not np.all(np.isfinite(first)):
            raise ValueError(f"scores must be finite numbers of shape (n,), got shape {first.shape}")
        self.state["recent"] = first[-window:].copy()

    def quantile(self, misses: float) -> float:
        """The threshold that this share of the last scores, and of one more, would miss."""
        recent = self.state["recent"]
        k = math.ceil(min(max((len(recent) + 1) * (1 - misses), -1.0), len(recent) + 1.0))
        if k > len(recent):
            return float("inf")
        return float(np.partition(recent, k - 1)[k - 1]) if k > 0 else float("-inf")

    def most_misses(self, score: float) -> float:
        """The largest share of misses whose `quantile` is no less than the score (DtACI's beta)."""
        recent = self.state["recent"]
        return 1 - np.count_nonzero(recent < score) / (len(recent) + 1)

    def _remember(self, score: float) -> None:
        self.state["recent"] = np.append(self.state["recent"], score)[-self.window :]


def restored(learner: OnlineThreshold, state: Mapping[str, ArrayLike]) -> OnlineThreshold:
    """The learner, going on from a state that another of the same parameters had.

    Raises
    ------
    ValueError
        if the names are not those of this learner's state
    """
    if state.keys() != learner.state.keys():
        raise ValueError(f"a state of this learner has {sorted(learner.state)}, got {sorted(state)}")
    learner.state = {name: np.array(values, dtype=np.float64) for name, values in state.items()}
    return learner

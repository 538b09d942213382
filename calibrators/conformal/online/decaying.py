"""decaying: quantile tracking with steps that shrink, so that the threshold settles where rows do.

Angelopoulos, Barber, Bates, "Online Conformal Prediction with Decaying Step Sizes", ICML 2024, section 2:

    q <- q + step t^(-1/2 - e) (missed - (1 - c))          e = 0.1

For any sequence of scores in a range of length B the share of misses among T differs from 1 - c by at most
(B + step) T^(1/2 + e) / (step T) (their theorem 1), and where rows are exchangeable q converges to the true quantile,
which steps of one size never do. The price is paid after a late shift: small steps are slow.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from calibrators.conformal.online.learner import OnlineThreshold

EXPONENT = 0.6
"""1/2 + e."""


class DecayingSteps(OnlineThreshold):
    """q with steps step t^-0.6, from the quantile of `scores` or, without any, from the first score seen.

    >>> learner = DecayingSteps(0.9, scores=np.linspace(0, 1, 99))
    >>> round(float(learner.run(np.random.default_rng(0).uniform(size=4000)).mean()), 2), round(learner.threshold, 1)
    (0.9, 0.9)
    """

    def __init__(self, confidence_level: float = 0.9, *, scores: ArrayLike = (), step: float = 1.0) -> None:
        super().__init__(confidence_level)
        if not step > 0:
            raise ValueError(f"step must be above 0, got {step}")
        self.step = step
        first = np.asarray(scores, dtype=np.float64)
        start = np.quantile(first, self.confidence_level) if len(first) else np.inf
        self.state["threshold"] = np.array([start, 0.0])  # with the number of labels

    @property
    def threshold(self) -> float:
        return float(self.state["threshold"][0])

    def _learn(self, score: float, missed: bool) -> None:
        threshold, count = (float(value) for value in self.state["threshold"])
        if np.isinf(threshold):
            threshold = score
        moved = self.step * (count + 1) ** -EXPONENT * (missed - self.misses_wanted)
        self.state["threshold"] = np.array([threshold + moved, count + 1])

"""aci: the level itself moves, by a step a miss.

Gibbs and Candes, "Adaptive Conformal Inference Under Distribution Shift", NeurIPS 2021, section 2:

    a <- a + step (1 - c - missed)         threshold: the 1 - a quantile of the last `window` scores

Their proposition 4.1: over T labels the share of misses differs from 1 - c by at most
(max(a_1, 1 - a_1) + step) / (T step), whatever the labels. a may leave 0..1; the set is then full or empty, which is
what brings it back. The authors' step is 0.005 and their window 1250.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from calibrators.conformal.online.learner import WindowedThreshold


class AdaptiveConformal(WindowedThreshold):
    """One level, one step.

    >>> learner = AdaptiveConformal(0.9, scores=np.linspace(0, 1, 99), step=0.05)
    >>> hits = learner.run(np.tile([0.2, 0.8, 3.0, 4.0], 500))  # far from the scores it started from
    >>> round(float(hits.mean()), 2)
    0.9
    """

    def __init__(
        self, confidence_level: float = 0.9, *, scores: ArrayLike = (), step: float = 0.005, window: int = 1250
    ) -> None:
        super().__init__(confidence_level, scores, window)
        if not step > 0:
            raise ValueError(f"step must be above 0, got {step}")
        self.step = step
        self.state["misses"] = np.array([self.misses_wanted])

    @property
    def threshold(self) -> float:
        return self.quantile(float(self.state["misses"][0]))

    def _learn(self, score: float, missed: bool) -> None:
        self.state["misses"] = self.state["misses"] + self.step * (self.misses_wanted - missed)
        self._remember(score)

"""dtaci: adaptive conformal inference with several steps at once, mixed by how well each does lately.

Gibbs and Candes, "Conformal Inference for Online Prediction with Arbitrary Distribution Shifts", JMLR 2024, algorithm
2. Each expert i has its step and its level a_i. With b the largest share of misses whose set would have held the label,
an expert's loss is the pinball loss of a_i at b, and its weight falls with it:

    l_i = (1 - c) (b - a_i) - min(0, b - a_i)
    w_i <- (1 - share) w_i exp(-eta l_i) + share mean of these
    a_i <- a_i + step_i (1 - c - [a_i > b])                     set at one of the a_i, drawn by weight

eta follows the losses of the last 500 labels: sqrt((log(2 k 500) + 1) / sum of the mean squared losses), k the number
of experts. The authors draw at random or take the mean of the a_i. The mean gives up what each expert has, the long-run
coverage: on elec2 it was .911 for .9. Here the draws follow the fractional parts of n times the golden ratio, which
spread evenly and are the same when the labels are replayed (.897).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from calibrators.conformal.online.learner import WindowedThreshold

STEPS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
SHARE = 1 / 1000
ETA, LOOK_BACK = 2.72, 500
"""eta until losses have been seen, and how many are looked back at."""

GOLDEN = (math.sqrt(5) - 1) / 2


class DynamicallyTunedConformal(WindowedThreshold):
    """Levels with several steps, mixed by weight.

    >>> learner = DynamicallyTunedConformal(0.9, scores=np.linspace(0, 1, 99))
    >>> bool(abs(learner.run(3 + np.random.default_rng(0).uniform(size=5000)).mean() - 0.9) < 0.01)
    True
    """

    def __init__(
        self,
        confidence_level: float = 0.9,
        *,
        scores: ArrayLike = (),
        steps: Sequence[float] = STEPS,
        window: int = 1250,
    ) -> None:
        super().__init__(confidence_level, scores, window)
        if not len(steps) or not min(steps) > 0:
            raise ValueError(f"steps must be numbers above 0, got {steps}")
        self.steps = np.asarray(steps, dtype=np.float64)
        self.state["misses"] = np.full(len(self.steps), self.misses_wanted)
        self.state["weights"] = np.full(len(self.steps), 1 / len(self.steps))
        self.state["losses"], self.state["count"] = np.zeros(0), np.zeros(1)

    @property
    def threshold(self) -> float:
        drawn = float(self.state["count"][0]) * GOLDEN % 1
        chosen = int(np.searchsorted(np.cumsum(self.state["weights"])[:-1], drawn, side="right"))
        return self.quantile(float(self.state["misses"][chosen]))

    def _learn(self, score: float, missed: bool) -> None:
        del missed
        misses, weights, wanted = self.state["misses"], self.state["weights"], self.misses_wanted
        most = self.most_misses(score)
        losses = wanted * (most - misses) - np.minimum(0, most - misses)
        grown = weights * np.exp(-self._eta() * (losses - losses.min()))
        grown = (1 - SHARE) * grown / grown.sum() + SHARE / len(grown)
        self.state["losses"] = np.append(self.state["losses"], (weights * losses**2).sum())[-LOOK_BACK:]
        self.state["weights"] = grown
        self.state["misses"] = misses + self.steps * (wanted - (misses > most))
        self.state["count"] = self.state["count"] + 1
        self._remember(score)

    def _eta(self) -> float:
        total = float(self.state["losses"].sum())
        if len(self.state["losses"]) < LOOK_BACK or not total:
            return ETA
        return math.sqrt((math.log(2 * len(self.steps) * LOOK_BACK) + 1) / total)

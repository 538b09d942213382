"""pid: the threshold as a controlled quantity: proportional to the last miss, integrating all, guessing ahead.

Angelopoulos, Candes, Tibshirani, "Conformal PID Control for Time Series Prediction", NeurIPS 2023, sections 2.1-2.3:

    P   tracked <- tracked + step range (missed - (1 - c))         range: of the last `window` scores
    I   strength tan(x log(t + 1) / (saturation t + 100)),         x the number of misses so far less (1 - c) t
    D   a forecast of the next score, where asked for

and the threshold is their sum. The argument of the tangent is kept inside +-pi/2: beyond it the published code is
infinite, which no later label could correct by degrees. The authors forecast by the Theta model (Assimakopoulos and
Nikolopoulos 2000), which is simple exponential smoothing with half of the trend's slope (Hyndman and Billah 2003).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from calibrators.conformal.online.learner import OnlineThreshold

FORECASTS = ("none", "theta")
SMOOTHING = 0.05
"""Of the exponential smoothing: the forecast follows some twenty labels."""

EDGE = math.pi / 2 - 1e-6


class ConformalPID(OnlineThreshold):
    """A controlled threshold.

    Parameters
    ----------
    scores : (n,) of a calibration set, to start from
    step : of the proportional part, in units of the range of scores
    strength : of the integrating part, in units of the score
    saturation : the larger, the more misses beyond what is wanted the integrating part bears
    forecast : "none" or "theta"

    >>> learner = ConformalPID(0.9, scores=np.linspace(0, 1, 99))
    >>> bool(abs(learner.run(np.random.default_rng(0).uniform(size=5000) ** 2).mean() - 0.9) < 0.01)
    True
    """

    def __init__(
        self,
        confidence_level: float = 0.9,
        *,
        scores: ArrayLike = (),
        step: float = 0.02,
        strength: float = 0.1,
        saturation: float = 0.2,
        forecast: Literal["none", "theta"] = "none",
        window: int = 100,
    ) -> None:
        super().__init__(confidence_level)
        if not (step > 0 and strength >= 0 and saturation > 0 and window >= 1):
            raise ValueError("step, saturation and window must be above 0, strength not negative")
        if forecast not in FORECASTS:
            raise ValueError(f"forecast must be one of {', '.join(FORECASTS)}, got {forecast!r}")
        self.step, self.strength, self.saturation, self.forecast = step, strength, saturation, forecast
        self.window = window
        first = np.asarray(scores, dtype=np.float64)
        start = float(np.quantile(first, self.confidence_level)) if len(first) else 0.0
        smooth = float(first.mean()) if len(first) else 0.0
        self.state["recent"] = first[-window:].copy()
        # tracked, misses so far, labels so far; smoothed score, its first place, sums of the trend's line
        self.state["control"] = np.array([start - (smooth if forecast == "theta" else 0.0), 0.0, 0.0])
        self.state["trend"] = np.array([smooth, 0.0, 0.0])

    @property
    def threshold(self) -> float:
        tracked, misses, count = (float(value) for value in self.state["control"])
        return tracked + self._integral(misses, count) + self._forecast()

    def _integral(self, misses: float, count: float) -> float:
        angle = (misses - self.misses_wanted * count) * math.log(count + 1) / (self.saturation * count + 100)
        return self.strength * math.tan(min(max(angle, -EDGE), EDGE))

    def _forecast(self) -> float:
        if self.forecast == "none":
            return 0.0
        smooth, total, moment = (float(value) for value in self.state["trend"])
        n = float(self.state["control"][2])
        # Least squares of the scores on 1..n: the sums suffice.
        slope = (moment - total * (n + 1) / 2) / (n * (n * n - 1) / 12) if n > 1 else 0.0
        return smooth + slope / 2

    def _learn(self, score: float, missed: bool) -> None:
        tracked, misses, count = (float(value) for value in self.state["control"])
        recent = self.state["recent"] = np.append(self.state["recent"], score)[-self.window :]
        moved = self.step * float(recent.max() - recent.min()) * (missed - self.misses_wanted)
        self.state["control"] = np.array([tracked + moved, misses + missed, count + 1])
        smooth, total, moment = (float(value) for value in self.state["trend"])
        self.state["trend"] = np.array(
            [smooth + SMOOTHING * (score - smooth), total + score, moment + score * (count + 1)]
        )

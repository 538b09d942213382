"""platt: a logistic curve on each class's log-odds.

Platt, "Probabilistic Outputs for Support Vector Machines", 1999, in the form of Lin, Lin, Weng, "A note on Platt's
probabilistic outputs for support vector machines", Machine Learning 68, 2007. On the log-odds of each class against the
rest, s_k = log(p_k / (1 - p_k)) with p the softmax of the logits,

    P(y = k) is proportional to sigmoid(a_k s_k + b_k).

With N+ rows of class k and N- of the others (sums of weights), a_k and b_k minimise the log loss against the targets

    (N+ + 1) / (N+ + 2)  for rows of class k,      1 / (N- + 2)  for the others        (Lin, Lin, Weng, equation 2)

which lie inside (0, 1), so the optimum is finite even where the rows are separable. It is found by Newton's method
with backtracking (their algorithm 1), for all classes at once. For two classes s_0 = -s_1 and the targets mirror each
other: a_0 = a_1, b_0 = -b_1, the row sums to one by itself, and this is Platt's own map on z_1 - z_0.

The slope is kept at zero or above. Below zero it turns a class's ranking upside down: in a class of few rows that is
noise, in one of many the columns have been mixed up, which a calibrator must not hide. The loss is convex, so the
constrained optimum is slope zero with the best intercept.

A class without rows, or whose log-odds never vary, says nothing about its slope. It takes the pooled slope, the mean of
the other classes' weighted with their rows (1 where there is none), and only its intercept is fitted; for a class
without rows the target is 1 / (N + 2) in every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.numerics import Array, blocks, log_odds, normalised_sigmoid

MAX_SLOPE = 1e6
"""Slopes end here, so that float32 cannot overflow for logits that `check_logits` accepts."""

GRADIENT_TOLERANCE = 1e-11
"""Of the mean log loss, on standardised log-odds."""

MAX_EVALUATIONS = 200
SUFFICIENT_DECREASE = 1e-4
RIDGE = 1e-12
"""Added to the curvatures (Lin, Lin, Weng, algorithm 1): a step is finite even where every sigmoid is flat."""

ROUNDING = 1e-14
"""A step may seem to raise the loss by so much of the sizes of a and b: near the optimum that is the sum's noise."""

LEAST_SPREAD = 1e-12
"""Log-odds that vary by less of their size vary by rounding alone."""


class PlattScaling(Calibrator):
    """One-vs-rest logistic calibration of the log-odds. May change the argmax.

    Attributes
    ----------
    slope_ : (n_classes,) float64, a_k >= 0; below 1 the model was overconfident about class k
    intercept_ : (n_classes,) float64, b_k

    Examples
    --------
    Four rows say class 1 by a log-odds of 4 and three of them are right: the targets 4/5 (of three rows) and 1/4 (of
    one) make 0.6625 of that.

    >>> calibrator = PlattScaling().fit([[0, 4], [0, 4], [0, 4], [0, 4], [4, 0]], [1, 1, 1, 0, 0])
    >>> calibrator.predict_proba([[0.0, 4.0], [4.0, 0.0]]).round(4).tolist()
    [[0.3375, 0.6625], [0.75, 0.25]]
    """

    learned = ("slope", "intercept")
    float32_atol = 5e-6

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        losses = _Losses.of(log_odds(logits), y, weight)
        counts = np.bincount(y, weights=weight, minlength=logits.shape[1])
        slope, intercept = _minimise(losses, np.full(len(counts), np.nan))
        informative = np.isfinite(slope) & (counts > 0)
        pooled = np.average(slope[informative], weights=counts[informative]) if informative.any() else 1.0
        given = np.clip(np.where(informative, slope, pooled), 0.0, MAX_SLOPE)
        bound = given != slope
        slope[bound], intercept[bound] = _minimise(losses.take(bound), given[bound])
        self.slope_, self.intercept_ = slope, intercept

    def _predict_proba(self, logits: Array) -> Array:
        dtype = logits.dtype
        return normalised_sigmoid(self.slope_.astype(dtype) * log_odds(logits) + self.intercept_.astype(dtype))

    def emit(self, graph: Graph, logits: str) -> str:
        scaled = graph.node("Mul", graph.log_odds(logits), graph.parameter("slope", self.slope_))
        return graph.normalised_sigmoid(graph.node("Add", scaled, graph.parameter("intercept", self.intercept_)))

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        for name in self.learned:
            check_tensor(name, tensors[name], np.float64, (n_classes,))
        slope = tensors["slope"]
        if not (slope.min() >= 0 and slope.max() <= MAX_SLOPE):
            raise ValueError(f"slopes must lie in 0..{MAX_SLOPE:g}, got {slope.min()}..{slope.max()}")


class _Losses(NamedTuple):
    """Mean log losses of k classes against the rest: L(a, b) = sum_i w_i softplus(a u_i + b) - a m - b r for each.

    The targets tau enter linearly, so two sums hold all of them.
    """

    u: Array  # (k, n_samples) log-odds
    weight: Array  # (n_samples,) w, summing to one
    moment: Array  # (k,) m = sum_i w_i tau_i u_i
    rate: Array  # (k,) r = sum_i w_i tau_i

    @classmethod
    def of(cls, scores: Array, y: Array, weight: Array) -> _Losses:
        n_samples, n_classes = scores.shape
        counts, total = np.bincount(y, weights=weight, minlength=n_classes), weight.sum()
        high, low = (counts + 1) / (counts + 2), 1 / (total - counts + 2)
        share = weight / total
        own = np.bincount(y, weights=share * scores[np.arange(n_samples), y], minlength=n_classes)
        moment, rate = low * (share @ scores) + (high - low) * own, low + (high - low) * counts / total
        return cls(np.ascontiguousarray(scores.T), share, moment, rate)

    def take(self, classes: Array | slice) -> _Losses:
        return _Losses(self.u[classes], self.weight, self.moment[classes], self.rate[classes])

    def standardised(self) -> tuple[_Losses, Array, Array]:
        """The same losses of log-odds with mean 0 and deviation 1; the old mean and deviation, 0 where none varies."""
        mean = self.u @ self.weight
        u = self.u - mean[:, None]
        deviation = np.sqrt(np.square(u) @ self.weight)
        deviation[deviation <= LEAST_SPREAD * np.abs(self.u).max(axis=1)] = 0.0
        divisor = np.where(deviation > 0, deviation, 1.0)
        u /= divisor[:, None]
        return _Losses(u, self.weight, (self.moment - mean * self.rate) / divisor, self.rate), mean, deviation

    def at(self, theta: Array, free: Array) -> tuple[Array, Array, Array]:
        """Value (k,), gradient (2, k) and Newton step (2, k) at theta = (a, b); a moves only where `free`."""
        t = theta[0][:, None] * self.u
        t += theta[1][:, None]
        decay = np.exp(-np.abs(t))
        p = np.where(t >= 0, 1.0, decay) / (1 + decay)
        value = (np.maximum(t, 0) + np.log1p(decay)) @ self.weight - theta[0] * self.moment - theta[1] * self.rate
        gradient_a = free * ((p * self.u) @ self.weight - self.moment)
        gradient_b = p @ self.weight - self.rate
        p *= 1 - p
        bb = p @ self.weight + RIDGE
        p *= self.u
        ab = free * (p @ self.weight)
        p *= self.u
        aa = p @ self.weight + RIDGE
        step = np.stack([ab * gradient_b - bb * gradient_a, ab * gradient_a - aa * gradient_b]) / (aa * bb - ab * ab)
        return value, np.stack([gradient_a, gradient_b]), step


def _minimise(losses: _Losses, slope: Array) -> tuple[Array, Array]:
    """Slopes and intercepts of least loss. A slope that is given stays; NaN stays where nothing identifies a slope."""
    found = []
    for block in blocks(*losses.u.shape):
        standardised, mean, deviation = losses.take(block).standardised()
        wanted = np.isnan(slope[block])
        a, b = _newton(standardised, np.where(wanted, 0.0, slope[block] * deviation), wanted & (deviation > 0))
        fitted = np.divide(a, deviation, out=slope[block].copy(), where=wanted & (deviation > 0))
        found.append(np.stack([fitted, b - np.nan_to_num(fitted) * mean]))
    slopes, intercepts = np.concatenate(found, axis=1)
    return slopes, intercepts


def _newton(losses: _Losses, a: Array, free: Array) -> tuple[Array, Array]:
    """Minimise each loss over b, and over a where `free`, from a given a and the intercept that says the base rate.

    Each evaluation either takes a class's step or halves it, so classes at different stages share every pass.
    """
    theta = np.stack([a, np.log(losses.rate / (1 - losses.rate))])
    value, gradient, step = losses.at(theta, free)
    length = np.ones(len(a))
    for _ in range(MAX_EVALUATIONS):
        active = np.flatnonzero(np.abs(gradient).max(axis=0) > GRADIENT_TOLERANCE)
        if not len(active):
            break
        trial = theta[:, active] + length[active] * step[:, active]
        trial_value, trial_gradient, trial_step = losses.take(active).at(trial, free[active])
        promised = length[active] * (gradient[:, active] * step[:, active]).sum(axis=0)
        noise = ROUNDING * (1 + np.abs(trial).sum(axis=0))
        better = trial_value <= value[active] + SUFFICIENT_DECREASE * promised + noise
        length[active] = np.where(better, 1.0, length[active] / 2)
        moved = active[better]
        theta[:, moved], value[moved] = trial[:, better], trial_value[better]
        gradient[:, moved], step[:, moved] = trial_gradient[:, better], trial_step[:, better]
    return theta[0], theta[1]

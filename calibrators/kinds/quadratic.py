"""quadratic: a parabola on each class's log-odds.

Berta, Holzmüller, Jordan, Bach, "Rethinking Early Stopping: Refine, Then Calibrate", arXiv 2501.19195, and their
package probmetrics: logistic regression on (1, s, s^2), with s_k the log-odds of class k against the rest,

    P(y = k) is proportional to sigmoid(alpha_k u_k + beta_k u_k^2 + c_k)
    u_k = clip((2 s_k - low_k - high_k) / (high_k - low_k), -1, 1)

u is s brought from the range [low_k, high_k] that it had in the calibration set to [-1, 1]: the same parabolas, and
numbers of one size. Where scores are normal among the rows of class k and among the others, with any two variances, the
true log-odds are such a parabola of s. Of all methods it won most comparisons in log loss of CalArena's
"tabarena-binary" (arXiv 2605.30188).

The map NEED NOT BE MONOTONE. Where the parabola has its vertex inside the range, two rows may change places, so the
ranking (area under the curve) may change; with few rows that bend is noise. A parabola far from its rows says nothing:
beyond the range its end values hold, where the published map runs on.

Targets, optimum, classes without rows: `calibrators.logistic`. The published fit has bare labels; smoothed ones give
separable rows a finite answer. For two classes the maps mirror each other and the row sums to one by itself.

Held-out log loss on CIFAR-10 ResNet-50, 5,000 rows to fit: .1988 (platt .2044, temperature scaling .2038).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.logistic import OneVsRest
from calibrators.numerics import Array, log_odds, normalised_sigmoid

LEAST_HALF = 1e-6
"""Scores whose range is narrower than this part of their size do not vary: float32 could not tell them apart."""

LARGEST = 1e31
"""Bound of centres and halves: no score of logits that `check_logits` accepts lies beyond."""


class QuadraticCalibration(Calibrator):
    """One-vs-rest logistic calibration with a quadratic term. May change the argmax and the ranking.

    Attributes
    ----------
    centre_, half_ : (n_classes,) float64, middle and half the width of the range of s_k in the calibration set
    coefficients_ : (n_classes, 2) float64, alpha_k and beta_k, of either sign
    intercept_ : (n_classes,) float64, c_k

    Examples
    --------
    Right less often where the model is surest: of 100 rows each at log-odds -2, 0 and 2, 10, 60 and 40 are class 1.

    >>> logits = [[0, -2]] * 100 + [[0, 0]] * 100 + [[0, 2]] * 100
    >>> y = [1] * 10 + [0] * 90 + [1] * 60 + [0] * 40 + [1] * 40 + [0] * 60
    >>> calibrator = QuadraticCalibration().fit(logits, y)
    >>> calibrator.predict_proba([[0.0, -2.0], [0.0, 0.0], [0.0, 2.0], [0.0, 9.0]])[:, 1].round(2).tolist()
    [0.1, 0.6, 0.4, 0.4]
    """

    learned = ("centre", "half", "coefficients", "intercept")
    float32_atol = 1e-5

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        scores = np.ascontiguousarray(log_odds(logits).T)
        problem = OneVsRest(scores, y, weight, _features)
        self.coefficients_, self.intercept_ = problem.fit((1.0, 0.0), nonnegative=False)
        self.centre_, self.half_ = _range(scores)

    def _predict_proba(self, logits: Array) -> Array:
        learned = (*self.coefficients_.T, self.intercept_, self.centre_, self.half_)
        alpha, beta, c, centre, half = (array.astype(logits.dtype) for array in learned)
        u = np.clip((log_odds(logits) - centre) / half, -1, 1)
        return normalised_sigmoid((beta * u + alpha) * u + c)

    def emit(self, graph: Graph, logits: str) -> str:
        centre, half = graph.parameter("centre", self.centre_), graph.parameter("half", self.half_)
        coefficients = graph.parameter("coefficients", self.coefficients_.T)
        rows = (graph.constant(np.array([row], dtype=np.int64)) for row in (0, 1))
        alpha, beta = (graph.node("Gather", coefficients, row, axis=0) for row in rows)
        u = graph.node("Div", graph.node("Sub", graph.log_odds(logits), centre), half)
        u = graph.node("Min", graph.node("Max", u, graph.constant(-1.0)), graph.constant(1.0))
        slope = graph.node("Add", graph.node("Mul", beta, u), alpha)
        t = graph.node("Add", graph.node("Mul", slope, u), graph.parameter("intercept", self.intercept_))
        return graph.normalised_sigmoid(t)

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        check_tensor("coefficients", tensors["coefficients"], np.float64, (n_classes, 2))
        for name in ("centre", "half", "intercept"):
            check_tensor(name, tensors[name], np.float64, (n_classes,))
            if np.abs(tensors[name]).max() > LARGEST:
                raise ValueError(f"{name} must lie within ±{LARGEST:g}, got {np.abs(tensors[name]).max()}")
        if tensors["half"].min() < np.finfo(np.float32).tiny:
            raise ValueError(f"half the width of a range must be positive, got {tensors['half'].min()}")


def _range(scores: Array) -> tuple[Array, Array]:
    """Middle and half the width of each row of scores (k, n_samples); a row that does not vary gets width enough."""
    low, high = scores.min(axis=1), scores.max(axis=1)
    centre, half = (low + high) / 2, (high - low) / 2
    size = np.abs(centre)
    varies = (half > LEAST_HALF * size) & (half >= np.finfo(np.float32).tiny)
    return centre, np.where(varies, half, np.maximum(size, 1.0))


def _features(scores: Array) -> Array:
    """u and u^2, (k, 2, n_samples), of log-odds (k, n_samples)."""
    centre, half = _range(scores)
    u = (scores - centre[:, None]) / half[:, None]
    return np.stack([u, u * u], axis=1)

"""spline: the confidence, moved by the slope of a smooth curve through the cumulative error.

Gupta, Rahimi, Ajanthan, Mensink, Sminchisescu, Hartley, "Calibration of Neural Networks using Splines", ICLR 2021.
Sort the rows by confidence s; with t in 0..1 the share of rows up to there (of their weights), let

    h(t) = sum over the rows up to t of w_i (correct_i - s_i) / sum_i w_i

|h| at its largest is the Kolmogorov-Smirnov calibration error. A natural cubic spline S of `N_KNOTS` even knots is
fitted to h by least squares, and as h is the integral of accuracy less confidence, the recalibrated confidence is

    c = s + S'(t)

Here:

1. The squares are integrated over t, not summed over rows: rows of one confidence are one straight piece of h, and a
   row of weight two is that row twice.
2. t depends on s alone, so c is a function of s. It is stored at `TABLE` points and read off by straight lines between
   them, both sides in log-odds u = log(s / (1 - s)), in which float32 resolves confidences near one. Half of the points
   are even in t, half even in u. Beyond the ends c stays what it is there.
3. c is kept within 1/K and (N + 1/K) / (N + 1), as if one more row had its label spread over the K classes.
4. The others keep their shares of what is left, 1 - c. That is softmax with c's log-odds less s's added to the top
   logit. Where the top would fall to its runner-up or below, it stops `LEAST_GAP` above it in logits, or where it was
   if it was nearer. So the argmax is kept.

Held out on CIFAR-10 ResNet-50 (5,000 rows to fit, 10,000 to score), against temperature scaling: Kolmogorov-Smirnov
error .0111 and .0175, Brier score .0807 and .0825, ECE .0138 and .0137, log loss .2068 and .2038.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.interpolate import CubicSpline

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.numerics import Array, softmax_in_place, two_largest

N_KNOTS = 6
TABLE = 128
LEAST_GAP = 1e-3
LARGEST_LEVEL = 60.0
"""Bound of the calibrated log-odds: beyond it float32 knows no probability."""

FARTHEST = 1e31
"""Bound of the table's scores: logits that `check_logits` accepts have none beyond."""

GAUSS_POINTS, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(4)
"""Exact up to degree 7; the product of two cubics has 6."""

TINY = float(np.finfo(np.float32).tiny)


class SplineCalibration(Calibrator):
    """Recalibrates the confidence; the other classes share the rest as they did. Keeps the argmax.

    Attributes
    ----------
    scores_ : (TABLE,) float32, log-odds of the model's confidence, not decreasing
    levels_ : (TABLE,) float32, log-odds of the calibrated confidence at those

    Examples
    --------
    Nine rows in ten are right, whether the model says so with log-odds 4 or 2.

    >>> logits = [[0.0, 4.0]] * 500 + [[0.0, 2.0]] * 500
    >>> calibrator = SplineCalibration().fit(logits, ([1] * 9 + [0]) * 100)
    >>> calibrator.predict_proba([[0.0, 4.0], [2.0, 0.0]]).max(axis=1).round(1).tolist()
    [0.9, 0.9]
    """

    learned = ("scores", "levels")
    float32_atol = 2e-5

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        gap, log_rest = _gap_and_rest(logits)
        correct = logits.argmax(axis=1) == y
        scores, share, error = _tied((gap - log_rest)[:, 0].astype(np.float32), correct, weight)
        after = np.cumsum(share)
        t, total = after - share / 2, weight.sum()
        spline = _fit_spline(np.append(0, after), np.append(0, np.cumsum(error)))
        even = np.linspace(0, 1, TABLE // 2)
        table = np.concatenate([np.interp(even, t, scores), scores[0] + even * (scores[-1] - scores[0])])
        self.scores_ = np.sort(table.astype(np.float32))
        confidence = _sigmoid(self.scores_) + spline(np.interp(self.scores_, scores, t), 1)
        uniform = 1 / logits.shape[1]
        levels = _logit(np.clip(confidence, uniform, (total + uniform) / (total + 1)))
        self.levels_ = np.clip(levels, -LARGEST_LEVEL, LARGEST_LEVEL).astype(np.float32)

    def _predict_proba(self, logits: Array) -> Array:
        gap, log_rest = _gap_and_rest(logits)
        level = _look_up(gap - log_rest, self.scores_.astype(logits.dtype), self.levels_.astype(logits.dtype))
        moved = logits - (logits.max(axis=1, keepdims=True) - gap)
        top = np.maximum(level + log_rest, np.minimum(gap, logits.dtype.type(LEAST_GAP)))
        np.put_along_axis(moved, logits.argmax(axis=1)[:, None], top, axis=1)
        return softmax_in_place(moved)

    def emit(self, graph: Graph, logits: str) -> str:
        zero, one = graph.constant(0.0), graph.constant(1.0)
        first, second = graph.two_largest(logits)
        above, gap = graph.node("Sub", logits, second), graph.node("Sub", first, second)
        terms = graph.reduce("ReduceSum", graph.node("Exp", graph.node("Min", above, zero)))
        log_rest = graph.node("Log", graph.node("Sub", terms, one))
        level = self._emit_look_up(graph, graph.node("Sub", gap, log_rest))
        least = graph.node("Min", gap, graph.constant(LEAST_GAP))
        top = graph.node("Max", graph.node("Add", level, log_rest), least)
        classes = graph.constant(np.arange(self.n_classes_, dtype=np.int64))
        is_top = graph.node("Equal", graph.node("ArgMax", logits, axis=1, keepdims=1), classes)
        return graph.softmax(graph.node("Where", is_top, top, above))

    def _emit_look_up(self, graph: Graph, score: str) -> str:
        """`_look_up` of FLOAT [B, 1] scores."""
        scores, levels = graph.parameter("scores", self.scores_), graph.parameter("levels", self.levels_)
        ends = [graph.node("Gather", scores, graph.constant(np.array([i], np.int64)), axis=0) for i in (0, TABLE - 1)]
        x = graph.node("Min", graph.node("Max", score, ends[0]), ends[1])
        passed = graph.reduce("ReduceSum", graph.cast(graph.node("Greater", x, scores), np.float32))
        cell = graph.node("Max", graph.node("Sub", passed, graph.constant(1.0)), graph.constant(0.0))
        left = graph.cast(cell, np.int32)
        right = graph.node("Add", left, graph.constant(np.array(1, dtype=np.int32)))
        low, high, low_level, high_level = [
            graph.node("Gather", table, index, axis=0) for table in (scores, levels) for index in (left, right)
        ]
        width = graph.node("Max", graph.node("Sub", high, low), graph.constant(TINY))
        fraction = graph.node("Div", graph.node("Sub", x, low), width)
        return graph.node("Add", low_level, graph.node("Mul", fraction, graph.node("Sub", high_level, low_level)))

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        del n_classes
        for name in self.learned:
            check_tensor(name, tensors[name], np.float32, (TABLE,))
        if np.diff(tensors["scores"]).min() < 0 or np.abs(tensors["scores"]).max() > FARTHEST:
            raise ValueError(f"scores must not decrease and lie within ±{FARTHEST:g}")
        if np.abs(tensors["levels"]).max() > LARGEST_LEVEL:
            raise ValueError(f"levels must lie within ±{LARGEST_LEVEL:g}")


def _gap_and_rest(logits: Array) -> tuple[Array, Array]:
    """Of each row, (n_samples, 1): the top logit's lead on the runner-up, and log sum exp of the others less it.

    The first less the second is the log-odds of the top class.
    """
    first, second = two_largest(logits, logits.argmax(axis=1))
    terms = np.minimum(logits - second, 0)
    np.exp(terms, out=terms)
    return first - second, np.log(terms.sum(axis=1, keepdims=True) - 1)


def _tied(scores: Array, correct: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Increasing distinct scores, each one's share of the weights, and its sum of w (correct - confidence) / sum w."""
    distinct, index = np.unique(scores, return_inverse=True)
    weight = weight / weight.sum()
    share = np.bincount(index, weights=weight)
    hits = np.bincount(index, weights=weight * correct)
    return distinct.astype(np.float64), share, hits - share * _sigmoid(distinct)


def _fit_spline(t: Array, h: Array) -> CubicSpline:
    """The natural cubic spline of least squared distance to the polyline through (t, h), integrated over 0..1."""
    knots = np.linspace(0, 1, N_KNOTS)
    basis = CubicSpline(knots, np.eye(N_KNOTS), bc_type="natural")
    nodes = np.union1d(np.minimum(t, 1.0), knots)
    half, middle = np.diff(nodes) / 2, (nodes[1:] + nodes[:-1]) / 2
    gram, moment = np.zeros((N_KNOTS, N_KNOTS)), np.zeros(N_KNOTS)
    for point, mass in zip(GAUSS_POINTS, GAUSS_WEIGHTS, strict=True):
        x = middle + half * point
        values = basis(x)
        weighted = values * (mass * half)[:, None]
        gram += weighted.T @ values
        moment += np.interp(x, t, h) @ weighted
    return CubicSpline(knots, np.linalg.solve(gram, moment), bc_type="natural")


def _look_up(score: Array, scores: Array, levels: Array) -> Array:
    """Value at `score` of the piecewise linear map through (scores, levels), its ends held."""
    x = np.clip(score, scores[0], scores[-1])
    left = np.clip(np.searchsorted(scores, x) - 1, 0, TABLE - 2)
    fraction = (x - scores[left]) / np.maximum(scores[left + 1] - scores[left], x.dtype.type(TINY))
    value: Array = levels[left] + fraction * (levels[left + 1] - levels[left])
    return value


def _sigmoid(log_odds: Array) -> Array:
    return np.exp(-np.logaddexp(0, -log_odds.astype(np.float64)))


def _logit(p: Array) -> Array:
    return np.asarray(np.log(p) - np.log1p(-p))

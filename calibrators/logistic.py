"""Logistic regression of each class against the rest, for the kinds that are one: platt, beta, quadratic.

With features x_ki of row i for class k, the probability sigmoid(theta_k . x_ki + b_k) is fitted to the targets of Lin,
Lin, Weng, "A note on Platt's probabilistic outputs for support vector machines", Machine Learning 68, 2007, equation 2:
with N+ rows of class k and N- of the others (sums of weights),

    tau = (N+ + 1) / (N+ + 2)  for rows of class k,      1 / (N- + 2)  for the others

They lie inside (0, 1), so the optimum is finite even where the rows are separable. The mean log loss

    L_k = sum_i w_i softplus(theta_k . x_ki + b_k) - theta_k . m_k - b_k r_k,    m_k = sum_i w_i tau_i x_ki,
                                                                                 r_k = sum_i w_i tau_i

is convex; the targets enter linearly, so that m and r hold all of them. It is minimised by Newton's method with
backtracking (their algorithm 1) on standardised features, for all classes at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from calibrators.numerics import Array, blocks

MAX_COEFFICIENT = 1e6
"""Coefficients end here, so that float32 cannot overflow for logits that `check_logits` accepts."""

GRADIENT_TOLERANCE = 1e-11
"""Of the mean log loss, on standardised features."""

MAX_EVALUATIONS = 200
SUFFICIENT_DECREASE = 1e-4
RIDGE = 1e-12
"""Added to the curvatures (Lin, Lin, Weng, algorithm 1): a step is finite even where every sigmoid is flat."""

ROUNDING = 1e-14
"""A step may seem to raise the loss by so much of the coefficients' sizes: near the optimum that is the sum's noise."""

LEAST_SPREAD = 1e-12
"""Features that vary by less of their size vary by rounding alone."""


class OneVsRest(NamedTuple):
    """The regressions of all classes; `features` makes (k, n_features, n_samples) of scores (k, n_samples)."""

    scores: Array  # (n_classes, n_samples)
    y: Array  # (n_samples,)
    weight: Array  # (n_samples,)
    features: Callable[[Array], Array]
    intercept: bool = True  # whether b_k is fitted; else it is zero

    def fit(self, unidentified: tuple[float, ...], *, nonnegative: bool) -> tuple[Array, Array]:
        """Coefficients (n_classes, n_features) and intercepts (n_classes,) of least loss.

        Where `nonnegative`, the first coefficient of a class below zero becomes zero and the others are fitted again,
        until none is below. A coefficient that its rows say nothing about, in a class without rows or for a feature
        that never varies, takes the pooled value, the mean of the other classes' weighted with their rows, or that of
        `unidentified` where there is none; the intercept is then fitted to it.
        """
        n_classes = len(self.scores)
        counts = np.bincount(self.y, weights=self.weight, minlength=n_classes)
        given = np.full((n_classes, len(unidentified)), np.nan)
        given[counts == 0] = 0.0
        coefficient, intercept = self._solve(np.arange(n_classes), given)
        for _ in range(nonnegative * len(unidentified)):
            below = np.flatnonzero((coefficient < 0).any(axis=1))
            given[below, (coefficient[below] < 0).argmax(axis=1)] = 0.0
            coefficient[below], intercept[below] = self._solve(below, given[below])
        coefficient[counts == 0] = np.nan
        final = np.clip(_pooled(coefficient, counts, unidentified), -MAX_COEFFICIENT, MAX_COEFFICIENT)
        changed = np.flatnonzero((final != coefficient).any(axis=1))
        coefficient[changed], intercept[changed] = self._solve(changed, final[changed])
        return coefficient, intercept

    def _solve(self, classes: Array, given: Array) -> tuple[Array, Array]:
        """The optimum of some classes. A coefficient that is given stays; NaN stays where nothing identifies it."""
        coefficient, intercept = given.copy(), np.zeros(len(classes))
        for block in blocks(len(classes), len(self.y) * given.shape[1]):
            if len(classes[block]):
                coefficient[block], intercept[block] = self._solve_block(classes[block], given[block])
        return coefficient, intercept

    def _solve_block(self, classes: Array, given: Array) -> tuple[Array, Array]:
        share = self.weight / self.weight.sum()
        x, mean, deviation = _standardised(self.features(self.scores[classes]), share, centred=self.intercept)
        shares = share * self._targets(classes)
        moment = np.column_stack([(x @ shares[:, :, None])[:, :, 0], shares.sum(axis=1)])
        wanted = np.isnan(given) & (deviation > 0)
        theta = np.column_stack([np.where(np.isnan(given), 0.0, given * deviation), np.zeros(len(classes))])
        if self.intercept:  # from the intercept that says the base rate
            theta[:, -1] = np.log(moment[:, -1] / (1 - moment[:, -1]))
        free = np.column_stack([wanted, np.full(len(classes), self.intercept)])
        theta = _newton(_Losses(x, share, moment), theta, free)
        fitted = np.divide(theta[:, :-1], deviation, out=given.copy(), where=wanted)
        return fitted, theta[:, -1] - (np.nan_to_num(fitted) * mean).sum(axis=1)

    def _targets(self, classes: Array) -> Array:
        hits = self.y == classes[:, None]
        positive = hits @ self.weight
        high, low = (positive + 1) / (positive + 2), 1 / (self.weight.sum() - positive + 2)
        targets: Array = np.where(hits, high[:, None], low[:, None])
        return targets


class _Losses(NamedTuple):
    """Mean log losses of k classes."""

    x: Array  # (k, n_features, n_samples)
    weight: Array  # (n_samples,) w, summing to one
    moment: Array  # (k, n_features + 1) m and r

    def take(self, classes: Array) -> _Losses:
        return self if len(classes) == len(self.x) else _Losses(self.x[classes], self.weight, self.moment[classes])

    def at(self, theta: Array, free: Array) -> tuple[Array, Array, Array]:
        """Value (k,), gradient and Newton step (k, n_features + 1) at theta, b last; only what is `free` moves."""
        t = (theta[:, None, :-1] @ self.x)[:, 0] + theta[:, -1:]
        decay = np.exp(-np.abs(t))
        p = np.where(t >= 0, 1.0, decay) / (1 + decay)
        value = (np.maximum(t, 0) + np.log1p(decay)) @ self.weight - (theta * self.moment).sum(axis=1)
        gradient = free * (self._moments(p * self.weight) - self.moment)
        curvature = p * (1 - p) * self.weight
        hessian = np.empty((len(theta), theta.shape[1], theta.shape[1]))
        hessian[:, :, -1] = hessian[:, -1, :] = self._moments(curvature)
        hessian[:, :-1, :-1] = (self.x * curvature[:, None]) @ self.x.transpose(0, 2, 1)
        hessian *= free[:, :, None] & free[:, None, :]
        hessian += np.where(free, RIDGE, 1.0)[:, :, None] * np.eye(theta.shape[1])
        return value, gradient, -np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]

    def _moments(self, terms: Array) -> Array:
        """Sums over the rows of terms (k, n_samples) times each feature, and of the terms themselves."""
        return np.column_stack([(self.x @ terms[:, :, None])[:, :, 0], terms.sum(axis=1)])


def _standardised(x: Array, share: Array, *, centred: bool) -> tuple[Array, Array, Array]:
    """Features of deviation 1, and mean 0 where `centred`; the old means and deviations, 0 where none varies."""
    mean = x @ share if centred else np.zeros(x.shape[:2])
    size = np.abs(x).max(axis=2)
    x = x - mean[:, :, None]
    deviation = np.sqrt(np.square(x) @ share)
    deviation[deviation <= LEAST_SPREAD * size] = 0.0
    return x / np.where(deviation > 0, deviation, 1.0)[:, :, None], mean, deviation


def _pooled(coefficient: Array, counts: Array, unidentified: tuple[float, ...]) -> Array:
    """Coefficients with each NaN replaced by the mean of its column, weighted with the classes' rows."""
    known = np.isfinite(coefficient) & (counts > 0)[:, None]
    rows = counts @ known
    total = counts @ np.where(known, coefficient, 0.0)
    mean = np.divide(total, rows, out=np.array(unidentified, dtype=np.float64), where=rows > 0)
    return np.where(known, coefficient, mean)


def _newton(losses: _Losses, theta: Array, free: Array) -> Array:
    """Minimise each loss from theta over what is `free`.

    Each evaluation either takes a class's step or halves it, so classes at different stages share every pass.
    """
    value, gradient, step = losses.at(theta, free)
    length = np.ones(len(theta))
    for _ in range(MAX_EVALUATIONS):
        active = np.flatnonzero(np.abs(gradient).max(axis=1) > GRADIENT_TOLERANCE)
        if not len(active):
            break
        trial = theta[active] + length[active, None] * step[active]
        trial_value, trial_gradient, trial_step = losses.take(active).at(trial, free[active])
        promised = length[active] * (gradient[active] * step[active]).sum(axis=1)
        noise = ROUNDING * (1 + np.abs(trial).sum(axis=1))
        better = trial_value <= value[active] + SUFFICIENT_DECREASE * promised + noise
        length[active] = np.where(better, 1.0, length[active] / 2)
        moved = active[better]
        theta[moved], value[moved] = trial[better], trial_value[better]
        gradient[moved], step[moved] = trial_gradient[better], trial_step[better]
    return theta

"""Softmax regression with a ridge: the convex problem inside `empirical_bayes`.

Rows i, classes k. The scores are linear in the parameters,

    z_ik = sum_m theta_m F_mik + d_k F_0ik + Psi_i . a_k,        p_i = softmax(z_i)

with `soft` features F that all classes share their coefficients of, and `common` features Psi (their first column ones)
that all classes read with coefficients of their own. With w_i the weight of a row, v_i a further weight on the last
class and S the diagonal of precisions, the objective

    J = sum_i w_i (-log p_i,y_i) + sum_i v_i (-log p_i,C) + 1/2 (x - x_0)' S (x - x_0)

is a sum and not a mean, so that precisions mean the same for any number of rows. It is convex, with

    gradient   sum_i J_i' ((w_i + v_i) p_i - w_i e_{y_i} - v_i e_C) + S (x - x_0)
    Hessian    sum_i (w_i + v_i) J_i' (diag p_i - p_i p_i') J_i + S

where J_i is the (C, parameters) matrix of features. Parameters are one vector: theta, then for each class its
coefficients of Psi, then d_k where the problem has slopes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize

from calibrators.numerics import Array, blocks

MOST_NEWTON_PARAMETERS = 400
"""Up to here the whole Hessian is cheaper than the steps it saves."""

NEWTON_STEPS = 60
NEWTON_TOLERANCE = 1e-6
"""Of the sum of weights: the squared Newton decrement whose step is the last. The decrement is twice what is left to
gain, and a full step about squares it."""

STEP_LENGTHS = tuple(0.5**halvings for halvings in range(20))
SUFFICIENT_DECREASE = 0.1

LBFGS_MEMORY = 20
LBFGS_STEPS = 200, 40
LBFGS_TOLERANCE = {"ftol": 1e-10, "gtol": 1e-6}, {"ftol": 1e-7, "gtol": 5e-5}
"""Of the mean loss: in float64, and in float32."""

FEWEST_LOOSE_PARAMETERS = 1500
MOST_DOUBLE_OF_FEW, MOST_DOUBLE = 1_000_000, 20_000
"""Scores of a problem that is computed in float64, of few and of many parameters."""


@dataclass(frozen=True)
class RidgeSoftmax:
    """The loss without its ridge."""

    soft: Array  # (m, n_samples, n_classes)
    common: Array  # (n_samples, c), first column ones
    labels: Array  # (n_samples,)
    weight: Array  # (n_samples,) w
    on_last: Array  # (n_samples,) v
    slopes: bool  # whether each class has its own coefficient of the first soft feature

    @property
    def shape(self) -> tuple[int, int]:
        """(classes, coefficients of each class)."""
        return self.soft.shape[2], self.common.shape[1] + self.slopes

    @property
    def n_parameters(self) -> int:
        return len(self.soft) + self.shape[0] * self.shape[1]

    def split(self, parameters: Array) -> tuple[Array, Array]:
        """theta (m,) and the coefficients of each class (n_classes, c or c + 1)."""
        n_soft = len(self.soft)
        return parameters[:n_soft], parameters[n_soft:].reshape(self.shape)

    def loss_and_gradient(self, parameters: Array) -> tuple[float, Array]:
        loss, gradient = 0.0, np.zeros(self.n_parameters)
        for rows in self._blocks():
            p, own_loss = rows._probabilities(parameters)
            loss += own_loss
            gradient += rows._gradient(p)
        return loss, gradient

    def loss(self, parameters: Array) -> float:
        return sum(rows._probabilities(parameters)[1] for rows in self._blocks())

    def fisher_diagonal(self, parameters: Array) -> Array:
        """Diagonal of the Hessian of the loss, as a vector of parameters."""
        diagonal = np.zeros(self.n_parameters)
        for rows in self._blocks():
            diagonal += rows._fisher_diagonal(rows._probabilities(parameters)[0])
        return diagonal

    def hessian(self, parameters: Array) -> Array:
        """Hessian of the loss, (n_parameters, n_parameters)."""
        hessian = np.zeros((self.n_parameters, self.n_parameters))
        for rows in self._blocks():
            hessian += rows._hessian(rows._probabilities(parameters)[0])
        return hessian

    def _blocks(self) -> list[RidgeSoftmax]:
        """The problem in pieces whose arrays stay in a processor's cache from one operation to the next."""
        return [
            replace(
                self,
                soft=self.soft[:, block],
                common=self.common[block],
                labels=self.labels[block],
                weight=self.weight[block],
                on_last=self.on_last[block],
            )
            for block in blocks(*self.soft.shape[1:])
        ]

    def _probabilities(self, parameters: Array) -> tuple[Array, float]:
        """p (n_samples, n_classes) and the loss."""
        z = self._scores(parameters)
        z -= z.max(axis=1, keepdims=True)
        own, last = z[np.arange(len(z)), self.labels].astype(float), z[:, -1].astype(float)
        np.exp(z, out=z)
        total = z.sum(axis=1)
        z /= total[:, None]
        loss = (self.weight + self.on_last) @ np.log(total.astype(float)) - self.weight @ own - self.on_last @ last
        return z, float(loss)

    def _scores(self, parameters: Array) -> Array:
        theta, own = self.split(parameters.astype(self.soft.dtype))
        n_common = self.common.shape[1]
        z = self.common @ own[:, :n_common].T
        z += np.tensordot(theta, self.soft, 1)
        if self.slopes:
            z += own[:, n_common] * self.soft[0]
        return z

    def _gradient(self, p: Array) -> Array:
        """Gradient of the loss where the probabilities are `p`, which become the residual."""
        p *= (self.weight + self.on_last).astype(p.dtype)[:, None]
        p[np.arange(len(p)), self.labels] -= self.weight
        p[:, -1] -= self.on_last
        shared = np.tensordot(self.soft, p, 2)
        own = p.T @ self.common
        if self.slopes:
            own = np.concatenate([own, np.einsum("ik,ik->k", p, self.soft[0])[:, None]], axis=1)
        return np.concatenate([shared, own.ravel()]).astype(float)

    def _fisher_diagonal(self, p: Array) -> Array:
        p_weighted = p * (self.weight + self.on_last).astype(p.dtype)[:, None]
        mean = np.einsum("ik,mik->mi", p, self.soft)
        shared = np.einsum("ik,mik->m", p_weighted, np.square(self.soft))
        shared -= np.square(mean) @ (self.weight + self.on_last)
        q = p_weighted * (1 - p)
        own = q.T @ np.square(self.common)
        if self.slopes:
            own = np.concatenate([own, np.einsum("ik,ik->k", q, np.square(self.soft[0]))[:, None]], axis=1)
        return np.concatenate([shared, own.ravel()]).astype(float)

    def _hessian(self, p: Array) -> Array:
        n_soft, (n_classes, width) = len(self.soft), self.shape
        weight = self.weight + self.on_last
        mean = np.empty((len(p), self.n_parameters))
        mean[:, :n_soft] = np.einsum("ik,mik->im", p, self.soft)
        hessian = np.zeros((self.n_parameters, self.n_parameters))
        for k in range(n_classes):
            columns = self._columns(k)
            own = np.r_[0:n_soft, n_soft + k * width : n_soft + (k + 1) * width]
            hessian[np.ix_(own, own)] += columns.T @ (columns * (weight * p[:, k])[:, None])
            mean[:, own[n_soft:]] = columns[:, n_soft:] * p[:, k, None]
        mean *= np.sqrt(weight)[:, None]
        return hessian - mean.T @ mean

    def _columns(self, k: int) -> Array:
        """Features of class k: soft, common and, with slopes, the first soft feature again."""
        parts = [self.soft[:, :, k].T, self.common]
        return np.concatenate([*parts, self.soft[0, :, k, None]] if self.slopes else parts, axis=1)


def solver_dtype(n_samples: int, n_classes: int, width: int) -> type[np.floating[Any]]:
    """float32 where the sums are long and their rounding is far below what stops the solver, else float64."""
    n_parameters, n_scores = n_classes * width, n_samples * n_classes
    newton = n_parameters <= MOST_NEWTON_PARAMETERS
    short = n_scores <= (MOST_DOUBLE_OF_FEW if n_parameters < FEWEST_LOOSE_PARAMETERS else MOST_DOUBLE)
    return np.float64 if newton or short else np.float32


@dataclass(frozen=True)
class Solution:
    parameters: Array
    effective: Array
    """Of each parameter, the share that the rows and not the ridge decided: 0 to 1."""


def minimise(problem: RidgeSoftmax, precision: Array, centre: Array, start: Array) -> Solution:
    """The optimum of the loss with its ridge, from `start`."""
    if problem.n_parameters <= MOST_NEWTON_PARAMETERS:
        return _newton(problem, precision, centre, start)
    return _lbfgs(problem, precision, centre, start)


def _newton(problem: RidgeSoftmax, precision: Array, centre: Array, start: Array) -> Solution:
    """Newton's method with halved steps; the effective shares from the inverse Hessian itself."""
    x = start
    for _ in range(NEWTON_STEPS):
        loss, gradient = problem.loss_and_gradient(x)
        value = loss + _ridge(x, precision, centre)
        gradient += precision * (x - centre)
        factor = scipy.linalg.cho_factor(problem.hessian(x) + np.diag(precision))
        step = scipy.linalg.cho_solve(factor, gradient)
        decrement = float(gradient @ step)
        for length in STEP_LENGTHS:
            trial = x - length * step
            trial_value = problem.loss(trial) + _ridge(trial, precision, centre)
            if trial_value <= value - SUFFICIENT_DECREASE * length * decrement:
                break
        x = trial
        if decrement <= NEWTON_TOLERANCE * problem.weight.sum():
            break
    inverse = scipy.linalg.cho_solve(factor, np.eye(len(x)))
    return Solution(x, 1 - precision * np.diag(inverse))


def _lbfgs(problem: RidgeSoftmax, precision: Array, centre: Array, start: Array) -> Solution:
    """L-BFGS on parameters scaled by the inverse root of the Hessian's diagonal."""
    fisher = problem.fisher_diagonal(start)
    scale = 1 / np.sqrt(fisher + precision)
    total = float(problem.weight.sum())
    loose = problem.soft.dtype == np.float32

    def objective(u: Array) -> tuple[float, Array]:
        x = scale * u
        loss, gradient = problem.loss_and_gradient(x)
        gradient += precision * (x - centre)
        return (loss + _ridge(x, precision, centre)) / total, scale * gradient / total

    found = scipy.optimize.minimize(
        objective,
        start / scale,
        jac=True,
        method="L-BFGS-B",
        options={"maxcor": LBFGS_MEMORY, "maxiter": LBFGS_STEPS[loose], **LBFGS_TOLERANCE[loose]},
    )
    x = scale * found.x
    fisher = problem.fisher_diagonal(x)
    return Solution(x, fisher / (fisher + precision))


def _ridge(x: Array, precision: Array, centre: Array) -> float:
    return float(precision @ np.square(x - centre)) / 2

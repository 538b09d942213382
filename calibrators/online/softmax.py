"""Multi-class online calibration: a temperature and a bias a class that forget, and a mixture of such experts.

An expert's probabilities are softmax(s z + b), z the logits less the row's largest, not below `LOWEST`. With p that
forecast and E_p, Var_p the mean and variance of z under it, each label y brings

    g_s = E_p z - z_y                 h_s <- lambda h_s + (Var_p z + g_s^2) / 2 + (1 - lambda) RIDGE
    g_k = p_k - 1[y = k]              h_k <- lambda h_k + (p_k (1 - p_k) + g_k^2) / 2 + (1 - lambda) RIDGE

and one step of Newton's method with this diagonal, pulled to s = 1 and b = 0 by the ridge as
`calibrators.online.experts` describes. A label costs a few exponentials a class, whatever the number of classes; a full
matrix, as the online Newton step has, would cost K^2 and is not better (benchmarks/online.py). Experts: the model's own
probabilities, a temperature alone, and temperature with biases at several memories; mixed by fixed share under the log
loss, half the first weight on the model's own, so that over T labels the loss exceeds its by at most log 2 + T SHARE.

Only biases follow a drift of the class priors: a temperature cannot see it.
"""

from __future__ import annotations

from math import exp, log
from typing import NamedTuple

import numpy as np

from calibrators.numerics import Array
from calibrators.online.compiled import compiled
from calibrators.online.experts import IDENTITY, SHARE

LOWEST = -50.0
RIDGE = 3.0
LEAST_SCALE, MOST_SCALE, MOST_BIAS = 0.01, 100.0, 20.0

MEMORY = np.array([np.inf, 500.0, 500.0, 4000.0, np.inf])
"""Of the experts, in labels; the first is the model's own probabilities, the second a temperature alone."""

N_EXPERTS = len(MEMORY)
FIRST_SHARES = np.array([IDENTITY] + [(1 - IDENTITY) / (N_EXPERTS - 1)] * (N_EXPERTS - 1))


class State(NamedTuple):
    """All float64, K the number of classes.

    Attributes
    ----------
    theta : (N_EXPERTS, 1 + K): s, then b
    curvature : (N_EXPERTS, 1 + K): h_s, then h_k
    shares : (N_EXPERTS,)
    """

    theta: Array
    curvature: Array
    shares: Array


def start(n_classes: int) -> State:
    """The state before the first label: every expert says what the model says."""
    theta = np.zeros((N_EXPERTS, 1 + n_classes))
    theta[:, 0] = 1.0
    return State(theta, np.full(theta.shape, RIDGE), FIRST_SHARES.copy())


def learn(state: State, logits: Array, y: Array, weight: Array) -> Array:
    """Probabilities (n_samples, n_classes), each row made before its label is learned from; `state` is changed.

    Parameters
    ----------
    logits : (n_samples, n_classes) float64
    y : (n_samples,) int64
    weight : (n_samples,) float64, positive. A weight of two is the row twice; what is left of one counts by its part
    """
    return _learn(*state, np.ascontiguousarray(logits), y, weight, MEMORY, FIRST_SHARES, SHARE)


def gains(logits: Array, y: Array) -> tuple[Array, Array]:
    """How much more probable each expert alone makes the labels than the model does, and its theta at the end.

    Parameters
    ----------
    logits : (n_samples, n_classes) float64
    y : (n_samples,) int64

    Returns
    -------
    gains : (N_EXPERTS,) in nats, each label forecast from those before it; the first, of the model itself, is 0
    theta : (N_EXPERTS, 1 + n_classes)

    Examples
    --------
    Half of the labels of a model that is sure of class 1.

    >>> found, theta = gains(np.array([[0.0, 3.0]] * 200), np.array([0, 1] * 100))
    >>> found.round(-1).tolist(), theta[1, 0].round(1).tolist()
    ([0.0, 160.0, 160.0, 160.0, 160.0], 0.0)
    """
    theta, curvature, _ = start(logits.shape[1])
    return _gains(theta, curvature, np.ascontiguousarray(logits), y, MEMORY), theta


@compiled
def _step(
    theta: Array, curvature: Array, z: Array, p: Array, y: int, weight: float, memory: float, biased: bool
) -> None:
    """One expert's step. p are its probabilities of the row z."""
    new = weight / memory
    mean = square = 0.0
    for k in range(len(z)):
        mean += p[k] * z[k]
        square += p[k] * z[k] * z[k]
    gradient = mean - z[y]
    information = 0.5 * (max(square - mean * mean, 0.0) + gradient * gradient)
    curvature[0] += new * (RIDGE - curvature[0]) + weight * information
    moved = theta[0] - (weight * gradient + new * RIDGE * (theta[0] - 1.0)) / curvature[0]
    theta[0] = min(max(moved, LEAST_SCALE), MOST_SCALE)
    if biased:
        for k in range(len(z)):
            gradient = p[k] - 1.0 if k == y else p[k]
            information = 0.5 * (p[k] * (1.0 - p[k]) + gradient * gradient)
            curvature[1 + k] += new * (RIDGE - curvature[1 + k]) + weight * information
            moved = theta[1 + k] - (weight * gradient + new * RIDGE * theta[1 + k]) / curvature[1 + k]
            theta[1 + k] = min(max(moved, -MOST_BIAS), MOST_BIAS)


@compiled
def _forecast(theta: Array, z: Array, p: Array) -> None:
    """softmax(s z + b) into p."""
    largest = -np.inf
    for k in range(len(z)):
        p[k] = theta[0] * z[k] + theta[1 + k]
        largest = max(largest, p[k])
    total = 0.0
    for k in range(len(z)):
        p[k] = exp(p[k] - largest)
        total += p[k]
    for k in range(len(z)):
        p[k] /= total


@compiled
def _learn(
    theta: Array, curvature: Array, shares: Array, logits: Array, y: Array, weight: Array, memory: Array,
    first_shares: Array, share: float,
) -> Array:  # fmt: skip
    n_experts = len(shares)
    n_samples, n_classes = logits.shape
    z, p, forecasts = np.empty(n_classes), np.empty((n_experts, n_classes)), np.zeros(logits.shape)
    for t in range(n_samples):
        largest = -np.inf
        for k in range(n_classes):
            largest = max(largest, logits[t, k])
        for k in range(n_classes):
            z[k] = max(logits[t, k] - largest, LOWEST)
        left = weight[t]
        while True:
            part, total = min(left, 1.0), 0.0
            for e in range(n_experts):
                _forecast(theta[e], z, p[e])
                if left == weight[t]:
                    for k in range(n_classes):
                        forecasts[t, k] += shares[e] * p[e, k]
                likelihood = max(p[e, y[t]], 1e-300)
                shares[e] *= likelihood if part == 1.0 else likelihood**part
                total += shares[e]
            if part == 0.0:
                break
            for e in range(n_experts):
                shares[e] = (1.0 - part * share) * shares[e] / total + part * share * first_shares[e]
                if e > 0:
                    _step(theta[e], curvature[e], z, p[e], y[t], part, memory[e], e > 1)
            left -= part
            if left <= 0.0:
                break
    return forecasts


@compiled
def _gains(theta: Array, curvature: Array, logits: Array, y: Array, memory: Array) -> Array:
    n_samples, n_classes = logits.shape
    z, p, gains = np.empty(n_classes), np.empty(n_classes), np.zeros(len(memory))
    for t in range(n_samples):
        largest = -np.inf
        for k in range(n_classes):
            largest = max(largest, logits[t, k])
        for k in range(n_classes):
            z[k] = max(logits[t, k] - largest, LOWEST)
        for e in range(len(memory)):
            _forecast(theta[e], z, p)
            if e == 0:
                own = log(max(p[y[t]], 1e-300))
            else:
                gains[e] += log(max(p[y[t]], 1e-300)) - own
                _step(theta[e], curvature[e], z, p, y[t], 1.0, memory[e], e > 1)
    return gains

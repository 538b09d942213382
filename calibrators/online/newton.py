"""Online Platt and beta scaling as published: the online Newton step.

Gupta, Ramdas, "Online Platt scaling with calibeating", ICML 2023, section 2 and appendix B: the forecast is
p_t = sigmoid(theta_t . x_t), and after each label y_t

    v = (p_t - y_t) x_t      H <- H + v v'      theta <- theta - H^-1 v / gamma      H_0 = I / (gamma D)^2

(online Newton step: Hazan, Agarwal, Kale, Machine Learning 69, 2007), with H^-1 kept by Sherman and Morrison's update.
Defaults are the authors' own: gamma = .1, D = 1 on (log-odds, 1) for Platt's map, D = 2 on (log p, log(1-p), 1) for the
beta map, theta_0 = 0. Their loss to the best fixed map grows as the logarithm of the number of rows.

These functions reproduce the published runs (`benchmarks/online.py`). Two properties make them a reference rather than
what one should use: theta_0 = 0 says one half at first, and H only grows, so that after a long quiet past the map
hardly moves. Where |theta| passes `MOST`, the authors project in the norm of H; it never happened in their runs or in
ours, and here such a step is not made.

The kinds `online_platt` and `online_beta` use `calibrators.online.experts` instead.
"""

from __future__ import annotations

from math import exp

import numpy as np

from calibrators.numerics import Array
from calibrators.online.compiled import compiled

GAMMA = 0.1
MOST = 100.0
LEAST_PROBABILITY = 1e-5
"""Probabilities are clipped here before their logarithms are taken."""


def online_platt(probabilities: Array, y: Array, *, gamma: float = GAMMA, diameter: float = 1.0) -> Array:
    """Forecasts (n_samples,) of class 1, each made before its label is seen.

    Parameters
    ----------
    probabilities : (n_samples,) the model's, of class 1
    y : (n_samples,) 0 or 1
    gamma, diameter : the step's gamma and D

    Examples
    --------
    >>> online_platt(np.array([0.9, 0.9, 0.9]), np.array([1, 0, 1])).round(3).tolist()
    [0.5, 0.571, 0.491]
    """
    p = np.clip(probabilities, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    x = np.column_stack([np.log(p / (1 - p)), np.ones(len(p))])
    return _forecasts(x, np.asarray(y, dtype=np.float64), gamma, diameter)


def online_beta(probabilities: Array, y: Array, *, gamma: float = GAMMA, diameter: float = 2.0) -> Array:
    """The same with the beta map."""
    p = np.clip(probabilities, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    q = np.clip(1 - np.asarray(probabilities), LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    x = np.column_stack([np.log(p), np.log(q), np.ones(len(p))])
    return _forecasts(x, np.asarray(y, dtype=np.float64), gamma, diameter)


@compiled
def _forecasts(x: Array, y: Array, gamma: float, diameter: float) -> Array:
    n_samples, n = x.shape
    inverse = np.eye(n) * (gamma * diameter) ** 2
    theta, v, u, step = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
    forecasts = np.empty(n_samples)
    for t in range(n_samples):
        total = 0.0
        for i in range(n):
            total += theta[i] * x[t, i]
        forecasts[t] = 1.0 / (1.0 + exp(-min(max(total, -100.0), 100.0)))
        for i in range(n):
            v[i] = (forecasts[t] - y[t]) * x[t, i]
        scale = 1.0
        for i in range(n):
            u[i] = 0.0
            for j in range(n):
                u[i] += inverse[i, j] * v[j]
            scale += v[i] * u[i]
        for i in range(n):
            for j in range(n):
                inverse[i, j] -= u[i] * u[j] / scale
        square = 0.0
        for i in range(n):
            step[i] = 0.0
            for j in range(n):
                step[i] += inverse[i, j] * v[j]
            square += (theta[i] - step[i] / gamma) ** 2
        if square <= MOST**2:
            for i in range(n):
                theta[i] -= step[i] / gamma
    return forecasts

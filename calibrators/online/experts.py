"""Binary online calibration by experts that forget at different rates, and by a mixture of them.

An expert is a logistic curve sigmoid(theta . phi(s)) of the model's log-odds s. After a label y it takes one step of
Newton's method on the discounted log loss of its past, with the ridge term that pulls it to the identity:

    H <- lambda H + w phi phi' + (1 - lambda) H_0        w = (p(1-p) + (p-y)^2) / 2,   p the forecast
    theta <- theta - H^-1 ((p - y) phi + (1 - lambda) H_0 (theta - theta_0))            lambda = 1 - 1/memory

w has the mean p(1-p) of the Fisher information where p is right, as the online Newton step's squared gradient has
(`calibrators.online.newton`), without its factor of ten on the step; and it is as large as the gradient where p is
badly wrong, so that no single label can throw the curve. Two shapes of curve, of s within `WITHIN`:

- lines a s + b, or the beta map a log p - c log(1-p) + b; H_0 is `RIDGE` times the unit matrix;
- bent lines, which follow what no sigmoid can: theta holds their values at `NODES`, and H_0 is `BEND_RIDGE` for the
  square of each change of slope and `LEVEL_RIDGE` for each value at -1, 0 and 1. Only the two nodes next to s have a
  phi, so H has two diagonals beside its own, and a step costs as many operations as there are nodes.

Expert 0 is the identity: the model's own probability. The forecast served is the mixture sum_e w_e p_e by fixed share
(Herbster, Warmuth, "Tracking the best expert", Machine Learning 32, 1998) under the log loss,

    w_e <- (1 - SHARE) w_e P_e(y) / sum + SHARE w_e(0)

which starts with half its weight on the identity: over any T labels its log loss exceeds the model's own by at most
log 2 + T SHARE, whatever comes. It does no harm.
"""

from __future__ import annotations

from math import exp, log1p
from typing import NamedTuple

import numpy as np

from calibrators.numerics import Array
from calibrators.online.compiled import compiled

WITHIN = 11.5
"""Log-odds are cut off here, at a probability of 1e-5, before features are made of them."""

MOST = 30.0
"""The largest log-odds that an expert says."""

KNOTS = np.linspace(-5.0, 5.0, 11)
NODES = np.array([-WITHIN, *KNOTS, WITHIN])
RIDGE, BEND_RIDGE, LEVEL_RIDGE = 3.0, 5.0, 1.0
MEMORIES = (60.0, 150.0, 400.0, 1000.0, 4000.0, np.inf)
BENT_MEMORIES = (3000.0, np.inf)
SHARE = 2e-5
IDENTITY = 0.5
"""The first weight of the identity; the others share the rest alike."""

N_EXPERTS = 1 + len(MEMORIES) + len(BENT_MEMORIES)
MEMORY = np.array([np.inf, *MEMORIES, *BENT_MEMORIES])
BENT = np.array([False] * (1 + len(MEMORIES)) + [True] * len(BENT_MEMORIES))
FIRST_SHARES = np.array([IDENTITY] + [(1 - IDENTITY) / (N_EXPERTS - 1)] * (N_EXPERTS - 1))


class State(NamedTuple):
    """Of one learner, all float64.

    Attributes
    ----------
    theta : (N_EXPERTS, len(NODES)); a line uses the first two or, of the beta map, three, the identity none
    curvature : (N_EXPERTS, len(NODES), 3), H: its diagonal, the one below, and the one below that
    shares : (N_EXPERTS,), w
    """

    theta: Array
    curvature: Array
    shares: Array


def start(beta: bool) -> State:
    """The state before the first label: every expert says what the model says."""
    theta, ridge = _start(beta)
    return State(theta.copy(), ridge.copy(), FIRST_SHARES.copy())


def n_line(beta: bool) -> int:
    """Features of a line."""
    return 3 if beta else 2


def _start(beta: bool) -> tuple[Array, Array]:
    """theta_0 and H_0 of all experts."""
    theta, ridge = np.zeros((N_EXPERTS, len(NODES))), np.zeros((N_EXPERTS, len(NODES), 3))
    theta[~BENT, 0] = 1.0
    if beta:
        theta[~BENT, 2] = 1.0
    ridge[~BENT, : n_line(beta), 0] = RIDGE
    theta[BENT], ridge[BENT] = NODES, _bend_ridge()
    return theta, ridge


def _bend_ridge() -> Array:
    """H_0 of a bent line, (len(NODES), 3)."""
    change = np.zeros((len(KNOTS), len(NODES)))  # of slope, at each knot
    for j, (before, after) in enumerate(zip(np.diff(NODES)[:-1], np.diff(NODES)[1:], strict=True)):
        change[j, j : j + 3] = 1 / before, -1 / before - 1 / after, 1 / after
    whole = BEND_RIDGE * change.T @ change + np.diag(LEVEL_RIDGE * (np.abs(NODES) <= 1))
    return np.column_stack([np.pad(np.diag(whole, -k), (0, k)) for k in range(3)])


def features(scores: Array, beta: bool) -> Array:
    """What `served` multiplies, one axis more than the scores, in their dtype: s, 1 (or log p, 1, -log(1-p)), then
    max(s - knot, 0)."""
    s = np.clip(scores, -WITHIN, WITHIN)
    line = [s, np.ones_like(s)]
    if beta:
        decay = np.log1p(np.exp(-np.abs(s)))
        line = [np.minimum(s, 0) - decay, line[1], np.maximum(s, 0) + decay]
    return np.stack([*line, *(np.maximum(s - s.dtype.type(knot), 0) for knot in KNOTS)], axis=-1)


def served(theta: Array, beta: bool) -> Array:
    """Coefficients (..., N_EXPERTS - 1, n_features) of `features`, of all experts but the identity."""
    lines, bent = theta[..., 1:, :][..., ~BENT[1:], :], theta[..., BENT, :]
    n = n_line(beta)
    coefficients = np.zeros((*theta.shape[:-2], N_EXPERTS - 1, n + len(KNOTS)))
    coefficients[..., : len(MEMORIES), :n] = lines[..., :n]
    slopes = np.diff(bent, axis=-1) / np.diff(NODES)
    straight = coefficients[..., len(MEMORIES) :, :]
    straight[..., 0] = slopes[..., 0]
    straight[..., 1] = bent[..., 0] + WITHIN * slopes[..., 0]
    if beta:
        straight[..., 2] = slopes[..., 0]  # log p - log(1-p) is s
    straight[..., n:] = np.diff(slopes, axis=-1)
    return coefficients


def learn(state: State, scores: Array, y: Array, weight: Array, beta: bool) -> Array:
    """Forecasts (n_samples,) of y = 1, each made before its label is learned from; `state` is changed.

    Parameters
    ----------
    scores : (n_samples,) float64, the model's log-odds
    y : (n_samples,) float64, 0 or 1
    weight : (n_samples,) float64, positive. A weight of two is the row twice; what is left of one counts by its part
    """
    return _learn(*state, scores, y, weight, beta, *_start(beta), MEMORY, BENT, FIRST_SHARES, NODES)


@compiled
def _fill_line(s: float, beta: bool, phi: Array) -> None:
    phi[0], phi[1] = s, 1.0
    if beta:
        decay = log1p(exp(-abs(s)))
        phi[0], phi[2] = min(s, 0.0) - decay, max(s, 0.0) + decay


@compiled
def _solve(band: Array, n: int, x: Array, lower: Array) -> None:
    """x <- H^-1 x, H of n rows and positive. H = L D L', of which `lower` takes D and the two diagonals of L."""
    for i in range(n):
        pivot, near, value = band[i, 0], 0.0, x[i]
        if i > 0:
            near = band[i - 1, 1]
        if i > 1:
            far = band[i - 2, 2]
            near -= far * lower[i - 2, 1]
            lower[i - 2, 2] = far / lower[i - 2, 0]
            pivot -= far * lower[i - 2, 2]
            value -= lower[i - 2, 2] * x[i - 2]
        if i > 0:
            lower[i - 1, 1] = near / lower[i - 1, 0]
            pivot -= near * lower[i - 1, 1]
            value -= lower[i - 1, 1] * x[i - 1]
        lower[i, 0], x[i] = pivot, value
    for i in range(n - 1, -1, -1):
        x[i] /= lower[i, 0]
        if i < n - 1:
            x[i] -= lower[i, 1] * x[i + 1]
        if i < n - 2:
            x[i] -= lower[i, 2] * x[i + 2]


@compiled
def _newton_step(
    theta: Array, band: Array, n: int, at: int, phi: Array, p: float, y: float, weight: float, memory: float,
    theta_0: Array, ridge: Array, step: Array, lower: Array,
) -> None:  # fmt: skip
    """One step of n coefficients, where phi holds the features from number `at` on and the others are zero."""
    step[:n] = 0.0
    new = weight / memory
    if new > 0.0:
        for i in range(n):
            off = theta[i] - theta_0[i]
            step[i] += new * ridge[i, 0] * off
            band[i, 0] += new * (ridge[i, 0] - band[i, 0])
            for k in range(1, min(3, n - i)):
                step[i + k] += new * ridge[i, k] * off
                step[i] += new * ridge[i, k] * (theta[i + k] - theta_0[i + k])
                band[i, k] += new * (ridge[i, k] - band[i, k])
    information = weight * 0.5 * (p * (1.0 - p) + (p - y) * (p - y))
    for i in range(len(phi)):
        step[at + i] += weight * (p - y) * phi[i]
        for k in range(len(phi) - i):
            band[at + i, k] += information * phi[i] * phi[i + k]
    _solve(band, n, step, lower)
    for i in range(n):
        theta[i] -= step[i]


@compiled
def _learn(
    theta: Array, curvature: Array, shares: Array, scores: Array, y: Array, weight: Array, beta: bool,
    theta_0: Array, ridge: Array, memory: Array, bent: Array, first_shares: Array, nodes: Array,
) -> Array:  # fmt: skip
    n_experts, n_nodes = theta.shape
    line, hats = np.zeros(3 if beta else 2), np.zeros(2)
    step, lower, said = np.zeros(n_nodes), np.zeros((n_nodes, 3)), np.zeros(n_experts)
    forecasts = np.empty(len(scores))
    for t in range(len(scores)):
        s = min(max(scores[t], -WITHIN), WITHIN)
        _fill_line(s, beta, line)
        at = 0
        while at < n_nodes - 2 and s > nodes[at + 1]:
            at += 1
        hats[1] = (s - nodes[at]) / (nodes[at + 1] - nodes[at])
        hats[0] = 1.0 - hats[1]
        left = weight[t]
        while True:
            part = min(left, 1.0)
            mixed = total = 0.0
            for e in range(n_experts):
                z = scores[t]
                if bent[e]:
                    z = theta[e, at] * hats[0] + theta[e, at + 1] * hats[1]
                elif e > 0:
                    z = 0.0
                    for i in range(len(line)):
                        z += theta[e, i] * line[i]
                z = min(max(z, -MOST), MOST)
                decay = exp(-abs(z))
                low = decay / (1.0 + decay)  # exact, where one less the other's probability is not
                said[e] = low if z < 0 else 1.0 / (1.0 + decay)
                likelihood = low if (z < 0) == (y[t] > 0.5) else 1.0 / (1.0 + decay)
                mixed += shares[e] * said[e]
                shares[e] *= likelihood if part == 1.0 else likelihood**part
                total += shares[e]
            if left == weight[t]:
                forecasts[t] = mixed
            if part == 0.0:
                break
            for e in range(n_experts):
                shares[e] = (1.0 - part * SHARE) * shares[e] / total + part * SHARE * first_shares[e]
                if bent[e]:
                    _newton_step(
                        theta[e], curvature[e], n_nodes, at, hats, said[e], y[t], part, memory[e],
                        theta_0[e], ridge[e], step, lower,
                    )  # fmt: skip
                elif e > 0:
                    _newton_step(
                        theta[e], curvature[e], len(line), 0, line, said[e], y[t], part, memory[e],
                        theta_0[e], ridge[e], step, lower,
                    )  # fmt: skip
            left -= part
            if left <= 0.0:
                break
    return forecasts

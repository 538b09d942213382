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

Time goes where one division waits for another: H = L D L' has one a row, and the lines are solved side by side.

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
IDENTITY, STEADY = 0.5, 0.2
"""First weights of the identity and of the line that never forgets; the others share the rest alike."""


def _bend_ridge() -> Array:
    """H_0 of a bent line: its five diagonals, (len(NODES), 5), with zeros where they end."""
    change = np.zeros((len(KNOTS), len(NODES)))  # of slope, at each knot
    for j, (before, after) in enumerate(zip(np.diff(NODES)[:-1], np.diff(NODES)[1:], strict=True)):
        change[j, j : j + 3] = 1 / before, -1 / before - 1 / after, 1 / after
    whole = np.pad(BEND_RIDGE * change.T @ change + np.diag(LEVEL_RIDGE * (np.abs(NODES) <= 1)), ((0, 0), (2, 2)))
    return np.stack([row[i : i + 5] for i, row in enumerate(whole)])


BEND = _bend_ridge()
N_LINES, N_BENT = len(MEMORIES), len(BENT_MEMORIES)
FIRST_BENT = 1 + N_LINES
N_EXPERTS = FIRST_BENT + N_BENT
MEMORY = np.array([np.inf, *MEMORIES, *BENT_MEMORIES])
BENT = np.array([False] * (1 + len(MEMORIES)) + [True] * len(BENT_MEMORIES))
FIRST_SHARES = np.full(N_EXPERTS, (1 - IDENTITY - STEADY) / (N_EXPERTS - 2))
FIRST_SHARES[0], FIRST_SHARES[N_LINES] = IDENTITY, STEADY


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
    theta, ridge = np.zeros((N_EXPERTS, len(NODES))), np.zeros((N_EXPERTS, len(NODES), 3))
    theta[~BENT, 0] = 1.0
    if beta:
        theta[~BENT, 2] = 1.0
    ridge[~BENT, : n_line(beta), 0] = RIDGE
    theta[BENT], ridge[BENT] = NODES, BEND[:, 2:]
    return State(theta, ridge, FIRST_SHARES.copy())


def n_line(beta: bool) -> int:
    """Features of a line."""
    return 3 if beta else 2


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
    return _learn(*state, scores, y, weight, beta, MEMORY, FIRST_SHARES, NODES, BEND)


@compiled
def _fill_line(s: float, beta: bool, phi: Array) -> None:
    phi[0], phi[1] = s, 1.0
    if beta:
        decay = log1p(exp(-abs(s)))
        phi[0], phi[2] = min(s, 0.0) - decay, max(s, 0.0) + decay


@compiled
def _step_lines(
    theta: Array, band: Array, phi: Array, said: Array, y: float, weight: float, memory: Array, beta: bool
) -> None:
    """One step of every line. H = L D L', of two rows or three."""
    for e in range(1, 1 + N_LINES):
        p = said[e]
        new, error = weight / memory[e], weight * (p - y)
        information = weight * 0.5 * (p * (1.0 - p) + (p - y) * (p - y))
        kept, ridge = 1.0 - new, new * RIDGE
        h00 = kept * band[e, 0, 0] + ridge + information * phi[0] * phi[0]
        h10 = kept * band[e, 0, 1] + information * phi[0] * phi[1]
        h11 = kept * band[e, 1, 0] + ridge + information * phi[1] * phi[1]
        band[e, 0, 0], band[e, 0, 1], band[e, 1, 0] = h00, h10, h11
        x0 = error * phi[0] + ridge * (theta[e, 0] - 1.0)
        x1 = error * phi[1] + ridge * theta[e, 1]
        l10 = h10 / h00
        d1 = h11 - l10 * h10
        x1 -= l10 * x0
        if beta:
            h20 = kept * band[e, 0, 2] + information * phi[0] * phi[2]
            h21 = kept * band[e, 1, 1] + information * phi[1] * phi[2]
            h22 = kept * band[e, 2, 0] + ridge + information * phi[2] * phi[2]
            band[e, 0, 2], band[e, 1, 1], band[e, 2, 0] = h20, h21, h22
            x2 = error * phi[2] + ridge * (theta[e, 2] - 1.0)
            l20 = h20 / h00
            near = h21 - l20 * h10
            l21 = near / d1
            x2 = (x2 - l20 * x0 - l21 * x1) / (h22 - l20 * h20 - l21 * near)
            theta[e, 2] -= x2
            x1 = x1 / d1 - l21 * x2
            x0 = x0 / h00 - l10 * x1 - l20 * x2
        else:
            x1 /= d1
            x0 = x0 / h00 - l10 * x1
        theta[e, 0] -= x0
        theta[e, 1] -= x1


@compiled
def _step_bent(
    theta: Array, band: Array, at: int, hats: Array, said: Array, y: float, weight: float, memory: Array,
    nodes: Array, bend: Array, off: Array, x: Array, inverse: Array, near: Array, far: Array,
) -> None:  # fmt: skip
    """One step of every bent line, of which s lies between nodes `at` and `at + 1`. H = L D L': the last four arrays
    take the step, 1/D and the two diagonals of L, (len(NODES), N_BENT) each; `off`, two zeros at either end, a line's
    distance from `nodes`. The lines go side by side, row by row: each row waits for the one above, and a processor does
    the other line's meanwhile."""
    n = len(x)
    for b in range(N_BENT):
        e = FIRST_BENT + b
        new = weight / memory[e]
        if new > 0.0:
            for i in range(n):
                off[i + 2] = theta[e, i] - nodes[i]
            for i in range(n):
                pull = 0.0
                for k in range(5):
                    pull += bend[i, k] * off[i + k]
                x[i, b] = new * pull
                for k in range(3):
                    band[e, i, k] += new * (bend[i, 2 + k] - band[e, i, k])
        else:
            for i in range(n):
                x[i, b] = 0.0
        error = weight * (said[e] - y)
        information = weight * 0.5 * (said[e] * (1.0 - said[e]) + (said[e] - y) * (said[e] - y))
        x[at, b] += error * hats[0]
        x[at + 1, b] += error * hats[1]
        band[e, at, 0] += information * hats[0] * hats[0]
        band[e, at, 1] += information * hats[0] * hats[1]
        band[e, at + 1, 0] += information * hats[1] * hats[1]
    for i in range(n):
        for b in range(N_BENT):
            e = FIRST_BENT + b
            pivot = band[e, i, 0]
            if i > 1:
                pivot -= far[i - 2, b] * band[e, i - 2, 2]
                x[i, b] -= far[i - 2, b] * x[i - 2, b]
            if i > 0:
                below = band[e, i - 1, 1]
                if i > 1:
                    below -= band[e, i - 2, 2] * near[i - 2, b]
                near[i - 1, b] = below * inverse[i - 1, b]
                pivot -= below * near[i - 1, b]
                x[i, b] -= near[i - 1, b] * x[i - 1, b]
            inverse[i, b] = 1.0 / pivot
            far[i, b] = band[e, i, 2] * inverse[i, b]
    for i in range(n - 1, -1, -1):
        for b in range(N_BENT):
            step = x[i, b] * inverse[i, b]
            if i < n - 1:
                step -= near[i, b] * x[i + 1, b]
            if i < n - 2:
                step -= far[i, b] * x[i + 2, b]
            x[i, b] = step
            theta[FIRST_BENT + b, i] -= step


@compiled
def _learn(
    theta: Array, curvature: Array, shares: Array, scores: Array, y: Array, weight: Array, beta: bool,
    memory: Array, first_shares: Array, nodes: Array, bend: Array,
) -> Array:  # fmt: skip
    n_experts, n_nodes = theta.shape
    line, hats, off = np.zeros(3 if beta else 2), np.zeros(2), np.zeros(n_nodes + 4)
    x, inverse = np.zeros((n_nodes, N_BENT)), np.zeros((n_nodes, N_BENT))
    near, far = np.zeros((n_nodes, N_BENT)), np.zeros((n_nodes, N_BENT))
    said, forecasts = np.zeros(n_experts), np.empty(len(scores))
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
                if e == 0:
                    z = scores[t]
                elif e >= FIRST_BENT:
                    z = theta[e, at] * hats[0] + theta[e, at + 1] * hats[1]
                else:
                    z = theta[e, 0] * line[0] + theta[e, 1] * line[1]
                    if beta:
                        z += theta[e, 2] * line[2]
                z = min(max(z, -MOST), MOST)
                decay = exp(-abs(z))
                high = 1.0 / (1.0 + decay)
                low = decay * high  # exact, where one less the other's probability is not
                said[e] = low if z < 0 else high
                likelihood = low if (z < 0) == (y[t] > 0.5) else high
                mixed += shares[e] * said[e]
                shares[e] *= likelihood if part == 1.0 else likelihood**part
                total += shares[e]
            if left == weight[t]:
                forecasts[t] = mixed
            if part == 0.0:
                break
            kept = (1.0 - part * SHARE) / total
            for e in range(n_experts):
                shares[e] = kept * shares[e] + part * SHARE * first_shares[e]
            _step_lines(theta, curvature, line, said, y[t], part, memory, beta)
            _step_bent(
                theta, curvature, at, hats, said, y[t], part, memory, nodes, bend, off, x, inverse, near, far
            )  # fmt: skip
            left -= part
            if left <= 0.0:
                break
    return forecasts

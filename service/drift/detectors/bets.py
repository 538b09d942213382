"""Bets against a forecast: what each pays for a label, and what is won by betting again and again.

A bet names a recalibrated forecast q beside the stated p, and a label y pays L = q_y / p_y. Where p is true,
E[L | p, past] = sum_k p_k q_k / p_k = 1, whatever q is, so long as it does not look at y. The bets:

- temperature: q = softmax(s log p), for a grid of s
- class bias: the odds of one class k times a factor f, q_k = f p_k / u and q_i = p_i / u with u = 1 + p_k (f - 1); only
  whether y = k matters, so L = f / u or 1 / u
- top label: log-odds a l + b of "the most probable class is right" beside l, for pairs (a, b)
- learners: softmax(s log p + b) with s, b learned from the labels before, each forgetting at its own rate

**A tolerance.** The null may be wider: P, what is true, lies in the band |P_k - p_k| <= eps for every k. Then p in L is
replaced by the point u of the band that is nearest to q, u = argmin KL(q || P). For any P of the band the derivative of
KL(q || u + t (P - u)) at t = 0 is not negative, as the band is convex:

    -sum_k q_k (P_k - u_k) / u_k >= 0     that is     sum_k P_k q_k / u_k <= sum_k q_k = 1

so E[L] <= 1 again, and no other denominator pays more (Grünwald, de Heide, Koolen, "Safe testing", JRSS B 86, 2024,
theorem 1). u is q m, cut off at the edges of the band, with the m at which it sums to one. Of an event, which is
right or not, it is the edge next to q. Where q lies in the band L = 1: there the bet is idle. Without it a
temperature would win without bound from classes that are stated as impossible and come once in a thousand rows.

**Wealth.** A bet is begun anew at every row, and what all its beginnings hold together is

    M <- L (M + w)          the Shiryaev-Roberts recursion, with weights w that sum to one over all bets at most

(Shin, Ramdas, Rinaldo, "E-detectors", NEJSDS 2, 2024, section 2.) Weights may depend on the row, not on its label: an
idle bet adds none, a bet on class k has the part p_k of its family's, a bet within a segment is begun at the segment's
rows. Then R = sum M grows by at most 1 in the mean each row, so P(R >= c within N rows) <= N / c for every N.

Nothing leaves the range of a float64: log-probabilities are cut off at `LOWEST`, which only lowers what is paid but
for a part of 1e-13 a class, and wealth at `HIGHEST`.
"""

from __future__ import annotations

from math import exp, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calibrators.numerics import Array
from calibrators.online.compiled import compiled

LOWEST = -30.0
HIGHEST = 1e200
HUGE = 1e100
"""Infinite logits are taken as these."""

FREQUENT = 1e-3
"""A row bets on the classes that it states to be at least so probable: of a thousand classes, on a few."""

RIDGE = 3.0
LEAST_SCALE, MOST_SCALE, MOST_BIAS = 0.05, 20.0, 10.0


class Bets(NamedTuple):
    """What is bet on. Bets on the whole are ordered as the first four fields are, and repeated within segments.

    Attributes
    ----------
    scales : (n_scales,), s of the temperature bets
    factors : (n_factors,), f of the class biases. Of two classes class 1 alone has these, as bets on the whole
    slopes, shifts : (n_top,), a and b of the top-label bets
    memories : (n_learners,), in labels; learners are not repeated within segments
    weights : (2, n_whole), of bets on the whole, learners last: while no segment is told apart, and when one is
    segment_weights : (n_whole - n_learners,), of those within a segment
    class_weights : (n_factors,), of the class biases of more than two classes, of all classes together
    n_segments : ids of segments are below this; others are of none
    tolerance : eps
    """

    scales: Array
    factors: Array
    slopes: Array
    shifts: Array
    memories: Array
    weights: Array
    segment_weights: Array
    class_weights: Array
    n_segments: int
    tolerance: float


class Wealth(NamedTuple):
    """What rows have changed, but for the learners.

    Bets stand in this order: on the whole, segment by segment, class by class.

    Attributes
    ----------
    held : (n_bets,) float64, M
    run : (n_bets,) float64, the product of L since the beginning that makes it largest, as Page's statistic has it
    since : (n_bets,) int64, how many rows were read before that beginning
    parts : float64, sums of `held`: of the whole, of each segment, of each class if there are more than two
    seen : (2,) int64, the first segment that came, -1 before, and whether another has
    """

    held: Array
    run: Array
    since: NDArray[np.int64]
    parts: Array
    seen: NDArray[np.int64]


class Learners(NamedTuple):
    """theta, curvature: (n_learners, 1 + n_classes) float64, s and b, and their second derivatives."""

    theta: Array
    curvature: Array


def begin(bets: Bets, n_classes: int) -> tuple[Wealth, Learners]:
    """Before the first row."""
    n_repeated = len(bets.segment_weights)
    n_biased = n_classes if n_classes > 2 else 0
    n_bets = bets.weights.shape[1] + bets.n_segments * n_repeated + n_biased * len(bets.factors)
    theta = np.zeros((len(bets.memories), 1 + n_classes))
    theta[:, 0] = 1.0
    wealth = Wealth(
        held=np.zeros(n_bets),
        run=np.zeros(n_bets),
        since=np.zeros(n_bets, np.int64),
        parts=np.zeros(1 + bets.n_segments + n_biased),
        seen=np.array([-1, 0]),
    )
    return wealth, Learners(theta, np.full(theta.shape, RIDGE))


@compiled
def read(
    bets: Bets, wealth: Wealth, learners: Learners, logits: Array, labels: NDArray[np.int64],
    segments: NDArray[np.int64], n_rows: int, enough: float,
) -> tuple[int, int]:  # fmt: skip
    """Bet on rows until R reaches `enough`: how many were read since `n_rows` = 0, and the row of that, or -1.

    Rows without a label, or with one that is no class, or with a NaN among the logits, are not read.
    """
    n_classes, n_whole, n_learners = logits.shape[1], bets.weights.shape[1], len(bets.memories)
    n_repeated, parts, seen = n_whole - n_learners, wealth.parts, wealth.seen
    z, p, q = np.empty(n_classes), np.empty(n_classes), np.empty((1 + n_learners, n_classes))
    ratios = np.empty(n_whole)
    for t in range(len(labels)):
        y, segment = labels[t], segments[t]
        if y < 0 or y >= n_classes or not _log_probabilities(logits, t, z, p):
            continue
        _temperature_ratios(bets.scales, bets.tolerance, z, p, y, q, ratios)
        if n_classes == 2:
            _bias_ratios(bets.factors, bets.tolerance, p[1], y == 1, len(bets.scales), ratios)
        if len(bets.slopes) > 0:
            _top_ratios(bets.slopes, bets.shifts, bets.tolerance, p, y, n_repeated - len(bets.slopes), ratios)
        for e in range(n_learners):
            _forecast(learners.theta, e, z, q)
            ratios[n_repeated + e] = _ratio(p, q, 1 + e, y, bets.tolerance)
            _learn(learners.theta, learners.curvature, e, z, q, y, bets.memories[e])
        seen[1] = 1 if seen[0] >= 0 and seen[0] != segment else seen[1]
        seen[0] = segment if seen[0] < 0 else seen[0]
        apart = seen[1] == 1 and 0 <= segment < bets.n_segments
        held, run, since = wealth.held, wealth.run, wealth.since
        parts[0] = _bet(held, run, since, 0, ratios, bets.weights[1 if apart else 0], n_rows)
        if apart:
            first, weights = n_whole + segment * n_repeated, bets.segment_weights
            parts[1 + segment] = _bet(held, run, since, first, ratios, weights, n_rows)
        total = parts[0]
        if n_classes > 2 and len(bets.factors) > 0:
            _bet_on_classes(bets, wealth, p, y, n_rows)
        if len(parts) > 1 and (seen[1] == 1 or n_classes > 2):
            for i in range(1, len(parts)):
                total += parts[i]
        n_rows += 1
        if total >= enough:
            return n_rows, t
    return n_rows, -1


# ---- what a label pays


@compiled
def _log_probabilities(logits: Array, t: int, z: Array, p: Array) -> bool:
    """A row of logits less the largest into z, their softmax into p; whether that could be done."""
    largest = -np.inf
    for k in range(len(z)):
        z[k] = min(max(logits[t, k], -HUGE), HUGE)
        if logits[t, k] != logits[t, k]:
            return False
        largest = max(largest, z[k])
    total = 0.0
    for k in range(len(z)):
        z[k] = max(z[k] - largest, LOWEST)
        p[k] = exp(z[k]) if z[k] < 0.0 else 1.0
        total += p[k]
    for k in range(len(z)):
        p[k] /= total
    return True


@compiled
def _temperature_ratios(
    scales: Array, eps: float, z: Array, p: Array, y: int, q: Array, ratios: Array
) -> None:  # fmt: skip
    for j in range(len(scales)):
        total = 0.0
        for k in range(len(z)):
            q[0, k] = exp(scales[j] * z[k]) if z[k] < 0.0 else 1.0
            total += q[0, k]
        if eps == 0.0:
            ratios[j] = q[0, y] / (total * p[y])
        else:
            for k in range(len(z)):
                q[0, k] /= total
            ratios[j] = _ratio(p, q, 0, y, eps)


@compiled
def _bias_ratios(factors: Array, eps: float, p: float, came: bool, first: int, ratios: Array) -> None:
    for j in range(len(factors)):
        ratios[first + j] = _event_ratio(p, factors[j] * p / (1.0 + p * (factors[j] - 1.0)), came, eps)


@compiled
def _top_ratios(
    slopes: Array, shifts: Array, eps: float, p: Array, y: int, first: int, ratios: Array
) -> None:  # fmt: skip
    top, rest = 0, 0.0
    for k in range(len(p)):
        top = k if p[k] > p[top] else top
    for k in range(len(p)):
        rest += p[k] if k != top else 0.0
    odds = log(p[top] / rest) if rest > 0.0 else np.inf
    for j in range(len(slopes)):
        said = 1.0 / (1.0 + exp(-(slopes[j] * odds + shifts[j])))
        ratios[first + j] = _event_ratio(1.0 - rest, said, y == top, eps)


@compiled
def _event_ratio(p: float, q: float, came: bool, eps: float) -> float:
    """L of a bet on an event that is stated to have the probability p."""
    u = min(max(q, p - eps), p + eps)
    if u == q:
        return 1.0
    return q / u if came else (1.0 - q) / (1.0 - u)


@compiled
def _ratio(p: Array, q: Array, e: int, y: int, eps: float) -> float:
    """L of a bet on all classes, q[e]."""
    if eps == 0.0:
        return float(q[e, y] / p[y])
    if len(p) == 2:
        return _event_ratio(p[1], q[e, 1], y == 1, eps)
    for k in range(len(p)):
        if abs(q[e, k] - p[k]) > eps:
            u = nearest_multiple(p, q[e], eps) * q[e, y]
            return float(q[e, y] / min(max(u, p[y] - eps), p[y] + eps))
    return 1.0


@compiled
def nearest_multiple(p: Array, q: Array, eps: float) -> float:
    """m, such that q m, cut off at the edges of the band, sums to one (to 1e-12): Newton's method between bounds."""
    m, low, high = 1.0, 0.0, np.inf
    for _ in range(100):
        total = free = 0.0
        for k in range(len(p)):
            u = m * q[k]
            if u < p[k] - eps:
                total += p[k] - eps
            elif u > p[k] + eps:
                total += p[k] + eps
            else:
                total += u
                free += q[k]
        if abs(total - 1.0) <= 1e-12:
            break
        if total < 1.0:
            low = m
        else:
            high = m
        m = m + (1.0 - total) / free if free > 0.0 else low
        if not low < m < high:
            m = 0.5 * (low + high) if high < np.inf else 2.0 * low
    return m


# ---- wealth


@compiled
def _bet(
    held: Array, run: Array, since: NDArray[np.int64], first: int, ratios: Array, weights: Array, n_rows: int
) -> float:  # fmt: skip
    """On as many bets as there are weights; what they hold then. An idle one is not begun."""
    total = 0.0
    for j in range(len(weights)):
        i = first + j
        if ratios[j] != 1.0:
            held[i] = min(ratios[j] * (held[i] + weights[j]), HIGHEST)
            if run[i] < 1.0:
                run[i], since[i] = 1.0, n_rows
            run[i] = min(ratios[j] * run[i], HIGHEST)
        total += held[i]
    return total


@compiled
def _bet_on_classes(bets: Bets, wealth: Wealth, p: Array, y: int, n_rows: int) -> None:
    n_factors = len(bets.factors)
    ratios, weights = np.empty(n_factors), np.empty(n_factors)
    first = len(wealth.held) - len(p) * n_factors
    for k in range(len(p)):
        if p[k] >= FREQUENT:
            _bias_ratios(bets.factors, bets.tolerance, p[k], y == k, 0, ratios)
            for j in range(n_factors):
                weights[j] = bets.class_weights[j] * p[k]
            part = _bet(wealth.held, wealth.run, wealth.since, first + k * n_factors, ratios, weights, n_rows)
            wealth.parts[1 + bets.n_segments + k] = part


# ---- learners


@compiled
def _forecast(theta: Array, e: int, z: Array, q: Array) -> None:
    """softmax(s z + b) of learner e into q[1 + e]."""
    largest = -np.inf
    for k in range(len(z)):
        q[1 + e, k] = theta[e, 0] * z[k] + theta[e, 1 + k]
        largest = max(largest, q[1 + e, k])
    total = 0.0
    for k in range(len(z)):
        q[1 + e, k] = exp(q[1 + e, k] - largest) if q[1 + e, k] < largest else 1.0
        total += q[1 + e, k]
    for k in range(len(z)):
        q[1 + e, k] /= total


@compiled
def _learn(
    theta: Array, curvature: Array, e: int, z: Array, q: Array, y: int, memory: float
) -> None:  # fmt: skip
    """One step of Newton's method with a diagonal of second derivatives, as `calibrators.online.softmax` takes it."""
    new = 1.0 / memory
    mean = square = 0.0
    for k in range(len(z)):
        mean += q[1 + e, k] * z[k]
        square += q[1 + e, k] * z[k] * z[k]
    gradient = mean - z[y]
    information = 0.5 * (max(square - mean * mean, 0.0) + gradient * gradient)
    curvature[e, 0] += new * (RIDGE - curvature[e, 0]) + information
    moved = theta[e, 0] - (gradient + new * RIDGE * (theta[e, 0] - 1.0)) / curvature[e, 0]
    theta[e, 0] = min(max(moved, LEAST_SCALE), MOST_SCALE)
    for k in range(len(z)):
        gradient = q[1 + e, k] - 1.0 if k == y else q[1 + e, k]
        information = 0.5 * (q[1 + e, k] * (1.0 - q[1 + e, k]) + gradient * gradient)
        curvature[e, 1 + k] += new * (RIDGE - curvature[e, 1 + k]) + information
        moved = theta[e, 1 + k] - (gradient + new * RIDGE * theta[e, 1 + k]) / curvature[e, 1 + k]
        theta[e, 1 + k] = min(max(moved, -MOST_BIAS), MOST_BIAS)

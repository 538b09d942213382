"""temperature: one number divides every logit.

Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 4.2: p = softmax(z / T),
with T > 0 minimising the mean log loss of the calibration set.

The problem is convex in beta = 1/T, not in T. With m_i(beta) = E_{k ~ softmax(beta z_i)}[z_ik], derivative and
curvature of the mean log loss L are

    L'(beta)  = sum_i w_i (m_i(beta) - z_{i,y_i}) / sum_i w_i
    L''(beta) = sum_i w_i Var_{k ~ softmax(beta z_i)}[z_ik] / sum_i w_i  >= 0

L' never decreases, so its root is bracketed in log beta and closed in by Newton steps that fall back to bisection, to a
relative precision of 1e-12 in beta: the optimum itself. (The published code runs 50 steps of a first-order LBFGS at
learning rate 0.01, stops near its start and may cross T = 0.)

There is no finite optimum when the loss falls for ever: the argmax is the label in every row (T -> 0), or a constant
beats the logits (T -> infinity). T is then the end of the range [e^-16, e^16] divided by the scale of the logits, and
`converged_` is False.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.numerics import Array, blocks, row_maxima, softmax_in_place, softmax_of_centred

LOG_RANGE = 16.0
MAX_STEPS = 100
RELATIVE_PRECISION = 1e-12
SMALL_STEP = 1e-7
LOWEST, HIGHEST = 1e-37, 1e38
"""A temperature that float32 holds."""


class TemperatureScaling(Calibrator):
    """p = softmax(z / T). Keeps the argmax, so the accuracy.

    Attributes
    ----------
    temperature_ : () float64, T > 0; above 1 the model was overconfident
    converged_ : whether T is an interior optimum (not stored in the artifact)

    Examples
    --------
    Two classes, logit gap 4, right three times in four: the gap that says 0.75 is log 3, so T = 4 / log 3.

    >>> calibrator = TemperatureScaling().fit([[0.0, 4.0]] * 4, [1, 1, 1, 0])
    >>> print(f"{calibrator.temperature_:.6f} {calibrator.predict_proba([[0.0, 4.0]])[0, 1]:.6f}")
    3.640957 0.750000
    """

    learned = ("temperature",)

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        # Centred on the label's own logit, so that L' needs no second gather and large offsets cancel exactly.
        centred = logits - logits[np.arange(len(y)), y][:, None]
        scale = float(max(centred.max(), -centred.min())) or 1.0
        centred /= scale
        log_beta, self.converged_ = _root(centred, weight / weight.sum(), start=float(np.log(scale)))
        self.temperature_ = np.asarray(np.clip(scale * np.exp(-log_beta), LOWEST, HIGHEST))

    def _predict_proba(self, logits: Array) -> Array:
        logits -= row_maxima(logits)
        with np.errstate(over="ignore"):  # minus infinity is a probability of zero
            logits *= logits.dtype.type(1 / self.temperature_)
        return softmax_of_centred(logits)

    def emit(self, graph: Graph, logits: str) -> str:
        # Centred before the division: float32 then errs in proportion to the distance from the top, not to the logit.
        return graph.softmax(graph.node("Div", graph.centre(logits), graph.parameter("temperature", self.temperature_)))

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        del n_classes
        check_tensor("temperature", tensors["temperature"], np.float64, ())
        if not LOWEST <= tensors["temperature"] <= HIGHEST:
            raise ValueError(f"temperature must lie in {LOWEST:g}..{HIGHEST:g}, got {tensors['temperature']}")


def _root(centred: Array, weight: Array, start: float) -> tuple[float, bool]:
    """Root of L' in u = log beta for logits scaled to ±1 and centred on the label; whether it is interior."""
    # L' tends to the mean of each row's mean as beta -> 0, and of each row's maximum as beta -> infinity.
    if weight @ centred.mean(axis=1) >= 0:
        return -LOG_RANGE, False
    if centred.max() <= 0:
        return LOG_RANGE, False
    low, high, u = -LOG_RANGE, LOG_RANGE, float(np.clip(start, -LOG_RANGE / 2, LOG_RANGE / 2))
    for _ in range(MAX_STEPS):
        slope, curvature = _derivatives(centred, weight, u)
        low, high = (u, high) if slope < 0 else (low, u)
        # Newton on L' as a function of u: dL'/du = beta L''.
        step = u - slope / curvature if curvature > 0 else np.inf
        # Newton's next step would be about the square of this one. It may be u itself, the bracket's end.
        arrived = abs(step - u) <= SMALL_STEP
        following = step if arrived or low < step < high else (low + high) / 2
        if arrived or abs(following - u) <= RELATIVE_PRECISION:
            return following, abs(following) < LOG_RANGE - 1e-6  # a root beyond the range is sought at its end
        u = following
    return u, True


def _derivatives(centred: Array, weight: Array, log_beta: float) -> tuple[float, float]:
    """(L', dL'/du) at u = log beta."""
    beta = np.exp(log_beta)
    slope = curvature = 0.0
    for block in blocks(*centred.shape):
        rows = centred[block]
        terms = softmax_in_place(beta * rows)
        terms *= rows
        mean = terms.sum(axis=1)
        variance = np.einsum("ik,ik->i", terms, rows) - mean**2
        slope += float(weight[block] @ mean)
        curvature += float(weight[block] @ np.maximum(variance, 0.0))
    return slope, float(beta) * curvature

"""ensemble_temperature: a mixture of the scaled softmax, the model's own softmax, and the uniform distribution.

Zhang, Kailkhura, Han, "Mix-n-Match: Ensemble and Compositional Methods for Uncertainty Calibration in Deep Learning",
ICML 2020, section 4 (ETS), with weights w >= 0 that sum to one:

    p = w0 softmax(z / T) + w1 softmax(z) + w2 / K

T comes first, from `temperature` (convex in 1/T). Given T the loss is convex in w, on a triangle. With q_i the three
predictions (n_classes each) for row i, and f_i those of its label,

    log    L(w) = - sum_i v_i log(w . f_i)                v: sample weights, summing to one
    brier  L(w) = sum_i v_i |w q_i - onehot(y_i)|^2       quadratic

Newton's method: each step minimises the quadratic model on the triangle exactly, by comparing the minima of its seven
faces (interior, edges, corners), then halves the step until the log loss falls. The Brier score needs one step.

The published code minimises the Brier score in both stages, T by a bounded search within 0.05..5; here T minimises the
log loss whatever `loss` says, because only that problem has one minimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import numpy as np

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.kinds.temperature import HIGHEST, LOWEST, TemperatureScaling
from calibrators.numerics import Array, blocks, centre, softmax, softmax_of_centred

LOSSES = ("log", "brier")
FACES = [list(face) for size in (1, 2, 3) for face in combinations(range(3), size)]
"""The corners, edges and interior of the triangle, as the components that are not zero there."""

MAX_STEPS = 100
MAX_HALVINGS = 50
PROMISED_DECREASE = 1e-16
"""Newton's method ends where its model promises less than this of the mean log loss."""

RIDGE = 1e-13
"""Of the curvature's trace: weights are defined even where two of the three predictions agree, as for T = 1."""

SUM_TOLERANCE = 1e-9


class EnsembleTemperatureScaling(Calibrator):
    """p = w0 softmax(z / T) + w1 softmax(z) + w2 / K. Keeps the argmax; where w2 = 1 all classes tie.

    Parameters
    ----------
    loss : "log" or "brier", what the weights minimise

    Attributes
    ----------
    temperature_ : () float64, T > 0
    weights_ : (3,) float64, w, not negative, summing to one

    Examples
    --------
    A far logit gap of 9 is right 9 times in 10, a gap of 1 as softmax says, 73 times in 100: no temperature says both.
    The uniform part brings the far rows near 0.9 and leaves the near ones near 0.73.

    >>> logits = [[0, 9]] * 100 + [[0, 1]] * 100
    >>> calibrator = EnsembleTemperatureScaling().fit(logits, [1] * 90 + [0] * 10 + [1] * 73 + [0] * 27)
    >>> calibrator.weights_.round(3).tolist(), calibrator.predict_proba([[0, 9], [0, 1]])[:, 1].round(3).tolist()
    ([0.0, 0.815, 0.185], [0.908, 0.688])
    """

    learned = ("temperature", "weights")

    def __init__(self, loss: Literal["log", "brier"] = "log") -> None:
        self.loss = loss

    def check_params(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        scaling = TemperatureScaling().fit(logits, y, sample_weight=weight)
        share = weight / weight.sum()
        self.temperature_ = scaling.temperature_
        minimise = _least_brier_score if self.loss == "brier" else _least_log_loss
        self.weights_ = minimise(logits, y, share, scaling)

    def _predict_proba(self, logits: Array) -> Array:
        w = self.weights_.astype(logits.dtype)
        below = centre(logits)
        with np.errstate(over="ignore"):  # minus infinity is a probability of zero
            scaled = softmax_of_centred(below * logits.dtype.type(1 / self.temperature_))
        mixed: Array = w[0] * scaled + w[1] * softmax_of_centred(below) + w[2] / logits.shape[1]
        return mixed

    def emit(self, graph: Graph, logits: str) -> str:
        weights = graph.parameter("weights", self.weights_)
        w = [graph.node("Gather", weights, graph.constant(np.array([i], dtype=np.int64)), axis=0) for i in range(3)]
        centred = graph.centre(logits)
        scaled = graph.softmax(graph.node("Div", centred, graph.parameter("temperature", self.temperature_)))
        mixed = graph.node("Add", graph.node("Mul", scaled, w[0]), graph.node("Mul", graph.softmax(centred), w[1]))
        return graph.node("Add", mixed, graph.node("Div", w[2], graph.constant(float(self.n_classes_))))

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        del n_classes
        temperature, weights = tensors["temperature"], tensors["weights"]
        check_tensor("temperature", temperature, np.float64, ())
        check_tensor("weights", weights, np.float64, (3,))
        if not LOWEST <= temperature <= HIGHEST:
            raise ValueError(f"temperature must lie in {LOWEST:g}..{HIGHEST:g}, got {temperature}")
        if weights.min() < 0 or abs(weights.sum() - 1) > SUM_TOLERANCE:
            raise ValueError(f"weights must not be negative and sum to one, got {weights.tolist()}")


def _least_log_loss(logits: Array, y: Array, share: Array, scaling: TemperatureScaling) -> Array:
    """Weights of least log loss, by Newton steps from the triangle's centre."""
    likelihood = _of_label(logits, y, scaling)
    w = np.full(3, 1 / 3)
    for _ in range(MAX_STEPS):
        ratio = likelihood / (likelihood @ w)[:, None]
        gradient, curvature = -share @ ratio, (ratio * share[:, None]).T @ ratio
        # The model around w is H (w' - w) . (w' - w) / 2 + g . (w' - w), and H w = -g: its linear part is 2 g.
        step = _least_on_triangle(curvature, 2 * gradient) - w
        length = _length(likelihood, share, w, step)
        if gradient @ step > -PROMISED_DECREASE or length == 0:
            break
        w = w + length * step
    return w


def _length(likelihood: Array, share: Array, w: Array, step: Array) -> float:
    """The longest of 1, 1/2, 1/4 .. at which the log loss falls; 0 where rounding hides every fall."""
    before = likelihood @ w
    for length in 0.5 ** np.arange(MAX_HALVINGS):
        with np.errstate(divide="ignore"):  # a label of probability zero is an infinite loss
            if share @ np.log(likelihood @ (w + length * step) / before) > 0:
                return float(length)
    return 0.0


def _least_brier_score(logits: Array, y: Array, share: Array, scaling: TemperatureScaling) -> Array:
    """Weights of least Brier score: |w q|^2 - 2 w . f, summed over the rows, is quadratic in w."""
    product = np.empty((3, 3))
    product[2] = product[:, 2] = 1 / logits.shape[1]  # each prediction's row sums to one
    product[:2, :2] = 0.0
    for block in blocks(*logits.shape):
        q = np.stack([scaling.predict_proba(logits[block]), softmax(logits[block])])
        product[:2, :2] += np.einsum("ank,bnk,n->ab", q, q, share[block])
    return _least_on_triangle(product, -share @ _of_label(logits, y, scaling))


def _of_label(logits: Array, y: Array, scaling: TemperatureScaling) -> Array:
    """(n_samples, 3): what each of the three predictions gives the label."""
    likelihood = np.full((len(y), 3), 1 / logits.shape[1])
    for block in blocks(*logits.shape):
        own = np.arange(len(y[block])), y[block]
        likelihood[block, 0] = scaling.predict_proba(logits[block])[own]
        likelihood[block, 1] = softmax(logits[block])[own]
    return likelihood


def _least_on_triangle(curvature: Array, linear: Array) -> Array:
    """The w >= 0 of sum one with least w . H w / 2 + c . w: the best of the faces' minima that lie inside."""
    curvature = curvature + RIDGE * np.trace(curvature) * np.eye(3)
    best, least = np.zeros(3), np.inf
    for face in FACES:
        w = _least_on_face(curvature, linear, face)
        value = w @ curvature @ w / 2 + linear @ w
        if w.min() >= 0 and value < least:
            best, least = w, value
    return best


def _least_on_face(curvature: Array, linear: Array, face: list[int]) -> Array:
    """Minimum subject to sum one and zero outside `face`, by elimination of the multiplier."""
    inverse = np.linalg.inv(curvature[np.ix_(face, face)])
    free, shift = -inverse @ linear[face], inverse.sum(axis=1)
    w = np.zeros(3)
    w[face] = free + shift * (1 - free.sum()) / shift.sum()
    return w

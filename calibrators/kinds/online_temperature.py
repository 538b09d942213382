"""online_temperature: a temperature and a bias a class that learn from every label as it comes.

The multi-class companion of `online_platt`: softmax(s z + b) at several rates of forgetting, mixed with each other and
with the model's own probabilities, so that it does no harm. `calibrators.online.softmax` has the formulas. No published
method does this online: Gupta, Ramdas, ICML 2023, is binary; a temperature fitted again on a window cannot follow a
drift of the class priors, which the biases can.

`fit` learns from the rows in their order, `partial_fit` from further ones. What is served are the coefficients of the
mixture, so a step of learning is another feed of the same graph. A label costs O(n_classes).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calibrators.base import check_tensor
from calibrators.graph import Graph
from calibrators.numerics import Array, centre, normalise
from calibrators.online.learner import OnlineCalibrator
from calibrators.online.softmax import LOWEST, N_EXPERTS, State, learn, start


class OnlineTemperatureScaling(OnlineCalibrator):
    """A mixture of softmax(s z + b), learned online. May change the argmax.

    Attributes
    ----------
    theta_, curvature_, shares_ : see `calibrators.online.softmax.State`

    Examples
    --------
    Class 1 becomes rare without the model knowing.

    >>> logits = [[0.0, 1.0, 0.0]] * 900
    >>> calibrator = OnlineTemperatureScaling().fit(logits, [0, 1, 1, 2] * 225)
    >>> calibrator.predict_proba(logits[:1])[:, 1].round(2).tolist()
    [0.5]
    >>> calibrator.partial_fit(logits, [0, 2] * 450).predict_proba(logits[:1])[:, 1].round(2).tolist()
    [0.05]
    """

    learned = ("theta", "curvature", "shares")
    float32_atol = 1e-5

    def _begin(self, n_classes: int) -> None:
        self.theta_, self.curvature_, self.shares_ = start(n_classes)

    def _learn(self, logits: Array, y: Array, weight: Array) -> Array:
        return learn(State(self.theta_, self.curvature_, self.shares_), logits, y, weight)

    def _predict_proba(self, logits: Array) -> Array:
        z = np.maximum(centre(logits), logits.dtype.type(LOWEST))
        theta, shares = self.theta_.astype(logits.dtype), self.shares_.astype(logits.dtype)
        mixed = np.zeros_like(z)
        for expert, share in zip(theta, shares, strict=True):
            scaled = expert[0] * z + expert[1:]
            scaled -= scaled.max(axis=1, keepdims=True)
            mixed += share * normalise(np.exp(scaled, out=scaled))
        return normalise(mixed)

    def emit(self, graph: Graph, logits: str) -> str:
        lowest = graph.constant(LOWEST)
        z = graph.reshape(graph.node("Max", graph.centre(logits), lowest), (-1, 1, self.n_classes_))
        scale = graph.parameter("scale", self.theta_[None, :, :1])
        bias = graph.parameter("bias", self.theta_[None, :, 1:])
        shares = graph.parameter("shares", self.shares_[None, :, None])
        each = graph.node("Softmax", graph.node("Add", graph.node("Mul", z, scale), bias), axis=2)
        return graph.normalise(graph.reduce("ReduceSum", graph.node("Mul", each, shares), axis=1, keepdims=False))

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        for name, shape in (("theta", (1 + n_classes,)), ("curvature", (1 + n_classes,)), ("shares", ())):
            check_tensor(name, tensors[name], np.float64, (N_EXPERTS, *shape))
        if not (tensors["shares"].min() >= 0 and np.isclose(tensors["shares"].sum(), 1)):
            raise ValueError("shares must be zero or above and sum to one")
